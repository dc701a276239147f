//! What is on the wire: headers, numbers in network byte order, well-known addresses.
//!
//! Headers are 2-byte aligned, since an Ethernet header of 14 bytes precedes them; they are read
//! and written in place.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv4 address, its octets in memory as on the wire.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ipv4(pub u32);

impl Ipv4 {
    /// From octets.
    #[inline]
    pub const fn new(octets: [u8; 4]) -> Self {
        Self(u32::from_ne_bytes(octets))
    }

    /// As a number in the order of the processor: adding 1 yields the next address.
    #[inline]
    pub const fn to_bits(self) -> u32 {
        u32::from_be(self.0)
    }

    /// Whether it lies in `network`, of which only the bits set in `mask` count.
    #[inline]
    pub const fn is_in(self, network: Self, mask: Self) -> bool {
        (self.0 ^ network.0) & mask.0 == 0
    }
}

impl From<Ipv4Addr> for Ipv4 {
    fn from(address: Ipv4Addr) -> Self {
        Self::new(address.octets())
    }
}

impl From<Ipv4> for Ipv4Addr {
    fn from(address: Ipv4) -> Self {
        address.0.to_ne_bytes().into()
    }
}

/// An IP address of either family, IPv4 as an IPv4-mapped IPv6 address (RFC 4291, section
/// 2.5.5.2), its octets in memory as on the wire: one kind of key for both.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ip(pub [u32; 4]);

impl Ip {
    /// `::`, which no flow has.
    pub const UNSPECIFIED: Self = Self([0; 4]);
    /// What precedes an IPv4 address: `::ffff:0:0/96`.
    const MAPPED: [u32; 3] = [0, 0, 0xffffu32.to_be()];

    /// An IPv4 address.
    #[inline(always)]
    pub const fn v4(address: Ipv4) -> Self {
        let [a, b, c] = Self::MAPPED;
        Self([a, b, c, address.0])
    }

    /// The IPv4 address, if it is one.
    #[inline(always)]
    pub const fn to_v4(self) -> Option<Ipv4> {
        let [a, b, c, d] = self.0;
        if a == 0 && b == 0 && c == Self::MAPPED[2] { Some(Ipv4(d)) } else { None }
    }

    /// The version of IP that it is of: 4 or 6.
    #[inline(always)]
    pub const fn family(&self) -> u8 {
        if self.to_v4().is_some() { 4 } else { 6 }
    }

    /// Whether it is `::`.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        let [a, b, c, d] = self.0;
        a | b | c | d == 0
    }
}

impl Ip {
    /// Whether it is the same: at once, since the compiler would compare word by word and branch.
    #[inline(always)]
    pub const fn is(self, other: Self) -> bool {
        let (a, b) = (self.0, other.0);
        (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) == 0
    }

    /// Whether it lies in `network`, of which only the bits set in `mask` count.
    #[inline(always)]
    pub const fn is_in(self, network: Self, mask: Self) -> bool {
        let (a, b, m) = (self.0, network.0, mask.0);
        ((a[0] ^ b[0]) & m[0])
            | ((a[1] ^ b[1]) & m[1])
            | ((a[2] ^ b[2]) & m[2])
            | ((a[3] ^ b[3]) & m[3])
            == 0
    }

    /// The link-local address of whoever has this MAC address (RFC 4291, appendix A).
    #[inline(always)]
    pub const fn link_local(mac: Mac) -> Self {
        let mac = mac.octets();
        let high = u32::from_ne_bytes([mac[0] ^ 2, mac[1], mac[2], 0xff]);
        let low = u32::from_ne_bytes([0xfe, mac[3], mac[4], mac[5]]);
        Self([0xfe80_0000u32.to_be(), 0, high, low])
    }

    /// Whether it is link-local: `fe80::/10`.
    #[inline(always)]
    pub const fn is_link_local(&self) -> bool {
        u32::from_be(self.0[0]) >> 22 == 0xfe80 >> 6
    }
}

impl From<Ipv6Addr> for Ip {
    fn from(address: Ipv6Addr) -> Self {
        let octets = address.octets();
        let (words, _) = octets.as_chunks::<4>();
        Self(core::array::from_fn(|index| u32::from_ne_bytes(words[index])))
    }
}

impl From<Ipv4Addr> for Ip {
    fn from(address: Ipv4Addr) -> Self {
        Self::v4(address.into())
    }
}

impl From<IpAddr> for Ip {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => address.into(),
        }
    }
}

