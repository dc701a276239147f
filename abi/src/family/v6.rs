//! IPv6 (RFC 8200).

use super::{Answering, Family, Fields};
use crate::drop::Drop;
use crate::flow::Direction;
use crate::icmp::v6 as icmp;
use crate::maps::{HostVpc, ProxyVpc, Slot};
use crate::wire::{
    Be16, ETHERTYPE_IPV6, ICMP, ICMPV6, Ip, Ip6Header, SLOTS_V6, TCP, UDP, slot_address_v6,
};

/// Whether a next header is no transport: hop-by-hop options, routing, authentication, destination
/// options, mobility, HIP, shim6 (IANA's IPv6 Extension Header Types).
#[inline(always)]
const fn is_extension(next_header: u8) -> bool {
    matches!(next_header, 0 | 43 | 51 | 60 | 135 | 139 | 140)
}

/// IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V6;

impl V6 {
    /// The protocol that a next header stands for, if it is one that is translated.
    #[inline(always)]
    pub(crate) const fn transport(next_header: u8) -> Result<u8, Drop> {
        match next_header {
            TCP | UDP => Ok(next_header),
            ICMPV6 => Ok(ICMP),
            next if is_extension(next) => Err(Drop::ExtensionHeader),
            _ => Err(Drop::UnsupportedProtocol),
        }
    }

    #[inline(always)]
    pub(crate) fn read(ip: &Ip6Header) -> Fields<Self> {
        Fields {
            tos: ip.traffic_class(),
            ttl: ip.hop_limit,
            protocol: if ip.next_header == ICMPV6 { ICMP } else { ip.next_header },
            length: Self::length(ip),
            source: ip.source,
            destination: ip.destination,
        }
    }

    /// The sum of an address's words.
    #[inline(always)]
    fn sum_of(address: Ip) -> u32 {
        let [a, b, c, d] = address.0;
        let half = |word: u32| (word & 0xffff) + (word >> 16);
        half(a) + half(b) + half(c) + half(d)
    }
}

impl Family for V6 {
    type Address = Ip;
    type Header = Ip6Header;

    const ETHERTYPE: Be16 = ETHERTYPE_IPV6;
    const ICMP: u8 = ICMPV6;
    const ECHO_REQUEST: u8 = icmp::ECHO_REQUEST;
    const ECHO_REPLY: u8 = icmp::ECHO_REPLY;
    const TOO_BIG: [u8; 2] = [icmp::TOO_BIG, 0];
    const TIME_EXCEEDED: [u8; 2] = [icmp::TIME_EXCEEDED, 0];
    const PROHIBITED: [u8; 2] = [icmp::UNREACHABLE, 1];
    const UNREACHABLE: [u8; 2] = [icmp::UNREACHABLE, 0];
    const UDP_NEEDS_CHECKSUM: bool = true;
    const ICMP_COVERS_ADDRESSES: bool = true;

    #[inline(always)]
    fn ip(address: Ip) -> Ip {
        address
    }

    #[inline(always)]
    fn same(a: Ip, b: Ip) -> bool {
        a.is(b)
    }

    #[inline(always)]
    fn hash(address: Ip) -> u32 {
        let [a, b, c, d] = address.0;
        a ^ b.rotate_left(8) ^ c.rotate_left(16) ^ d
    }

    /// Not `::/64` (unspecified, loopback, IPv4-mapped), link-local, multicast (RFC 6890) or a
    /// guest's.
    #[inline(always)]
    fn is_destination(address: Ip) -> bool {
        let first = u32::from_be(address.0[0]);
        let is_guest = (address.0[0] ^ SLOTS_V6.0[0]) | (address.0[1] ^ SLOTS_V6.0[1]) == 0;
        Self::is_peer(address) && first >> 22 != 0xfe80 >> 6 && first >> 24 != 0xff && !is_guest
    }

    /// Not `::/64`: there are the addresses of IPv4's flows, and none of IPv6's.
    #[inline(always)]
    fn is_peer(address: Ip) -> bool {
        address.0[0] | address.0[1] != 0
    }

    #[inline(always)]
    fn difference(old: Ip, new: Ip) -> u32 {
        let [a, b, c, d] = old.0;
        Self::sum_of(Ip([!a, !b, !c, !d])) + Self::sum_of(new)
    }

