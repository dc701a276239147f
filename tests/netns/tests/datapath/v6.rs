//! IPv6 in a VPC: what tenants use it for, and what is refused.

use std::io::{ErrorKind, Read};
use std::net::{Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

use etherparse::{
    Icmpv6Type, IpHeaders, NetSlice, PacketBuilder, PacketBuilderStep, SlicedPacket,
    TransportSlice, icmpv6,
};
use warren_abi::icmp::v6::{TIME_EXCEEDED, TOO_BIG};
use warren_abi::wire::{GATEWAY_MAC, GATEWAY_V6, slot_address_v6};
use warren_dataplane::datapath::{DropReason, PortRange};
use warren_netns::netns::{Namespace, enable_v6};
use warren_netns::servers::{bulk_sink_at, bulk_source_at, udp_at, udp_echo_at};
use warren_netns::topology::{SERVER, SERVER_V6, SHARED_V6};

use crate::bed::{Bed, PORTS, VNI_A, VNI_B, eventually};
use crate::guest::{KernelGuest, PATIENCE, RawGuest, SILENCE};
use crate::traffic::udp_round_trip;

const PORT: u16 = 7000;
/// The largest IP packet of a guest, in the topology.
const MTU: u16 = 1450;
const ANY: Ipv6Addr = Ipv6Addr::UNSPECIFIED;

fn gateway() -> Ipv6Addr {
    GATEWAY_V6.into()
}

/// A guest with the kernel's network stack, and IPv6 as the identity tells.
pub fn plug(bed: &Bed, slot: u32) -> KernelGuest {
    let guest = KernelGuest::plug(bed, slot);
    enable_v6(&guest.namespace, "eth0").expect("the kernel has IPv6");
    let address = bed.host().slots()[slot as usize - 1].address_v6;
    for words in [
        format!("addr add {address}/128 dev eth0 nodad"),
        format!("-6 route add default via {} dev eth0", gateway()),
    ] {
        guest.namespace.ip(&words).expect("the guest can be configured");
    }
    guest
}

/// Sends a datagram over IPv6 and waits for it to come back.
pub fn round_trip(guest: &Namespace, to: (Ipv6Addr, u16)) -> bool {
    let socket = udp_at(guest, (ANY, 0)).expect("there is a port");
    socket.set_read_timeout(Some(SILENCE)).expect("it is not zero");
    socket.connect(to).expect("there is a route");
    (0..3).any(|_| {
        socket.send(b"ping").ok();
        socket.recv(&mut [0; 16]).is_ok_and(|length| length == 4)
    })
}

/// The beginning of a packet that this guest may send.
pub fn packet(guest: &RawGuest, to: Ipv6Addr, hops: u8) -> PacketBuilderStep<IpHeaders> {
    from(guest, own(1), to, hops)
}

/// The beginning of a packet from an address.
fn from(guest: &RawGuest, from: Ipv6Addr, to: Ipv6Addr, hops: u8) -> PacketBuilderStep<IpHeaders> {
    let macs = (guest.mac, GATEWAY_MAC.octets());
    PacketBuilder::ethernet2(macs.0, macs.1).ipv6(from.octets(), to.octets(), hops)
}

/// The address of a slot's guest.
pub fn own(slot: u32) -> Ipv6Addr {
    slot_address_v6(slot).into()
}

macro_rules! bytes {
    ($builder:expr, $payload:expr) => {{
        let (builder, payload) = ($builder, $payload);
        let mut frame = Vec::with_capacity(builder.size(payload.len()));
        builder.write(&mut frame, payload).expect("a vector takes everything");
        frame
    }};
}

/// The sum that an `ICMPv6` message and its pseudo-header come to: 0 if its checksum is right.
fn checksum(frame: &[u8]) -> u16 {
    let length = u32::from(u16::from_be_bytes([frame[18], frame[19]]));
    let mut summed = frame[22..54].to_vec();
    summed.extend(length.to_be_bytes());
    summed.extend([0, 0, 0, 58]);
    summed.extend(&frame[54..54 + length as usize]);
    crate::icmp::checksum(&summed)
}

/// Makes the checksum of a frame's `ICMPv6` message anew.
fn seal(frame: &mut [u8]) {
    frame[56..58].fill(0);
    let sum = checksum(frame);
    frame[56..58].copy_from_slice(&sum.to_be_bytes());
}

/// A neighbour solicitation, with the option for the sender's MAC address.
fn solicitation(guest: &RawGuest, source: Ipv6Addr, target: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    let mut message = [0; 4].to_vec();
    message.extend(target.octets());
    message.extend([1, 1]);
    message.extend(mac);
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 1);
    let step = from(guest, source, group, 255).icmpv6(Icmpv6Type::Unknown {
        type_u8: 135,
        code_u8: 0,
        bytes5to8: [0; 4],
    });
    bytes!(step, &message[4..])
}

