//! Route tables of VPCs.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use etherparse::PacketBuilder;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use warren_abi::wire::{TUNNEL_MAC, VXLAN_PORT};
use warren_dataplane::datapath::{DropReason, Error, ProxyVpc};
use warren_netns::capture::Capture;
use warren_netns::netns::{Namespace, veth};
use warren_netns::servers::{Server, udp_echo};
use warren_netns::topology::{HOST, PROXY, SERVER, SHARED, VPC_INTERFACES};
use warren_proto::route::{MAX_ROUTES, Route, Table, Target, defaults};

use crate::bed::{Bed, PORTS, VNI_A, VNI_B, proxy_vpc};
use crate::guest::{KernelGuest, PATIENCE, SILENCE};
use crate::traffic::udp_round_trip;

const PORT: u16 = 7000;
/// An address behind the gateways.
const BEHIND: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

fn parse(routes: &[impl AsRef<str>]) -> Vec<Route> {
    routes.iter().map(|route| route.as_ref().parse().expect("it is a route")).collect()
}

fn with_routes(vni: u32, routes: Vec<Route>) -> ProxyVpc {
    ProxyVpc { routes, ..proxy_vpc(vni, vec![(PORTS, HOST)]) }
}

fn apply(bed: &Bed, vni: u32, routes: &[impl AsRef<str>]) {
    try_apply(bed, vni, parse(routes)).expect("the proxy takes the VPC");
}

fn try_apply(bed: &Bed, vni: u32, routes: Vec<Route>) -> Result<(), Error> {
    let vpc = with_routes(vni, routes);
    bed.topology.proxy.run(|| bed.proxy().apply_vpc(&vpc))
}

/// Puts a switch in the place of a VPC's server, which stays behind it.
fn switch(vpc: &Namespace) {
    for words in [
        "link add br0 type bridge stp_state 0 forward_delay 0",
        "link set eth0 master br0",
        "addr flush dev eth0",
        &format!("addr add {SERVER}/24 dev br0"),
        "link set br0 up",
    ] {
        vpc.ip(words).expect("there can be a switch");
    }
}

/// A machine at the switch, which routes.
fn router(vpc: &Namespace, address: &str) -> Namespace {
    let name = format!("gw{}", address.replace('.', ""));
    let machine = Namespace::new(&name).expect("namespaces can be made");
    veth(vpc, &name, &machine, "eth0").expect("they can be connected");
    vpc.ip(&format!("link set {name} master br0")).expect("the switch takes it");
    machine.ip(&format!("addr add {address}/24 dev eth0")).expect("it can have an address");
    machine.run(|| fs::write("/proc/sys/net/ipv4/ip_forward", "1")).expect("it routes");
    machine
}

/// A machine at the switch with [`BEHIND`] on it, and a server there.
fn server_behind(vpc: &Namespace, address: &str) -> (Namespace, Server) {
    let machine = router(vpc, address);
    machine.ip(&format!("addr add {BEHIND}/32 dev lo")).expect("it can have an address");
    let back = format!("route add {SHARED} dev eth0 src {BEHIND}");
    machine.ip(&back).expect("it can answer from there");
    let server = udp_echo(&machine, PORT).expect("the server starts");
    (machine, server)
}

