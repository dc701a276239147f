//! How much a slot may send, receive and hold: [`warren_abi::limit`] decides.
//!
//! Global functions: the verifier looks at each once, not with each of the many ways to it.

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use warren_abi::drop::Drop;
use warren_abi::flow::Direction;
use warren_abi::limit::{Bucket, FLOWS_AHEAD_NS, PACKETS_AHEAD_NS, Share, Tally, code};
use warren_abi::maps::{Slot, Traffic};

use crate::atomic::compare_exchange;
use crate::maps::{CT_OUT, HELD, LIMITS, SCRATCH, uncached_slot};

/// How often a word is looked at again when another CPU changed it meanwhile.
const ATTEMPTS: u32 = 8;

/// Whether the slot's rates let a packet pass.
#[inline(always)]
pub fn admit(slot: &Slot, direction: Direction, traffic: Traffic) -> Result<(), Drop> {
    if !slot.guard.is_limited() {
        return Ok(());
    }
    let is_received = u32::from(direction == Direction::In);
    result(warren_admit(slot.number, is_received, traffic.packets, traffic.bytes))
}

/// What a function returned: 0, or a reason's [`code`].
#[inline(always)]
pub fn result(found: u32) -> Result<(), Drop> {
    const REASONS: [Drop; 5] =
        [Drop::PacketLimit, Drop::BitLimit, Drop::NewFlowLimit, Drop::FlowLimit, Drop::PortLimit];
    if found == 0 {
        return Ok(());
    }
    let mut index = 0;
    while index < REASONS.len() {
        if found == code(REASONS[index]) {
            return Err(REASONS[index]);
        }
        index += 1;
    }
    Err(Drop::Internal)
}

/// [`admit`], in one direction: 0, or a reason's code.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_admit(number: u32, is_received: u32, packets: u64, bytes: u64) -> u32 {
    let Some(limits) = LIMITS.get_ptr_mut(number) else {
        return code(Drop::Internal);
    };
    // SAFETY: the verifier checked the pointer for null; the helper has no preconditions.
    unsafe {
        let now_ns = bpf_ktime_get_coarse_ns();
        let rates = match is_received {
            0 => &raw mut (*limits).sent,
            _ => &raw mut (*limits).received,
        };
        if !draw(&raw mut (*rates).packets, packets, now_ns, PACKETS_AHEAD_NS) {
            return code(Drop::PacketLimit);
        }
        if !draw(&raw mut (*rates).bytes, bytes, now_ns, PACKETS_AHEAD_NS) {
            return code(Drop::BitLimit);
        }
    }
    0
}

/// Counts the flow or mapping whose key this CPU's scratch holds among what a slot holds: 0, or a
/// reason's code. The daemon's, which has no slot, is not counted.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_grow(number: u32) -> u32 {
    if number == 0 {
        return 0;
    }
    let (Some(limits), Some(held)) = (LIMITS.get_ptr_mut(number), HELD.get_ptr_mut(number)) else {
        return code(Drop::Internal);
    };
    let Some((generation, share)) = subject() else {
        return code(Drop::Internal);
    };
    // SAFETY: the verifier checked the pointers for null; the helper has no preconditions.
    unsafe {
        let begun = &raw mut (*limits).begun;
        if !share.has(Share::FLOW) {
            // A mapping is not to begin if its flow may not, which comes next.
            let most = (&raw const (*limits).flows).read_volatile();
            if (&raw const (*held).flows).read_volatile().more(generation, most).is_none() {
                return code(Drop::FlowLimit);
            }
            if begun.read_volatile().admit(1, bpf_ktime_get_coarse_ns(), FLOWS_AHEAD_NS).is_none() {
                return code(Drop::NewFlowLimit);
            }
        }
        if share.has(Share::FLOW) {
            if !draw(begun, 1, bpf_ktime_get_coarse_ns(), FLOWS_AHEAD_NS) {
                return code(Drop::NewFlowLimit);
            }
            let most = (&raw const (*limits).flows).read_volatile();
            if !change(&raw mut (*held).flows, |tally| tally.more(generation, most)) {
                return code(Drop::FlowLimit);
            }
        }
        let most = (&raw const (*limits).ports).read_volatile();
        if share.has(Share::PORT)
            && !change(&raw mut (*held).ports, |tally| tally.more(generation, most))
        {
            if share.has(Share::FLOW) {
                change(&raw mut (*held).flows, |tally| tally.less(generation));
            }
            return code(Drop::PortLimit);
        }
    }
    0
}

/// Counts it no more.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_shrink(number: u32) -> u32 {
    if number != 0 {
        shrink(number);
    }
    0
}

/// Counts it no more. Not a call: stacks of calls inside calls add up.
#[inline(always)]
fn shrink(number: u32) {
    let (Some(held), Some((generation, share))) = (HELD.get_ptr_mut(number), subject()) else {
        return;
    };
    // SAFETY: the verifier checked the pointer for null.
    unsafe {
        if share.has(Share::FLOW) {
            change(&raw mut (*held).flows, |tally| tally.less(generation));
        }
        if share.has(Share::PORT) {
            change(&raw mut (*held).ports, |tally| tally.less(generation));
        }
    }
}

/// Counts it no more that ended, if it did until then, whatever slot has it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_shrink_ended() -> u32 {
    let Some(scratch) = SCRATCH.get_ptr(0) else {
        return 0;
    };
    // SAFETY: it is a map value, and nobody else's at this time.
    let key = unsafe { &(*scratch).flow_key };
    let (Some(flow), Some(slot)) = (CT_OUT.get_ptr(key), uncached_slot(key.ifindex)) else {
        return 0;
    };
    // SAFETY: it is a map value.
    if unsafe { (&raw const (*flow).state).read_volatile() }.is_counted() {
        shrink(slot.number);
    }
    0
}

/// Generation and share of the flow or mapping whose key this CPU's scratch holds.
#[inline(always)]
fn subject() -> Option<(u32, Share)> {
    let scratch = SCRATCH.get_ptr(0)?;
    // SAFETY: it is a map value, and nobody else's at this time.
    let key = unsafe { &(*scratch).flow_key };
    Some((key.generation, Share::of(key)))
}

/// Takes some units out of a bucket, if they may come now.
///
/// # Safety
/// `bucket` must point into a map value.
#[inline(always)]
unsafe fn draw(bucket: *mut Bucket, units: u64, now_ns: u64, ahead_ns: u64) -> bool {
    // SAFETY: as the caller promises.
    unsafe {
        let cost = (&raw const (*bucket).cost).read_volatile();
        if cost == 0 {
            return true;
        }
        let mut attempt = 0;
        while attempt < ATTEMPTS {
            attempt += 1;
            let due_ns = (&raw const (*bucket).due_ns).read_volatile();
            let Some(new) = (Bucket { due_ns, cost }).admit(units, now_ns, ahead_ns) else {
                return false;
            };
            if compare_exchange(&raw mut (*bucket).due_ns, due_ns, new) {
                return true;
            }
        }
    }
    false
}

/// Changes a tally: false if it is not to be changed.
///
/// # Safety
/// `tally` must point into a map value.
#[inline(always)]
unsafe fn change(tally: *mut Tally, to: impl Fn(Tally) -> Option<Tally>) -> bool {
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        attempt += 1;
        // SAFETY: as the caller promises.
        unsafe {
            let found = tally.read_volatile();
            let Some(new) = to(found) else {
                return false;
            };
            if compare_exchange(tally.cast(), found.0, new.0) {
                return true;
            }
        }
    }
    false
}
