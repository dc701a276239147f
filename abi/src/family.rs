//! What differs between the families of addresses, so that the programs are written once.

mod v4;
mod v6;

pub use v4::V4;
pub use v6::V6;

use crate::drop::Drop;
use crate::flow::Direction;
use crate::maps::{HostVpc, ProxyVpc, Slot};
use crate::wire::{Be16, Ip};

/// A family of addresses.
pub trait Family: Copy {
    /// An address.
    type Address: Copy;
    /// The IP header, without options.
    type Header: Copy;

    /// What the Ethernet header says.
    const ETHERTYPE: Be16;
    /// Length of the IP header, in bytes.
    const HEADER: usize = size_of::<Self::Header>();
    /// The IP protocol number of its ICMP.
    const ICMP: u8;
    /// Type of its ICMP: echo request.
    const ECHO_REQUEST: u8;
    /// Type of its ICMP: echo reply.
    const ECHO_REPLY: u8;
    /// Type and code of its ICMP: it does not fit the next link.
    const TOO_BIG: [u8; 2];
    /// Type and code of its ICMP: no time left to live.
    const TIME_EXCEEDED: [u8; 2];
    /// Type and code of its ICMP: administratively prohibited.
    const PROHIBITED: [u8; 2];
    /// Type and code of its ICMP: no way there.
    const UNREACHABLE: [u8; 2];
    /// Whether UDP must have a checksum.
    const UDP_NEEDS_CHECKSUM: bool;
    /// Whether its ICMP's checksum covers the addresses, as those of TCP and UDP do.
    const ICMP_COVERS_ADDRESSES: bool;

    /// As flows know it.
    fn ip(address: Self::Address) -> Ip;
    /// Whether they are the same.
    fn same(a: Self::Address, b: Self::Address) -> bool;
    /// A few bits of it, for hashing.
    fn hash(address: Self::Address) -> u32;
    /// Whether a host in a VPC can have it.
    fn is_destination(address: Self::Address) -> bool;
    /// Whether a flow can have it as its peer's address.
    fn is_peer(address: Self::Address) -> bool;
    /// What to add to a sum of words that covers `old`, which becomes `new`.
    fn difference(old: Self::Address, new: Self::Address) -> u32;
    /// The same, for the kernel's helper: the old value, the new one and their size in bytes, or 0,
    /// the difference and 0.
    fn replacement(old: Self::Address, new: Self::Address) -> (u64, u64, u64);

    /// The address of a slot's guest.
    fn guest(slot: &Slot) -> Self::Address;
    /// The address that guests appear as, on a host.
    ///
    /// # Errors
    /// If the VPC has none of this family.
    fn shared(vpc: &HostVpc) -> Result<Self::Address, Drop>;
    /// The address that guests appear as, on a proxy.
    ///
    /// # Errors
    /// If the VPC has none of this family.
    fn shared_on_proxy(vpc: &ProxyVpc) -> Result<Self::Address, Drop>;

    /// What a packet's header says.
    ///
    /// # Errors
    /// If it is not one that is translated.
    fn fields(header: &Self::Header) -> Result<Fields<Self>, Drop>;
    /// What the header of a packet says that an ICMP error embeds.
    ///
    /// # Errors
    /// If it is not one that is translated.
    fn embedded(header: &Self::Header) -> Result<Fields<Self>, Drop>;
    /// Length of header and payload, in bytes.
    fn length(header: &Self::Header) -> u32;
    /// Source address.
    fn source(header: &Self::Header) -> Self::Address;
    /// Whether the packet must not be fragmented on its way.
    fn is_whole(header: &Self::Header) -> bool;
    /// Puts `address` in the place of the guest's side: the source outwards, the destination
    /// inwards. Takes one off the time to live, which is at least 1.
    fn readdress(header: &mut Self::Header, direction: Direction, address: Self::Address);
    /// The same in the header of a packet that goes the other way, and whose time to live stays;
    /// returns what to add to a sum of words that covers it.
    fn readdress_embedded(
        header: &mut Self::Header,
        direction: Direction,
        address: Self::Address,
    ) -> u32;
    /// The sum of the header's words (RFC 1071).
    fn sum(header: &Self::Header) -> u32;
    /// The sum of what its ICMP's checksum covers besides the message.
    fn pseudo_sum(header: &Self::Header) -> u32;
    /// The sum of what the checksums of TCP and UDP cover besides the segment: what stands in their
    /// place while they are left to the device (virtio 1.2, section 5.1.6.2).
    fn transport_sum(header: &Self::Header) -> u32;
    /// Whether its ICMP has errors of this type that are translated.
    fn is_error(kind: u8) -> bool;
    /// Whether its ICMP has other messages of this type that nobody may answer with an error.
    fn is_other_error(kind: u8) -> bool;
}

/// A family in which the data path has something to say itself.
pub trait Answering: Family {
    /// A header of internetwork control.
    fn answer(source: Self::Address, destination: Self::Address, payload: u16) -> Self::Header;
}

/// What a program needs of an IP header.
#[derive(Clone, Copy, Debug)]
pub struct Fields<F: Family> {
    /// DSCP and ECN.
    pub tos: u8,
    /// Time to live.
    pub ttl: u8,
    /// IP protocol; [`ICMP`](crate::wire::ICMP) also stands for `ICMPv6` in IPv6.
    pub protocol: u8,
    /// Length of header and payload.
    pub length: u32,
    /// Source address.
    pub source: F::Address,
    /// Destination address.
    pub destination: F::Address,
}
