//! Fragments: what is one, what is known of its datagram, and who deals with it.
//!
//! The first fragment has the ports; what becomes of it is remembered for the others, in one of
//! [`CELLS`] places that each slot and each VPC has. One that comes before the first waits outside
//! of the kernel, for [`Tag::delay_ms`] at a time.

use core::marker::PhantomData;

use crate::drop::Drop;
use crate::family::{Family, Fields, V4, V6};
use crate::flow::Direction;
use crate::maps::{HostVpc, ProxyVpc, Slot};
use crate::wire::{Be16, Ethernet, ICMP, Ip, Ip6Fragment, Ip6Header, IpHeader, Mac, TCP, UDP};

/// Datagrams of one slot's or VPC's, in one direction, that are known at one time.
pub const CELLS: u32 = 32;
/// Datagrams that are known at one time, over all: 4 MB.
pub const DATAGRAMS: u32 = 1 << 14;
/// How long a datagram is known, in ticks ([`TICK_NS`](crate::flow::TICK_NS)): as long as its
/// receiver waits for the rest of it (RFC 791, section 3.2).
pub const LIFE: u32 = 15;

/// Where a fragment came from.
pub mod origin {
    /// Host: a slot's TAP. Its owner is the TAP, its mark the attachment's generation.
    pub const SLOT: u8 = 1;
    /// Host: the tunnel. Its owner is the VNI.
    pub const PROXY: u8 = 2;
    /// Proxy: the tunnel. Its owner is the VNI. The tunnel's other end, an [`Ip`](crate::wire::Ip),
    /// is between the tag and the packet.
    pub const HOST: u8 = 3;
    /// Proxy: a VPC. Its owner is the VNI.
    pub const VPC: u8 = 4;
}

/// Tells where a fragment came from, in the place of its MAC addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// One of [`origin`].
    pub origin: u8,
    /// How often it waited for its datagram's first fragment.
    pub attempt: u8,
    /// Whose it is, by the origin.
    pub owner: u32,
    /// Tells that owner from others, by the origin; or 0.
    pub mark: u32,
}

impl Tag {
    /// How often a fragment waits, at most.
    pub const ATTEMPTS: u8 = 10;

    /// What its bytes begin with.
    const MAGIC: [u8; 2] = [0x02, b'f'];

    /// Of a fragment that did not wait yet.
    #[inline(always)]
    pub const fn new(origin: u8, owner: u32, mark: u32) -> Self {
        Self { origin, attempt: 0, owner, mark }
    }

    /// What one that waits is tagged with; none: it waited long enough.
    #[inline(always)]
    #[must_use]
    pub const fn again(self) -> Option<Self> {
        if self.attempt >= Self::ATTEMPTS {
            return None;
        }
        Some(Self { attempt: self.attempt + 1, ..self })
    }

    /// How long it waits this time, in milliseconds: 1 to 512, a second in all.
    pub const fn delay_ms(self) -> u64 {
        let attempt = if self.attempt > Self::ATTEMPTS { Self::ATTEMPTS } else { self.attempt };
        1 << (attempt.saturating_sub(1))
    }

    /// As the destination and the source of a frame.
    #[inline(always)]
    pub const fn to_macs(self) -> (Mac, Mac) {
        let (owner, mark) = (self.owner.to_ne_bytes(), self.mark.to_ne_bytes());
        let magic = Self::MAGIC;
        (
            Mac::new([magic[0], magic[1], self.origin, self.attempt, owner[0], owner[1]]),
            Mac::new([owner[2], owner[3], mark[0], mark[1], mark[2], mark[3]]),
        )
    }

    /// From a frame's destination and source; none if they are no tag.
    #[inline(always)]
    pub const fn from_macs(destination: Mac, source: Mac) -> Option<Self> {
        let (to, from) = (destination.octets(), source.octets());
        if to[0] != Self::MAGIC[0] || to[1] != Self::MAGIC[1] {
            return None;
        }
        let owner = u32::from_ne_bytes([to[4], to[5], from[0], from[1]]);
        let mark = u32::from_ne_bytes([from[2], from[3], from[4], from[5]]);
        Some(Self { origin: to[2], attempt: to[3], owner, mark })
    }

    /// From the beginning of a frame; none if that is no tag.
    pub fn of_frame(frame: &[u8]) -> Option<Self> {
        let (destination, rest) = frame.split_first_chunk()?;
        Self::from_macs(Mac::new(*destination), Mac::new(*rest.first_chunk()?))
    }

