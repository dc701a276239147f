//! Link-local services: what goes between guests and the daemon, and between the daemon and a VPC.
//!
//! The daemon reads and writes IP packets at a TUN device, and has a TCP of its own: none of these
//! packets reaches the kernel's.

use aya_ebpf::helpers::generated::{bpf_ktime_get_coarse_ns, bpf_redirect, bpf_skb_change_head};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::family::V4;
use warren_abi::flow::Direction;
use warren_abi::maps::Slot;
use warren_abi::services::{self, SLOT_RATE, stamp};
use warren_abi::wire::{ETHERTYPE_IPV4, Ethernet, GATEWAY_MAC, IpHeader, Mac, slot_number};

use crate::maps::{SERVICE_SLOTS, daemon_in, services_ifindex, uncached_slot};
use crate::parse::{IP, Packet, at};
use crate::{drops, parse, tap};

/// A guest's packet, which is known to be its own, to the address of a service.
#[inline(always)]
pub fn to_daemon(ctx: &TcContext, slot: &Slot, packet: &Packet<V4>) -> Result<i32, Drop> {
    if slot.attachment.vni() == 0 {
        return Err(Drop::Detached);
    }
    if !services::is_open(packet.destination, packet.protocol, packet.peer_port) {
        return Err(Drop::NoService);
    }
    let entry = SERVICE_SLOTS.get_ptr_mut(slot.number).ok_or(Drop::Internal)?;
    // SAFETY: the verifier checked the pointer for null; map values stay readable. A race between
    // CPUs lets a packet more pass, at worst.
    unsafe {
        let due_ns = (&raw const (*entry).due_ns).read_volatile();
        let due_ns = SLOT_RATE.admit(due_ns, bpf_ktime_get_coarse_ns()).ok_or(Drop::ServiceRate)?;
        (&raw mut (*entry).due_ns).write_volatile(due_ns);
    }
    // SAFETY: `at` checked the bounds.
    unsafe {
        let ip = &mut *at::<IpHeader>(ctx, IP).ok_or(Drop::Internal)?;
        ip.identify(stamp(slot.attachment.generation()));
        Ok(bpf_redirect(services_ifindex(), 0) as i32)
    }
}

/// What the daemon sends: an answer to a guest, or a packet of its own into a VPC. A reason comes
/// with the slot that it concerns, or 0.
#[classifier]
pub fn services(ctx: TcContext) -> i32 {
    match from_daemon(&ctx) {
        Ok(action) => drops::verdict(&ctx, 0, Ok(action)),
        Err((scope, reason)) => drops::verdict(&ctx, scope, Err(reason)),
    }
}

#[inline(always)]
fn from_daemon(ctx: &TcContext) -> Result<i32, (u32, Drop)> {
    let nobody = |reason| (0, reason);
    // SAFETY: the context is the kernel's for as long as the program runs.
    if unsafe { bpf_skb_change_head(ctx.skb.skb, IP as u32, 0) } != 0 {
        return Err((0, Drop::Internal));
    }
    write_header(ctx, Mac([0; 3])).map_err(nobody)?;
    parse::prepare::<V4>(ctx).map_err(nobody)?;
    let mut packet = parse::packet::<V4>(ctx, Direction::Out).map_err(nobody)?;
    if let Some(vni) = services::vpc_of(packet.source) {
        return tap::to_vpc(ctx, &daemon_in(vni), &mut packet).map_err(nobody);
    }
    to_guest(ctx, &packet)
}

/// Hands the daemon's answer to the tenant that asked, or to nobody.
#[inline(always)]
fn to_guest(ctx: &TcContext, packet: &Packet<V4>) -> Result<i32, (u32, Drop)> {
    let number = slot_number(packet.destination.into()).ok_or((0, Drop::BadDestination))?;
    let entry = SERVICE_SLOTS.get(number).ok_or((0, Drop::BadDestination))?;
    let slot = uncached_slot(entry.ifindex).ok_or((0, Drop::BadDestination))?;
    let dropped = |reason| (number, reason);
    if slot.address != packet.destination || slot.attachment.vni() == 0 {
        return Err(dropped(Drop::Detached));
    }
    // SAFETY: `at` checked the bounds.
    let found =
        unsafe { (*at::<IpHeader>(ctx, IP).ok_or(dropped(Drop::Internal))?).identification };
    if found != stamp(slot.attachment.generation()) {
        return Err(dropped(Drop::StaleFlow));
    }
    write_header(ctx, slot.mac).map_err(dropped)?;
    // SAFETY: the helper has no preconditions.
    Ok(unsafe { bpf_redirect(slot.ifindex, 0) } as i32)
}

/// Writes the Ethernet header in front of an IP packet.
#[inline(always)]
fn write_header(ctx: &TcContext, destination: Mac) -> Result<(), Drop> {
    let header = at::<Ethernet>(ctx, 0).ok_or(Drop::Internal)?;
    // SAFETY: `at` checked the bounds.
    unsafe {
        *header = Ethernet { destination, source: GATEWAY_MAC, ethertype: ETHERTYPE_IPV4 };
    }
    Ok(())
}
