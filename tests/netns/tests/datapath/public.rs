//! What leaves a VPC by its public address.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};

use warren_dataplane::datapath::{DropReason, HostVpc, ProxyVpc, ProxyVpcV6};
use warren_netns::netns::{Namespace, veth};
use warren_netns::servers::{bulk_sink, bulk_source, udp, udp_at, udp_echo_at};
use warren_netns::topology::{HOST, PROXY, SERVER, SHARED, VPC_INTERFACES};

use crate::bed::{Bed, PORTS, VNI_A, VNI_B, eventually, proxy_vpc};
use crate::fragments::Daemon;
use crate::guest::{KernelGuest, PATIENCE, RawGuest, SILENCE, frame};
use crate::icmp::checksum;
use crate::traffic::udp_round_trip;
use crate::v6::{plug, round_trip};

const PORT: u16 = 7000;
/// VNI of the public address of the first VPC, and of the second.
const PUBLIC: [u32; 2] = [300, 301];
const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(203, 0, 113, 7), Ipv4Addr::new(203, 0, 113, 8)];
const ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 7);
/// A server behind the gateway of the public network.
const AWAY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const AWAY_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, 1);

/// The public network is what the second VPC's interface is in. Its gateway has the server's address,
/// as well.
fn internet(bed: &Bed) -> &Namespace {
    let gateway = &bed.topology.vpcs[1];
    for words in ["addr add 203.0.113.1/24 dev eth0", &format!("addr add {AWAY}/32 dev lo")] {
        gateway.ip(words).expect("it can have an address");
    }
    if bed.v6 {
        for words in [
            "addr add 2001:db8:9::1/64 dev eth0 nodad".to_owned(),
            format!("addr add {AWAY_V6}/128 dev eth0 nodad"),
        ] {
            gateway.ip(&words).expect("it can have an address");
        }
    }
    gateway
}

/// A public address, as the proxy knows it.
fn public(bed: &Bed, index: usize) -> ProxyVpc {
    let v6 = bed.v6.then(|| ProxyVpcV6 {
        shared_address: ADDRESS_V6,
        cidr: "2001:db8:9::/64".parse().expect("it is a CIDR"),
        gateway: Some("2001:db8:9::1".parse().expect("it is an address")),
    });
    ProxyVpc {
        interface: VPC_INTERFACES[1].to_owned(),
        shared_address: ADDRESSES[index],
        cidr: "203.0.113.0/24".parse().expect("it is a CIDR"),
        gateway: Some([203, 0, 113, 1].into()),
        v6,
        holders: Vec::new(),
        ..proxy_vpc::<Ipv4Addr>(PUBLIC[index], Vec::new())
    }
}

fn apply(bed: &Bed, vpc: &ProxyVpc) {
    bed.topology.proxy.run(|| bed.proxy().apply_vpc(vpc)).expect("the proxy takes the VPC");
}

/// The first VPC, as the proxy knows it, whatever it leaves by.
fn private(bed: &Bed) -> ProxyVpc {
    let known = bed.topology.proxy.run(|| bed.proxy().vpcs()).expect("they can be read");
    known.into_iter().find(|vpc| vpc.vni == VNI_A).expect("it is there")
}

/// Has the first VPC leave by its public address.
fn open(bed: &Bed) {
    apply(bed, &public(bed, 0));
    apply(bed, &ProxyVpc { public: Some(PUBLIC[0]), ..private(bed) });
}