impl From<Ip> for Ipv6Addr {
    fn from(address: Ip) -> Self {
        let mut octets = [0; 16];
        for (to, word) in octets.as_chunks_mut::<4>().0.iter_mut().zip(address.0) {
            *to = word.to_ne_bytes();
        }
        octets.into()
    }
}

impl From<Ip> for IpAddr {
    /// An IPv4-mapped address becomes an IPv4 address.
    fn from(address: Ip) -> Self {
        Ipv6Addr::from(address).to_canonical()
    }
}

/// A 16-bit number in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Be16(pub u16);

impl Be16 {
    /// From a number in the order of the processor.
    #[inline]
    pub const fn new(value: u16) -> Self {
        Self(value.to_be())
    }

    /// The number in the order of the processor.
    #[inline]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}

/// A MAC address, as on the wire; in words, since programs compare and copy those at once.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mac(pub [u16; 3]);

impl Mac {
    /// From octets.
    #[inline]
    pub const fn new(octets: [u8; 6]) -> Self {
        // SAFETY: both are six bytes, of which any are a value.
        Self(unsafe { core::mem::transmute::<[u8; 6], [u16; 3]>(octets) })
    }

    /// Whether it is of a group, or of all.
    #[inline(always)]
    pub const fn is_multicast(self) -> bool {
        self.octets()[0] & 1 != 0
    }

    /// Its octets.
    #[inline(always)]
    pub const fn octets(self) -> [u8; 6] {
        // SAFETY: both are six bytes, of which any are a value.
        unsafe { core::mem::transmute::<[u16; 3], [u8; 6]>(self.0) }
    }
}

/// MAC address of every slot's gateway.
pub const GATEWAY_MAC: Mac = Mac::new([0x02, b'w', b'r', 0xff, 0xff, 0xff]);

/// Every slot's gateway.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// Source and destination of the inner Ethernet header in the tunnel, which nobody looks at. Not
/// the address of a VXLAN device: Linux drops frames that carry the address of its own.
pub const TUNNEL_MAC: Mac = Mac::new([0x02, b'w', b'r', 0xff, 0xff, 0xfe]);

/// Slots that 169.254.0.0/16 has addresses for: all but 169.254.0.0, the gateway,
/// 169.254.169.0/24 (link-local services) and 169.254.255.255.
pub const MAX_SLOTS: u32 = (1 << 16) - 2 - 1 - 256;

/// The address of a slot's guest; none for 0 and beyond [`MAX_SLOTS`].
pub const fn slot_address(slot: u32) -> Option<Ipv4Addr> {
    if slot == 0 || slot > MAX_SLOTS {
        return None;
    }
    let mut host = slot;
    if host >= 0x0101 {
        host += 1;
    }
    if host >= 0xa900 {
        host += 0x100;
    }
    Some(Ipv4Addr::new(169, 254, (host >> 8) as u8, host as u8))
}

/// The slot that has this address: the inverse of [`slot_address`].
pub const fn slot_number(address: Ipv4Addr) -> Option<u32> {
    let bits = address.to_bits();
    if bits >> 16 != 0xa9fe {
        return None;
    }
    let slot = match bits & 0xffff {
        0 | 0x0101 | 0xa900..=0xa9ff | 0xffff => return None,
        host @ 0..0x0101 => host,
        host @ 0..0xa900 => host - 1,
        host => host - 1 - 0x100,
    };
    Some(slot)
}

/// Every slot's gateway, in IPv6.
pub const GATEWAY_V6: Ip = Ip([0xfe80_0000u32.to_be(), 0, 0, 1u32.to_be()]);

/// The prefix of 64 bits that guests' IPv6 addresses are from: `fdc9:7e4b:52a6::/64`, unique local
/// (RFC 4193), its global identifier drawn at random. As 169.254.0.0/16, it is on no wire.
pub const SLOTS_V6: Ip = Ip([0xfdc9_7e4bu32.to_be(), 0x52a6_0000u32.to_be(), 0, 0]);

/// The IPv6 address of a slot's guest: the number behind [`SLOTS_V6`].
#[inline(always)]
pub const fn slot_address_v6(slot: u32) -> Ip {
    let [a, b, c, _] = SLOTS_V6.0;
    Ip([a, b, c, slot.to_be()])
}

/// The MAC address of a slot's guest: locally administered, unicast.
pub const fn slot_mac(slot: u32) -> Mac {
    let [_, high, middle, low] = slot.to_be_bytes();
    Mac::new([0x02, b'w', b'r', high, middle, low])
}

/// `EtherType` of IPv4.
pub const ETHERTYPE_IPV4: Be16 = Be16::new(0x0800);
/// `EtherType` of IPv6.
pub const ETHERTYPE_IPV6: Be16 = Be16::new(0x86dd);
/// `EtherType` of ARP.
pub const ETHERTYPE_ARP: Be16 = Be16::new(0x0806);

/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;
/// IP protocol number of `ICMPv6`.
pub const ICMPV6: u8 = 58;

/// UDP port of VXLAN (RFC 7348, section 8).
pub const VXLAN_PORT: u16 = 4789;

/// Bytes that encapsulation adds to an IP packet: IPv4, UDP, VXLAN and Ethernet headers.
pub const VXLAN_OVERHEAD: u16 = 20 + 8 + 8 + 14;
/// Bytes that encapsulation adds to an IP packet where the underlay is of IPv6.
pub const VXLAN_OVERHEAD_V6: u16 = VXLAN_OVERHEAD + 20;

/// Ethernet header.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Ethernet {
    /// Destination.
    pub destination: Mac,
    /// Source.
    pub source: Mac,
    /// `EtherType`: what follows.
    pub ethertype: Be16,
}