#[test]
fn a_default_route_leads_through_a_gateway_to_a_public_network_and_back() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    switch(&bed.topology.vpcs[0]);
    let gateway = router(&bed.topology.vpcs[0], "10.0.0.1");
    let public = Namespace::new("public").expect("namespaces can be made");
    veth(&gateway, "eth1", &public, "eth0").expect("they can be connected");
    gateway.ip("addr add 203.0.113.1/24 dev eth1").expect("it can have an address");
    public.ip("addr add 203.0.113.10/24 dev eth0").expect("it can have an address");
    public.ip("route add 10.0.0.0/24 via 203.0.113.1").expect("it is on-link");
    let echo = udp_echo(&public, PORT).expect("the server starts");
    let there = ("203.0.113.10", PORT);
    let dropped = |reason| bed.proxy_drops(VNI_A, reason);

    assert!(!udp_round_trip(&guest.namespace, there));
    assert!(dropped(DropReason::NoRoute) > 0, "there is no gateway");
    apply(&bed, VNI_A, &["0.0.0.0/0 via 10.0.0.1"]);
    assert!(udp_round_trip(&guest.namespace, there));
    assert_eq!(echo.count(), 1);
    apply(&bed, VNI_A, &["0.0.0.0/0 via 10.0.0.1", "203.0.113.8/29 blackhole"]);
    assert!(!udp_round_trip(&guest.namespace, there));
    assert_eq!(dropped(DropReason::Blackhole), 3);
    // The way of IPv6 is none of IPv4.
    let no_route = dropped(DropReason::NoRoute);
    apply(&bed, VNI_A, &["fd00::/64 local", "::/0 via fd00::1"]);
    assert!(!udp_round_trip(&guest.namespace, there));
    assert_eq!(dropped(DropReason::NoRoute), no_route + 3);
    assert_eq!(echo.count(), 1);

    let vpc = ProxyVpc {
        gateway: Some([10, 0, 0, 1].into()),
        ..with_routes(VNI_A, parse(&["192.0.2.0/24 blackhole"]))
    };
    bed.topology.proxy.run(|| bed.proxy().apply_vpc(&vpc)).expect("the proxy takes the VPC");
    assert!(udp_round_trip(&guest.namespace, there), "a table leaves CIDR and gateway in force");
    let _server = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    assert!(udp_round_trip(&guest.namespace, (SERVER, PORT)));
}

#[test]
fn vpcs_with_the_same_addresses_have_tables_of_their_own() {
    let bed = Bed::new();
    let (a, b) = (KernelGuest::plug(&bed, 1), KernelGuest::plug(&bed, 2));
    bed.host().attach(1, VNI_A).expect("the slot is free");
    bed.host().attach(2, VNI_B).expect("the slot is free");
    for vpc in &bed.topology.vpcs {
        switch(vpc);
    }
    let (_in_a, at_a) = server_behind(&bed.topology.vpcs[0], "10.0.0.1");
    let (_in_b, at_b) = server_behind(&bed.topology.vpcs[1], "10.0.0.2");
    apply(&bed, VNI_A, &[format!("{BEHIND}/32 via 10.0.0.1")]);
    apply(&bed, VNI_B, &[format!("{BEHIND}/32 via 10.0.0.2")]);
    assert!(udp_round_trip(&a.namespace, (BEHIND, PORT)));
    assert_eq!((at_a.count(), at_b.count()), (1, 0));
    assert!(udp_round_trip(&b.namespace, (BEHIND, PORT)));
    assert_eq!((at_a.count(), at_b.count()), (1, 1));
    apply(&bed, VNI_A, &[format!("{BEHIND}/32 blackhole")]);
    assert!(!udp_round_trip(&a.namespace, (BEHIND, PORT)));
    assert!(udp_round_trip(&b.namespace, (BEHIND, PORT)));
}

#[test]
fn a_live_flow_follows_its_route_at_once() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    switch(&bed.topology.vpcs[0]);
    let gateways = ["10.0.0.1", "10.0.0.2"];
    let servers = gateways.map(|gateway| server_behind(&bed.topology.vpcs[0], gateway));
    let socket = guest.namespace.run(|| UdpSocket::bind("0.0.0.0:0")).expect("there is a port");
    socket.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    guest.namespace.run(|| socket.connect((BEHIND, PORT))).expect("there is a route");
    for round in 0..20 {
        let now = round % 2;
        apply(&bed, VNI_A, &[format!("198.51.100.0/24 via {}", gateways[now])]);
        let before = servers[now].1.count();
        socket.send(b"ping").expect("the guest can send");
        assert_eq!(socket.recv(&mut [0; 16]).expect("an answer comes"), 4);
        assert_eq!(servers[now].1.count(), before + 1, "round {round}");
    }
}

/// Addresses of this many different prefixes.
fn many(from: usize, to: usize) -> Vec<String> {
    let prefix = |n: usize| format!("100.{}.{}.0/24 via 10.0.0.10", 64 + n / 256, n % 256);
    (from..to).map(prefix).collect()
}

