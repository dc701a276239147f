//! Tells the daemon of flows that begin and end, and counts them.
//!
//! Global functions: the verifier looks at them once. They find the flow in this CPU's scratch,
//! where it was put to be inserted or removed. They are called where no stack is left, and use
//! none. Packets of flows that live do not come here.

use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_map_lookup_elem};
use aya_ebpf::maps::PerCpuArray;
use warren_abi::flowlog::{LOST, What, level};
use warren_abi::maps::{Flow, FlowEvent, Traffic};

use crate::conntrack::Scratch;
use crate::maps::{CT_IN, CT_OUT, FLOW_COUNTS, FLOW_EVENTS, SCRATCH, flow_log};

/// So many bytes that were not read have the daemon woken; fewer wait for it.
const ENOUGH: u64 = 64 << 10;

/// The flow or mapping in the scratch was inserted.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_flow_begun() -> u32 {
    let Some(scratch) = first(&SCRATCH) else {
        return 0;
    };
    // SAFETY: it is a map value, and nobody else's at this time.
    let Scratch { flow_key, flow, claim, event, .. } = unsafe { &mut *scratch };
    let is_mapping = flow_key.is_mapping();
    if !is_mapping {
        count(What::Begun as usize);
    }
    // A mapping's beginning says who has a port, whether starts are told or not.
    let wanted = if is_mapping { level::ENDS } else { level::STARTS };
    if flow_log() & wanted != 0 {
        event.what = What::Begun as u8;
        event.received = claim.received;
        event.key = *flow_key;
        fill(event, flow);
        tell(event);
    }
    0
}

/// The flow or mapping of the key in the scratch is about to be removed: its number, of [`What`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_flow_ended(why: u32) -> u32 {
    let Some(scratch) = first(&SCRATCH) else {
        return 0;
    };
    // SAFETY: it is a map value, and nobody else's at this time.
    let Scratch { flow_key, claim_key, event, .. } = unsafe { &mut *scratch };
    if !flow_key.is_mapping() {
        count(why as usize);
    }
    if flow_log() & level::ENDS == 0 {
        return 0;
    }
    let Some(flow) = CT_OUT.get_ptr(&*flow_key) else {
        return 0;
    };
    // SAFETY: it is a map value; nobody else removes it.
    let flow = unsafe { &*flow };
    *claim_key = flow_key.claim(flow.vni, flow.port);
    event.what = why as u8;
    event.key = *flow_key;
    fill(event, flow);
    event.received = match CT_IN.get_ptr(&*claim_key) {
        // SAFETY: as above.
        Some(claim) => unsafe { (*claim).received },
        None => Traffic::NONE,
    };
    tell(event);
    0
}

#[inline(always)]
fn fill(event: &mut FlowEvent, flow: &Flow) {
    // SAFETY: the helper has no preconditions.
    event.at_ns = unsafe { bpf_ktime_get_ns() };
    event.sent = flow.sent;
    event.vni = flow.vni;
    event.began = flow.began;
    event.last = flow.state.last_tick();
    event.port = flow.port;
    event.reserved = 0;
}

#[inline(always)]
fn tell(event: &FlowEvent) {
    let unread = FLOW_EVENTS.query(BPF_RB_AVAIL_DATA as u64);
    // Each wake-up would cost more than all the rest: the daemon looks by itself, ten times a
    // second, and is woken if that is not often enough.
    let flags = if unread > ENOUGH { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP };
    if FLOW_EVENTS.output::<FlowEvent>(event, flags as u64).is_err() {
        count(LOST);
    }
}

#[inline(always)]
fn count(index: usize) {
    if let Some(counts) = first(&FLOW_COUNTS) {
        // SAFETY: per-CPU, and tc programs do not interrupt one another on a CPU.
        unsafe { (*counts)[index % (*counts).len()] += 1 };
    }
}

/// The index of an array's first entry, which does not lie on the stack.
#[unsafe(no_mangle)]
static FIRST: u32 = 0;

#[inline(always)]
fn first<T>(array: &'static PerCpuArray<T>) -> Option<*mut T> {
    // SAFETY: the helper takes a map and a key of it.
    let entry: *mut T = unsafe {
        bpf_map_lookup_elem((&raw const *array).cast_mut().cast(), (&raw const FIRST).cast()).cast()
    };
    if entry.is_null() { None } else { Some(entry) }
}
