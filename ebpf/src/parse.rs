//! Reading packets.

use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::family::{Family, Fields};
use warren_abi::flow::{Direction, tcp};
use warren_abi::maps::Traffic;
use warren_abi::wire::{Be16, Ethernet, ICMP, TCP, UDP};

/// Where the IP header begins.
pub const IP: usize = size_of::<Ethernet>();

/// Where the header of TCP, UDP or ICMP begins: IP options are not accepted.
#[inline(always)]
pub const fn l4<F: Family>() -> usize {
    IP + F::HEADER
}

/// A pointer into the packet, if all of `T` is there. Any helper that changes the packet makes it
/// invalid, and the verifier rejects its use from then on.
#[inline(always)]
pub fn at<T>(ctx: &TcContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() { None } else { Some(start as *mut T) }
}

/// Makes the headers directly readable, where the kernel left them in fragments.
///
/// Refuses a frame with a VLAN tag: the kernel took the tag out of sight, and would put it back in
/// front of whatever leaves.
#[inline(always)]
pub fn prepare<F: Family>(ctx: &TcContext) -> Result<(), Drop> {
    // SAFETY: the context is the kernel's for as long as the program runs.
    if unsafe { (*ctx.skb.skb).vlan_present } != 0 {
        return Err(Drop::NotIpv4);
    }
    // Ethernet, IP and TCP headers.
    pull(ctx, l4::<F>() as u32 + 20);
    Ok(())
}

/// Makes the first `length` bytes directly readable, as far as there are so many.
#[inline(always)]
pub fn pull(ctx: &TcContext, length: u32) {
    if ctx.data() + length as usize > ctx.data_end() {
        // A failure is met again as a missing header.
        let _ = ctx.pull_data(if ctx.len() < length { ctx.len() } else { length });
    }
}

/// What the Ethernet header says of what follows it.
#[inline(always)]
pub fn ethertype(ctx: &TcContext) -> Be16 {
    // SAFETY: the context is the kernel's for as long as the program runs.
    Be16(unsafe { (*ctx.skb.skb).protocol } as u16)
}

/// The Ethernet header.
#[inline(always)]
pub fn ethernet(ctx: &TcContext) -> Result<Ethernet, Drop> {
    let header = at::<Ethernet>(ctx, 0).ok_or(Drop::Truncated)?;
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    Ok(unsafe { *header })
}

/// A packet of a protocol that is translated, its fields copied: the next helper call may move the
/// packet.
#[derive(Clone, Copy)]
pub struct Packet<F: Family> {
    /// DSCP and ECN.
    pub tos: u8,
    /// Time to live.
    pub ttl: u8,
    /// TCP, UDP or ICMP, which also stands for `ICMPv6`.
    pub protocol: u8,
    /// TCP flags; 0 for other protocols.
    pub flags: u8,
    /// TCP: the sequence number after it.
    pub next: u32,
    /// TCP: the acknowledgement number.
    pub acknowledged: u32,
    /// Source address.
    pub source: F::Address,
    /// Destination address.
    pub destination: F::Address,
    /// Port on the guest's side, or the ICMP echo identifier.
    pub local_port: Be16,
    /// Port of the peer in the VPC; 0 for ICMP.
    pub peer_port: Be16,
    /// It is UDP without a checksum.
    pub unchecked: bool,
    /// It is an ICMP error: [`icmp`](crate::icmp) finds the ports, which are 0.
    pub is_error: bool,
    /// Length of IP and transport headers.
    pub header_length: u32,
    /// What it adds to its flow's traffic.
    pub traffic: Traffic,
}

