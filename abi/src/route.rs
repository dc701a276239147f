//! Routes of VPCs, as the maps hold them.

use crate::maps::ProxyVpc;
use crate::wire::{Ip, Ipv4};

/// What a prefix in the trie of routes is of: the prefix of a route, behind its VPC.
///
/// IPv4 addresses are IPv4-mapped, so `::/0` is a prefix of them, too: each VPC with a route table
/// has an entry for [`RouteKey::IPV4`] that stops them short of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteKey {
    /// The VPC.
    pub vni: u32,
    /// Address of the prefix.
    pub address: Ip,
}

impl RouteKey {
    /// Bits that precede those of an address: the VNI's.
    pub const VNI_BITS: u32 = 32;
    /// Bits that precede those of an IPv4 address in an [`Ip`].
    pub const IPV4_BITS: u32 = 96;
    /// The prefix of all IPv4 addresses, of [`RouteKey::IPV4_BITS`] bits.
    pub const IPV4: Ip = Ip::v4(Ipv4(0));
    /// Bits of a whole key.
    pub const BITS: u32 = Self::VNI_BITS + 128;
}

/// Where packets go.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// One of the constants.
    pub kind: u32,
    /// The next hop of [`Route::VIA`], of the destination's family; else `::`.
    pub next_hop: Ip,
}

impl Route {
    /// Kind: nowhere, as where there is no route.
    pub const NONE: u32 = 0;
    /// Kind: to the destination itself, which is on-link.
    pub const LOCAL: u32 = 1;
    /// Kind: to the next hop.
    pub const VIA: u32 = 2;
    /// Kind: nowhere, on purpose.
    pub const BLACKHOLE: u32 = 3;

    /// Of a kind without a next hop.
    #[inline(always)]
    pub const fn new(kind: u32) -> Self {
        Self { kind, next_hop: Ip::UNSPECIFIED }
    }

    /// To a next hop.
    #[inline(always)]
    pub const fn via(next_hop: Ip) -> Self {
        Self { kind: Self::VIA, next_hop }
    }

    /// Of a VPC without a table: its CIDR is on-link, its gateway the next hop of all else.
    #[inline(always)]
    pub fn without_table(vpc: &ProxyVpc, destination: Ip) -> Self {
        match destination.to_v4() {
            Some(address) if address.is_in(vpc.network, vpc.mask) => Self::new(Self::LOCAL),
            Some(_) if vpc.gateway != Ipv4(0) => Self::via(Ip::v4(vpc.gateway)),
            None if destination.is_in(vpc.v6.network, vpc.v6.mask) => Self::new(Self::LOCAL),
            None if !vpc.v6.gateway.is_unspecified() => Self::via(vpc.v6.gateway),
            _ => Self::new(Self::NONE),
        }
    }
}

/// The route of one destination, as it was found in one state of its VPC's table.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedRoute {
    /// [`ProxyVpc::table`] of that state; 0: nothing is here.
    pub table: u64,
    /// The VPC.
    pub vni: u32,
    /// The destination.
    pub destination: Ip,
    /// The route.
    pub route: Route,
}

impl CachedRoute {
    /// Places of the cache: a power of two.
    pub const PLACES: u32 = 4096;

    /// The only place for a destination: what hashes alike takes turns.
    #[inline(always)]
    pub const fn index(vni: u32, destination: Ip) -> u32 {
        let [a, b, c, d] = destination.0;
        // The finaliser of MurmurHash3, over words that are odd multiples of themselves.
        let mut hash = vni
            ^ a.wrapping_mul(0x9e37_79b1)
            ^ b.wrapping_mul(0x85eb_ca77)
            ^ c.wrapping_mul(0xc2b2_ae3d)
            ^ d.wrapping_mul(0x27d4_eb2f);
        hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
        hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
        (hash ^ hash >> 16) % Self::PLACES
    }

    /// Whether it is of this destination, in the present state of the VPC's table.
    #[inline(always)]
    pub const fn is_of(&self, vpc: &ProxyVpc, destination: Ip) -> bool {
        self.table == vpc.table && self.vni == vpc.vni && self.destination.is(destination)
    }
}