/// ARP message for Ethernet and IPv4 (RFC 826).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Arp {
    /// Hardware type; 1 is Ethernet.
    pub hardware: Be16,
    /// Protocol type; an `EtherType`.
    pub protocol: Be16,
    /// Length of a hardware address, 6.
    pub hardware_length: u8,
    /// Length of a protocol address, 4.
    pub protocol_length: u8,
    /// [`Arp::REQUEST`] or [`Arp::REPLY`].
    pub operation: Be16,
    /// Sender's hardware address.
    pub sender_mac: Mac,
    /// Sender's protocol address.
    pub sender: Ipv4,
    /// Target's hardware address.
    pub target_mac: Mac,
    /// Target's protocol address.
    pub target: Ipv4,
}

impl Arp {
    /// Operation: who has the target address?
    pub const REQUEST: Be16 = Be16::new(1);
    /// Operation: the sender has the sender address.
    pub const REPLY: Be16 = Be16::new(2);
}

/// IPv4 header without options (RFC 791).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct IpHeader {
    /// Version 4 and a length of 5 words: [`IpHeader::PLAIN`].
    pub version_length: u8,
    /// DSCP, and ECN in the lower two bits.
    pub tos: u8,
    /// Length of header and payload.
    pub total_length: Be16,
    /// Identification.
    pub identification: Be16,
    /// Flags and fragment offset.
    pub fragment: Be16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol.
    pub protocol: u8,
    /// Header checksum.
    pub checksum: u16,
    /// Source.
    pub source: Ipv4,
    /// Destination.
    pub destination: Ipv4,
}

impl IpHeader {
    /// Version and length of a header without options.
    pub const PLAIN: u8 = 0x45;
    /// Flag: do not fragment.
    pub const DF: Be16 = Be16::new(0x4000);
    /// In a fragment, one of these bits is set: more fragments follow, or the offset.
    pub const FRAGMENT: Be16 = Be16::new(0x3fff);
    /// Flag: more fragments follow.
    pub const MORE: Be16 = Be16::new(0x2000);
    /// The fragment's offset: 0 in the first one.
    pub const OFFSET: Be16 = Be16::new(0x1fff);

    /// The sum of its words (RFC 1071): folded, it is the complement of the checksum if that
    /// field is 0, and 0xffff if the field is right.
    #[inline(always)]
    pub const fn sum(&self) -> u32 {
        let (source, destination) = (self.source.0, self.destination.0);
        u16::from_ne_bytes([self.version_length, self.tos]) as u32
            + self.total_length.0 as u32
            + self.identification.0 as u32
            + self.fragment.0 as u32
            + u16::from_ne_bytes([self.ttl, self.protocol]) as u32
            + self.checksum as u32
            + (source & 0xffff)
            + (source >> 16)
            + (destination & 0xffff)
            + (destination >> 16)
    }
}

/// IPv6 header (RFC 8200, section 3).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Ip6Header {
    /// Version 6, traffic class and flow label.
    pub version: [u8; 4],
    /// Length of what follows.
    pub payload_length: Be16,
    /// Protocol, or the first extension header.
    pub next_header: u8,
    /// Time to live.
    pub hop_limit: u8,
    /// Source.
    pub source: Ip,
    /// Destination.
    pub destination: Ip,
}