#[test]
fn a_route_that_stays_has_no_gap_while_thousands_come_and_go() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    switch(&bed.topology.vpcs[0]);
    let (_machine, echo) = server_behind(&bed.topology.vpcs[0], "10.0.0.1");
    let stays = format!("198.51.100.0/24 via {}", "10.0.0.1");
    let tables =
        [many(0, MAX_ROUTES - 1), many(MAX_ROUTES / 2, MAX_ROUTES), Vec::new()].map(|mut table| {
            table.push(stays.clone());
            parse(&table)
        });
    apply(&bed, VNI_A, &[&stays]);
    assert!(udp_round_trip(&guest.namespace, (BEHIND, PORT)));
    let sent = guest.namespace.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("there is a port");
        socket.connect((BEHIND, PORT)).expect("there is a route");
        socket.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        std::thread::scope(|scope| {
            let changes = scope.spawn(|| {
                for table in tables.iter().cycle().take(6) {
                    try_apply(&bed, VNI_A, table.clone()).expect("the proxy takes the VPC");
                }
            });
            let mut sent = 0;
            while !changes.is_finished() {
                socket.send(b"ping").expect("the guest can send");
                assert_eq!(socket.recv(&mut [0; 16]).expect("no datagram is lost"), 4);
                sent += 1;
            }
            changes.join().expect("it does not panic");
            sent
        })
    });
    assert_eq!(echo.count(), sent + 1);
    assert!(sent > 20, "the tables changed faster than anybody could notice");
    assert_eq!(bed.proxy_drops(VNI_A, DropReason::NoRoute), 0);
}

