//! The route tables of a proxy's VPCs: one trie for all of them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{MapData, MapError};
use ipnetwork::IpNetwork;
use warren_abi::maps::{CachedRoute, Route, RouteKey, names};
use warren_proto::route::{Route as Definition, Table, Target, defaults};

use super::programs::MapSpec;
use super::{Error, ProxyVpc, is_missing};

/// Routes of all VPCs of a proxy. The trie takes memory for those that are there.
const MAX_ROUTES: u32 = 1 << 20;

/// Entries of one VPC in the trie, by length of the prefix, VNI included, and key.
pub(super) type Entries = BTreeMap<(u32, RouteKey), Route>;

/// The maps of routes: entries, and what was looked up in them.
pub(super) fn map_specs() -> [MapSpec; 2] {
    [
        MapSpec::new::<Key<RouteKey>, Route>(names::ROUTES, MAX_ROUTES),
        MapSpec::new::<u32, CachedRoute>(names::ROUTE_CACHE, CachedRoute::PLACES),
    ]
}

impl ProxyVpc {
    /// The routes that it has without a table, and beside one that does not overrule them.
    fn default_routes(&self) -> Vec<Definition> {
        let v4 = defaults(self.cidr.into(), self.gateway.map(Into::into));
        let v6 = self.v6.map(|v6| defaults(v6.cidr.into(), v6.gateway.map(Into::into)));
        v4.chain(v6.into_iter().flatten()).collect()
    }

    /// The addresses in the VPC that guests appear as.
    fn shared_addresses(&self) -> Vec<IpAddr> {
        let v6 = self.v6.map(|v6| v6.shared_address.into());
        [self.shared_address.into()].into_iter().chain(v6).collect()
    }
}

/// The trie, and what it holds: this process is the only one to write.
pub(super) struct Routes {
    trie: LpmTrie<MapData, RouteKey, Route>,
    present: BTreeMap<u32, Entries>,
}

impl Routes {
    /// Adopts the entries that are there.
    pub fn open(trie: LpmTrie<MapData, RouteKey, Route>) -> Result<Self, Error> {
        let mut present = BTreeMap::<u32, Entries>::new();
        for entry in &trie {
            let (key, route) = entry.map_err(error)?;
            present
                .entry(key.data().vni)
                .or_default()
                .insert((key.prefix_len(), key.data()), route);
        }
        Ok(Self { trie, present })
    }

    /// Makes `wanted` the entries of a VPC: first those that are new or changed, then away with
    /// the others. An entry that stays is never missing.
    pub fn set(&mut self, vni: u32, wanted: &Entries) -> Result<(), Error> {
        let present = self.present.entry(vni).or_default();
        for (&place, route) in wanted {
            if present.get(&place) != Some(route) {
                self.trie.insert(&key(place), route, 0).map_err(error)?;
                // At once, so that this is what the trie holds even if the next one fails.
                present.insert(place, *route);
            }
        }
        let unwanted: Vec<_> =
            present.keys().filter(|place| !wanted.contains_key(place)).copied().collect();
        for place in unwanted {
            match self.trie.remove(&key(place)) {
                Err(source) if !is_missing(&source) => return Err(error(source)),
                _ => present.remove(&place),
            };
        }
        if present.is_empty() {
            self.present.remove(&vni);
        }
        Ok(())
    }

    /// The routes of a VPC's own table.
    pub fn of(&self, vpc: &ProxyVpc) -> Vec<Definition> {
        let defaults = vpc.default_routes();
        let present = self.present.get(&vpc.vni).into_iter().flatten();
        let routes = present.filter_map(|(&(length, key), route)| definition(length, key, route));
        routes.filter(|route| !defaults.contains(route)).collect()
    }
}

fn error(source: MapError) -> Error {
    Error::map(names::ROUTES, source)
}

fn key((length, data): (u32, RouteKey)) -> Key<RouteKey> {
    Key::new(length, data)
}