    /// Writes it to the beginning of a frame, if there is room.
    pub fn write(self, frame: &mut [u8]) {
        let (destination, source) = self.to_macs();
        if let Some(room) = frame.get_mut(..12) {
            room[..6].copy_from_slice(&destination.octets());
            room[6..].copy_from_slice(&source.octets());
        }
    }
}

const _: () = assert!(size_of::<Ethernet>() == 14);

/// What a fragment says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Identification of its datagram.
    pub id: u32,
    /// Where its payload belongs, in bytes.
    pub offset: u32,
    /// Bytes of its payload.
    pub length: u32,
    /// Whether others follow it.
    pub more: bool,
}

impl Piece {
    /// Whether it can be part of a datagram of this protocol.
    ///
    /// One that is not the last has a multiple of 8 bytes; none is empty, or goes beyond the largest
    /// packet; none lies in the header that the ports are judged by: neither the end of one that is
    /// cut short (RFC 1858) nor another one over it (RFC 3128).
    ///
    /// # Errors
    /// If not.
    #[inline(always)]
    pub const fn check<F: Fragmented>(&self, protocol: u8) -> Result<(), Drop> {
        let Self { offset, length, more, .. } = *self;
        let least = if protocol == TCP { 20 } else { 8 };
        let is_broken = more && length % 8 != 0
            || length == 0
            || offset + length > F::LARGEST
            || offset == 0 && length < least
            || offset != 0 && offset < least;
        if is_broken { Err(Drop::BadFragment) } else { Ok(()) }
    }
}

/// Which datagram.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DatagramKey {
    /// [`Tag::origin`].
    pub origin: u32,
    /// [`Tag::owner`].
    pub owner: u32,
    /// [`Tag::mark`].
    pub mark: u32,
    /// The tunnel's other end, of [`origin::HOST`]; else unspecified.
    pub remote: Ip,
    /// The address of the peer in the VPC.
    pub peer: Ip,
    /// Its identification.
    pub id: u32,
    /// IP protocol.
    pub protocol: u32,
}

impl DatagramKey {
    /// The only place for it: those of one owner that follow each other do not meet.
    #[inline(always)]
    pub const fn cell(&self) -> Cell {
        Cell { owner: self.owner, number: self.origin * CELLS + self.id % CELLS }
    }

    /// Whether both are the same: at once, since the compiler would compare word by word.
    #[inline(always)]
    pub const fn is(&self, other: &Self) -> bool {
        const fn difference(a: &Ip, b: &Ip) -> u32 {
            let (a, b) = (a.0, b.0);
            (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3])
        }

        let addresses =
            difference(&self.peer, &other.peer) | difference(&self.remote, &other.remote);
        let owners = (self.origin ^ other.origin)
            | (self.owner ^ other.owner)
            | (self.mark ^ other.mark)
            | (self.id ^ other.id)
            | (self.protocol ^ other.protocol);
        addresses | owners == 0
    }
}

/// A place for a datagram.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// [`Tag::owner`].
    pub owner: u32,
    /// Counted over origins.
    pub number: u32,
}

/// What is known of a datagram, from its first fragment.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Which one.
    pub key: DatagramKey,
    /// The tick of its first fragment.
    pub began: u32,
    /// Bytes of its first fragment's payload.
    pub first: u32,
    /// Bytes of payload that were seen, less all that there are, when the last fragment tells: 0
    /// when it is complete.
    pub seen: i32,
    /// The identification that it has from here on.
    pub id: u32,
    /// On a host: index of the TAP that gets it.
    pub ifindex: u32,
    /// The attachment of that TAP.
    pub generation: u32,
    /// On a proxy: underlay address of the host that gets it.
    pub host: Ip,
    /// The port on the guests' side.
    pub local_port: Be16,
    /// The port of the peer.
    pub peer_port: Be16,
}

impl Datagram {
    /// Whether it is this one, and fragments of it may still come. What comes for one that is
    /// complete is another's, of the same identification.
    #[inline(always)]
    pub const fn is_of(&self, key: &DatagramKey, now: u32) -> bool {
        self.is_awaited(now) && self.key.is(key)
    }

    /// Whether fragments of it may still come.
    #[inline(always)]
    pub const fn is_awaited(&self, now: u32) -> bool {
        // Another CPU may be a tick ahead.
        self.seen != 0 && now.wrapping_sub(self.began).wrapping_add(1) <= LIFE + 1
    }

    /// Enters a later fragment.
    ///
    /// # Errors
    /// If it is over the first one.
    #[inline(always)]
    pub const fn enter(&mut self, piece: &Piece) -> Result<(), Drop> {
        if piece.offset < self.first {
            return Err(Drop::BadFragment);
        }
        self.seen = self.seen.wrapping_add(piece.length as i32);
        if !piece.more {
            self.seen = self.seen.wrapping_sub((piece.offset + piece.length) as i32);
        }
        Ok(())
    }
}