#[test]
fn tcp_and_udp_reach_the_server_and_come_back() {
    let bed = Bed::dual();
    let guest = plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let server = &bed.topology.vpcs[0];

    let socket = udp_at(server, (ANY, PORT + 3)).expect("the port is free");
    let client = udp_at(&guest.namespace, (ANY, 0)).expect("there is a port");
    let mut seen = None;
    eventually(|| {
        client.send_to(b"ping", (SERVER_V6, PORT + 3)).expect("there is a route");
        seen = socket.recv_from(&mut [0; 16]).ok();
        seen.is_some()
    });
    let (_, SocketAddr::V6(peer)) = seen.expect("it came") else { panic!("it is of IPv6") };
    assert_eq!(*peer.ip(), SHARED_V6);
    assert!(
        (u32::from(PORTS.base)..u32::from(PORTS.base) + PORTS.count).contains(&peer.port().into())
    );
    let _echo = udp_echo_at(server, (ANY, PORT)).expect("the server starts");
    assert!(round_trip(&guest.namespace, (SERVER_V6, PORT)));

    let bytes = 4 << 20;
    let _source = bulk_source_at(server, (ANY, PORT), bytes, 0).expect("the server starts");
    let received = guest.namespace.run(|| {
        let mut stream = TcpStream::connect((SERVER_V6, PORT)).expect("the server answers");
        stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        let mut received = Vec::new();
        stream.read_to_end(&mut received).expect("the stream is whole");
        received
    });
    assert_eq!(received.len() as u64, bytes);
    assert!(received.iter().zip(0u64..).all(|(&byte, n)| u64::from(byte) == n % 251));

    let sink = bulk_sink_at(server, (ANY, PORT + 1)).expect("the server starts");
    guest.namespace.run(|| {
        let mut stream = TcpStream::connect((SERVER_V6, PORT + 1)).expect("the server answers");
        std::io::Write::write_all(&mut stream, &received).expect("the server reads");
        stream.shutdown(std::net::Shutdown::Write).expect("the stream stands");
        stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        assert_eq!(stream.read(&mut [0; 1]).expect("the server closes"), 0);
    });
    assert_eq!(sink.count(), bytes);
    for reason in [DropReason::NoFlow, DropReason::Internal, DropReason::Truncated] {
        assert_eq!(bed.host_drops(1, reason), 0, "{reason}");
    }
    // IPv4 has the same ports at the same time.
    let _echo = warren_netns::servers::udp_echo(server, PORT + 2).expect("the server starts");
    assert!(udp_round_trip(&guest.namespace, (SERVER, PORT + 2)));
}

#[test]
fn an_echo_request_is_answered_under_the_guest_s_identifier() {
    let bed = Bed::dual();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    guest.send(&bytes!(packet(&guest, SERVER_V6, 64).icmpv6_echo_request(0x1234, 7), b"payload"));
    let reply = guest.receive(PATIENCE).expect("the server's kernel answers");
    assert_eq!(checksum(&reply), 0);
    let reply = SlicedPacket::from_ethernet(&reply).expect("it is whole");
    let Some(NetSlice::Ipv6(ip)) = &reply.net else { panic!("it is IPv6") };
    assert_eq!(ip.header().destination_addr(), own(1));
    assert_eq!(ip.header().hop_limit(), 63, "decremented once");
    let Some(TransportSlice::Icmpv6(icmp)) = &reply.transport else { panic!("it is ICMP") };
    let Icmpv6Type::EchoReply(header) = icmp.icmp_type() else { panic!("it is a reply") };
    assert_eq!((header.id, header.seq, icmp.payload()), (0x1234, 7, b"payload".as_slice()));
}