#[test]
fn what_has_no_route_in_the_vpc_leaves_and_what_has_one_does_not() {
    let mut bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let away = udp_at(internet(&bed), (AWAY, PORT)).expect("the port is free");
    let inside = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let send = |to: Ipv4Addr| guest.send(&frame(guest.packet(to, 64).udp(1000, PORT), b"hello"));

    send(AWAY);
    eventually(|| bed.proxy_drops(VNI_A, DropReason::NoRoute) == 1);
    open(&bed);
    for _ in 0..2 {
        let seen = [(&away, AWAY, ADDRESSES[0]), (&inside, SERVER, SHARED)].map(|(at, to, as_)| {
            send(to);
            at.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
            let seen = at.recv_from(&mut [0; 16]).expect("it comes").1;
            assert_eq!(seen.ip(), as_);
            at.send_to(b"reply", seen).expect("it can be sent");
            let got = guest.receive(PATIENCE).expect("it comes back");
            assert!(got.ends_with(b"reply"));
            assert_eq!(got[26..30], to.octets());
            seen.port()
        });
        assert_eq!(seen[0], seen[1], "a guest's port is one, whoever it writes to");
        let ports = u32::from(PORTS.base)..u32::from(PORTS.base) + PORTS.count;
        assert!(ports.contains(&seen[0].into()));
        let stranger = udp(&bed.topology.vpcs[1], 0).expect("there is a port");
        stranger.send_to(b"let me in", (ADDRESSES[0], seen[0])).expect("it can be sent");
        assert_eq!(guest.receive(SILENCE), None);
        stranger.send_to(b"let me in", (ADDRESSES[0], 80)).expect("it can be sent");
        eventually(|| bed.proxy_drops(PUBLIC[0], DropReason::NoBlockHolder) >= 1);
        assert_eq!(private(&bed).public, Some(PUBLIC[0]));
        bed.reopen_proxy();
    }
    // What is not to leave has a route to nowhere.
    let routes = vec!["198.51.100.0/24 blackhole".parse().expect("it is a route")];
    apply(&bed, &ProxyVpc { routes, ..private(&bed) });
    send(AWAY);
    eventually(|| bed.proxy_drops(VNI_A, DropReason::Blackhole) == 1);
    apply(&bed, &ProxyVpc { routes: Vec::new(), public: None, ..private(&bed) });
    let before = bed.proxy_drops(VNI_A, DropReason::NoRoute);
    send(AWAY);
    eventually(|| bed.proxy_drops(VNI_A, DropReason::NoRoute) == before + 1);
}

#[test]
fn streams_leave_and_return_whole() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    open(&bed);
    let bytes: Vec<u8> = (0..4u64 << 20).map(|n| (n % 251) as u8).collect();
    let there = internet(&bed);
    let _source = bulk_source(there, PORT, bytes.len() as u64, 0).expect("the server starts");
    let sink = bulk_sink(there, PORT + 1).expect("the server starts");
    guest.namespace.run(|| {
        let mut stream = TcpStream::connect((AWAY, PORT)).expect("the server answers");
        stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        let mut received = Vec::new();
        stream.read_to_end(&mut received).expect("the stream is whole");
        assert!(received == bytes);

        let mut stream = TcpStream::connect((AWAY, PORT + 1)).expect("the server answers");
        stream.write_all(&bytes).expect("the server reads");
        stream.shutdown(Shutdown::Write).expect("the stream stands");
        stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        assert_eq!(stream.read(&mut [0; 1]).expect("the server closes"), 0);
    });
    assert_eq!(sink.count(), bytes.len() as u64);
}

#[test]
fn echoes_and_errors_come_back() {
    let bed = Bed::new();
    let raw = RawGuest::open(&bed, 2);
    let guest = KernelGuest::plug(&bed, 1);
    for slot in [1, 2] {
        bed.host().attach(slot, VNI_A).expect("the slot is free");
    }
    open(&bed);
    internet(&bed);
    raw.send(&frame(raw.packet(AWAY, 64).icmpv4_echo_request(0x1234, 7), b"payload"));
    let reply = raw.receive(PATIENCE).expect("the server's kernel answers");
    assert_eq!(reply[26..30], AWAY.octets());
    assert_eq!((reply[34], &reply[38..42]), (0, &[0x12, 0x34, 0, 7][..]));
    assert_eq!((checksum(&reply[14..34]), checksum(&reply[34..49])), (0, 0));
    guest.namespace.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("there is a port");
        socket.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        socket.connect((AWAY, PORT)).expect("there is a route");
        socket.send(b"anybody?").expect("it can be sent");
        let error = socket.recv(&mut [0; 16]).expect_err("nobody listens");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    });
}

#[test]
fn fragments_leave_and_return() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    open(&bed);
    let _daemon = Daemon::start(&bed);
    let _echo = udp_echo_at(internet(&bed), (AWAY, PORT)).expect("the server starts");
    guest.namespace.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("there is a port");
        socket.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        socket.connect((AWAY, PORT)).expect("there is a route");
        let datagram: Vec<u8> = (0..6000u32).map(|n| (n % 251) as u8).collect();
        for _ in 0..3 {
            socket.send(&datagram).expect("it can be sent");
            let mut got = vec![0; 8000];
            let length = socket.recv(&mut got).expect("it comes back");
            assert!(got[..length] == datagram);
        }
    });
}

