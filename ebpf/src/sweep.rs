//! Removes flows that ended. The daemon looks for them and runs this on a packet that names them, a
//! [`Sweep`]; here it is decided.

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::flow::Timers;
use warren_abi::maps::{Attachment, InKey, OutKey, Sweep};

use crate::conntrack::{compare_exchange, now};
use crate::maps::{CT_IN, CT_OUT, slot_in};
use crate::parse::at;

/// Decides about each of the flows named.
#[classifier]
pub fn sweep(ctx: TcContext) -> i32 {
    let Some(order) = at::<Sweep>(&ctx, 0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: `at` checked the bounds; nothing here moves the packet.
    unsafe {
        let (timers, count) = ((*order).timers, (*order).count);
        let now = now();
        let (mut expired, mut stale) = (0, 0);
        let mut index = 0;
        while index < Sweep::KEYS {
            if index as u32 >= count {
                break;
            }
            let key = (&raw const (*order).keys[index]).read_unaligned();
            match end(&key, &timers, now) {
                Verdict::Live => {}
                // It went with its flows.
                _ if key.is_mapping() => {}
                Verdict::Expired => expired += 1,
                Verdict::Stale => stale += 1,
            }
            index += 1;
        }
        (*order).expired = expired;
        (*order).stale = stale;
    }
    TC_ACT_OK
}

enum Verdict {
    Live,
    Expired,
    Stale,
}

/// Removes a flow if it ended: marks it first, so that a packet that comes meanwhile finds it
/// ended, and one that came before makes the exchange fail.
#[inline(always)]
fn end(key: &OutKey, timers: &Timers, now: u32) -> Verdict {
    let Some(flow) = CT_OUT.get_ptr_mut(key) else {
        return Verdict::Live;
    };
    // SAFETY: the verifier checked the pointer for null; map values stay readable. Only this
    // program removes flows, and the daemon runs it once at a time.
    let (state, vni, port) =
        unsafe { ((&raw const (*flow).state).read_volatile(), (*flow).vni, (*flow).port) };
    let attachment = slot_in(vni, key.ifindex).map(|slot| slot.attachment);
    let is_stale = attachment != Some(Attachment::new(vni, key.generation));
    if !is_stale && !state.is_expired(key.protocol as u8, timers, now) {
        return Verdict::Live;
    }
    // SAFETY: as above.
    if !unsafe { compare_exchange(&raw mut (*flow).state, state, state.ended()) } {
        return Verdict::Live;
    }
    let OutKey { peer, peer_port, protocol, .. } = *key;
    let _ = CT_OUT.remove(key);
    let _ = CT_IN.remove(InKey { vni, peer, peer_port, port, protocol });
    if is_stale { Verdict::Stale } else { Verdict::Expired }
}
