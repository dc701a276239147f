//! Removes flows that ended. The daemon looks for them and runs this on a packet that names them, a
//! [`Sweep`]; here it is decided.

use core::mem::offset_of;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::conntrack::{Verdict, end};
use warren_abi::flow::tick;
use warren_abi::maps::{OutKey, Sweep};

use crate::conntrack::Maps;
use crate::parse::at;

/// What [`warren_end`] says of a flow that was removed: one more that expired, or was stale.
const EXPIRED: u32 = 1;
const STALE: u32 = 1 << 16;

/// Decides about each of the flows named.
#[classifier]
pub fn sweep(ctx: TcContext) -> i32 {
    let Some(order) = at::<Sweep>(&ctx, 0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: `at` checked the bounds; nothing here moves the packet.
    unsafe {
        let count = (*order).count;
        // Not from the scratch, whose two ways there would each be verified to the end.
        let now = tick(bpf_ktime_get_coarse_ns());
        let mut removed = 0;
        let mut index = 0;
        while index < Sweep::KEYS as u32 {
            if index >= count {
                break;
            }
            removed += warren_end(ctx.skb.skb, index, now);
            index += 1;
        }
        (*order).expired = removed % STALE;
        (*order).stale = removed / STALE;
    }
    TC_ACT_OK
}

/// Decides about one of the flows that the packet names.
///
/// A global function: the verifier looks at it once, not for each flow, after each way through the
/// one before.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_end(skb: *mut __sk_buff, index: u32, now: u32) -> u32 {
    let ctx = TcContext::new(skb);
    let place = index as usize % Sweep::KEYS * size_of::<OutKey>();
    let (Some(order), Some(key)) =
        (at::<Sweep>(&ctx, 0), at::<OutKey>(&ctx, offset_of!(Sweep, keys) + place))
    else {
        return 0;
    };
    let Ok(maps) = Maps::open() else {
        return 0;
    };
    // SAFETY: `at` checked the bounds; nothing here moves the packet.
    let (timers, key) = unsafe { ((*order).timers, key.read_unaligned()) };
    match end(&maps, key, &timers, now) {
        Verdict::Stays => 0,
        // It went with its flows.
        _ if key.is_mapping() => 0,
        Verdict::Expired => EXPIRED,
        Verdict::Stale => STALE,
    }
}