#[test]
fn ten_thousand_routes_outlive_the_daemon_and_more_are_refused() {
    let mut bed = Bed::new();
    let mut wanted = parse(&many(0, MAX_ROUTES));
    wanted.sort_by_key(|route| route.prefix);
    try_apply(&bed, VNI_A, wanted.clone()).expect("the proxy takes the VPC");
    apply(&bed, VNI_B, &["fd00::/8 local", "10.7.0.0/16 blackhole", "::/0 via fd00::1"]);
    bed.reopen_proxy();
    let vpcs = bed.topology.proxy.run(|| bed.proxy().vpcs()).expect("they can be read");
    let mut found = vpcs[0].routes.clone();
    found.sort_by_key(|route| route.prefix);
    assert_eq!(found, wanted);
    assert_eq!(vpcs[1].routes.len(), 3);

    let error = |routes: &[Route]| match try_apply(&bed, VNI_A, routes.to_vec()) {
        Err(Error::Routes(error)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let refused = error(&parse(&many(0, MAX_ROUTES + 1)));
    assert!(refused.contains("10001 routes are too many"), "{refused}");
    let refused = error(&parse(&["10.7.0.0/16 local", "10.7.0.0/16 blackhole"]));
    assert!(refused.contains("two routes to 10.7.0.0/16"), "{refused}");
    let refused = error(&parse(&["10.7.0.0/16 via 10.8.0.1"]));
    assert!(refused.contains("10.8.0.1 of 10.7.0.0/16 is not on-link"), "{refused}");
    let refused = error(&parse(&[format!("10.7.0.0/16 via {SHARED}")]));
    assert!(refused.contains("shared address"), "{refused}");

    try_apply(&bed, VNI_A, Vec::new()).expect("the proxy takes the VPC");
    let vpcs = bed.topology.proxy.run(|| bed.proxy().vpcs()).expect("they can be read");
    assert_eq!((vpcs[0].routes.len(), vpcs[1].routes.len()), (0, 3));
}

/// Sends as the host does, without one.
struct Tunnel(UdpSocket);

impl Tunnel {
    fn open(bed: &Bed) -> Self {
        let socket = bed.topology.host.run(|| UdpSocket::bind((HOST, 0)));
        let socket = socket.expect("the host has the address");
        bed.topology.host.run(|| socket.connect((PROXY, VXLAN_PORT))).expect("it is on-link");
        Self(socket)
    }

    /// Sends a datagram from the shared address to a destination in a VPC.
    fn send(&self, vni: u32, destination: Ipv4Addr, payload: &[u8]) {
        let mut bytes = vec![0x08, 0, 0, 0];
        bytes.extend((vni << 8).to_be_bytes());
        let mac = TUNNEL_MAC.octets();
        PacketBuilder::ethernet2(mac, mac)
            .ipv4(SHARED.octets(), destination.octets(), 64)
            .udp(PORTS.base, PORT)
            .write(&mut bytes, payload)
            .expect("a vector takes everything");
        self.0.send(&bytes).expect("the host can send");
    }
}

/// The next hops of the model's routes, on-link, and their MAC addresses.
const HOPS: std::ops::Range<u8> = 1..6;

fn hop_mac(hop: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, hop]
}

/// Octets that make prefixes nest and neighbour.
fn address() -> impl Strategy<Value = Ipv4Addr> {
    let octet = || prop::sample::select(vec![0u8, 1, 2, 127, 128, 255]);
    (octet(), octet(), octet()).prop_map(|(b, c, d)| Ipv4Addr::new(11, b, c, d))
}

fn routes() -> impl Strategy<Value = Vec<Route>> {
    let target = prop_oneof![
        4 => HOPS.prop_map(|hop| Target::Via(Ipv4Addr::new(10, 0, 0, hop).into())),
        1 => Just(Target::Blackhole),
    ];
    let length = prop_oneof![Just(0u8), 8..=32u8];
    prop::collection::vec((address(), length, target), 0..40).prop_map(|routes| {
        let routes = routes.into_iter().map(|(address, length, target)| {
            let network = ipnetwork::Ipv4Network::new(address, length).expect("it is at most 32");
            let network = ipnetwork::Ipv4Network::new(network.network(), length);
            (network.expect("it is at most 32").into(), target)
        });
        let routes: BTreeMap<_, _> = routes.collect();
        routes.into_iter().map(|(prefix, target)| Route { prefix, target }).collect()
    })
}

#[test]
fn packets_go_where_the_longest_prefix_says() {
    let bed = Bed::new();
    for (interface, hop) in VPC_INTERFACES.into_iter().flat_map(|i| HOPS.map(move |h| (i, h))) {
        let mac = hop_mac(hop).map(|octet| format!("{octet:02x}")).join(":");
        let words = format!("neigh add 10.0.0.{hop} lladdr {mac} dev {interface} nud permanent");
        bed.topology.proxy.ip(&words).expect("neighbours can be given");
    }
    let tunnel = Tunnel::open(&bed);
    let captures = bed.topology.vpcs.each_ref();
    let captures = captures.map(|vpc| Capture::start(vpc, "eth0").expect("captures can be made"));
    let strategy = ([routes(), routes()], prop::collection::vec(address(), 60));
    let config = Config { cases: 24, failure_persistence: None, ..Config::default() };
    let run = |(tables, destinations): ([Vec<Route>; 2], Vec<Ipv4Addr>)| {
        for ((vni, routes), capture) in [VNI_A, VNI_B].into_iter().zip(tables).zip(&captures) {
            let vpc = with_routes(vni, routes.clone());
            bed.topology.proxy.run(|| bed.proxy().apply_vpc(&vpc)).expect("it takes the VPC");
            let own = defaults(vpc.cidr.into(), vpc.gateway.map(Into::into)).collect::<Vec<_>>();
            let model = Table::new(&routes, &own, &[SHARED.into()]).expect("it is a table");
            // Each destination twice: looked up, and from the cache.
            let mut wanted = BTreeMap::new();
            for (number, &destination) in (0u8..).zip(destinations.iter().chain(&destinations)) {
                if let Some(Target::Via(std::net::IpAddr::V4(hop))) =
                    model.look_up(destination.into())
                {
                    wanted.insert(number, hop_mac(hop.octets()[3]));
                }
                tunnel.send(vni, destination, &[number]);
            }
            let mut found = BTreeMap::new();
            while found.len() < wanted.len() {
                let Some(frame) = capture.next(PATIENCE).expect("it can be read") else { break };
                if let Some((mac, number)) = datagram(&frame.bytes) {
                    found.insert(number, mac);
                }
            }
            prop_assert_eq!(&found, &wanted);
            let more = capture.next(Duration::ZERO).expect("it can be read");
            prop_assert!(more.is_none_or(|frame| datagram(&frame.bytes).is_none()));
        }
        Ok(())
    };
    TestRunner::new(config).run(&strategy, run).expect("the program does as the model");
    std::thread::sleep(SILENCE);
    for capture in &captures {
        let late = capture.drain().expect("it can be read");
        assert!(late.iter().all(|frame| datagram(&frame.bytes).is_none()), "one was not wanted");
    }
}

/// The destination MAC address of a datagram of [`Tunnel::send`], and its payload.
fn datagram(frame: &[u8]) -> Option<([u8; 6], u8)> {
    let is_ours = frame.len() >= 43 && frame[12..14] == [8, 0] && frame[30] == 11;
    is_ours.then(|| (frame[..6].try_into().expect("it is six bytes"), frame[42]))
}