#[test]
fn public_addresses_of_one_proxy_reach_each_other() {
    let bed = Bed::new();
    let [a, b] = [(1, VNI_A), (2, VNI_B)].map(|(slot, vni)| {
        bed.host().attach(slot, vni).expect("the slot is free");
        RawGuest::open(&bed, slot)
    });
    open(&bed);
    apply(&bed, &public(&bed, 1));
    let elsewhere = Namespace::new("vpc-c").expect("namespaces can be made");
    veth(&bed.topology.proxy, "vpc-c", &elsewhere, "eth0").expect("they can be connected");
    let second = ProxyVpc {
        interface: "vpc-c".to_owned(),
        public: Some(PUBLIC[1]),
        ..proxy_vpc(VNI_B, vec![(PORTS, HOST)])
    };
    apply(&bed, &second);
    let server = udp_at(internet(&bed), (AWAY, PORT)).expect("the port is free");
    let seen = |guest: &RawGuest, port| {
        guest.send(&frame(guest.packet(AWAY, 64).udp(port, PORT), b"who am I?"));
        server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        server.recv_from(&mut [0; 16]).expect("the server is reached").1
    };
    let (from_a, from_b) = (seen(&a, 1000), seen(&b, 2000));
    let SocketAddr::V4(at_a) = from_a else { panic!("it is of IPv4") };
    let SocketAddr::V4(at_b) = from_b else { panic!("it is of IPv4") };
    assert_eq!([*at_a.ip(), *at_b.ip()], ADDRESSES);
    let a_to_b = frame(a.packet(*at_b.ip(), 64).udp(1000, at_b.port()), b"from a");
    let b_to_a = frame(b.packet(*at_a.ip(), 64).udp(2000, at_a.port()), b"from b");
    a.send(&a_to_b);
    eventually(|| bed.host_drops(0, DropReason::NoFlow) == 1);
    for _ in 0..3 {
        b.send(&b_to_a);
        let got = a.receive(PATIENCE).expect("it comes");
        assert!(got.ends_with(b"from b"));
        assert_eq!(got[26..30], at_b.ip().octets());
        a.send(&a_to_b);
        let got = b.receive(PATIENCE).expect("it comes");
        assert!(got.ends_with(b"from a"));
        assert_eq!(got[26..30], at_a.ip().octets());
    }
}

#[test]
fn guests_without_a_vpc_leave_by_an_address_of_their_own() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    // It is a VPC that is in the public network, and nowhere else.
    let own = ProxyVpc { holders: vec![(PORTS, HOST.into())], ..public(&bed, 1) };
    apply(&bed, &own);
    open(&bed);
    let vpc = HostVpc {
        vni: PUBLIC[1],
        shared_address: ADDRESSES[1],
        shared_address_v6: None,
        ports: PORTS,
        proxy_address: PROXY.into(),
        proxies: Vec::new(),
    };
    bed.host().apply_vpc(&vpc).expect("the host takes the VPC");
    bed.host().attach(1, PUBLIC[1]).expect("the slot is free");
    let echo = udp_echo_at(internet(&bed), (AWAY, PORT)).expect("the server starts");
    assert!(udp_round_trip(&guest.namespace, (AWAY, PORT)));
    assert_eq!(echo.count(), 1);
    // Whoever is behind another VPC's public address gets nothing uncalled for.
    assert!(!udp_round_trip(&guest.namespace, (ADDRESSES[0], PORTS.base)));
    eventually(|| bed.host_drops(0, DropReason::NoFlow) > 0);
}

#[test]
fn a_public_address_is_one_vpc_s() {
    let bed = Bed::new();
    open(&bed);
    let second = ProxyVpc { public: Some(PUBLIC[0]), ..proxy_vpc(VNI_B, vec![(PORTS, HOST)]) };
    let error = bed.topology.proxy.run(|| bed.proxy().apply_vpc(&second));
    let error = error.expect_err("it is another's").to_string();
    assert!(error.contains("300, which is that of VNI 100"), "{error}");
}

#[test]
fn ipv6_leaves_as_well() {
    let bed = Bed::dual();
    let guest = plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let there = internet(&bed);
    let echo = udp_echo_at(there, (AWAY_V6, PORT)).expect("the server starts");
    assert!(!round_trip(&guest.namespace, (AWAY_V6, PORT)));
    open(&bed);
    assert!(round_trip(&guest.namespace, (AWAY_V6, PORT)));
    assert_eq!(echo.count(), 1);
    let socket = udp_at(&guest.namespace, (Ipv6Addr::UNSPECIFIED, 0)).expect("there is a port");
    socket.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    socket.connect((AWAY_V6, PORT + 1)).expect("there is a route");
    socket.send(b"anybody?").expect("it can be sent");
    let error = socket.recv(&mut [0; 16]).expect_err("nobody listens");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    let _daemon = Daemon::start(&bed);
    socket.connect((AWAY_V6, PORT)).expect("there is a route");
    let comes_back = |_| {
        socket.send(&[7; 4000]).expect("it can be sent");
        socket.recv(&mut [0; 8000]).is_ok_and(|length| length == 4000)
    };
    // The first answer is too big for the tunnel, and the server is told so.
    assert!((0..3).any(comes_back));
}