/// A family's packets in fragments.
pub trait Fragmented: Family {
    /// The header of a fragment: IP's, and what tells of the fragment.
    type Fragment: Copy;

    /// Most bytes that all fragments of a datagram carry.
    const LARGEST: u32;

    /// The IP header.
    fn ip_header(fragment: &Self::Fragment) -> &Self::Header;
    /// The same.
    fn ip_header_mut(fragment: &mut Self::Fragment) -> &mut Self::Header;
    /// The sum of the words of the whole header (RFC 1071).
    fn whole_sum(fragment: &Self::Fragment) -> u32;
    /// What a fragment's header says of it, and the fields, the protocol being the datagram's; none
    /// if it is no fragment.
    ///
    /// # Errors
    /// If it is not one that is translated.
    fn piece(fragment: &Self::Fragment) -> Result<Option<(Piece, Fields<Self>)>, Drop>;
    /// Gives the datagram another identification.
    fn identify(fragment: &mut Self::Fragment, id: u32);
}

impl Fragmented for V4 {
    type Fragment = IpHeader;

    const LARGEST: u32 = 65_535 - Self::HEADER as u32;

    #[inline(always)]
    fn ip_header(fragment: &IpHeader) -> &IpHeader {
        fragment
    }

    #[inline(always)]
    fn ip_header_mut(fragment: &mut IpHeader) -> &mut IpHeader {
        fragment
    }

    #[inline(always)]
    fn whole_sum(fragment: &IpHeader) -> u32 {
        Self::sum(fragment)
    }

    #[inline(always)]
    fn piece(ip: &IpHeader) -> Result<Option<(Piece, Fields<Self>)>, Drop> {
        if ip.version_length != IpHeader::PLAIN {
            return Err(Drop::BadHeader);
        }
        let fragment = ip.fragment.get();
        if fragment & IpHeader::FRAGMENT.get() == 0 {
            return Ok(None);
        }
        if !matches!(ip.protocol, TCP | UDP | ICMP) {
            return Err(Drop::UnsupportedProtocol);
        }
        let offset = (fragment & IpHeader::OFFSET.get()) as u32 * 8;
        let more = fragment & IpHeader::MORE.get() != 0;
        let length = (ip.total_length.get() as u32).saturating_sub(Self::HEADER as u32);
        let piece = Piece { id: ip.identification.get() as u32, offset, length, more };
        Ok(Some((piece, Self::read(ip))))
    }

    #[inline(always)]
    fn identify(ip: &mut IpHeader, id: u32) {
        ip.identify(Be16::new(id as u16));
    }
}

/// Fragments' headers follow IP's at once: other extension headers are not accepted.
impl Fragmented for V6 {
    type Fragment = Ip6Fragment;

    const LARGEST: u32 = 65_535;

    #[inline(always)]
    fn ip_header(fragment: &Ip6Fragment) -> &Ip6Header {
        &fragment.ip
    }

    #[inline(always)]
    fn ip_header_mut(fragment: &mut Ip6Fragment) -> &mut Ip6Header {
        &mut fragment.ip
    }

    #[inline(always)]
    fn whole_sum(fragment: &Ip6Fragment) -> u32 {
        let [a, b, c, d] = fragment.identification;
        Self::sum(&fragment.ip)
            + u16::from_ne_bytes([fragment.next_header, fragment.reserved]) as u32
            + fragment.offset.0 as u32
            + u16::from_ne_bytes([a, b]) as u32
            + u16::from_ne_bytes([c, d]) as u32
    }

    #[inline(always)]
    fn piece(header: &Ip6Fragment) -> Result<Option<(Piece, Fields<Self>)>, Drop> {
        let ip = &header.ip;
        if !ip.is_version_6() {
            return Err(Drop::BadHeader);
        }
        if ip.next_header != Ip6Header::FRAGMENT {
            return Ok(None);
        }
        let protocol = Self::transport(header.next_header)?;
        let offset = header.offset.get();
        let length = (ip.payload_length.get() as u32).saturating_sub(Ip6Fragment::LENGTH);
        let piece = Piece {
            id: u32::from_be_bytes(header.identification),
            offset: (offset & Ip6Fragment::OFFSET) as u32,
            length,
            more: offset & Ip6Fragment::MORE != 0,
        };
        Ok(Some((piece, Fields { protocol, ..Self::read(ip) })))
    }