#[test]
fn tenants_with_the_same_addresses_do_not_meet() {
    let bed = Bed::dual();
    let (a, b) = (plug(&bed, 1), plug(&bed, 2));
    bed.host().attach(1, VNI_A).expect("the slot is free");
    bed.host().attach(2, VNI_B).expect("the slot is free");
    let [in_a, in_b] = &bed.topology.vpcs;
    let (at_a, at_b) = (udp_echo_at(in_a, (ANY, PORT)), udp_echo_at(in_b, (ANY, PORT)));
    let (at_a, at_b) = (at_a.expect("the server starts"), at_b.expect("the server starts"));
    assert!(round_trip(&a.namespace, (SERVER_V6, PORT)));
    assert_eq!((at_a.count(), at_b.count()), (1, 0));
    assert!(round_trip(&b.namespace, (SERVER_V6, PORT)));
    assert_eq!((at_a.count(), at_b.count()), (1, 1));
    // Nor does a slot's next tenant meet the former one's flows.
    bed.host().detach(1).expect("it was attached");
    assert!(!round_trip(&a.namespace, (SERVER_V6, PORT)));
    assert_eq!(at_a.count(), 1);
}

#[test]
fn a_vpc_without_ipv6_says_so_at_once() {
    let bed = Bed::new();
    let guest = plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let error = guest.namespace.run(|| TcpStream::connect((SERVER_V6, PORT)));
    assert_eq!(error.expect_err("nobody is there").kind(), ErrorKind::NetworkUnreachable);
    assert!(bed.host_drops(1, DropReason::NoSharedAddress) > 0);
}

#[test]
fn neighbour_discovery_is_answered_in_place() {
    let bed = Bed::dual();
    let guest = RawGuest::open(&bed, 1);
    let link_local: Ipv6Addr = "fe80::77:72ff:fe00:1".parse().expect("it is an address");
    for (source, target) in [(own(1), gateway()), (link_local, gateway()), (own(1), own(2))] {
        guest.send(&solicitation(&guest, source, target, guest.mac));
        let reply = guest.receive(PATIENCE).expect("it is answered in place");
        assert_eq!(checksum(&reply), 0);
        assert_eq!(reply[..14], [&guest.mac[..], &GATEWAY_MAC.octets(), &[0x86, 0xdd]].concat());
        assert_eq!((reply.len(), reply[21]), (86, 255));
        assert_eq!(reply[22..38], target.octets());
        assert_eq!(reply[38..54], source.octets());
        // An advertisement of a router, solicited, that overrides.
        assert_eq!((&reply[54..56], &reply[58..62]), (&[136, 0][..], &[0xe0, 0, 0, 0][..]));
        assert_eq!(reply[62..78], target.octets());
        assert_eq!(reply[78..], [&[2, 1][..], &GATEWAY_MAC.octets()].concat());
    }
    // Duplicate address detection, and solicitations for itself, hear nothing.
    guest.send(&solicitation(&guest, ANY, own(1), guest.mac));
    guest.send(&solicitation(&guest, link_local, own(1), guest.mac));
    let unexpected = bed.host_drops(1, DropReason::UnexpectedNd);
    assert_eq!(unexpected, 2);

    let mut forged = RawGuest::open(&bed, 2);
    forged.mac = [2, 0, 0, 0, 0, 9];
    for frame in [
        solicitation(&guest, own(2), gateway(), guest.mac),
        solicitation(&guest, gateway(), own(2), guest.mac),
        solicitation(&guest, SERVER_V6, gateway(), guest.mac),
        solicitation(&guest, own(1), gateway(), forged.mac),
        solicitation(&forged, own(1), gateway(), guest.mac),
    ] {
        guest.send(&frame);
    }
    assert_eq!(bed.host_drops(1, DropReason::SpoofedNd), 5);
    let mut far = solicitation(&guest, own(1), gateway(), guest.mac);
    far[21] = 254;
    guest.send(&far);
    assert_eq!(bed.host_drops(1, DropReason::UnexpectedNd), unexpected + 1);
    let mut damaged = solicitation(&guest, own(1), gateway(), guest.mac);
    damaged[56] ^= 1;
    guest.send(&damaged);
    assert_eq!(bed.host_drops(1, DropReason::BadChecksum), 1);
    assert_eq!(guest.receive(SILENCE), None);
}

