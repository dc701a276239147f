//! Network address translation of one packet.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::programs::TcContext;
use warren_abi::checksum::update;
use warren_abi::drop::Drop;
use warren_abi::flow::Direction;
use warren_abi::wire::{Be16, ICMP, IpHeader, Ipv4, TCP, UDP};

use crate::parse::{IP, L4, Packet, at};

/// Puts `address` and `port` in the place of the guest's side: the source outwards, the
/// destination inwards. Takes one off the time to live.
#[inline(always)]
pub fn translate(
    ctx: &TcContext,
    packet: &Packet,
    direction: Direction,
    address: Ipv4,
    port: Be16,
) -> Result<(), Drop> {
    let old = match direction {
        Direction::Out => packet.source,
        Direction::In => packet.destination,
    };
    // What the transport's checksum is made of is the kernel's to know (none yet, left to the
    // device, or summed by it): only its helpers change it rightly.
    let (offset, flags) = match packet.protocol {
        TCP => (L4 + 16, 0),
        UDP => (L4 + 6, BPF_F_MARK_MANGLED_0 as u64),
        _ => (L4 + 2, 0),
    };
    if packet.protocol != ICMP && !packet.unchecked {
        let flags = flags | BPF_F_PSEUDO_HDR as u64 | 4;
        ctx.l4_csum_replace(offset, old.0 as u64, address.0 as u64, flags)
            .map_err(|_| Drop::Internal)?;
    }
    if port != packet.local_port && !packet.unchecked {
        ctx.l4_csum_replace(offset, packet.local_port.0 as u64, port.0 as u64, flags | 2)
            .map_err(|_| Drop::Internal)?;
    }
    readdress(ctx, packet, direction, address)?;
    // SAFETY: `at` checked the bounds.
    let ports = unsafe { &mut *at::<[Be16; 4]>(ctx, L4).ok_or(Drop::Internal)? };
    let index = match (packet.protocol, direction) {
        (ICMP, _) => 2,
        (_, Direction::Out) => 0,
        (_, Direction::In) => 1,
    };
    ports[index] = port;
    Ok(())
}

/// Puts `address` in the place of the guest's side in the IP header, and takes one off the time
/// to live.
#[inline(always)]
pub fn readdress(
    ctx: &TcContext,
    packet: &Packet,
    direction: Direction,
    address: Ipv4,
) -> Result<(), Drop> {
    if packet.ttl <= 1 {
        return Err(Drop::TtlExceeded);
    }
    let old = match direction {
        Direction::Out => packet.source,
        Direction::In => packet.destination,
    };
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &mut *at::<IpHeader>(ctx, IP).ok_or(Drop::Internal)? };
    let lifetime = |ttl| u16::from_ne_bytes([ttl, packet.protocol]);
    ip.ttl = packet.ttl - 1;
    ip.checksum = update(
        ip.checksum,
        [old.0 as u16, (old.0 >> 16) as u16, lifetime(packet.ttl)],
        [address.0 as u16, (address.0 >> 16) as u16, lifetime(packet.ttl - 1)],
    );
    match direction {
        Direction::Out => ip.source = address,
        Direction::In => ip.destination = address,
    }
    Ok(())
}
