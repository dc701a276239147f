//! Route tables of VPCs: what makes a valid one.
//!
//! In text, a route is written as `10.9.0.0/16 via 10.1.0.1`, `10.8.0.0/16 local` or
//! `10.7.0.0/16 blackhole`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display, Formatter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde::{Deserialize, Serialize};

use crate::v1;

/// Most routes of a VPC, without those of its CIDR and gateway.
pub const MAX_ROUTES: usize = 10_000;

/// `0.0.0.0/0`.
const ALL_IPV4: IpNetwork =
    IpNetwork::V4(Ipv4Network::new_checked(Ipv4Addr::UNSPECIFIED, 0).expect("0 is at most 32"));

/// `::/0`.
const ALL_IPV6: IpNetwork =
    IpNetwork::V6(Ipv6Network::new_checked(Ipv6Addr::UNSPECIFIED, 0).expect("0 is at most 128"));

/// What becomes of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Their destinations are on-link.
    Local,
    /// They go to a next hop, which is on-link.
    Via(IpAddr),
    /// They are dropped.
    Blackhole,
}

/// What becomes of the packets for some addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Route {
    /// No bits are set behind it; it is no IPv4 prefix in the clothes of IPv6.
    pub prefix: IpNetwork,
    /// A next hop is of the prefix's family.
    pub target: Target,
}

/// A text or message that is no route.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidRoute(String);

/// Routes that together make no table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTable {
    /// Over [`MAX_ROUTES`].
    #[error("{0} routes are too many: a VPC has at most {MAX_ROUTES}; join some prefixes")]
    TooMany(usize),
    /// Two routes of one prefix.
    #[error("there are two routes to {0}: give each prefix one")]
    Duplicate(IpNetwork),
    /// The next hop cannot be reached directly.
    #[error(
        "the next hop {via} of {prefix} is not on-link: give an address that a local route covers, \
         such as the VPC's CIDR"
    )]
    NotOnLink {
        /// Of the route.
        prefix: IpNetwork,
        /// The next hop.
        via: IpAddr,
    },
    /// The next hop is where the packets come from.
    #[error("the next hop {via} of {prefix} is the VPC's shared address: give another")]
    SharedAddress {
        /// Of the route.
        prefix: IpNetwork,
        /// The next hop.
        via: IpAddr,
    },
}

/// A prefix of either family, such as `10.9.0.0/16`.
pub fn parse_prefix(text: &str) -> Result<IpNetwork, InvalidRoute> {
    let invalid = |problem: String| Err(InvalidRoute(problem));
    let Ok(prefix) = text.parse::<IpNetwork>() else {
        return invalid(format!("\"{text}\" is not a prefix such as 10.9.0.0/16 or 2001:db8::/32"));
    };
    if !text.contains('/') {
        return invalid(format!("\"{text}\" has no prefix length: write {prefix} for one address"));
    }
    let (network, length) = (prefix.network(), prefix.prefix());
    if prefix.ip() != network {
        return invalid(format!("{text} has bits set behind its prefix: write {network}/{length}"));
    }
    match network {
        IpAddr::V6(mapped) if length >= 96 && mapped.to_ipv4_mapped().is_some() => {
            invalid(format!("{text} is of IPv4: write it as such"))
        }
        _ => Ok(prefix),
    }
}

impl Route {
    /// A route that is checked.
    fn new(prefix: IpNetwork, target: Target) -> Result<Self, InvalidRoute> {
        let Target::Via(via) = target else { return Ok(Self { prefix, target }) };
        let unicast = match via {
            IpAddr::V4(via) => via.octets()[0] != 0 && via.octets()[0] < 224 && !via.is_loopback(),
            IpAddr::V6(via) => {
                let mapped = via.to_ipv4_mapped().is_some();
                !mapped && !via.is_unspecified() && !via.is_multicast() && !via.is_loopback()
            }
        };
        if !unicast {
            let problem = format!("the next hop {via} of {prefix} is no address of a machine");
            return Err(InvalidRoute(problem));
        }
        if via.is_ipv4() != prefix.is_ipv4() {
            let problem = format!(
                "the next hop {via} of {prefix} is of the other IP version than the prefix"
            );
            return Err(InvalidRoute(problem));
        }
        Ok(Self { prefix, target })
    }
}

impl FromStr for Route {
    type Err = InvalidRoute;

    fn from_str(text: &str) -> Result<Self, InvalidRoute> {
        let words: Vec<_> = text.split_whitespace().collect();
        let (prefix, target) = match words[..] {
            [prefix, "local"] => (prefix, Target::Local),
            [prefix, "blackhole"] => (prefix, Target::Blackhole),
            [prefix, "via", via] => (prefix, Target::Via(parse_next_hop(via)?)),
            _ => {
                return Err(InvalidRoute(format!(
                    "\"{text}\" is not a route: write PREFIX via ADDRESS, PREFIX local or PREFIX \
                     blackhole"
                )));
            }
        };
        Self::new(parse_prefix(prefix)?, target)
    }
}

