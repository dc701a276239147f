//! ICMP errors (RFC 792), and their translation (RFC 5508, sections 4 and 5).
//!
//! An error carries the beginning of the packet that it is about. It is for the flow of that
//! packet, and tells of it under the addresses and ports that its receiver knows.

use crate::checksum::{fold, update};
use crate::drop::Drop;
use crate::flow::Direction;
use crate::wire::{Be16, ICMP, IpHeader, Ipv4, TCP, UDP};

/// Echo reply.
pub const ECHO_REPLY: u8 = 0;
/// Destination unreachable.
pub const UNREACHABLE: u8 = 3;
/// Source quench, which nobody is to send or to heed (RFC 6633).
pub const SOURCE_QUENCH: u8 = 4;
/// Redirect: about a link, not about a flow.
pub const REDIRECT: u8 = 5;
/// Echo request.
pub const ECHO_REQUEST: u8 = 8;
/// Time exceeded.
pub const TIME_EXCEEDED: u8 = 11;
/// Parameter problem.
pub const PARAMETER_PROBLEM: u8 = 12;

/// Whether messages of this type are errors that are translated.
#[inline(always)]
pub const fn is_error(kind: u8) -> bool {
    matches!(kind, UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM)
}

/// An ICMP error, up to the first 8 bytes of the embedded packet's transport.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct IcmpError {
    /// Type and code.
    pub kind: [u8; 2],
    /// Checksum of the message.
    pub checksum: u16,
    /// What the type says: the next hop's MTU, or a pointer, or nothing.
    pub rest: [Be16; 2],
    /// The embedded packet's IP header.
    pub ip: IpHeader,
    /// The embedded packet's UDP or ICMP header, or the beginning of its TCP header.
    pub l4: [Be16; 4],
}

/// An ICMP error about TCP that embeds as much as the checksum.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct IcmpErrorTcp {
    /// The error.
    pub error: IcmpError,
    /// More of the embedded TCP header: acknowledgement number, flags, window.
    pub l4: [Be16; 4],
    /// The embedded TCP header's checksum.
    pub checksum: u16,
}

/// The flow that an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// TCP, UDP or ICMP.
    pub protocol: u8,
    /// The address on the guest's side.
    pub local: Ipv4,
    /// The port on the guest's side, or the ICMP echo identifier.
    pub local_port: Be16,
    /// The address of the peer.
    pub peer: Ipv4,
    /// The port of the peer; 0 for ICMP.
    pub peer_port: Be16,
}

/// Why a packet went no further, as its sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reason {
    /// Type and code.
    pub kind: [u8; 2],
    /// What the type says.
    pub rest: [Be16; 2],
}

impl Reason {
    /// Fragmentation needed and DF set.
    const TOO_BIG: [u8; 2] = [UNREACHABLE, 4];
    /// Communication administratively prohibited.
    const PROHIBITED: [u8; 2] = [UNREACHABLE, 13];

    /// What the sender of a packet that was dropped is told; `mtu` is the next hop's.
    ///
    /// Too big: the MTU (RFC 1191, section 4). No time left to live (RFC 792). No port or no room
    /// for a new flow (RFC 5508, REQ-8). Of all else, nothing: silence is not a leak.
    #[inline(always)]
    pub const fn of(drop: Drop, mtu: u16) -> Option<Self> {
        let (kind, mtu) = match drop {
            Drop::TooBig => (Self::TOO_BIG, mtu),
            Drop::TtlExceeded => ([TIME_EXCEEDED, 0], 0),
            Drop::PortsExhausted | Drop::FlowsExhausted => (Self::PROHIBITED, 0),
            _ => return None,
        };
        Some(Self { kind, rest: [Be16(0), Be16::new(mtu)] })
    }

    /// Whether it concerns only packets that must not be fragmented.
    #[inline(always)]
    pub const fn is_about_df(&self) -> bool {
        let [kind, code] = self.kind;
        kind == Self::TOO_BIG[0] && code == Self::TOO_BIG[1]
    }
}

impl IcmpError {
    /// The flow that it is about. `direction` is the error's way; the packet that it embeds went
    /// the other.
    ///
    /// # Errors
    /// Whatever cannot be a packet of a flow: [`Drop::IcmpError`]; if the embedded IP header's
    /// checksum is wrong, [`Drop::BadChecksum`] (RFC 5508, REQ-3b).
    #[inline(always)]
    pub fn subject(&self, direction: Direction) -> Result<Subject, Drop> {
        let ip = self.ip;
        if ip.version_length != IpHeader::PLAIN || ip.fragment.0 & IpHeader::OFFSET.0 != 0 {
            return Err(Drop::IcmpError);
        }
        if fold(ip.sum()) != 0xffff {
            return Err(Drop::BadChecksum);
        }
        let l4 = self.l4;
        let (source_port, destination_port) = match ip.protocol {
            TCP | UDP => (l4[0], l4[1]),
            ICMP => match (direction, l4[0].0.to_ne_bytes()[0]) {
                (Direction::In, ECHO_REQUEST) => (l4[2], Be16(0)),
                (Direction::Out, ECHO_REPLY) => (Be16(0), l4[2]),
                _ => return Err(Drop::IcmpError),
            },
            _ => return Err(Drop::IcmpError),
        };
        let (source, destination) = ((ip.source, source_port), (ip.destination, destination_port));
        let ((local, local_port), (peer, peer_port)) = match direction {
            Direction::In => (source, destination),
            Direction::Out => (destination, source),
        };
        Ok(Subject { protocol: ip.protocol, local, local_port, peer, peer_port })
    }

    /// Puts `address` and `port` in the place of those on the guest's side, and makes the
    /// checksums fit again: those of the embedded headers, as far as they are there, and its own.
    /// `tcp` is the embedded TCP header's checksum, if that is there.
    #[inline(always)]
    pub fn translate(
        &mut self,
        subject: &Subject,
        direction: Direction,
        address: Ipv4,
        port: Be16,
        tcp: Option<&mut u16>,
    ) {
        let old = [subject.local.0 as u16, (subject.local.0 >> 16) as u16];
        let new = [address.0 as u16, (address.0 >> 16) as u16];
        match direction {
            Direction::In => self.ip.source = address,
            Direction::Out => self.ip.destination = address,
        }
        // The address and the checksum that covers it change the message's sum by nothing.
        self.ip.checksum = update(self.ip.checksum, old, new);

        let (port_index, checksum_index) = match (subject.protocol, direction) {
            (ICMP, _) => (2, 1),
            (_, Direction::In) => (0, 3),
            (_, Direction::Out) => (1, 3),
        };
        self.l4[port_index] = port;
        let mut message = update(self.checksum, [subject.local_port.0], [port.0]);
        let old = [old[0], old[1], subject.local_port.0];
        let new = [new[0], new[1], port.0];
        if subject.protocol == TCP {
            if let Some(checksum) = tcp {
                let next = update(*checksum, old, new);
                message = update(message, [*checksum], [next]);
                *checksum = next;
            }
        } else {
            let found = self.l4[checksum_index].0;
            let next = match subject.protocol {
                ICMP => update(found, [subject.local_port.0], [port.0]),
                _ if found == 0 => 0,
                // 0 would mean that there is none (RFC 768).
                _ => match update(found, old, new) {
                    0 => 0xffff,
                    next => next,
                },
            };
            message = update(message, [found], [next]);
            self.l4[checksum_index] = Be16(next);
        }
        self.checksum = message;
    }
}