/// Reads the packet behind an Ethernet header, which said that it is of this family. ICMP is
/// accepted as an echo request outwards and an echo reply inwards, and as an error both ways.
#[inline(always)]
pub fn packet<F: Family>(ctx: &TcContext, direction: Direction) -> Result<Packet<F>, Drop> {
    #[repr(C, packed(2))]
    struct Headers<F: Family> {
        ip: F::Header,
        /// All of UDP's and ICMP's header.
        l4: [Be16; 4],
    }

    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    let headers = unsafe { &*at::<Headers<F>>(ctx, IP).ok_or_else(|| short::<F>(ctx))? };
    // SAFETY: headers are 2-byte aligned in packets.
    let ip = unsafe { &*(&raw const headers.ip) };
    let Fields { tos, ttl, protocol, length, source, destination } = F::fields(ip)?;
    let l4 = headers.l4;
    let (local_port, peer_port) = match direction {
        Direction::Out => (l4[0], l4[1]),
        Direction::In => (l4[1], l4[0]),
    };
    let mut packet = Packet {
        tos,
        ttl,
        protocol,
        flags: 0,
        next: 0,
        acknowledged: 0,
        source,
        destination,
        local_port,
        peer_port,
        unchecked: false,
        is_error: false,
        header_length: F::HEADER as u32 + 8,
        traffic: Traffic::NONE,
    };
    match protocol {
        TCP => {
            // SAFETY: `at` checked the bounds.
            let header =
                unsafe { *at::<[[u8; 4]; 5]>(ctx, self::l4::<F>()).ok_or(Drop::Truncated)? };
            let [offset, flags, ..] = header[3];
            packet.flags = flags;
            packet.header_length = F::HEADER as u32 + (offset >> 4) as u32 * 4;
            packet.next = u32::from_be_bytes(header[1])
                .wrapping_add(length.wrapping_sub(packet.header_length))
                .wrapping_add(u32::from(flags & tcp::FIN));
            packet.acknowledged = u32::from_be_bytes(header[2]);
            if packet.header_length < F::HEADER as u32 + 20 {
                return Err(Drop::BadHeader);
            }
        }
        // RFC 8200, section 8.1.
        UDP if F::UDP_NEEDS_CHECKSUM && l4[3].0 == 0 => return Err(Drop::NoChecksum),
        UDP => packet.unchecked = l4[3].0 == 0,
        ICMP => {
            let [kind, _] = l4[0].0.to_ne_bytes();
            let query = match direction {
                Direction::Out => F::ECHO_REQUEST,
                Direction::In => F::ECHO_REPLY,
            };
            if kind == query {
                packet.local_port = l4[2];
                packet.peer_port = Be16(0);
            } else if F::is_error(kind) {
                packet.is_error = true;
                packet.local_port = Be16(0);
                packet.peer_port = Be16(0);
            } else if F::is_other_error(kind) {
                return Err(Drop::IcmpError);
            } else {
                return Err(Drop::UnsupportedProtocol);
            }
        }
        _ => return Err(Drop::UnsupportedProtocol),
    }
    if length < packet.header_length || length + IP as u32 > ctx.len() {
        return Err(Drop::Truncated);
    }
    packet.traffic = traffic(ctx, length, packet.header_length);
    Ok(packet)
}

/// What a packet is without a whole header of any transport: the last fragment may be that short.
#[inline(always)]
fn short<F: Family>(ctx: &TcContext) -> Drop {
    // SAFETY: `at` checked the bounds.
    match at::<F::Header>(ctx, IP).map(|header| F::fields(unsafe { &*header })) {
        Some(Err(Drop::Fragment)) => Drop::Fragment,
        _ => Drop::Truncated,
    }
}

/// A later fragment, as the packet of its datagram's ports.
#[inline(always)]
pub fn rest<F: Family>(fields: &Fields<F>, local_port: Be16, peer_port: Be16) -> Packet<F> {
    let Fields { tos, ttl, protocol, source, destination, .. } = *fields;
    Packet {
        tos,
        ttl,
        protocol,
        flags: 0,
        next: 0,
        acknowledged: 0,
        source,
        destination,
        local_port,
        peer_port,
        unchecked: false,
        is_error: false,
        header_length: F::HEADER as u32,
        traffic: Traffic::NONE,
    }
}

/// What a packet of this length amounts to on the wire, where each segment has all headers.
#[inline(always)]
fn traffic(ctx: &TcContext, length: u32, headers: u32) -> Traffic {
    // SAFETY: the context is the kernel's for as long as the program runs. Its count of segments
    // is not looked at: it is 0 for what came through a TAP.
    let segment = unsafe { (*ctx.skb.skb).gso_size };
    let packets = if segment == 0 { 1 } else { (length - headers).div_ceil(segment).max(1) };
    Traffic { packets: packets as u64, bytes: (length + (packets - 1) * headers) as u64 }
}
