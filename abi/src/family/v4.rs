//! IPv4 (RFC 791).

use super::{Answering, Family, Fields};
use crate::checksum::{difference, fold, update};
use crate::drop::Drop;
use crate::flow::Direction;
use crate::icmp;
use crate::maps::{HostVpc, ProxyVpc, Slot};
use crate::wire::{Be16, ETHERTYPE_IPV4, ICMP, Ip, IpHeader, Ipv4, TCP, UDP};

/// IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V4;

impl V4 {
    #[inline(always)]
    const fn words(address: Ipv4) -> [u16; 2] {
        [address.0 as u16, (address.0 >> 16) as u16]
    }

    /// Puts in the address of the guest's side, and returns what was there.
    #[inline(always)]
    fn replace(ip: &mut IpHeader, direction: Direction, address: Ipv4) -> Ipv4 {
        match direction {
            Direction::Out => {
                let old = ip.source;
                ip.source = address;
                old
            }
            Direction::In => {
                let old = ip.destination;
                ip.destination = address;
                old
            }
        }
    }

    #[inline(always)]
    pub(crate) fn read(ip: &IpHeader) -> Fields<Self> {
        Fields {
            tos: ip.tos,
            ttl: ip.ttl,
            protocol: ip.protocol,
            length: Self::length(ip),
            source: ip.source,
            destination: ip.destination,
        }
    }
}

impl Family for V4 {
    type Address = Ipv4;
    type Header = IpHeader;

    const ETHERTYPE: Be16 = ETHERTYPE_IPV4;
    const ICMP: u8 = ICMP;
    const ECHO_REQUEST: u8 = icmp::ECHO_REQUEST;
    const ECHO_REPLY: u8 = icmp::ECHO_REPLY;
    const TOO_BIG: [u8; 2] = [icmp::UNREACHABLE, 4];
    const TIME_EXCEEDED: [u8; 2] = [icmp::TIME_EXCEEDED, 0];
    const PROHIBITED: [u8; 2] = [icmp::UNREACHABLE, 13];
    const UNREACHABLE: [u8; 2] = [icmp::UNREACHABLE, 0];
    const UDP_NEEDS_CHECKSUM: bool = false;
    const ICMP_COVERS_ADDRESSES: bool = false;

    #[inline(always)]
    fn ip(address: Ipv4) -> Ip {
        Ip::v4(address)
    }

    #[inline(always)]
    fn same(a: Ipv4, b: Ipv4) -> bool {
        a == b
    }

    #[inline(always)]
    fn hash(address: Ipv4) -> u32 {
        address.0
    }

    /// Not 0/8, 127/8, 169.254/16, multicast or reserved (RFC 6890).
    #[inline(always)]
    fn is_destination(address: Ipv4) -> bool {
        let bits = address.to_bits();
        let first = bits >> 24;
        first != 0 && first != 127 && first < 224 && bits >> 16 != 0xa9fe
    }

    #[inline(always)]
    fn is_peer(_: Ipv4) -> bool {
        true
    }

    #[inline(always)]
    fn difference(old: Ipv4, new: Ipv4) -> u32 {
        difference(Self::words(old), Self::words(new))
    }

    #[inline(always)]
    fn replacement(old: Ipv4, new: Ipv4) -> (u64, u64, u64) {
        (old.0 as u64, new.0 as u64, 4)
    }

    #[inline(always)]
    fn guest(slot: &Slot) -> Ipv4 {
        slot.address
    }

    #[inline(always)]
    fn shared(vpc: &HostVpc) -> Result<Ipv4, Drop> {
        Ok(vpc.shared_address)
    }

    #[inline(always)]
    fn shared_on_proxy(vpc: &ProxyVpc) -> Result<Ipv4, Drop> {
        Ok(vpc.shared_address)
    }

    #[inline(always)]
    fn fields(ip: &IpHeader) -> Result<Fields<Self>, Drop> {
        if ip.version_length != IpHeader::PLAIN {
            return Err(Drop::BadHeader);
        }
        if ip.fragment.0 & IpHeader::FRAGMENT.0 != 0 {
            return Err(Drop::Fragment);
        }
        match ip.protocol {
            TCP | UDP | ICMP => Ok(Self::read(ip)),
            _ => Err(Drop::UnsupportedProtocol),
        }
    }

    /// Also the checksum must be right (RFC 5508, REQ-3b).
    #[inline(always)]
    fn embedded(ip: &IpHeader) -> Result<Fields<Self>, Drop> {
        if ip.version_length != IpHeader::PLAIN || ip.fragment.0 & IpHeader::OFFSET.0 != 0 {
            return Err(Drop::IcmpError);
        }
        if fold(ip.sum()) != 0xffff {
            return Err(Drop::BadChecksum);
        }
        Ok(Self::read(ip))
    }

    #[inline(always)]
    fn length(ip: &IpHeader) -> u32 {
        ip.total_length.get() as u32
    }

    #[inline(always)]
    fn source(ip: &IpHeader) -> Ipv4 {
        ip.source
    }

    #[inline(always)]
    fn is_whole(ip: &IpHeader) -> bool {
        ip.fragment.0 & IpHeader::DF.0 != 0
    }

    #[inline(always)]
    fn readdress(ip: &mut IpHeader, direction: Direction, address: Ipv4) {
        let old = Self::replace(ip, direction, address);
        let before = u16::from_ne_bytes([ip.ttl, ip.protocol]);
        ip.ttl -= 1;
        let after = u16::from_ne_bytes([ip.ttl, ip.protocol]);
        let [old, new] = [Self::words(old), Self::words(address)];
        ip.checksum = update(ip.checksum, [old[0], old[1], before], [new[0], new[1], after]);
    }

    /// The address and the checksum that covers it change the sum by nothing.
    #[inline(always)]
    fn readdress_embedded(ip: &mut IpHeader, direction: Direction, address: Ipv4) -> u32 {
        let old = Self::replace(ip, direction.reversed(), address);
        ip.checksum = update(ip.checksum, Self::words(old), Self::words(address));
        0
    }

    #[inline(always)]
    fn sum(ip: &IpHeader) -> u32 {
        ip.sum()
    }

    #[inline(always)]
    fn pseudo_sum(_: &IpHeader) -> u32 {
        0
    }

    #[inline(always)]
    fn transport_sum(ip: &IpHeader) -> u32 {
        let [source, destination] = [Self::words(ip.source), Self::words(ip.destination)];
        let length = ip.total_length.get().wrapping_sub(Self::HEADER as u16);
        source[0] as u32
            + source[1] as u32
            + destination[0] as u32
            + destination[1] as u32
            + Be16::new(ip.protocol as u16).0 as u32
            + Be16::new(length).0 as u32
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        icmp::is_error(kind)
    }

    #[inline(always)]
    fn is_other_error(kind: u8) -> bool {
        matches!(kind, icmp::SOURCE_QUENCH | icmp::REDIRECT)
    }
}

impl Answering for V4 {
    #[inline(always)]
    fn answer(source: Ipv4, destination: Ipv4, payload: u16) -> IpHeader {
        let mut ip = IpHeader {
            version_length: IpHeader::PLAIN,
            // Internetwork control (RFC 1812, section 4.3.2.5).
            tos: 0xc0,
            total_length: Be16::new(Self::HEADER as u16 + payload),
            identification: Be16(0),
            fragment: IpHeader::DF,
            ttl: 64,
            protocol: ICMP,
            checksum: 0,
            source,
            destination,
        };
        ip.checksum = !fold(ip.sum());
        ip
    }
}