fn parse_next_hop(text: &str) -> Result<IpAddr, InvalidRoute> {
    text.parse().map_err(|_| InvalidRoute(format!("the next hop \"{text}\" is not an IP address")))
}

impl Display for Route {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.prefix)?;
        match self.target {
            Target::Local => write!(f, "local"),
            Target::Via(via) => write!(f, "via {via}"),
            Target::Blackhole => write!(f, "blackhole"),
        }
    }
}

impl TryFrom<String> for Route {
    type Error = InvalidRoute;

    fn try_from(text: String) -> Result<Self, InvalidRoute> {
        text.parse()
    }
}

impl From<Route> for String {
    fn from(route: Route) -> Self {
        route.to_string()
    }
}

impl TryFrom<&v1::Route> for Route {
    type Error = InvalidRoute;

    fn try_from(route: &v1::Route) -> Result<Self, InvalidRoute> {
        let prefix = parse_prefix(&route.prefix)?;
        let target = match route.kind() {
            v1::RouteKind::Via => Target::Via(parse_next_hop(&route.via)?),
            _ if !route.via.is_empty() => {
                let problem = format!("{prefix} has the next hop {}, but is not VIA", route.via);
                return Err(InvalidRoute(problem));
            }
            v1::RouteKind::Local => Target::Local,
            v1::RouteKind::Blackhole => Target::Blackhole,
            v1::RouteKind::Unspecified => {
                let problem = format!("{prefix} has no kind: give LOCAL, VIA or BLACKHOLE");
                return Err(InvalidRoute(problem));
            }
        };
        Self::new(prefix, target)
    }
}

impl From<Route> for v1::Route {
    fn from(route: Route) -> Self {
        let (kind, via) = match route.target {
            Target::Local => (v1::RouteKind::Local, String::new()),
            Target::Via(via) => (v1::RouteKind::Via, via.to_string()),
            Target::Blackhole => (v1::RouteKind::Blackhole, String::new()),
        };
        Self { prefix: route.prefix.to_string(), kind: kind.into(), via }
    }
}

/// The routes of one IP version that a VPC has without a table: its CIDR is on-link, its gateway
/// takes the rest.
pub fn defaults(cidr: IpNetwork, gateway: Option<IpAddr>) -> impl Iterator<Item = Route> {
    let local = Route { prefix: cidr, target: Target::Local };
    let all = if cidr.is_ipv4() { ALL_IPV4 } else { ALL_IPV6 };
    let default = gateway.map(|gateway| Route { prefix: all, target: Target::Via(gateway) });
    [local].into_iter().chain(default)
}

/// A route table, valid.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table(BTreeMap<IpNetwork, Target>);

impl Table {
    /// The table of these routes, and of those `defaults` whose prefixes they do not have. No next
    /// hop may be one of the `shared_addresses`.
    pub fn new(
        routes: &[Route],
        defaults: &[Route],
        shared_addresses: &[IpAddr],
    ) -> Result<Self, InvalidTable> {
        if routes.len() > MAX_ROUTES {
            return Err(InvalidTable::TooMany(routes.len()));
        }
        let mut table = BTreeMap::new();
        for route in routes {
            if table.insert(route.prefix, route.target).is_some() {
                return Err(InvalidTable::Duplicate(route.prefix));
            }
        }
        for route in defaults {
            table.entry(route.prefix).or_insert(route.target);
        }
        let table = Self(table);
        table.check_next_hops(shared_addresses)?;
        Ok(table)
    }

    fn check_next_hops(&self, shared_addresses: &[IpAddr]) -> Result<(), InvalidTable> {
        let lengths: BTreeSet<_> = self.0.keys().map(IpNetwork::prefix).collect();
        let mut on_link = BTreeSet::new();
        for (&prefix, &target) in &self.0 {
            let Target::Via(via) = target else { continue };
            if shared_addresses.contains(&via) {
                return Err(InvalidTable::SharedAddress { prefix, via });
            }
            // RFC 4291, section 2.5.6: such addresses are of the link.
            if matches!(via, IpAddr::V6(via) if via.is_unicast_link_local()) {
                continue;
            }
            // Many routes share few next hops.
            if on_link.insert(via) && self.longest(via, &lengths) != Some(Target::Local) {
                return Err(InvalidTable::NotOnLink { prefix, via });
            }
        }
        Ok(())
    }

    /// What becomes of packets for this address: the longest prefix that holds it decides. None if
    /// there is none.
    pub fn look_up(&self, address: IpAddr) -> Option<Target> {
        self.longest(address, &(0..=128).collect())
    }

    fn longest(&self, address: IpAddr, lengths: &BTreeSet<u8>) -> Option<Target> {
        lengths.iter().rev().find_map(|&length| {
            let network = IpNetwork::new(address, length).ok()?;
            let prefix = IpNetwork::new(network.network(), length).ok()?;
            self.0.get(&prefix).copied()
        })
    }

    /// Its routes, in the order of their prefixes.
    pub fn iter(&self) -> impl Iterator<Item = Route> {
        self.0.iter().map(|(&prefix, &target)| Route { prefix, target })
    }
}
