//! Network address translation of one packet.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::flow::Direction;
use warren_abi::wire::{Be16, ICMP, IpHeader, Ipv4, TCP, UDP};

use crate::parse::{IP, L4, Packet, at};

/// Puts `address` and `port` in the place of the guest's side: the source outwards, the
/// destination inwards. Takes one off the time to live, which must be above 0.
#[inline(always)]
pub fn translate(
    ctx: &TcContext,
    packet: &Packet,
    direction: Direction,
    address: Ipv4,
    port: Be16,
) -> Result<(), Drop> {
    #[repr(C, packed(2))]
    struct Headers {
        ip: IpHeader,
        l4: [Be16; 4],
    }

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
    // SAFETY: `at` checked the bounds.
    let headers = unsafe { &mut *at::<Headers>(ctx, IP).ok_or(Drop::Internal)? };
    let lifetime = [packet.ttl, packet.protocol];
    headers.ip.ttl = packet.ttl - 1;
    headers.ip.checksum = update(
        headers.ip.checksum,
        [old.0 as u16, (old.0 >> 16) as u16, u16::from_ne_bytes(lifetime)],
        [
            address.0 as u16,
            (address.0 >> 16) as u16,
            u16::from_ne_bytes([packet.ttl - 1, packet.protocol]),
        ],
    );
    match direction {
        Direction::Out => headers.ip.source = address,
        Direction::In => headers.ip.destination = address,
    }
    let index = match (packet.protocol, direction) {
        (ICMP, _) => 2,
        (_, Direction::Out) => 0,
        (_, Direction::In) => 1,
    };
    headers.l4[index] = port;
    Ok(())
}

/// A checksum after some of the words under it changed (RFC 1624, equation 3).
#[inline(always)]
fn update(checksum: u16, old: [u16; 3], new: [u16; 3]) -> u16 {
    let mut sum = !checksum as u32;
    sum += !old[0] as u32 + !old[1] as u32 + !old[2] as u32;
    sum += new[0] as u32 + new[1] as u32 + new[2] as u32;
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}
