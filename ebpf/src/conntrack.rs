//! The tables of flows: [`warren_abi::conntrack`] decides, over BPF maps.

use core::arch::asm;
use core::ffi::c_void;
use core::hint::black_box;
use core::ptr::null_mut;

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::generated::{
    bpf_get_prandom_u32, bpf_jiffies64, bpf_ktime_get_coarse_ns, bpf_loop,
};
use warren_abi::conntrack::{
    self, Ports, Purpose, Receiver, Refused, Search, Segment, Tables, Wanted, stay, step,
};
use warren_abi::drop::Drop;
use warren_abi::family::Family;
use warren_abi::flow::{Direction, FlowState, Timers, tick};
use warren_abi::flowlog::What;
use warren_abi::icmp::Subject;
use warren_abi::limit::code;
use warren_abi::maps::{Flow, FlowEvent, Guard, InFlow, InKey, OutKey, Slot, Traffic};
use warren_abi::nat::MAX_PROBES;
use warren_abi::wire::{Be16, Ip};

use crate::atomic::compare_exchange;
use crate::cache;
use crate::flowlog::{warren_flow_begun, warren_flow_ended};
use crate::limit::{warren_grow, warren_shrink, warren_shrink_ended};
use crate::maps::{CT_IN, CT_OUT, SCRATCH, daemon_in, services_ifindex, slot_in, timers};
use crate::parse::Packet;
use crate::{limit, migration, policy, stack};

const EEXIST: i32 = -17;

/// The port that stands for the guest's in this flow, which the packet begins or keeps alive.
#[inline(always)]
pub fn outward<F: Family>(slot: &Slot, ports: Ports, packet: &Packet<F>) -> Result<Be16, Drop> {
    let maps = Maps::open()?;
    // SAFETY: it is a map value, and nobody else's at this time.
    let port = unsafe { &mut (*maps.scratch).port };
    let segment = segment(packet, F::ip(packet.destination));
    conntrack::outward_into(&maps, slot, ports, &segment, port)?;
    Ok(*port)
}

/// Whom a packet from the VPC is for. A reason comes with the slot that it concerns, or 0.
#[inline(always)]
pub fn inward<F: Family>(vni: u32, packet: &Packet<F>) -> Result<Receiver, (u32, Drop)> {
    if !F::is_peer(packet.source) {
        return Err((0, Drop::NoFlow));
    }
    let maps = Maps::open().map_err(|reason| (0, reason))?;
    conntrack::inward(&maps, vni, &segment(packet, F::ip(packet.source)))
}

/// The port that stands for the guest's in the flow that its ICMP error is about.
#[inline(always)]
pub fn error_outward<F: Family>(slot: &Slot, subject: &Subject<F::Address>) -> Result<Be16, Drop> {
    let key = OutKey {
        ifindex: slot.ifindex,
        generation: slot.attachment.generation(),
        peer: F::ip(subject.peer),
        guest_port: subject.local_port,
        peer_port: subject.peer_port,
        protocol: subject.protocol as u32,
    };
    conntrack::error_outward(&Maps::open()?, slot, key)
}

/// Whom an ICMP error from the VPC is for.
#[inline(always)]
pub fn error_inward<F: Family>(
    vni: u32,
    subject: &Subject<F::Address>,
) -> Result<Receiver, (u32, Drop)> {
    if !F::is_peer(subject.peer) {
        return Err((0, Drop::IcmpError));
    }
    let key = InKey {
        vni,
        peer: F::ip(subject.peer),
        peer_port: subject.peer_port,
        port: subject.local_port,
        protocol: subject.protocol as u32,
    };
    conntrack::error_inward(&Maps::open().map_err(|reason| (0, reason))?, key)
}

#[inline(always)]
fn segment<F: Family>(packet: &Packet<F>, peer: Ip) -> Segment {
    Segment {
        peer,
        peer_port: packet.peer_port,
        local_port: packet.local_port,
        protocol: packet.protocol,
        flags: packet.flags,
        next: packet.next,
        acknowledged: packet.acknowledged,
        traffic: packet.traffic,
    }
}

/// The maps of flows and claims.
pub struct Maps {
    scratch: *mut Scratch,
}

/// Where keys and values are put together: a program's stack has no room for so many.
pub struct Scratch {
    port: Be16,
    pub flow_key: OutKey,
    pub flow: Flow,
    pub claim_key: InKey,
    pub claim: InFlow,
    search: Search,
    pub event: FlowEvent,
    clock: Clock,
}

/// What time it was when it was last asked for.
#[derive(Clone, Copy)]
struct Clock {
    /// Sixteen jiffies.
    moment: u64,
    tick: u32,
}