    #[inline(always)]
    fn replacement(old: Ip, new: Ip) -> (u64, u64, u64) {
        (0, Self::difference(old, new) as u64, 0)
    }

    #[inline(always)]
    fn guest(slot: &Slot) -> Ip {
        slot_address_v6(slot.number)
    }

    #[inline(always)]
    fn shared(vpc: &HostVpc) -> Result<Ip, Drop> {
        let address = vpc.shared_address_v6;
        if address.is_unspecified() { Err(Drop::NoSharedAddress) } else { Ok(address) }
    }

    #[inline(always)]
    fn shared_on_proxy(vpc: &ProxyVpc) -> Result<Ip, Drop> {
        let address = vpc.v6.shared_address;
        if address.is_unspecified() { Err(Drop::NoSharedAddress) } else { Ok(address) }
    }

    #[inline(always)]
    fn fields(ip: &Ip6Header) -> Result<Fields<Self>, Drop> {
        if !ip.is_version_6() {
            return Err(Drop::BadHeader);
        }
        if ip.next_header == Ip6Header::FRAGMENT {
            return Err(Drop::Fragment);
        }
        Ok(Fields { protocol: Self::transport(ip.next_header)?, ..Self::read(ip) })
    }

    #[inline(always)]
    fn embedded(ip: &Ip6Header) -> Result<Fields<Self>, Drop> {
        match ip.next_header {
            TCP | UDP | ICMPV6 if ip.is_version_6() => Ok(Self::read(ip)),
            _ => Err(Drop::IcmpError),
        }
    }

    #[inline(always)]
    fn length(ip: &Ip6Header) -> u32 {
        Self::HEADER as u32 + ip.payload_length.get() as u32
    }

    #[inline(always)]
    fn source(ip: &Ip6Header) -> Ip {
        ip.source
    }

    /// Nobody fragments on the way (RFC 8200, section 5).
    #[inline(always)]
    fn is_whole(_: &Ip6Header) -> bool {
        true
    }

    #[inline(always)]
    fn readdress(ip: &mut Ip6Header, direction: Direction, address: Ip) {
        ip.hop_limit -= 1;
        match direction {
            Direction::Out => ip.source = address,
            Direction::In => ip.destination = address,
        }
    }

    #[inline(always)]
    fn readdress_embedded(ip: &mut Ip6Header, direction: Direction, address: Ip) -> u32 {
        let old;
        match direction {
            Direction::In => {
                old = ip.source;
                ip.source = address;
            }
            Direction::Out => {
                old = ip.destination;
                ip.destination = address;
            }
        }
        Self::difference(old, address)
    }

    #[inline(always)]
    fn sum(ip: &Ip6Header) -> u32 {
        let [a, b, c, d] = ip.version;
        u16::from_ne_bytes([a, b]) as u32
            + u16::from_ne_bytes([c, d]) as u32
            + ip.payload_length.0 as u32
            + u16::from_ne_bytes([ip.next_header, ip.hop_limit]) as u32
            + Self::sum_of(ip.source)
            + Self::sum_of(ip.destination)
    }

    #[inline(always)]
    fn pseudo_sum(ip: &Ip6Header) -> u32 {
        Self::sum_of(ip.source)
            + Self::sum_of(ip.destination)
            + ip.payload_length.0 as u32
            + Be16::new(ip.next_header as u16).0 as u32
    }

    #[inline(always)]
    fn transport_sum(ip: &Ip6Header) -> u32 {
        Self::pseudo_sum(ip)
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(
            kind,
            icmp::UNREACHABLE | icmp::TOO_BIG | icmp::TIME_EXCEEDED | icmp::PARAMETER_PROBLEM
        )
    }

    #[inline(always)]
    fn is_other_error(kind: u8) -> bool {
        kind < icmp::ECHO_REQUEST || kind == icmp::REDIRECT
    }
}

impl Answering for V6 {
    #[inline(always)]
    fn answer(source: Ip, destination: Ip, payload: u16) -> Ip6Header {
        Ip6Header {
            // Internetwork control.
            version: [0x6c, 0, 0, 0],
            payload_length: Be16::new(payload),
            next_header: ICMPV6,
            hop_limit: 64,
            source,
            destination,
        }
    }
}