#[test]
fn what_a_guest_may_not_send_goes_nowhere() {
    let bed = Bed::dual();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let udp = |source, to: &str| {
        let to: Ipv6Addr = to.parse().expect("it is an address");
        bytes!(from(&guest, source, to, 64).udp(1000, PORT), b"x")
    };
    let server = SERVER_V6.to_string();
    let mut foreign_mac = udp(own(1), &server);
    foreign_mac[11] ^= 1;
    let mut unchecked = udp(own(1), &server);
    unchecked[60..62].fill(0);
    let with_next = |next| {
        let mut frame = udp(own(1), &server);
        frame[20] = next;
        frame
    };
    let link_local: Ipv6Addr = "fe80::77:72ff:fe00:1".parse().expect("it is an address");
    for (reason, frames) in [
        (DropReason::SpoofedMac, vec![foreign_mac]),
        (
            DropReason::SpoofedAddress,
            vec![udp(own(2), &server), udp(SHARED_V6, &server), udp(link_local, &server)],
        ),
        (
            DropReason::BadDestination,
            ["::", "::1", "::ffff:10.0.0.10", "fe80::1", "ff02::1", &own(2).to_string()]
                .map(|to| udp(own(1), to))
                .to_vec(),
        ),
        (DropReason::NoChecksum, vec![unchecked]),
        (DropReason::ExtensionHeader, [0, 43, 51, 60, 135].map(with_next).to_vec()),
        (DropReason::UnsupportedProtocol, [1, 50, 59, 132].map(with_next).to_vec()),
    ] {
        for frame in &frames {
            guest.send(frame);
        }
        assert_eq!(bed.host_drops(1, reason), frames.len() as u64, "{reason}");
    }
    assert_eq!(bed.host().flows().expect("flows can be counted"), 0);
    assert_eq!(guest.receive(SILENCE), None);
}

#[test]
fn a_guest_is_told_why_its_packet_went_no_further() {
    let bed = Bed::dual();
    bed.apply_host(VNI_A, PortRange { base: 8192, count: 64 });
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let expect = |kind: [u8; 2], mtu: u16, sent: &[u8], embedded: usize| {
        let got = guest.receive(PATIENCE).expect("the answer comes");
        assert_eq!(checksum(&got), 0);
        assert_eq!(got[..14], [&guest.mac[..], &GATEWAY_MAC.octets(), &[0x86, 0xdd]].concat());
        assert_eq!(got[22..38], gateway().octets());
        assert_eq!(got[38..54], own(1).octets());
        assert_eq!(got[54..56], kind);
        assert_eq!(got[58..62], u32::from(mtu).to_be_bytes());
        assert_eq!(got.len(), 62 + embedded);
        // Nobody may rely on the embedded transport's checksum.
        assert_eq!(got[62..102], sent[14..54]);
        assert_eq!(got[102..106], sent[54..58]);
    };
    let udp =
        |hops, payload: &[u8]| bytes!(packet(&guest, SERVER_V6, hops).udp(1000, PORT), payload);
    let tcp = |hops, payload: &[u8]| {
        bytes!(packet(&guest, SERVER_V6, hops).tcp(1000, PORT, 1, 9).syn(), payload)
    };
    for (sent, embedded) in [(udp(1, b""), 48), (tcp(1, b"odd"), 60)] {
        guest.send(&sent);
        expect([TIME_EXCEEDED, 0], 0, &sent, embedded);
    }
    for (sent, embedded) in [(udp(64, &[7; 1403]), 48), (tcp(64, &[7; 1403]), 60)] {
        guest.send(&sent);
        expect([TOO_BIG, 0], MTU, &sent, embedded);
    }
    assert_eq!(bed.host_drops(1, DropReason::TooBig), 2);
    for port in 1..=64 {
        guest.send(&bytes!(packet(&guest, SERVER_V6, 64).udp(port, PORT), b""));
    }
    let sent = bytes!(packet(&guest, SERVER_V6, 64).udp(65, PORT), b"one too many");
    guest.send(&sent);
    expect([1, 1], 0, &sent, 48);
    assert_eq!(bed.host_drops(1, DropReason::PortsExhausted), 1);
}

#[test]
fn errors_reach_both_sides_sockets() {
    let bed = Bed::dual();
    let guest = plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let refused = |socket: &UdpSocket| {
        eventually(|| {
            let sent = socket.send(b"ping");
            let got = sent.and_then(|_| socket.recv(&mut [0; 16]));
            got.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
        });
    };
    // The server's kernel refuses, and the guest's socket hears of it.
    let socket = udp_at(&guest.namespace, (ANY, 0)).expect("there is a port");
    socket.connect((SERVER_V6, PORT)).expect("there is a route");
    refused(&socket);
    // The guest's kernel refuses what comes for a socket that is gone.
    let server = udp_at(&bed.topology.vpcs[0], (ANY, PORT)).expect("the port is free");
    let mut peer = None;
    eventually(|| {
        socket.send(b"ping").ok();
        peer = server.recv_from(&mut [0; 16]).ok();
        peer.is_some()
    });
    drop(socket);
    server.connect(peer.expect("it came").1).expect("it is on-link");
    refused(&server);
    assert_eq!(bed.host_drops(1, DropReason::BadChecksum), 0);
}

