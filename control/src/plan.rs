//! What a VPC's network deployment needs next, for one of its shared addresses: worked out from what is
//! wanted, who is alive and what each agent acknowledged, without any I/O.
//!
//! A host's port range must be known to every alive proxy before the host uses it: else replies to
//! its first packets would be dropped. So each proxy gets the VPC with all holders first, and a
//! host its part of it only when each alive proxy has acknowledged that host's range. Until then it
//! goes on with the one that it has. Holders on dead hosts stay: a host that is merely cut off still
//! sends.
//!
//! Which proxy owns an address is settled between the proxies: they are told who is alive, in the
//! order of succession. One that is not, and merely cut off from here, thereby loses what it owns:
//! it does not learn of new ranges.
//!
//! What is to be another's ports must first be known by no proxy as the former holder's: not by
//! those that are dead, either, for one that is merely cut off still forwards.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use warren_proto::v1::apply_vpc_request::Role as Apply;
use warren_proto::v1::{self, ApplyVpcRequest, HostVpc, PortHolder, ProxyVpc, Route, VpcSecurity};

use crate::fleet::{Role, Session};
use crate::ports::{Lease, Leases, PortRange};
use crate::spread;
use crate::vpc::{SharedAddress, Vpc, VpcV6};

/// A host or proxy.
#[derive(Clone, Debug)]
pub struct Node<'a> {
    /// What it does.
    pub role: Role,
    /// Its address in the underlay.
    pub underlay_address: IpAddr,
    /// Its session, if it is alive.
    pub session: Option<Session>,
    /// A proxy that is to own no addresses, as long as there is another one.
    pub drained: bool,
    /// The last definition of the VPC with this address that it acknowledged in this session.
    pub acknowledged: Option<&'a ApplyVpcRequest>,
}

/// What is to be done for one shared address, and what is done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// What to push now, by the name of the agent. Its session is the present one.
    pub pushes: BTreeMap<String, ApplyVpcRequest>,
    /// The hosts that may start instances in the VPC, with the session this is true for.
    pub ready: BTreeMap<String, Session>,
    /// The alive proxies.
    pub proxies: BTreeSet<String>,
    /// The fenced ranges that no proxy takes packets from any more.
    pub dropped: BTreeSet<PortRange>,
}

/// Plans the deployment of one of a VPC's shared addresses, with the VPC's own routes and security, on
/// all nodes.
pub fn plan(
    vpc: &Vpc,
    place: usize,
    routes: &[Route],
    security: Option<&VpcSecurity>,
    leases: &Leases,
    nodes: &BTreeMap<String, Node<'_>>,
) -> Plan {
    let mut plan = Plan::default();
    let Some(shared) = vpc.shared_addresses().nth(place) else { return plan };
    let vnis = vpc.vnis();
    let alive =
        |role| nodes.iter().filter(move |(_, node)| node.role == role && node.session.is_some());
    let living: Vec<_> = alive(Role::Proxy).collect();
    let order = succession(&vnis, place, &living);
    let wanted = proxy_request(vpc, &shared, routes, leases, nodes, &order);
    // Once for each proxy, not for each host: a route table is large.
    let serving: Vec<_> =
        living.iter().map(|(_, node)| holders_of_same(node.acknowledged, &wanted)).collect();
    for (name, proxy) in &living {
        plan.proxies.insert((*name).clone());
        if proxy.acknowledged != Some(&wanted) {
            plan.pushes.insert((*name).clone(), wanted.clone());
        }
    }
    // The one that owns the shared address says so itself; until then, hosts begin here.
    let serves = |name: &str| {
        living.iter().zip(&serving).any(|((other, _), known)| *other == name && known.is_some())
    };
    let first = order.iter().find(|(name, _)| serves(name));
    let first = first.or_else(|| living.iter().find(|(name, _)| serves(name)));
    let first = first.or_else(|| order.first());
    let mut all: Vec<_> = nodes
        .values()
        .filter(|node| node.role == Role::Proxy)
        .map(|proxy| proxy.underlay_address.to_string())
        .collect();
    all.sort_unstable();
    let proxies: Vec<_> = nodes.values().filter(|node| node.role == Role::Proxy).collect();
    let is_dropped = |range: &&PortRange| proxies.iter().all(|proxy| dropped(proxy, **range));
    plan.dropped = leases.fenced().iter().filter(is_dropped).copied().collect();
    let Some((_, first)) = first else { return plan };
    for (name, host) in alive(Role::Host) {
        let Some(lease) = leases.of(name) else { continue };
        let address = host.underlay_address.to_string();
        let places = spread::of_host(&vnis, name);
        let rank = places.iter().position(|other| *other == place).unwrap_or_default();
        let is_known = |range| {
            // The other holders do not matter: a host does not wait for another's range.
            serving.iter().all(|holders| holders.is_some_and(|known| knows(known, &address, range)))
        };
        let request = |ports: PortRange| {
            let host = HostVpc {
                ports: Some(ports.into()),
                proxy_address: first.underlay_address.to_string(),
                proxies: all.clone(),
                resolver: vpc.resolver.map(|resolver| resolver.to_string()).unwrap_or_default(),
                search_domain: vpc.search_domain.clone(),
                security: security.cloned(),
                rank: rank as u32,
            };
            request(vpc, &shared, Apply::Host(host))
        };
        let present = host.acknowledged.and_then(ports);
        if is_known(lease.ports) && present != Some(lease.ports) {
            plan.pushes.insert(name.clone(), request(lease.ports));
        }
        // It goes on with what it has while it gets another range.
        let ports = present.filter(|range| is_held(lease, *range)).unwrap_or(lease.ports);
        if !is_known(ports) {
            continue;
        }
        let request = request(ports);
        if host.acknowledged != Some(&request) {
            plan.pushes.entry(name.clone()).or_insert(request);
        } else if let Some(session) = host.session {
            plan.ready.insert(name.clone(), session);
        }
    }
    plan
}