/// A step of the search that this CPU's scratch holds: not 0 ends it.
extern "C" fn probe(index: u64, _: *mut c_void) -> i64 {
    let Ok(maps) = Maps::open() else {
        return 1;
    };
    // SAFETY: it is a map value, and nobody else's at this time.
    let search = unsafe { &mut (*maps.scratch).search };
    i64::from(step(&maps, search, index as u32))
}

/// The search that this CPU's scratch holds, step by step.
///
/// A global function: the verifier looks at it once, not with each of the many ways to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_probe() -> u32 {
    // SAFETY: the callback takes nothing.
    unsafe { bpf_loop(MAX_PROBES, probe as *mut c_void, null_mut(), 0) as u32 }
}

/// The search that this CPU's scratch holds, at the port that it has.
///
/// A global function: the verifier looks at it once, not with each of the many ways to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_stay() -> u32 {
    if let Ok(maps) = Maps::open() {
        // SAFETY: it is a map value, and nobody else's at this time.
        let search = unsafe { &mut (*maps.scratch).search };
        stay(&maps, search);
    }
    0
}

/// What [`warren_turn`] says if another CPU was faster.
const LOST: u32 = u32::MAX;

/// Turns the flow whose key this CPU's scratch holds: 0, [`LOST`] or a reason's code.
///
/// A global function: the verifier looks at it once, not with each of the many ways to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_turn(number: u32, found: u64, state: u64) -> u32 {
    let Ok(maps) = Maps::open() else {
        return LOST;
    };
    // SAFETY: it is a map value, and nobody else's at this time.
    let key = unsafe { &(*maps.scratch).flow_key };
    let Some(flow) = CT_OUT.get_ptr_mut(key) else {
        return LOST;
    };
    match conntrack::turn(&maps, number, key, flow, FlowState(found), FlowState(state)) {
        Ok(true) => 0,
        Ok(false) => LOST,
        Err(reason) => code(reason),
    }
}

/// Forgets the flow whose key this CPU's scratch holds.
///
/// A global function: the verifier looks at it once, not with each of the many ways to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_forget(state: u64) -> u32 {
    let Ok(maps) = Maps::open() else {
        return 0;
    };
    // SAFETY: it is a map value, and nobody else's at this time.
    let key = unsafe { (*maps.scratch).flow_key };
    if let Some(flow) = CT_OUT.get_ptr_mut(&key) {
        conntrack::forget(&maps, key, flow, FlowState(state));
    }
    0
}

/// What [`warren_judge`] says.
const ALLOWED: u32 = 0;
const DENIED: u32 = 1;
const MISSING: u32 = 2;

/// Judges the flow whose key this CPU's scratch holds.
///
/// A global function: the verifier looks at it once, not with each of the many ways to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_judge(guard: u32, epoch: u32) -> u32 {
    let Ok(maps) = Maps::open() else {
        return MISSING;
    };
    // SAFETY: it is a map value, and nobody else's at this time.
    let key = unsafe { &(*maps.scratch).flow_key };
    let flow = CT_OUT.get_ptr_mut(key);
    match conntrack::judge(&maps, Guard(guard as u16), epoch, key, flow) {
        Ok(()) => ALLOWED,
        Err(Drop::Denied) => DENIED,
        Err(_) => MISSING,
    }
}

impl Maps {
    /// The maps, and this CPU's scratch: tc programs do not interrupt one another.
    #[inline(always)]
    pub fn open() -> Result<Self, Drop> {
        Ok(Self { scratch: SCRATCH.get_ptr_mut(0).ok_or(Drop::Internal)? })
    }

    #[inline(always)]
    fn put_flow_key(&self, key: OutKey) -> &OutKey {
        // SAFETY: it is a map value, and nobody else's at this time; so below.
        unsafe {
            (*self.scratch).flow_key = key;
            &(*self.scratch).flow_key
        }
    }

    #[inline(always)]
    fn put_flow(&self, flow: Flow) -> &Flow {
        // SAFETY: as above.
        unsafe {
            (*self.scratch).flow = flow;
            &(*self.scratch).flow
        }
    }

    #[inline(always)]
    fn put_claim_key(&self, key: InKey) -> &InKey {
        // SAFETY: as above.
        unsafe {
            (*self.scratch).claim_key = key;
            &(*self.scratch).claim_key
        }
    }

    #[inline(always)]
    fn put_claim(&self, mut claim: InFlow) -> &InFlow {
        claim.received.packets = stack::opaque(claim.received.packets);
        // SAFETY: as above.
        unsafe {
            (*self.scratch).claim = claim;
            &(*self.scratch).claim
        }
    }
}

