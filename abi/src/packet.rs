//! What a packet says: read once, in one pass, from whatever holds its bytes.

use crate::drop::Drop;
use crate::family::{Family, Fields};
use crate::flow::{Direction, tcp};
use crate::maps::Traffic;
use crate::wire::{Be16, Ethernet, ICMP, TCP, UDP};

/// Where the IP header begins, in bytes.
pub const IP: usize = size_of::<Ethernet>();

/// Where the header of TCP, UDP or ICMP begins: IP options are not accepted.
#[inline(always)]
pub const fn l4<F: Family>() -> usize {
    IP + F::HEADER
}

/// An Ethernet frame, as far as it can be read directly.
///
/// # Safety
/// What [`Frame::at`] returns is aligned to 2 bytes, and valid for reads while the frame is
/// borrowed.
pub unsafe trait Frame {
    /// Where `T`, which is aligned to 2 bytes at most, lies in the frame, if all of it is there.
    fn at<T>(&self, offset: usize) -> Option<*const T>;
    /// Bytes of the whole frame.
    fn length(&self) -> u32;
    /// Bytes of payload of each segment that is made of it; 0: it is none to be segmented.
    fn segment(&self) -> u32;
}

/// A packet of a protocol that is translated, its fields copied: whatever changes the packet may
/// move it.
#[derive(Clone, Copy, Debug)]
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
    /// It is an ICMP error: the ports, which are 0, are to be found in what it embeds.
    pub is_error: bool,
    /// Length of IP and transport headers.
    pub header_length: u32,
    /// What it adds to its flow's traffic.
    pub traffic: Traffic,
}

impl<F: Family> Packet<F> {
    /// Reads the packet behind an Ethernet header, which said that it is of this family. ICMP is
    /// accepted as an echo request outwards and an echo reply inwards, and as an error both ways.
    ///
    /// # Errors
    /// Why the packet is not one that is translated.
    #[inline(always)]
    pub fn read(frame: &impl Frame, direction: Direction) -> Result<Self, Drop> {
        #[repr(C, packed(2))]
        struct Headers<F: Family> {
            ip: F::Header,
            /// All of UDP's and ICMP's header.
            l4: [Be16; 4],
        }

        // SAFETY: `Frame::at`; every bit pattern is a value.
        let headers = unsafe { &*frame.at::<Headers<F>>(IP).ok_or_else(|| short::<F>(frame))? };
        let ip = &raw const headers.ip;
        // SAFETY: headers are aligned to 2 bytes at most.
        let fields = F::fields(unsafe { &*ip })?;
        let Fields { protocol, length, .. } = fields;
        let l4 = headers.l4;
        let (local_port, peer_port) = match direction {
            Direction::Out => (l4[0], l4[1]),
            Direction::In => (l4[1], l4[0]),
        };
        let mut packet = Self::of(&fields, local_port, peer_port);
        packet.header_length = F::HEADER as u32 + 8;
        match protocol {
            TCP => {
                // SAFETY: as above.
                let header =
                    unsafe { *frame.at::<[[u8; 4]; 5]>(self::l4::<F>()).ok_or(Drop::Truncated)? };
                let [offset, flags, ..] = header[3];
                packet.flags = flags;
                packet.header_length = F::HEADER as u32 + (offset >> 4) as u32 * 4;
                packet.next = u32::from_be_bytes(header[1])
                    .wrapping_add(length.wrapping_sub(packet.header_length))
                    .wrapping_add((flags & tcp::FIN) as u32);
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
        if length < packet.header_length || length + IP as u32 > frame.length() {
            return Err(Drop::Truncated);
        }
        packet.traffic = traffic(frame, length, packet.header_length);
        Ok(packet)
    }

    /// A later fragment, as the packet of its datagram's ports; it adds nothing to traffic.
    #[inline(always)]
    pub const fn of(fields: &Fields<F>, local_port: Be16, peer_port: Be16) -> Self {
        let Fields { tos, ttl, protocol, source, destination, .. } = *fields;
        Self {
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
}

/// What a packet is without a whole header of any transport: the last fragment may be that short.
#[inline(always)]
fn short<F: Family>(frame: &impl Frame) -> Drop {
    // SAFETY: `Frame::at`; every bit pattern is a value.
    match frame.at::<F::Header>(IP).map(|header| F::fields(unsafe { &*header })) {
        Some(Err(Drop::Fragment)) => Drop::Fragment,
        _ => Drop::Truncated,
    }
}

/// What a packet of this length amounts to on the wire, where each segment has all headers.
#[inline(always)]
fn traffic(frame: &impl Frame, length: u32, headers: u32) -> Traffic {
    let segment = frame.segment();
    let packets = if segment == 0 { 1 } else { (length - headers).div_ceil(segment) };
    let packets = if packets == 0 { 1 } else { packets };
    Traffic { packets: packets as u64, bytes: (length + (packets - 1) * headers) as u64 }
}
