//! What tenants use it for.

use std::io::Read;
use std::net::{TcpStream, UdpSocket};

use etherparse::{Icmpv4Type, SlicedPacket, TransportSlice};
use warren_netns::capture::{Capture, vni};
use warren_netns::netns::Namespace;
use warren_netns::servers::{bulk_sink, bulk_source, udp, udp_echo};
use warren_netns::topology::{CONTROL, HOST, ONLY_IN_B, PROXY, SERVER, SHARED, UNDERLAY};

use crate::bed::{Bed, VNI_A, VNI_B};
use crate::guest::{KernelGuest, PATIENCE, RawGuest, SILENCE, frame, ipv4};

const PORT: u16 = 7000;

/// Sends a datagram and waits for it to come back.
pub fn udp_round_trip(guest: &Namespace, to: impl std::net::ToSocketAddrs + Send) -> bool {
    guest.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("there is a port");
        socket.set_read_timeout(Some(SILENCE)).expect("it is not zero");
        socket.connect(to).expect("there is a route");
        for _ in 0..3 {
            socket.send(b"ping").ok();
            if socket.recv(&mut [0; 16]).is_ok_and(|length| length == 4) {
                return true;
            }
        }
        false
    })
}

#[test]
fn tcp_and_udp_reach_the_server_and_come_back() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");

    let _echo = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    assert!(udp_round_trip(&guest.namespace, (SERVER, PORT)));

    let bytes = 4 << 20;
    let _source = bulk_source(&bed.topology.vpcs[0], PORT, bytes, 0).expect("the server starts");
    let received = guest.namespace.run(|| {
        let mut stream = TcpStream::connect((SERVER, PORT)).expect("the server answers");
        stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        let mut received = Vec::new();
        stream.read_to_end(&mut received).expect("the stream is whole");
        received
    });
    assert_eq!(received.len() as u64, bytes);
    assert!(received.iter().zip(0u64..).all(|(&byte, n)| u64::from(byte) == n % 251));
    assert_eq!(bed.host().drops().expect("counters can be read"), []);
}

#[test]
fn an_echo_request_is_answered_under_the_guest_s_identifier() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let builder = guest.packet(SERVER, 64).icmpv4_echo_request(0x1234, 7);
    guest.send(&frame(builder, b"payload"));
    let reply = guest.receive(PATIENCE).expect("the server's kernel answers");
    let reply = SlicedPacket::from_ethernet(&reply).expect("it is whole");
    assert_eq!(ipv4(&reply).destination_addr(), guest.address);
    let Some(TransportSlice::Icmpv4(icmp)) = &reply.transport else { panic!("it is ICMP") };
    let Icmpv4Type::EchoReply(header) = icmp.icmp_type() else { panic!("it is a reply") };
    assert_eq!((header.id, header.seq, icmp.payload()), (0x1234, 7, b"payload".as_slice()));
    assert_eq!(icmp.checksum(), icmp.icmp_type().calc_checksum(icmp.payload()));
    // Decremented once, by the host: the kernels of proxy and server did not route it.
    assert_eq!(ipv4(&reply).ttl(), 63);
}

#[test]
fn a_guest_sends_as_fast_as_it_can() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let sink = bulk_sink(&bed.topology.vpcs[0], PORT).expect("the server starts");
    let bytes: Vec<u8> = (0..4u64 << 20).map(|n| (n % 251) as u8).collect();
    guest.namespace.run(|| {
        let mut stream = TcpStream::connect((SERVER, PORT)).expect("the server answers");
        std::io::Write::write_all(&mut stream, &bytes).expect("the server reads");
        stream.shutdown(std::net::Shutdown::Write).expect("the stream stands");
        stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        assert_eq!(stream.read(&mut [0; 1]).expect("the server closes"), 0);
    });
    assert_eq!(sink.count(), bytes.len() as u64);
}

#[test]
fn tenants_with_the_same_addresses_reach_only_their_own() {
    let bed = Bed::new();
    let (a, b) = (KernelGuest::plug(&bed, 1), KernelGuest::plug(&bed, 2));
    bed.host().attach(1, VNI_A).expect("the slot is free");
    bed.host().attach(2, VNI_B).expect("the slot is free");
    let in_a = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    let in_b = udp_echo(&bed.topology.vpcs[1], PORT).expect("the server starts");

    assert!(udp_round_trip(&a.namespace, (SERVER, PORT)));
    assert_eq!((in_a.count(), in_b.count()), (1, 0));
    assert!(udp_round_trip(&b.namespace, (SERVER, PORT)));
    assert_eq!((in_a.count(), in_b.count()), (1, 1));
    // The server answers from its first address, which is no answer to these.
    assert!(!udp_round_trip(&a.namespace, (ONLY_IN_B, PORT)));
    assert_eq!((in_a.count(), in_b.count()), (1, 1));
    assert!(!udp_round_trip(&b.namespace, (ONLY_IN_B, PORT)));
    assert!(in_b.count() > 1);
    assert_eq!(in_a.count(), 1);
}

