//! Flows: which port stands for which guest's, and for how long.
//!
//! Two maps hold a flow. `CT_IN` is inserted first, and inserting it claims the port: whoever
//! finds the key taken tries the next one. `CT_OUT` comes second and holds the flow's state; who
//! loses that race gives the port back and uses the winner's. The sweep removes them the other
//! way round, after it ended the state with a compare-and-exchange, so that a packet either
//! refreshes a flow or finds it gone.
//!
//! UDP's ports are endpoint-independent (RFC 4787, REQ-1, REQ-3): what claims one is a mapping, an
//! entry of both maps under no peer, and the flows from that port of the guest's all have its
//! port. The flows are the filter: only their peers get through. A flow keeps its mapping alive.

use core::arch::asm;
use core::num::NonZeroU32;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use warren_abi::drop::Drop;
use warren_abi::flow::{Direction, FlowState, tcp, tick};
use warren_abi::icmp::Subject;
use warren_abi::maps::{Attachment, Flow, HostVpc, InFlow, InKey, OutKey, Slot, Traffic};
use warren_abi::nat::{MAX_PROBES, probe_port};
use warren_abi::wire::{Be16, Ip, UDP};

use crate::maps::{CT_IN, CT_OUT, slot_in};
use crate::parse::Packet;

const EEXIST: i32 = -17;

/// How often a state is looked at again when another CPU changed it meanwhile: that happens once
/// a tick, and at TCP's turning points.
const ATTEMPTS: u32 = 4;

/// The tick that it is now.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: the helper has no preconditions.
    tick(unsafe { bpf_ktime_get_coarse_ns() })
}

/// The port that stands for the guest's in this flow, which the packet begins or keeps alive.
#[inline(always)]
pub fn outward(slot: &Slot, vpc: &HostVpc, packet: &Packet) -> Result<Be16, Drop> {
    let key = OutKey {
        ifindex: slot.ifindex,
        generation: slot.attachment.generation(),
        peer: Ip::v4(packet.destination),
        guest_port: packet.local_port,
        peer_port: packet.peer_port,
        protocol: packet.protocol as u32,
    };
    let now = now();
    if let Some(port) = resume(&key, packet, now)? {
        return Ok(port);
    }
    if !FlowState::can_begin(packet.protocol, packet.flags) {
        return Err(Drop::NoFlow);
    }
    let vni = slot.attachment.vni();
    if packet.protocol == UDP {
        let port = mapped(&key.mapping(), vni, vpc, now)?;
        if let Attempt::Begun = attempt(&key, vni, port, packet.traffic, now)? {
            return Ok(port);
        }
    } else if let Some(port) = begin(&key, vni, vpc, packet.traffic, now)? {
        return Ok(port);
    }
    resume(&key, packet, now)?.ok_or(Drop::Internal)
}

/// The port of the guest's flow that the packet keeps alive; none if there is no such flow.
#[inline(always)]
fn resume(key: &OutKey, packet: &Packet, now: u32) -> Result<Option<Be16>, Drop> {
    let Some(flow) = refresh(key, Direction::Out, packet.flags, now)? else {
        return Ok(None);
    };
    // SAFETY: it is a map value. One that is recycled meanwhile counts a packet too many.
    unsafe {
        add(&raw mut (*flow).sent, packet.traffic);
        Ok(Some((&raw const (*flow).port).read_volatile()))
    }
}

/// The port of a mapping, which a new flow begins or keeps alive.
#[inline(always)]
fn mapped(key: &OutKey, vni: u32, vpc: &HostVpc, now: u32) -> Result<Be16, Drop> {
    let port = |Entered { flow, .. }: Entered| {
        // SAFETY: it is a map value.
        unsafe { (&raw const (*flow).port).read_volatile() }
    };
    if let Some(found) = enter(key, Direction::Out, 0, now)? {
        return Ok(port(found));
    }
    if let Some(port) = begin(key, vni, vpc, Traffic::NONE, now)? {
        return Ok(port);
    }
    enter(key, Direction::Out, 0, now)?.map(port).ok_or(Drop::Internal)
}