/// The entries for a VPC's routes, which are checked; none if it has no table.
pub(super) fn entries(vpc: &ProxyVpc) -> Result<Entries, Error> {
    if vpc.routes.is_empty() {
        return Ok(Entries::new());
    }
    let table = Table::new(&vpc.routes, &vpc.default_routes(), &vpc.shared_addresses());
    let table = table.map_err(Error::Routes)?;
    let ipv4 = RouteKey { vni: vpc.vni, address: RouteKey::IPV4 };
    let none = Route::new(Route::NONE);
    let mut entries = Entries::from([((RouteKey::VNI_BITS + RouteKey::IPV4_BITS, ipv4), none)]);
    for Definition { prefix, target } in table.iter() {
        let before = match prefix {
            IpNetwork::V4(_) => RouteKey::VNI_BITS + RouteKey::IPV4_BITS,
            IpNetwork::V6(_) => RouteKey::VNI_BITS,
        };
        let key = RouteKey { vni: vpc.vni, address: prefix.network().into() };
        let route = match target {
            Target::Local => Route::new(Route::LOCAL),
            Target::Via(next_hop) => Route::via(next_hop.into()),
            Target::Blackhole => Route::new(Route::BLACKHOLE),
        };
        entries.insert((before + u32::from(prefix.prefix()), key), route);
    }
    Ok(entries)
}

/// The route that an entry is of; none for the one that is in each table.
fn definition(length: u32, key: RouteKey, route: &Route) -> Option<Definition> {
    let length = length.checked_sub(RouteKey::VNI_BITS)?;
    let (address, bits) = match key.address.to_v4() {
        Some(address) if length >= RouteKey::IPV4_BITS => {
            (std::net::Ipv4Addr::from(address).into(), length - RouteKey::IPV4_BITS)
        }
        _ => (key.address.into(), length),
    };
    let prefix = IpNetwork::new(address, bits as u8).ok()?;
    let target = match route.kind {
        Route::LOCAL => Target::Local,
        Route::VIA => Target::Via(route.next_hop.into()),
        Route::BLACKHOLE => Target::Blackhole,
        _ => return None,
    };
    Some(Definition { prefix, target })
}

#[cfg(test)]
mod tests {
    use super::super::ProxyVpcV6;
    use super::*;

    fn vpc(routes: &[&str]) -> ProxyVpc {
        ProxyVpc {
            vni: 7,
            interface: String::new(),
            shared_address: [10, 1, 0, 9].into(),
            cidr: "10.1.0.0/16".parse().unwrap(),
            gateway: Some([10, 1, 0, 1].into()),
            v6: Some(ProxyVpcV6 {
                shared_address: "2001:db8:1::9".parse().unwrap(),
                cidr: "2001:db8:1::/64".parse().unwrap(),
                gateway: Some("fe80::1".parse().unwrap()),
            }),
            holders: vec![],
            claim: None,
            routes: routes.iter().map(|route| route.parse().unwrap()).collect(),
            public: None,
        }
    }

    #[test]
    fn entries_hold_all_that_makes_a_route() {
        let routes = ["10.2.0.0/16 via 10.1.0.2", "fd00::/8 local", "fd00::/64 blackhole"];
        let entries = entries(&vpc(&routes)).unwrap();
        let lengths: Vec<_> = entries.keys().map(|(length, _)| *length).collect();
        // The default route of IPv4 stands where otherwise the entry is that keeps it from `::/0`.
        assert_eq!(lengths, [32, 40, 96, 96, 128, 144, 144]);
        let mut found: Vec<_> = entries
            .iter()
            .filter_map(|(&(length, key), route)| definition(length, key, route))
            .map(|route| route.to_string())
            .collect();
        found.sort();
        let mut wanted = routes.to_vec();
        wanted.extend(["0.0.0.0/0 via 10.1.0.1", "10.1.0.0/16 local"]);
        wanted.extend(["::/0 via fe80::1", "2001:db8:1::/64 local"]);
        wanted.sort_unstable();
        assert_eq!(found, wanted);
    }
}
