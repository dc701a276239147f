//! Collects flows that ended. The daemon runs it, on a packet that is a [`Sweep`].

use core::ffi::{c_long, c_void};
use core::ptr::addr_of;

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::bpf_for_each_map_elem;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::flow::Timers;
use warren_abi::maps::{Attachment, Flow, InKey, OutKey, Sweep};

use crate::conntrack::{compare_exchange, now};
use crate::maps::{CT_IN, CT_OUT, slot};
use crate::parse::at;

struct Sweeping {
    timers: Timers,
    now: u32,
    live: u32,
    expired: u32,
    stale: u32,
}

/// Walks over all flows.
#[classifier]
pub fn sweep(ctx: TcContext) -> i32 {
    let Some(order) = at::<Sweep>(&ctx, 0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: `at` checked the bounds.
    let timers = unsafe { (*order).timers };
    let mut sweeping = Sweeping { timers, now: now(), live: 0, expired: 0, stale: 0 };
    // SAFETY: the callback has the signature that the kernel calls for a hash map's elements.
    unsafe {
        bpf_for_each_map_elem(
            addr_of!(CT_OUT).cast_mut().cast(),
            visit as *mut c_void,
            (&raw mut sweeping).cast(),
            0,
        );
    }
    let Some(report) = at::<Sweep>(&ctx, 0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: `at` checked the bounds.
    unsafe {
        (*report).live = sweeping.live;
        (*report).expired = sweeping.expired;
        (*report).stale = sweeping.stale;
    }
    TC_ACT_OK
}

/// Decides about one flow, and removes it where it stands: a packet that comes between finds the
/// flow ended, and one that came before makes the exchange fail.
#[inline(never)]
extern "C" fn visit(
    _: *mut c_void,
    key: *const OutKey,
    flow: *mut Flow,
    sweeping: *mut Sweeping,
) -> c_long {
    // SAFETY: the kernel passes an element's key and value, and the context given above.
    unsafe {
        let key = *key;
        let sweeping = &mut *sweeping;
        let state = (&raw const (*flow).state).read_volatile();
        let Flow { vni, port, .. } = *flow;
        let attachment = slot(key.ifindex).map(|slot| slot.attachment);
        let stale = attachment != Some(Attachment::new(vni, key.generation));
        let expired = state.is_expired(key.protocol as u8, &sweeping.timers, sweeping.now);
        if !(stale || expired) || !compare_exchange(&raw mut (*flow).state, state, state.ended()) {
            sweeping.live += 1;
            return 0;
        }
        let OutKey { peer, peer_port, protocol, .. } = key;
        let _ = CT_OUT.remove(key);
        let _ = CT_IN.remove(InKey { vni, peer, peer_port, port, protocol });
        if stale {
            sweeping.stale += 1;
        } else {
            sweeping.expired += 1;
        }
        0
    }
}