// Pointers come from maps, and the verifier checked them for null; map values stay readable to the
// end of the program. An entry that is removed may be recycled for another key meanwhile: reads
// are volatile, and `conntrack` deals with what they find.
impl Tables for Maps {
    type Flow = *mut Flow;
    type Claim = *mut InFlow;

    #[inline(always)]
    fn now(&self) -> u32 {
        // The clock is a call, the jiffies are a load. They are of 1 to 10 ms: up to 160 ms of a
        // tick's second may be missed.
        // SAFETY: the helpers have no preconditions; the scratch is a map value, and nobody else's
        // at this time.
        unsafe {
            let clock = &mut (*self.scratch).clock;
            let moment = bpf_jiffies64() >> 4;
            if clock.moment != moment {
                *clock = Clock { moment, tick: tick(bpf_ktime_get_coarse_ns()) };
            }
            clock.tick
        }
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn timers(&self) -> &Timers {
        timers()
    }

    #[inline(always)]
    fn slot(&self, vni: u32, ifindex: u32) -> Option<Slot> {
        slot_in(vni, ifindex)
    }

    #[inline(always)]
    fn receiver(&self, vni: u32, ifindex: u32) -> Option<Slot> {
        if ifindex == services_ifindex() {
            return Some(daemon_in(vni));
        }
        cache::slot(ifindex).copied()
    }

    #[inline(always)]
    fn may_begin(&self, key: OutKey) -> bool {
        !migration::is_formers(self.put_flow_key(key))
    }

    #[inline(always)]
    fn grow(&self, number: u32, key: &OutKey) -> Result<(), Drop> {
        self.put_flow_key(*key);
        limit::result(warren_grow(number))
    }

    #[inline(always)]
    fn turn(
        &self,
        number: u32,
        key: OutKey,
        found: FlowState,
        state: FlowState,
    ) -> Result<bool, Drop> {
        self.put_flow_key(key);
        match warren_turn(number, found.0, state.0) {
            LOST => Ok(false),
            found => limit::result(found).map(|()| true),
        }
    }

    #[inline(always)]
    fn forget(&self, key: OutKey, state: FlowState) {
        self.put_flow_key(key);
        warren_forget(state.0);
    }

    #[inline(always)]
    fn shrink(&self, number: u32, key: &OutKey) {
        self.put_flow_key(*key);
        warren_shrink(number);
    }

    #[inline(always)]
    fn is_allowed(&self, guard: Guard, epoch: u32, key: &OutKey) -> Result<bool, Drop> {
        policy::is_allowed(guard, epoch, key)
    }

    #[inline(always)]
    fn judge(&self, slot: &Slot, key: OutKey) -> Result<(), Drop> {
        self.put_flow_key(key);
        match warren_judge(slot.guard.0 as u32, slot.epoch) {
            ALLOWED => Ok(()),
            DENIED => Err(Drop::Denied),
            _ => Err(Drop::Internal),
        }
    }

    #[inline(always)]
    fn search(&self, wanted: Wanted, purpose: Purpose, port: &mut Be16) -> Result<(), Drop> {
        // SAFETY: it is a map value, and nobody else's at this time.
        let search = unsafe { &mut (*self.scratch).search };
        *search = Search::new(wanted);
        conntrack::search(self, search, purpose, port)
    }

    #[inline(always)]
    fn probe(&self, search: &mut Search) {
        // The callback finds the search in the scratch: the compiler must believe that it does.
        black_box(&mut *search);
        warren_probe();
        black_box(search);
    }

    #[inline(always)]
    fn stay(&self, search: &mut Search) {
        // As above.
        black_box(&mut *search);
        warren_stay();
        black_box(search);
    }

    #[inline(always)]
    fn flow(&self, key: OutKey) -> Option<*mut Flow> {
        CT_OUT.get_ptr_mut(self.put_flow_key(key))
    }

    #[inline(always)]
    fn insert_flow(&self, key: OutKey, flow: Flow) -> Result<(), Refused> {
        CT_OUT
            .insert(self.put_flow_key(key), self.put_flow(flow), BPF_NOEXIST as u64)
            .map_err(refused)
    }

    #[inline(always)]
    fn begun(&self) {
        warren_flow_begun();
    }

    #[inline(always)]
    fn remove_flow(&self, key: OutKey, why: What) {
        let key = self.put_flow_key(key);
        warren_flow_ended(why as u32);
        warren_shrink_ended();
        let _ = CT_OUT.remove(key);
    }

    #[inline(always)]
    fn state(&self, flow: *mut Flow) -> FlowState {
        // SAFETY: it is a map value.
        unsafe { (&raw const (*flow).state).read_volatile() }
    }

    #[inline(always)]
    fn exchange(&self, flow: *mut Flow, expected: FlowState, new: FlowState) -> bool {
        // SAFETY: it is a map value.
        unsafe { compare_exchange((&raw mut (*flow).state).cast(), expected.0, new.0) }
    }

    #[inline(always)]
    fn check(&self, flow: *mut Flow) -> u16 {
        // SAFETY: it is a map value.
        unsafe { (&raw const (*flow).check).read_volatile() }
    }

    #[inline(always)]
    fn place(&self, flow: *mut Flow) -> (u32, Be16) {
        // SAFETY: it is a map value.
        unsafe {
            ((&raw const (*flow).vni).read_volatile(), (&raw const (*flow).port).read_volatile())
        }
    }

    #[inline(always)]
    fn end(&self, flow: *mut Flow, direction: Direction) -> u32 {
        // SAFETY: it is a map value.
        unsafe {
            match direction {
                Direction::Out => (&raw const (*flow).ends[0]).read_volatile(),
                Direction::In => (&raw const (*flow).ends[1]).read_volatile(),
            }
        }
    }

    #[inline(always)]
    fn set_end(&self, flow: *mut Flow, direction: Direction, end: u32) {
        // SAFETY: it is a map value. In one that is recycled meanwhile, it counts only if that
        // flow sees a FIN, which enters its own.
        unsafe {
            match direction {
                Direction::Out => (&raw mut (*flow).ends[0]).write_volatile(end),
                Direction::In => (&raw mut (*flow).ends[1]).write_volatile(end),
            }
        }
    }

    #[inline(always)]
    fn judged(&self, flow: *mut Flow) -> u32 {
        // SAFETY: it is a map value.
        unsafe { (&raw const (*flow).judged).read_volatile() }
    }

    #[inline(always)]
    fn set_judged(&self, flow: *mut Flow, epoch: u32) {
        // SAFETY: it is a map value. One that is recycled meanwhile was judged when it began: if
        // its slot is of another epoch, it is judged again.
        unsafe { (&raw mut (*flow).judged).write_volatile(epoch) }
    }

    #[inline(always)]
    fn sent(&self, flow: *mut Flow, traffic: Traffic) {
        // SAFETY: it is a map value. One that is recycled meanwhile counts a packet too many.
        unsafe { add(&raw mut (*flow).sent, traffic) }
    }

    #[inline(always)]
    fn claim(&self, key: InKey) -> Option<*mut InFlow> {
        CT_IN.get_ptr_mut(self.put_claim_key(key))
    }

    #[inline(always)]
    fn insert_claim(&self, key: InKey, claim: InFlow) -> Result<(), Refused> {
        CT_IN
            .insert(self.put_claim_key(key), self.put_claim(claim), BPF_NOEXIST as u64)
            .map_err(refused)
    }

    #[inline(always)]
    fn replace_claim(&self, key: InKey, claim: InFlow) -> Result<(), Refused> {
        CT_IN
            .insert(self.put_claim_key(key), self.put_claim(claim), BPF_ANY as u64)
            .map_err(refused)
    }

    #[inline(always)]
    fn remove_claim(&self, key: InKey) {
        let _ = CT_IN.remove(self.put_claim_key(key));
    }

    #[inline(always)]
    fn read(&self, claim: *mut InFlow) -> InFlow {
        // SAFETY: it is a map value.
        unsafe { claim.read() }
    }

    #[inline(always)]
    fn set_refreshed(&self, claim: *mut InFlow, tick: u32) {
        // SAFETY: it is a map value.
        unsafe { (&raw mut (*claim).refreshed).write_volatile(tick) }
    }

    #[inline(always)]
    fn set_claim_judged(&self, claim: *mut InFlow, epoch: u32) {
        // SAFETY: it is a map value; as of `set_judged`.
        unsafe { (&raw mut (*claim).judged).write_volatile(epoch as u16) }
    }

    #[inline(always)]
    fn received(&self, claim: *mut InFlow, traffic: Traffic) {
        // SAFETY: it is a map value. One that is recycled meanwhile counts a packet too many.
        unsafe { add(&raw mut (*claim).received, traffic) }
    }
}

#[inline(always)]
fn refused(error: i32) -> Refused {
    if error == EEXIST { Refused::Exists } else { Refused::Full }
}

/// Adds to what a flow carried, which other CPUs may do as well.
///
/// # Safety
/// `total` must point into a map value.
#[inline(always)]
unsafe fn add(total: *mut Traffic, Traffic { packets, bytes }: Traffic) {
    // SAFETY: two atomic instructions on the map value; `core` has none on this target.
    unsafe {
        asm!(
            "lock *(u64 *)({total} + 0) += {packets}",
            "lock *(u64 *)({total} + 8) += {bytes}",
            total = in(reg) total,
            packets = in(reg) packets,
            bytes = in(reg) bytes,
        );
    }
}
