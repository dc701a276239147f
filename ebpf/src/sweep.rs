//! Removes flows that ended. The daemon looks for them and runs this on a packet that names them, a
//! [`Sweep`]; here it is decided.

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::conntrack::{Verdict, end};
use warren_abi::flow::tick;
use warren_abi::maps::Sweep;

use crate::conntrack::Maps;
use crate::parse::at;

/// Decides about each of the flows named.
#[classifier]
pub fn sweep(ctx: TcContext) -> i32 {
    let Some(order) = at::<Sweep>(&ctx, 0) else {
        return TC_ACT_SHOT;
    };
    let Ok(maps) = Maps::open() else {
        return TC_ACT_SHOT;
    };
    // SAFETY: `at` checked the bounds; nothing here moves the packet.
    unsafe {
        let (timers, count) = ((*order).timers, (*order).count);
        // Not from the scratch, whose two ways there would each be verified to the end.
        let now = tick(bpf_ktime_get_coarse_ns());
        let (mut expired, mut stale) = (0, 0);
        let mut index = 0;
        while index < Sweep::KEYS {
            if index as u32 >= count {
                break;
            }
            let key = (&raw const (*order).keys[index]).read_unaligned();
            match end(&maps, key, &timers, now) {
                Verdict::Stays => {}
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