/// Of the proxies, those that may own one of a VPC's addresses, in the order in which they are to.
fn succession<'a, 'b>(
    vnis: &[u32],
    place: usize,
    living: &[(&'a String, &'a Node<'b>)],
) -> Vec<(&'a String, &'a Node<'b>)> {
    let all_drained = living.iter().all(|(_, proxy)| proxy.drained);
    let wanted = living.iter().filter(|(_, proxy)| all_drained || !proxy.drained);
    let names: Vec<&str> = wanted.map(|(name, _)| name.as_str()).collect();
    let order = spread::of_proxies(vnis, &names).swap_remove(place);
    let found = |name: &str| living.iter().find(|(other, _)| *other == name).copied();
    order.into_iter().filter_map(found).collect()
}

/// The ports that a host was told of.
pub fn ports(request: &ApplyVpcRequest) -> Option<PortRange> {
    match &request.role {
        Some(Apply::Host(host)) => host.ports.map(Into::into),
        _ => None,
    }
}

/// Whether a host may go on with a range that it was told of.
fn is_held(lease: &Lease, range: PortRange) -> bool {
    lease.ranges().any(|held| held.contains(range))
}

/// Whether holders, in the order of their ports, have all of a range as this host's.
fn knows(holders: &[PortHolder], address: &str, range: PortRange) -> bool {
    let range_of = |holder: &PortHolder| holder.ports.map(PortRange::from);
    let after = holders
        .partition_point(|holder| range_of(holder).is_some_and(|holder| holder.base <= range.base));
    let Some(holder) = after.checked_sub(1).and_then(|index| holders.get(index)) else {
        return false;
    };
    holder.host_address == address && range_of(holder).is_some_and(|held| held.contains(range))
}

/// Whether a proxy certainly takes no packets with these ports any more.
fn dropped(proxy: &Node<'_>, range: PortRange) -> bool {
    let Some(Apply::Proxy(known)) = proxy.acknowledged.and_then(|known| known.role.as_ref()) else {
        return false;
    };
    let mut held = known.holders.iter().filter_map(|holder| holder.ports.map(PortRange::from));
    proxy.session.is_some() && !held.any(|held| held.overlaps(range))
}

fn request(vpc: &Vpc, shared: &SharedAddress, role: Apply) -> ApplyVpcRequest {
    let v1::SharedAddress { address, address_v6, vni } = (*shared).into();
    ApplyVpcRequest {
        vpc: vpc.name.clone(),
        vni,
        shared_address: address,
        role: Some(role),
        shared_address_v6: address_v6,
    }
}

/// Who holds which ports, in the order of the ports.
fn holders(leases: &Leases, nodes: &BTreeMap<String, Node<'_>>) -> Vec<PortHolder> {
    let of_host = |(name, lease): (&str, &Lease)| {
        let host = nodes.get(name).filter(|node| node.role == Role::Host)?;
        let host_address = host.underlay_address.to_string();
        let holder = move |range: PortRange| PortHolder {
            ports: Some(range.into()),
            host_address: host_address.clone(),
        };
        Some(lease.ranges().map(holder).collect::<Vec<_>>())
    };
    let mut holders: Vec<_> = leases.iter().filter_map(of_host).flatten().collect();
    holders.sort_unstable_by_key(|holder| holder.ports.map(|ports| ports.base));
    holders
}

fn proxy_request(
    vpc: &Vpc,
    shared: &SharedAddress,
    routes: &[Route],
    leases: &Leases,
    nodes: &BTreeMap<String, Node<'_>>,
    order: &[(&String, &Node<'_>)],
) -> ApplyVpcRequest {
    let proxies = order.iter().map(|(_, proxy)| proxy.underlay_address.to_string()).collect();
    let [cidr_v6, _, gateway_v6] = VpcV6::texts(vpc.v6);
    let proxy = ProxyVpc {
        interface: vpc.interface.clone(),
        cidr: vpc.cidr.to_string(),
        gateway: vpc.gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
        holders: holders(leases, nodes),
        routes: routes.to_vec(),
        cidr_v6,
        gateway_v6,
        proxies,
        public_vni: vpc.public_vni(shared.vni).unwrap_or_default(),
    };
    request(vpc, shared, Apply::Proxy(proxy))
}

/// The holders that a proxy knows, if but for them it serves as one with the definition `wanted`.
fn holders_of_same<'a>(
    known: Option<&'a ApplyVpcRequest>,
    wanted: &ApplyVpcRequest,
) -> Option<&'a [PortHolder]> {
    let ApplyVpcRequest { vpc, vni, shared_address, role, shared_address_v6 } = known?;
    let (Some(Apply::Proxy(known)), Some(Apply::Proxy(proxy))) = (role, &wanted.role) else {
        return None;
    };
    let ProxyVpc {
        interface,
        cidr,
        gateway,
        holders,
        routes,
        cidr_v6,
        gateway_v6,
        proxies,
        public_vni,
    } = known;
    let same = *vpc == wanted.vpc
        && *vni == wanted.vni
        && *shared_address == wanted.shared_address
        && *shared_address_v6 == wanted.shared_address_v6
        && *interface == proxy.interface
        && *cidr == proxy.cidr
        && *gateway == proxy.gateway
        && *cidr_v6 == proxy.cidr_v6
        && *gateway_v6 == proxy.gateway_v6
        && *proxies == proxy.proxies
        && *public_vni == proxy.public_vni
        && *routes == proxy.routes;
    same.then_some(holders)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn vpc() -> Vpc {
        Vpc {
            name: "blue".into(),
            vni: 4096,
            cidr: "10.1.0.0/16".parse().unwrap(),
            shared_address: "10.1.0.9".parse().unwrap(),
            interface: "eth1".into(),
            gateway: None,
            v6: Some(VpcV6 {
                cidr: "2001:db8:1::/64".parse().unwrap(),
                shared_address: "2001:db8:1::9".parse().unwrap(),
                gateway: Some("fe80::1".parse().unwrap()),
            }),
            ports_per_host: 1024,
            resolver: Some("10.1.0.2".parse().unwrap()),
            search_domain: "corp.internal".into(),
            more_addresses: [4097, 4098]
                .map(|vni| SharedAddress {
                    vni,
                    address: Ipv4Addr::new(10, 1, 1, vni as u8),
                    address_v6: Some(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 1, vni as u16)),
                })
                .into(),
            public: None,
            public_of: None,
        }
    }

    /// A fleet whose agents acknowledge what they are told to.
    #[derive(Clone, Default)]
    struct World {
        /// Of the address.
        place: usize,
        leases: Leases,
        routes: Vec<Route>,
        security: Option<VpcSecurity>,
        nodes: BTreeMap<String, (Role, Option<Session>)>,
        drained: BTreeSet<String>,
        acknowledged: BTreeMap<String, ApplyVpcRequest>,
    }

    impl World {
        fn with(names: &[&str]) -> Self {
            let mut world = Self::default();
            for name in names {
                let role = if name.starts_with('p') { Role::Proxy } else { Role::Host };
                world.nodes.insert((*name).into(), (role, Some(1)));
            }
            world
        }

        fn lease(&mut self, host: &str) {
            self.leases.lease(host, 1024).unwrap();
        }

        /// Whether the host may start instances, and with which ports.
        fn ports(&self, host: &str) -> (bool, Option<PortRange>) {
            (self.plan().ready.contains_key(host), self.acknowledged.get(host).and_then(ports))
        }

        fn plan(&self) -> Plan {
            let nodes = self.nodes.iter().map(|(name, (role, session))| {
                let [letter, digit] = name.as_bytes().try_into().unwrap();
                let node = Node {
                    role: *role,
                    underlay_address: IpAddr::from([192, 0, letter, digit - b'0']),
                    session: *session,
                    drained: self.drained.contains(name),
                    acknowledged: self.acknowledged.get(name),
                };
                (name.clone(), node)
            });
            let security = self.security.as_ref();
            plan(&vpc(), self.place, &self.routes, security, &self.leases, &nodes.collect())
        }

        /// Plans, and lets these agents acknowledge; fails if nothing was to be pushed to one.
        fn acknowledge(&mut self, names: &[&str]) {
            let plan = self.plan();
            for name in names {
                let request = plan.pushes.get(*name).unwrap_or_else(|| panic!("{name}: {plan:?}"));
                self.acknowledged.insert((*name).into(), request.clone());
            }
        }

        /// The proxies that may own the addresses, as this one was told, by the last octet of their
        /// addresses.
        fn order(&self, proxy: &str) -> Vec<u8> {
            let Some(Apply::Proxy(proxy)) = &self.acknowledged[proxy].role else { panic!() };
            let last = |address: &String| address.rsplit('.').next().unwrap().parse().unwrap();
            proxy.proxies.iter().map(last).collect()
        }

        fn pushes(&self) -> Vec<String> {
            self.plan().pushes.into_keys().collect()
        }

        fn ready(&self) -> Vec<String> {
            self.plan().ready.into_keys().collect()
        }
    }

    #[test]
    fn proxies_first_then_the_host_then_it_is_ready() {
        let mut world = World::with(&["h1", "h2", "p1", "p2"]);
        assert_eq!(world.pushes(), ["p1", "p2"], "proxies know the VPC before there is a holder");
        world.lease("h1");
        world.acknowledge(&["p1"]);
        assert_eq!(world.pushes(), ["p2"], "one proxy is not enough");
        world.acknowledge(&["p2"]);
        assert_eq!(world.pushes(), ["h1"]);
        assert_eq!(world.ready(), [""; 0]);
        world.acknowledge(&["h1"]);
        assert_eq!((world.pushes(), world.ready()), (vec![], vec!["h1".to_owned()]));
    }

    #[test]
    fn a_second_host_does_not_disturb_the_first() {
        let mut world = World::with(&["h1", "h2", "p1"]);
        world.lease("h1");
        world.acknowledge(&["p1"]);
        world.acknowledge(&["h1"]);
        world.lease("h2");
        assert_eq!((world.pushes(), world.ready()), (vec!["p1".into()], vec!["h1".to_owned()]));
        world.acknowledge(&["p1"]);
        assert_eq!((world.pushes(), world.ready()), (vec!["h2".into()], vec!["h1".to_owned()]));
    }

    #[test]
    fn a_new_proxy_learns_the_vpc_before_hosts_are_moved_to_it() {
        let mut world = World::with(&["h1", "p2"]);
        world.lease("h1");
        world.acknowledge(&["p2"]);
        world.acknowledge(&["h1"]);
        world.nodes.insert("p1".into(), (Role::Proxy, Some(2)));
        assert_eq!((world.pushes(), world.ready()), (vec!["p1".into(), "p2".into()], vec![]));
        world.acknowledge(&["p1", "p2"]);
        assert_eq!(world.order("p1"), world.order("p2"));
        assert_eq!((world.order("p1").len(), world.pushes()), (2, vec!["h1".to_owned()]));
        let Some(Apply::Host(host)) = &world.plan().pushes["h1"].role else { panic!() };
        let both = [1, 2].map(|last| IpAddr::from([192, 0, b'p', last]).to_string());
        assert_eq!(host.proxies, both);
        assert_eq!(host.proxy_address, both[usize::from(world.order("p1")[0]) - 1]);
        assert_eq!(
            (host.resolver.as_str(), host.search_domain.as_str()),
            ("10.1.0.2", "corp.internal")
        );
    }

    #[test]
    fn proxies_and_hosts_are_told_of_ipv6() {
        let mut world = World::with(&["h1", "p1"]);
        world.lease("h1");
        world.acknowledge(&["p1"]);
        let told = &world.acknowledged["p1"];
        assert_eq!(told.shared_address_v6, "2001:db8:1::9");
        let Some(Apply::Proxy(proxy)) = &told.role else { panic!() };
        assert_eq!(
            (proxy.cidr_v6.as_str(), proxy.gateway_v6.as_str()),
            ("2001:db8:1::/64", "fe80::1")
        );
        assert_eq!(world.plan().pushes["h1"].shared_address_v6, "2001:db8:1::9");
        // Without it, a proxy does not serve as the VPC's yet.
        world.acknowledged.get_mut("p1").unwrap().shared_address_v6.clear();
        assert_eq!(world.pushes(), ["p1"]);
    }

    #[test]
    fn dead_proxies_are_not_waited_for_and_dead_hosts_stay_holders() {
        let mut world = World::with(&["h1", "h2", "p1", "p2"]);
        world.lease("h1");
        world.lease("h2");
        world.acknowledge(&["p2"]);
        world.nodes.insert("p1".into(), (Role::Proxy, None));
        world.nodes.insert("h2".into(), (Role::Host, None));
        world.acknowledge(&["p2"]);
        assert_eq!((world.order("p2"), world.pushes()), (vec![2], vec!["h1".to_owned()]));
        let Some(Apply::Proxy(proxy)) = &world.acknowledged["p2"].role else { panic!() };
        assert_eq!(proxy.holders.len(), 2);
        world.acknowledge(&["h1"]);
        assert_eq!((world.pushes(), world.ready()), (vec![], vec!["h1".to_owned()]));
    }

    #[test]
    fn a_drained_proxy_knows_everything_and_is_not_to_own_the_addresses() {
        let mut world = World::with(&["h1", "p1", "p2"]);
        world.lease("h1");
        world.drained.insert("p1".into());
        world.acknowledge(&["p1", "p2"]);
        assert_eq!((world.order("p1"), world.order("p2")), (vec![2], vec![2]));
        let Some(Apply::Host(host)) = &world.plan().pushes["h1"].role else { panic!() };
        assert_eq!(host.proxy_address, IpAddr::from([192, 0, b'p', 2]).to_string());
        assert_eq!(host.proxies.len(), 2, "packets may be on their way from it");
        // Somebody has to.
        world.drained.insert("p2".into());
        world.acknowledge(&["p1", "p2"]);
        assert_eq!(world.order("p1").len(), 2);
    }

    #[test]
    fn addresses_are_several_proxies_and_a_host_s_first_has_the_least_rank() {
        let mut world = World::with(&["h1", "p1", "p2", "p3"]);
        world.lease("h1");
        let first = |world: &World, place| {
            let mut world = World { place, ..world.clone() };
            world.acknowledge(&["p1", "p2", "p3"]);
            let order = world.order("p1");
            assert_eq!((&order, order.len()), (&world.order("p3"), 3));
            let Some(Apply::Host(host)) = &world.plan().pushes["h1"].role else { panic!() };
            (order[0], host.rank, world.plan().pushes["h1"].vni)
        };
        let all: Vec<_> = (0..3).map(|place| first(&world, place)).collect();
        let sorted = |mut numbers: Vec<u32>| {
            numbers.sort_unstable();
            numbers
        };
        assert_eq!(sorted(all.iter().map(|it| it.0.into()).collect()), [1, 2, 3]);
        assert_eq!(sorted(all.iter().map(|it| it.1).collect()), [0, 1, 2]);
        assert_eq!(all.iter().map(|it| it.2).collect::<Vec<_>>(), [4096, 4097, 4098]);
        assert_eq!(World { place: 3, ..world }.plan(), Plan::default());
    }

    #[test]
    fn without_a_proxy_nothing_is_pushed_and_nobody_is_ready() {
        let mut world = World::with(&["h1", "p1"]);
        world.lease("h1");
        world.acknowledge(&["p1"]);
        world.acknowledge(&["h1"]);
        world.nodes.insert("p1".into(), (Role::Proxy, None));
        assert_eq!(world.plan(), Plan::default());
    }

    #[test]
    fn whoever_registers_anew_is_told_anew() {
        let mut world = World::with(&["h1", "p1"]);
        world.lease("h1");
        world.acknowledge(&["p1"]);
        world.acknowledge(&["h1"]);
        // A new session: nothing is acknowledged in it.
        world.acknowledged.remove("h1");
        assert_eq!((world.pushes(), world.ready()), (vec!["h1".into()], vec![]));
        world.acknowledge(&["h1"]);
        world.acknowledged.remove("p1");
        assert_eq!((world.pushes(), world.ready()), (vec!["p1".into()], vec![]));
        world.acknowledge(&["p1"]);
        assert_eq!((world.pushes(), world.ready()), (vec![], vec!["h1".to_owned()]));
    }

    #[test]
    fn a_host_goes_on_with_what_it_has_while_it_gets_more() {
        let mut world = World::with(&["h1", "p1", "p2"]);
        world.lease("h1");
        world.acknowledge(&["p1", "p2"]);
        world.acknowledge(&["h1"]);
        let before = world.leases.of("h1").unwrap().ports;
        let after = world.leases.lease("h1", 2048).unwrap();
        assert_eq!(world.pushes(), ["p1", "p2"]);
        assert_eq!(world.ports("h1"), (true, Some(before)));
        world.acknowledge(&["p1"]);
        assert_eq!(world.pushes(), ["p2"], "one proxy is not enough");
        world.acknowledge(&["p2"]);
        assert_eq!((world.pushes(), world.ports("h1")), (vec!["h1".into()], (true, Some(before))));
        world.acknowledge(&["h1"]);
        assert_eq!((world.pushes(), world.ports("h1")), (vec![], (true, Some(after))));
    }

    #[test]
    fn a_host_that_shrinks_is_told_at_once_and_proxies_know_it_for_what_it_had() {
        let mut world = World::with(&["h1", "p1"]);
        world.lease("h1");
        world.acknowledge(&["p1"]);
        world.acknowledge(&["h1"]);
        let before = world.leases.of("h1").unwrap().ports;
        let after = world.leases.lease("h1", 512).unwrap();
        assert_eq!(world.pushes(), ["h1", "p1"]);
        world.acknowledge(&["h1", "p1"]);
        assert_eq!((world.pushes(), world.ports("h1")), (vec![], (true, Some(after))));
        let known = world.acknowledged["p1"].role.clone();
        let Some(Apply::Proxy(proxy)) = known else { panic!() };
        let held: u32 = proxy.holders.iter().map(|holder| holder.ports.unwrap().count).sum();
        assert_eq!(held, before.count);
    }

    #[test]
    fn what_is_fenced_is_dropped_when_each_proxy_says_so_dead_ones_included() {
        let mut world = World::with(&["h1", "h2", "p1", "p2"]);
        world.lease("h1");
        world.lease("h2");
        world.acknowledge(&["p1", "p2"]);
        world.leases.forget("h1");
        let fenced: BTreeSet<_> = world.leases.fenced().iter().copied().collect();
        assert_eq!(world.plan().dropped, BTreeSet::new());
        world.acknowledge(&["p1"]);
        assert_eq!(world.plan().dropped, BTreeSet::new());
        world.nodes.insert("p2".into(), (Role::Proxy, None));
        assert_eq!(world.plan().dropped, BTreeSet::new(), "it may still forward");
        world.nodes.insert("p2".into(), (Role::Proxy, Some(2)));
        world.acknowledge(&["p2"]);
        assert_eq!(world.plan().dropped, fenced);
    }

    #[test]
    fn a_host_is_ready_again_when_it_knows_the_new_rules() {
        let mut world = World::with(&["h1", "p1"]);
        world.lease("h1");
        world.acknowledge(&["p1"]);
        world.acknowledge(&["h1"]);
        world.security = Some(VpcSecurity::default());
        assert_eq!((world.pushes(), world.ready()), (vec!["h1".into()], vec![]));
        world.acknowledge(&["h1"]);
        assert_eq!((world.pushes(), world.ready()), (vec![], vec!["h1".to_owned()]));
    }

    #[test]
    fn a_host_is_ready_again_when_proxies_know_the_new_routes() {
        let mut world = World::with(&["h1", "p1"]);
        world.lease("h1");
        world.acknowledge(&["p1"]);
        world.acknowledge(&["h1"]);
        world.routes = vec![Route { prefix: "10.9.0.0/16".into(), ..Route::default() }];
        assert_eq!((world.pushes(), world.ready()), (vec!["p1".into()], vec![]));
        world.acknowledge(&["p1"]);
        assert_eq!((world.pushes(), world.ready()), (vec![], vec!["h1".to_owned()]));
    }
}
