//! Network address translation of one packet.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::programs::TcContext;
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
    let old = match direction {
        Direction::Out => packet.source,
        Direction::In => packet.destination,
    };
    // What the transport's checksum is made of is the kernel's to know (none yet, left to the
    // device, or summed by it): only its helpers change it rightly.
    let (offset, flags) = match packet.protocol {
        TCP => (l4::<F>() + 16, 0),
        UDP => (l4::<F>() + 6, BPF_F_MARK_MANGLED_0 as u64),
        _ => (l4::<F>() + 2, 0),
    };
    let covers_addresses = F::ICMP_COVERS_ADDRESSES || packet.protocol != ICMP;
    if covers_addresses && !packet.unchecked {
        let (from, to, size) = F::replacement(old, address);
        ctx.l4_csum_replace(offset, from, to, flags | BPF_F_PSEUDO_HDR as u64 | size)
            .map_err(|_| Drop::Internal)?;
    }
    if port != packet.local_port && !packet.unchecked {
        ctx.l4_csum_replace(offset, packet.local_port.0 as u64, port.0 as u64, flags | 2)
            .map_err(|_| Drop::Internal)?;
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
