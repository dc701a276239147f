//! ICMP errors (RFC 792), and their translation (RFC 5508, sections 4 and 5).
//!
//! An error carries the beginning of the packet that it is about. It is for the flow of that
//! packet, and tells of it under the addresses and ports that its receiver knows.

use crate::checksum::{adjust, difference};
use crate::drop::Drop;
use crate::family::{Family, V4};
use crate::flow::Direction;
use crate::wire::{Be16, ICMP, TCP, UDP};

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

/// Types of `ICMPv6` (RFC 4443, RFC 4861).
pub mod v6 {
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 1;
    /// Packet too big.
    pub const TOO_BIG: u8 = 2;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 3;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 4;
    /// Echo request: from here on, messages are no errors.
    pub const ECHO_REQUEST: u8 = 128;
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 129;
    /// Router solicitation, the first message of neighbour discovery.
    pub const ROUTER_SOLICITATION: u8 = 133;
    /// Neighbour solicitation.
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    /// Neighbour advertisement.
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    /// Redirect, the last message of neighbour discovery.
    pub const REDIRECT: u8 = 137;
}

/// An ICMP error, up to the first 8 bytes of the embedded packet's transport.
#[repr(C, packed(2))]
#[derive(Clone, Copy)]
pub struct IcmpError<F: Family = V4> {
    /// Type and code.
    pub kind: [u8; 2],
    /// Checksum of the message.
    pub checksum: u16,
    /// What the type says: the next hop's MTU, or a pointer, or nothing.
    pub rest: [Be16; 2],
    /// The embedded packet's IP header.
    pub ip: F::Header,
    /// The embedded packet's UDP or ICMP header, or the beginning of its TCP header.
    pub l4: [Be16; 4],
}

/// An ICMP error about TCP that embeds as much as the checksum.
#[repr(C, packed(2))]
#[derive(Clone, Copy)]
pub struct IcmpErrorTcp<F: Family = V4> {
    /// The error.
    pub error: IcmpError<F>,
    /// More of the embedded TCP header: acknowledgement number, flags, window.
    pub l4: [Be16; 4],
    /// The embedded TCP header's checksum.
    pub checksum: u16,
}

/// The flow that an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject<A> {
    /// TCP, UDP or ICMP.
    pub protocol: u8,
    /// The address on the guest's side.
    pub local: A,
    /// The port on the guest's side, or the ICMP echo identifier.
    pub local_port: Be16,
    /// The address of the peer.
    pub peer: A,
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
    /// What the sender of a packet that was dropped is told; `mtu` is the next hop's.
    ///
    /// Too big: the MTU (RFC 1191, section 4; RFC 4443, section 3.2). No time left to live. No
    /// port or no room for a new flow (RFC 5508, REQ-8), a rule against it, or none that the guest
    /// may have. No address of this family, so that a guest takes the other one at once. Of all
    /// else, nothing: silence is not a leak.
    #[inline(always)]
    pub const fn of<F: Family>(drop: Drop, mtu: u16) -> Option<Self> {
        let (kind, mtu) = match drop {
            Drop::TooBig => (F::TOO_BIG, mtu),
            Drop::TtlExceeded => (F::TIME_EXCEEDED, 0),
            Drop::PortsExhausted
            | Drop::FlowsExhausted
            | Drop::Denied
            | Drop::FlowLimit
            | Drop::PortLimit => (F::PROHIBITED, 0),
            Drop::NoSharedAddress => (F::UNREACHABLE, 0),
            _ => return None,
        };
        Some(Self { kind, rest: [Be16(0), Be16::new(mtu)] })
    }
}

impl<F: Family> IcmpError<F> {
    /// The flow that it is about. `direction` is the error's way; the packet that it embeds went
    /// the other.
    ///
    /// # Errors
    /// Whatever cannot be a packet of a flow: [`Drop::IcmpError`]; if the embedded IP header's
    /// checksum is wrong, [`Drop::BadChecksum`] (RFC 5508, REQ-3b).
    #[inline(always)]
    pub fn subject(&self, direction: Direction) -> Result<Subject<F::Address>, Drop> {
        let ip = F::embedded(&{ self.ip })?;
        let l4 = self.l4;
        let (source_port, destination_port) = match ip.protocol {
            TCP | UDP => (l4[0], l4[1]),
            ICMP => {
                let [kind, _] = l4[0].0.to_ne_bytes();
                match direction {
                    Direction::In if kind == F::ECHO_REQUEST => (l4[2], Be16(0)),
                    Direction::Out if kind == F::ECHO_REPLY => (Be16(0), l4[2]),
                    _ => return Err(Drop::IcmpError),
                }
            }
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
    /// checksums fit again: those of the embedded headers, as far as they are there, and its own,
    /// which may cover the IP header in front of it, where the same changes. `tcp` is the embedded
    /// TCP header's checksum, if that is there.
    #[inline(always)]
    pub fn translate(
        &mut self,
        subject: &Subject<F::Address>,
        direction: Direction,
        address: F::Address,
        port: Be16,
        tcp: Option<&mut u16>,
    ) {
        let addresses = F::difference(subject.local, address);
        let ports = difference([subject.local_port.0], [port.0]);
        let mut ip = self.ip;
        let mut message = ports + F::readdress_embedded(&mut ip, direction, address);
        self.ip = ip;
        if F::ICMP_COVERS_ADDRESSES {
            message += addresses;
        }

        let (port_index, checksum_index) = match (subject.protocol, direction) {
            (ICMP, _) => (2, 1),
            (_, Direction::In) => (0, 3),
            (_, Direction::Out) => (1, 3),
        };
        self.l4[port_index] = port;
        if subject.protocol == TCP {
            if let Some(checksum) = tcp {
                let next = adjust(*checksum, addresses + ports);
                message += difference([*checksum], [next]);
                *checksum = next;
            }
        } else {
            let found = self.l4[checksum_index].0;
            let next = match subject.protocol {
                ICMP if !F::ICMP_COVERS_ADDRESSES => adjust(found, ports),
                ICMP => adjust(found, addresses + ports),
                _ if found == 0 => 0,
                // 0 would mean that there is none (RFC 768).
                _ => match adjust(found, addresses + ports) {
                    0 => 0xffff,
                    next => next,
                },
            };
            message += difference([found], [next]);
            self.l4[checksum_index] = Be16(next);
        }
        self.checksum = adjust(self.checksum, message);
    }
}
