//! Network address translation of one packet.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::programs::TcContext;
use warren_abi::checksum::{adjust, difference, fold};
use warren_abi::drop::Drop;
use warren_abi::family::Family;
use warren_abi::flow::Direction;
use warren_abi::wire::{Be16, ICMP, TCP, UDP};

use crate::parse::{IP, Packet, at, l4};

/// Puts `address` and `port` in the place of the guest's side: the source outwards, the
/// destination inwards. Takes one off the time to live.
#[inline(always)]
pub fn translate<F: Family>(
    ctx: &TcContext,
    packet: &Packet<F>,
    direction: Direction,
    address: F::Address,
    port: Be16,
) -> Result<(), Drop> {
    let old = guest_side(packet, direction);
    if !packet.unchecked {
        let is_done = match direction {
            Direction::Out => update::<F>(ctx, packet, address, port)?,
            Direction::In => false,
        };
        if !is_done {
            replace(ctx, packet, (old, address), port)?;
        }
    }
    readdress(ctx, packet, direction, address)?;
    // SAFETY: `at` checked the bounds.
    let ports = unsafe { &mut *at::<[Be16; 4]>(ctx, l4::<F>()).ok_or(Drop::Internal)? };
    let index = match (packet.protocol, direction) {
        (ICMP, _) => 2,
        (_, Direction::Out) => 0,
        (_, Direction::In) => 1,
    };
    ports[index] = port;
    Ok(())
}

/// The address on the guest's side.
#[inline(always)]
fn guest_side<F: Family>(packet: &Packet<F>, direction: Direction) -> F::Address {
    match direction {
        Direction::Out => packet.source,
        Direction::In => packet.destination,
    }
}

/// [`translate`], of the address alone, and of what comes from anywhere.
#[inline(always)]
pub fn translate_address<F: Family>(
    ctx: &TcContext,
    packet: &Packet<F>,
    direction: Direction,
    address: F::Address,
) -> Result<(), Drop> {
    let old = guest_side(packet, direction);
    if !packet.unchecked {
        replace(ctx, packet, (old, address), packet.local_port)?;
    }
    readdress(ctx, packet, direction, address)
}

/// Changes the checksum of what came from a TAP, if that is not left to the device: then, it is the
/// pseudo-header's sum. False: it may be, or is not of TCP or UDP.
///
/// Two calls of helpers less. What comes from elsewhere may have been summed by a network card, which
/// only helpers can account for.
#[inline(always)]
fn update<F: Family>(
    ctx: &TcContext,
    packet: &Packet<F>,
    address: F::Address,
    port: Be16,
) -> Result<bool, Drop> {
    let offset = match packet.protocol {
        TCP => 16,
        UDP => 6,
        _ => return Ok(false),
    };
    // SAFETY: `at` checked the bounds; the two references are to different parts of the packet.
    let (header, checksum) = unsafe {
        (
            &*at::<F::Header>(ctx, IP).ok_or(Drop::Internal)?,
            &mut *at::<u16>(ctx, l4::<F>() + offset).ok_or(Drop::Internal)?,
        )
    };
    let left_to_device = fold(F::transport_sum(header));
    // SAFETY: the context is the kernel's for as long as the program runs.
    if *checksum == left_to_device || unsafe { (*ctx.skb.skb).gso_size } != 0 {
        return Ok(false);
    }
    let ports = difference([packet.local_port.0], [port.0]);
    // None is told by zeroes, and zeroes by ones (RFC 768).
    *checksum = match adjust(*checksum, F::difference(packet.source, address) + ports) {
        0 if packet.protocol == UDP => !0,
        new => new,
    };
    Ok(true)
}

/// Changes the checksum, whatever it is made of: that is the kernel's to know (none yet, left to the
/// device, or summed by it).
#[inline(always)]
fn replace<F: Family>(
    ctx: &TcContext,
    packet: &Packet<F>,
    (old, new): (F::Address, F::Address),
    port: Be16,
) -> Result<(), Drop> {
    let (offset, flags) = match packet.protocol {
        TCP => (l4::<F>() + 16, 0),
        UDP => (l4::<F>() + 6, BPF_F_MARK_MANGLED_0 as u64),
        _ => (l4::<F>() + 2, 0),
    };
    if F::ICMP_COVERS_ADDRESSES || packet.protocol != ICMP {
        let (from, to, size) = F::replacement(old, new);
        ctx.l4_csum_replace(offset, from, to, flags | BPF_F_PSEUDO_HDR as u64 | size)
            .map_err(|_| Drop::Internal)?;
    }
    if port != packet.local_port {
        ctx.l4_csum_replace(offset, packet.local_port.0 as u64, port.0 as u64, flags | 2)
            .map_err(|_| Drop::Internal)?;
    }
    Ok(())
}

/// Puts `address` in the place of the guest's side in the IP header, and takes one off the time
/// to live.
#[inline(always)]
pub fn readdress<F: Family>(
    ctx: &TcContext,
    packet: &Packet<F>,
    direction: Direction,
    address: F::Address,
) -> Result<(), Drop> {
    if packet.ttl <= 1 {
        return Err(Drop::TtlExceeded);
    }
    // SAFETY: `at` checked the bounds.
    let header = unsafe { &mut *at::<F::Header>(ctx, IP).ok_or(Drop::Internal)? };
    F::readdress(header, direction, address);
    Ok(())
}