impl Ip6Header {
    /// Next header: a fragment's.
    pub const FRAGMENT: u8 = 44;

    /// Whether it is of this version.
    #[inline(always)]
    pub const fn is_version_6(&self) -> bool {
        self.version[0] >> 4 == 6
    }

    /// DSCP, and ECN in the lower two bits.
    #[inline(always)]
    pub const fn traffic_class(&self) -> u8 {
        self.version[0] << 4 | self.version[1] >> 4
    }
}

/// IPv6 header, and a fragment's behind it (RFC 8200, section 4.5).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Ip6Fragment {
    /// The IPv6 header.
    pub ip: Ip6Header,
    /// The datagram's protocol, or extension header.
    pub next_header: u8,
    /// Nothing.
    pub reserved: u8,
    /// [`Ip6Fragment::OFFSET`] and [`Ip6Fragment::MORE`].
    pub offset: Be16,
    /// Identification of the datagram: it is not aligned.
    pub identification: [u8; 4],
}

impl Ip6Fragment {
    /// Length of the fragment's header, in bytes.
    pub const LENGTH: u32 = (size_of::<Self>() - size_of::<Ip6Header>()) as u32;
    /// Where the payload belongs, in bytes.
    pub const OFFSET: u16 = 0xfff8;
    /// Others follow.
    pub const MORE: u16 = 1;
}

/// Neighbour solicitation or advertisement (RFC 4861, sections 4.3 and 4.4), with an option for a
/// link-layer address.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Neighbour {
    /// Type and code.
    pub kind: [u8; 2],
    /// Checksum.
    pub checksum: u16,
    /// Of an advertisement: [`Neighbour::ROUTER`], [`Neighbour::SOLICITED`] and
    /// [`Neighbour::OVERRIDE`].
    pub flags: [u8; 4],
    /// Whose link-layer address it is about.
    pub target: Ip,
    /// The option's type and length, in 8 bytes.
    pub option: [u8; 2],
    /// The link-layer address.
    pub mac: Mac,
}

impl Neighbour {
    /// Flag: the sender is a router.
    pub const ROUTER: u8 = 0x80;
    /// Flag: it is the answer to a solicitation.
    pub const SOLICITED: u8 = 0x40;
    /// Flag: what is known of the target is to be replaced.
    pub const OVERRIDE: u8 = 0x20;
    /// Option: the sender's link-layer address.
    pub const SOURCE_MAC: [u8; 2] = [1, 1];
    /// Option: the target's link-layer address.
    pub const TARGET_MAC: [u8; 2] = [2, 1];
    /// Length without the option.
    pub const PLAIN: u32 = 24;
    /// Hop limit of all neighbour discovery: nothing that was forwarded has it.
    pub const HOP_LIMIT: u8 = 255;
}

/// VXLAN header (RFC 7348, section 5).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Vxlan {
    /// The I flag: the VNI is valid.
    pub flags: u32,
    /// VNI in the upper 24 bits, network byte order.
    pub vni: u32,
}

impl Vxlan {
    /// The I flag and no other.
    pub const FLAGS: u32 = 0x0800_0000u32.to_be();

    /// The header for a VNI below 2^24.
    #[inline]
    pub const fn new(vni: u32) -> Self {
        Self { flags: Self::FLAGS, vni: (vni << 8).to_be() }
    }
}

/// UDP header (RFC 768).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Udp {
    /// Source port.
    pub source: Be16,
    /// Destination port.
    pub destination: Be16,
    /// Length of header and payload.
    pub length: Be16,
    /// Checksum; 0 is none.
    pub checksum: u16,
}

/// The same as [`Tunnel`], where the underlay is of IPv6.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct TunnelV6 {
    /// Outer IPv6 header.
    pub ip: Ip6Header,
    /// Outer UDP header.
    pub udp: Udp,
    /// VXLAN header.
    pub vxlan: Vxlan,
    /// Inner Ethernet header.
    pub ethernet: Ethernet,
}

/// What encapsulation puts between the outer Ethernet header and the inner IP packet.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Tunnel {
    /// Outer IPv4 header.
    pub ip: IpHeader,
    /// Outer UDP header.
    pub udp: Udp,
    /// VXLAN header.
    pub vxlan: Vxlan,
    /// Inner Ethernet header.
    pub ethernet: Ethernet,
}