    #[inline(always)]
    fn identify(fragment: &mut Ip6Fragment, id: u32) {
        fragment.identification = id.to_be_bytes();
    }
}

/// A family's packets of which only the beginning is there: first fragments are read and translated
/// as whole packets are.
#[derive(Clone, Copy, Debug)]
pub struct First<F>(PhantomData<F>);

impl<F: Fragmented> Family for First<F> {
    type Address = F::Address;
    type Header = F::Fragment;

    const ETHERTYPE: Be16 = F::ETHERTYPE;
    const ICMP: u8 = F::ICMP;
    const ECHO_REQUEST: u8 = F::ECHO_REQUEST;
    const ECHO_REPLY: u8 = F::ECHO_REPLY;
    const TOO_BIG: [u8; 2] = F::TOO_BIG;
    const TIME_EXCEEDED: [u8; 2] = F::TIME_EXCEEDED;
    const PROHIBITED: [u8; 2] = F::PROHIBITED;
    const UNREACHABLE: [u8; 2] = F::UNREACHABLE;
    const UDP_NEEDS_CHECKSUM: bool = F::UDP_NEEDS_CHECKSUM;
    const ICMP_COVERS_ADDRESSES: bool = F::ICMP_COVERS_ADDRESSES;

    #[inline(always)]
    fn ip(address: F::Address) -> Ip {
        F::ip(address)
    }
    #[inline(always)]
    fn same(a: F::Address, b: F::Address) -> bool {
        F::same(a, b)
    }
    #[inline(always)]
    fn hash(address: F::Address) -> u32 {
        F::hash(address)
    }
    #[inline(always)]
    fn is_destination(address: F::Address) -> bool {
        F::is_destination(address)
    }
    #[inline(always)]
    fn is_peer(address: F::Address) -> bool {
        F::is_peer(address)
    }
    #[inline(always)]
    fn difference(old: F::Address, new: F::Address) -> u32 {
        F::difference(old, new)
    }
    #[inline(always)]
    fn replacement(old: F::Address, new: F::Address) -> (u64, u64, u64) {
        F::replacement(old, new)
    }
    #[inline(always)]
    fn guest(slot: &Slot) -> F::Address {
        F::guest(slot)
    }
    #[inline(always)]
    fn shared(vpc: &HostVpc) -> Result<F::Address, Drop> {
        F::shared(vpc)
    }
    #[inline(always)]
    fn shared_on_proxy(vpc: &ProxyVpc) -> Result<F::Address, Drop> {
        F::shared_on_proxy(vpc)
    }
    /// Only first fragments.
    #[inline(always)]
    fn fields(header: &F::Fragment) -> Result<Fields<Self>, Drop> {
        match F::piece(header)? {
            Some((Piece { offset: 0, .. }, fields)) => {
                let Fields { tos, ttl, protocol, length, source, destination } = fields;
                Ok(Fields { tos, ttl, protocol, length, source, destination })
            }
            _ => Err(Drop::BadFragment),
        }
    }
    /// None: an error that is in fragments is not translated.
    #[inline(always)]
    fn embedded(_: &F::Fragment) -> Result<Fields<Self>, Drop> {
        Err(Drop::IcmpError)
    }
    #[inline(always)]
    fn length(header: &F::Fragment) -> u32 {
        F::length(F::ip_header(header))
    }
    #[inline(always)]
    fn source(header: &F::Fragment) -> F::Address {
        F::source(F::ip_header(header))
    }
    #[inline(always)]
    fn is_whole(header: &F::Fragment) -> bool {
        F::is_whole(F::ip_header(header))
    }
    #[inline(always)]
    fn readdress(header: &mut F::Fragment, direction: Direction, address: F::Address) {
        F::readdress(F::ip_header_mut(header), direction, address);
    }
    #[inline(always)]
    fn readdress_embedded(
        header: &mut F::Fragment,
        direction: Direction,
        address: F::Address,
    ) -> u32 {
        F::readdress_embedded(F::ip_header_mut(header), direction, address)
    }
    #[inline(always)]
    fn sum(header: &F::Fragment) -> u32 {
        F::whole_sum(header)
    }
    #[inline(always)]
    fn pseudo_sum(header: &F::Fragment) -> u32 {
        F::pseudo_sum(F::ip_header(header))
    }
    /// Of no fragment is the checksum left to the device.
    #[inline(always)]
    fn transport_sum(header: &F::Fragment) -> u32 {
        F::transport_sum(F::ip_header(header))
    }
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        F::is_error(kind)
    }
    #[inline(always)]
    fn is_other_error(kind: u8) -> bool {
        F::is_other_error(kind)
    }
}