/// Begins a flow or a mapping on a port of the host's; none if another CPU did so meanwhile.
#[inline(always)]
fn begin(
    key: &OutKey,
    vni: u32,
    vpc: &HostVpc,
    sent: Traffic,
    now: u32,
) -> Result<Option<Be16>, Drop> {
    let count = NonZeroU32::new(vpc.port_count).ok_or(Drop::PortsExhausted)?;
    // SAFETY: the helper has no preconditions.
    let random = unsafe { bpf_get_prandom_u32() };
    let mut probe = 0;
    while probe < MAX_PROBES {
        let port = Be16::new(probe_port(vpc.port_base, count, random, probe));
        probe += 1;
        match attempt(key, vni, port, sent, now)? {
            Attempt::Begun => return Ok(Some(port)),
            Attempt::Lost => return Ok(None),
            Attempt::Taken => {}
        }
    }
    Err(Drop::PortsExhausted)
}

/// What came of an attempt at a port.
enum Attempt {
    /// The flow began.
    Begun,
    /// Another CPU began it, on a port of its own.
    Lost,
    /// The port is another's.
    Taken,
}

/// Begins a flow or a mapping on this port, if it can be had.
#[inline(always)]
fn attempt(key: &OutKey, vni: u32, port: Be16, sent: Traffic, now: u32) -> Result<Attempt, Drop> {
    let OutKey { ifindex, generation, peer, guest_port, peer_port, protocol } = *key;
    let received = Traffic::NONE;
    let back = InFlow { ifindex, generation, refreshed: now, guest_port, reserved: 0, received };
    let claim = InKey { vni, peer, peer_port, port, protocol };
    match CT_IN.insert(&claim, &back, BPF_NOEXIST as u64) {
        Ok(()) => {}
        Err(EEXIST) => return Ok(Attempt::Taken),
        Err(_) => return Err(Drop::FlowsExhausted),
    }
    let state = FlowState::begin(protocol as u8, now);
    let flow = Flow { state, vni, port, reserved: 0, sent };
    match CT_OUT.insert(key, &flow, BPF_NOEXIST as u64) {
        Ok(()) => Ok(Attempt::Begun),
        Err(error) => {
            let _ = CT_IN.remove(&claim);
            if error == EEXIST { Ok(Attempt::Lost) } else { Err(Drop::FlowsExhausted) }
        }
    }
}

/// Who gets a packet from the VPC, and at which port.
pub struct Receiver {
    /// The slot.
    pub slot: Slot,
    /// The guest's port.
    pub port: Be16,
}

/// Whom a packet from the VPC is for. A reason comes with the slot that it concerns, or 0.
#[inline(always)]
pub fn inward(vni: u32, packet: &Packet) -> Result<Receiver, (u32, Drop)> {
    let key = InKey {
        vni,
        peer: Ip::v4(packet.source),
        peer_port: packet.peer_port,
        port: packet.local_port,
        protocol: packet.protocol as u32,
    };
    let (entry, flow, slot) = find(&key, Drop::NoFlow)?;

    // The state is the other map's: look there once a tick, and when TCP turns.
    let now = now();
    if flow.refreshed != now || packet.flags & (tcp::SYN | tcp::FIN | tcp::RST) != 0 {
        let key = OutKey {
            ifindex: flow.ifindex,
            generation: flow.generation,
            peer: Ip::v4(packet.source),
            guest_port: flow.guest_port,
            peer_port: packet.peer_port,
            protocol: packet.protocol as u32,
        };
        match refresh(&key, Direction::In, packet.flags, now) {
            Ok(Some(_)) => {}
            Ok(None) => return Err((slot.number, Drop::NoFlow)),
            Err(reason) => return Err((slot.number, reason)),
        }
        // SAFETY: as above; at worst, another flow is refreshed a tick late.
        unsafe { (*entry).refreshed = now };
    }
    // SAFETY: it is a map value. One that is recycled meanwhile counts a packet too many.
    unsafe { add(&raw mut (*entry).received, packet.traffic) };
    Ok(Receiver { slot, port: flow.guest_port })
}