#[test]
fn an_error_from_the_vpc_tells_of_the_guest_s_own_packet() {
    let bed = Bed::dual();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let sent = bytes!(packet(&guest, SERVER_V6, 64).tcp(1000, PORT, 1, 9).syn(), b"");
    // Nobody listens; and a router on the way tells that it is unreachable by a raw socket.
    guest.send(&sent);
    let reset = guest.receive(PATIENCE).expect("the server's kernel answers");
    assert_eq!((reset[20], reset[67] & 4), (6, 4));

    let sent = bytes!(packet(&guest, SERVER_V6, 64).udp(1001, PORT), b"payload");
    guest.send(&sent);
    let got = guest.receive(PATIENCE).expect("the server's kernel refuses");
    assert_eq!(checksum(&got), 0);
    assert_eq!(got[22..38], SERVER_V6.octets());
    assert_eq!(got[38..54], own(1).octets());
    assert_eq!(got[54..56], [1, 4], "port unreachable");
    // All that was sent, under the guest's own address and port, with the checksum that it had.
    let mut expected = sent[14..].to_vec();
    expected[7] = 63;
    assert_eq!(got[62..], expected);

    // What is damaged, or about no flow of the guest's, is refused.
    let about = |source: Ipv6Addr, port: u16| {
        let step = PacketBuilder::ipv6(SERVER_V6.octets(), source.octets(), 60).udp(PORT, port);
        let unreachable = icmpv6::DestUnreachableCode::Port;
        bytes!(
            packet(&guest, SERVER_V6, 64).icmpv6(Icmpv6Type::DestinationUnreachable(unreachable)),
            &bytes!(step, b"")
        )
    };
    guest.send(&about(own(2), 1001));
    guest.send(&about(own(1), 1002));
    assert_eq!(bed.host_drops(1, DropReason::IcmpError), 2);
    let mut damaged = about(own(1), 1001);
    damaged[58] ^= 1;
    guest.send(&damaged);
    assert_eq!(bed.host_drops(1, DropReason::BadChecksum), 1);
    seal(&mut damaged);
    guest.send(&damaged);
    assert_eq!(bed.host_drops(1, DropReason::BadChecksum), 1);
    assert_eq!(bed.host_drops(1, DropReason::IcmpError), 2);
}

#[test]
fn both_sides_learn_the_path_s_mtu_and_segments_fit_it() {
    let bed = Bed::dual();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let server = udp_at(&bed.topology.vpcs[0], (ANY, PORT)).expect("the port is free");
    guest.send(&bytes!(packet(&guest, SERVER_V6, 64).udp(1000, PORT), b"ping"));
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    let (_, peer) = server.recv_from(&mut [0; 16]).expect("it comes");
    server.connect(peer).expect("it is on-link");
    server.send(&[0; 1420]).expect("it fits the link");
    eventually(|| path_mtu(&server) == i32::from(MTU));

    let _source =
        bulk_source_at(&bed.topology.vpcs[0], (ANY, PORT), 1, 0).expect("the server starts");
    let options = [etherparse::TcpOptionElement::MaximumSegmentSize(1440)];
    let syn = packet(&guest, SERVER_V6, 64).tcp(1000, PORT, 1, 64_000).syn();
    guest.send(&bytes!(syn.options(&options).expect("they fit"), b""));
    let answer = guest.receive(PATIENCE).expect("the server answers");
    assert_eq!(answer[67] & 0x12, 0x12, "SYN and ACK");
    let segment = 1450u16 - 60;
    assert_eq!(answer[74..78], [&[2, 4][..], &segment.to_be_bytes()].concat());
}

/// The path's MTU towards the peer of a socket that is connected.
fn path_mtu(socket: &UdpSocket) -> i32 {
    let (mut mtu, mut length) = (0i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: the pointers are those of an integer and of its length.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU,
            (&raw mut mtu).cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0, "it is connected");
    mtu
}