#[test]
fn a_detached_slot_reaches_nothing_and_a_moved_one_the_other_vpc() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    let in_a = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    let in_b = udp_echo(&bed.topology.vpcs[1], PORT).expect("the server starts");
    assert!(!udp_round_trip(&guest.namespace, (SERVER, PORT)));
    let first = bed.host().attach(1, VNI_A).expect("the slot is free");
    assert!(udp_round_trip(&guest.namespace, (SERVER, PORT)));
    bed.host().detach(1).expect("the slot can be detached");
    assert!(!udp_round_trip(&guest.namespace, (SERVER, PORT)));
    let second = bed.host().attach(1, VNI_B).expect("the slot is free");
    assert_ne!(first, second);
    assert!(udp_round_trip(&guest.namespace, (SERVER, PORT)));
    assert_eq!((in_a.count(), in_b.count()), (1, 1));
}

#[test]
fn the_underlay_s_routes_are_followed_as_they_are_now() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let echo = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    assert!(udp_round_trip(&guest.namespace, (SERVER, PORT)));

    // From now on, the way to the proxy leads over another machine.
    let router = &bed.topology.control;
    router.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")).expect("it routes");
    let words = format!("route add {PROXY} via {CONTROL}");
    bed.topology.host.ip(&words).expect("it is on-link");
    let capture = Capture::start(router, UNDERLAY).expect("captures can be made");
    assert!(udp_round_trip(&guest.namespace, (SERVER, PORT)));
    let frames = capture.drain().expect("the capture can be read");
    assert!(frames.iter().any(|frame| vni(&frame.bytes) == Some(VNI_A)));
    assert!(echo.count() >= 2);
}

#[test]
fn the_tunnel_s_headers_are_as_the_standards_want_them() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let _server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let underlay = Capture::start(&bed.topology.proxy, UNDERLAY).expect("captures can be made");
    let next = || loop {
        let frame = underlay.next(PATIENCE).expect("it can be read").expect("it comes");
        if vni(&frame.bytes) == Some(VNI_A) {
            return frame.bytes;
        }
    };
    let mut ports = Vec::new();
    for ecn in 0..4 {
        let mut bytes = frame(guest.packet(SERVER, 64).udp(1000, PORT), b"payload");
        // DSCP 46 and each ECN codepoint; the checksum of the header made anew.
        bytes[15] = 46 << 2 | ecn;
        let header = etherparse::Ipv4HeaderSlice::from_slice(&bytes[14..34]).expect("it is whole");
        let checksum = header.to_header().calc_header_checksum();
        bytes[24..26].copy_from_slice(&checksum.to_be_bytes());
        guest.send(&bytes);

        let outer = next();
        let packet = SlicedPacket::from_ethernet(&outer).expect("it is whole");
        let header = ipv4(&packet).to_header();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        assert_eq!((header.source, header.destination), (HOST.octets(), PROXY.octets()));
        assert!(header.dont_fragment);
        // RFC 6040: ECN is copied; DSCP is the tenant's own.
        assert_eq!((header.dscp.value(), header.ecn.value()), (0, ecn));
        let Some(TransportSlice::Udp(udp)) = &packet.transport else { panic!("it is UDP") };
        assert_eq!((udp.destination_port(), udp.checksum()), (4789, 0));
        assert!(udp.source_port() >= 49152);
        ports.push(udp.source_port());

        let inner = SlicedPacket::from_ethernet(&udp.payload()[8..]).expect("it is whole");
        let header = ipv4(&inner).to_header();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        assert_eq!((header.source, header.destination), (SHARED.octets(), SERVER.octets()));
        assert_eq!((header.time_to_live, header.ecn.value()), (63, ecn));
        let Some(TransportSlice::Udp(udp)) = &inner.transport else { panic!("it is UDP") };
        let checksum = udp.to_header().calc_checksum_ipv4(&header, b"payload");
        assert_eq!(Ok(udp.checksum()), checksum.map_err(|_| ()));
    }
    ports.dedup();
    assert_eq!(ports.len(), 1, "one flow, one source port");
}