/// The entry of a flow that its peer names, and its slot; `missing` if there is none.
#[inline(always)]
fn find(key: &InKey, missing: Drop) -> Result<(*mut InFlow, InFlow, Slot), (u32, Drop)> {
    // What comes from no address is no answer to anybody: a mapping's entry is there.
    if key.peer.is_unspecified() {
        return Err((0, missing));
    }
    let entry = CT_IN.get_ptr_mut(key).ok_or((0, missing))?;
    // SAFETY: the verifier checked the pointer for null; map values stay readable. One that is
    // recycled meanwhile is another flow's, whose attachment is checked like any.
    let flow = unsafe { entry.read() };
    let slot = slot_in(key.vni, flow.ifindex).ok_or((0, Drop::StaleFlow))?;
    if slot.attachment != Attachment::new(key.vni, flow.generation) {
        return Err((slot.number, Drop::StaleFlow));
    }
    Ok((entry, flow, slot))
}

/// The port that stands for the guest's in the flow that its ICMP error is about. Errors neither
/// refresh nor end a flow (RFC 5508, REQ-6).
#[inline(always)]
pub fn error_outward(slot: &Slot, subject: &Subject) -> Result<Be16, Drop> {
    let key = OutKey {
        ifindex: slot.ifindex,
        generation: slot.attachment.generation(),
        peer: Ip::v4(subject.peer),
        guest_port: subject.local_port,
        peer_port: subject.peer_port,
        protocol: subject.protocol as u32,
    };
    let flow = CT_OUT.get_ptr(&key).ok_or(Drop::IcmpError)?;
    // SAFETY: the verifier checked the pointer for null; map values stay readable.
    Ok(unsafe { (&raw const (*flow).port).read_volatile() })
}

/// Whom an ICMP error from the VPC is for.
#[inline(always)]
pub fn error_inward(vni: u32, subject: &Subject) -> Result<Receiver, (u32, Drop)> {
    let key = InKey {
        vni,
        peer: Ip::v4(subject.peer),
        peer_port: subject.peer_port,
        port: subject.local_port,
        protocol: subject.protocol as u32,
    };
    let (_, flow, slot) = find(&key, Drop::IcmpError)?;
    Ok(Receiver { slot, port: flow.guest_port })
}

/// Enters a packet into its flow's state, and once a tick into its mapping's: the flow, or none if
/// it is not there.
#[inline(always)]
fn refresh(
    key: &OutKey,
    direction: Direction,
    flags: u8,
    now: u32,
) -> Result<Option<*mut Flow>, Drop> {
    let found = enter(key, direction, flags, now)?;
    Ok(found.map(|Entered { flow, changed }| {
        if changed && key.protocol == UDP as u32 {
            // If it is gone, a sweep just took it for idle: the flow goes on alone.
            let _ = enter(&key.mapping(), direction, 0, now);
        }
        flow
    }))
}

/// What was found of a flow or a mapping.
struct Entered {
    /// Its entry.
    flow: *mut Flow,
    /// Whether its state changed.
    changed: bool,
}

/// Enters a packet into the state of a flow or of a mapping; none if it is not there.
#[inline(always)]
fn enter(key: &OutKey, direction: Direction, flags: u8, now: u32) -> Result<Option<Entered>, Drop> {
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        attempt += 1;
        let Some(flow) = CT_OUT.get_ptr_mut(key) else {
            return Ok(None);
        };
        // SAFETY: the verifier checked the pointer for null; map values stay readable. If the
        // sweep removes the flow and the entry is recycled, the exchange fails, for the state
        // found was an old tick's. Only a flow of this very tick goes without, and such a one does
        // not expire.
        unsafe {
            let found = (&raw const (*flow).state).read_volatile();
            if found.is_ended() {
                return Err(Drop::NoFlow);
            }
            let next = found.after(direction, flags, now);
            let changed = next != found;
            if !changed || compare_exchange(&raw mut (*flow).state, found, next) {
                return Ok(Some(Entered { flow, changed }));
            }
        }
    }
    Err(Drop::Internal)
}

/// Puts `new` in the place of `expected`, unless there is something else: returns whether it did.
///
/// # Safety
/// `state` must point to a map value.
#[inline(always)]
pub unsafe fn compare_exchange(state: *mut FlowState, expected: FlowState, new: FlowState) -> bool {
    let found: u64;
    // SAFETY: one atomic instruction on the map value. `core`'s atomics of this width do not
    // exist on this target.
    unsafe {
        asm!(
            "r0 = cmpxchg_64({state} + 0, r0, {new})",
            state = in(reg) state,
            new = in(reg) new.0,
            inlateout("r0") expected.0 => found,
        );
    }
    found == expected.0
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
