//! ICMP errors, translated both ways (RFC 5508, sections 4 to 7).

use std::io::ErrorKind;
use std::net::{Ipv4Addr, UdpSocket};

use warren_abi::flow::Timers;
use warren_abi::icmp::{PARAMETER_PROBLEM, SOURCE_QUENCH, TIME_EXCEEDED, UNREACHABLE};
use warren_abi::wire::GATEWAY_MAC;
use warren_dataplane::datapath::DropReason;
use warren_netns::capture::Capture;
use warren_netns::servers::udp;
use warren_netns::topology::{ONLY_IN_B, SERVER, SHARED};

use crate::bed::{Bed, PORTS, VNI_A, eventually};
use crate::flows::{AT_ONCE, next_tick};
use crate::guest::{KernelGuest, PATIENCE, RawGuest, SILENCE, frame};

const PORT: u16 = 7000;
/// A router in the VPC, which is known to nobody but by its errors.
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 77);

/// The Internet checksum of bytes (RFC 1071); 0 if they contain one that is right.
pub fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !sum as u16
}

/// Makes the checksum of a frame's IP header anew.
fn seal_ip(frame: &mut [u8]) {
    frame[24..26].fill(0);
    let sum = checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
}

/// Makes the checksum of a frame's ICMP message anew.
fn seal_icmp(frame: &mut [u8]) {
    frame[36..38].fill(0);
    let sum = checksum(&frame[34..]);
    frame[36..38].copy_from_slice(&sum.to_be_bytes());
}

/// An ICMP error about the IP packet in a frame, of which it embeds so many bytes.
pub fn error(
    macs: ([u8; 6], [u8; 6]),
    addresses: (Ipv4Addr, Ipv4Addr),
    kind: [u8; 2],
    about: &[u8],
    embedded: usize,
) -> Vec<u8> {
    let mut bytes = [macs.1, macs.0].concat();
    bytes.extend([8, 0, 0x45, 0]);
    bytes.extend((20 + 8 + embedded as u16).to_be_bytes());
    bytes.extend([0, 0, 0, 0, 64, 1, 0, 0]);
    bytes.extend(addresses.0.octets());
    bytes.extend(addresses.1.octets());
    bytes.extend([kind[0], kind[1], 0, 0, 0, 0, 0x05, 0x14]);
    bytes.extend(&about[14..14 + embedded]);
    seal_ip(&mut bytes);
    seal_icmp(&mut bytes);
    bytes
}

/// The server's end of the wire, where a test is a router or a server with a stack of its own.
struct Wire(Capture);

impl Wire {
    fn new(bed: &Bed) -> Self {
        Self(Capture::start(&bed.topology.vpcs[0], "eth0").expect("captures can be made"))
    }

    /// The next IP packet from the shared address.
    fn next(&self) -> Vec<u8> {
        loop {
            let frame = self.0.next(PATIENCE).expect("it can be read").expect("it comes").bytes;
            if frame.len() >= 34 && frame[12..14] == [8, 0] && frame[26..30] == SHARED.octets() {
                return frame;
            }
        }
    }

    /// An error from the router to the shared address, about a packet that came over this wire.
    fn error(about: &[u8], kind: [u8; 2], embedded: usize) -> Vec<u8> {
        let mac = |at: usize| about[at..at + 6].try_into().expect("they are six");
        error((mac(0), mac(6)), (ROUTER, SHARED), kind, about, embedded)
    }

    fn send(&self, frame: &[u8]) {
        self.0.send(frame).expect("the wire takes it");
    }
}

/// Attaches the first slot.
fn guest(bed: &Bed) -> RawGuest {
    let guest = RawGuest::open(bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    guest
}

#[test]
fn a_closed_port_is_refused_to_the_guest_s_socket() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let refused = guest.namespace.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("there is a port");
        socket.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        socket.connect((SERVER, PORT)).expect("there is a route");
        socket.send(b"anybody?").expect("it leaves");
        socket.recv(&mut [0; 16])
    });
    assert_eq!(refused.expect_err("nobody listens").kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn an_error_from_the_vpc_tells_of_the_guest_s_own_packet() {
    let bed = Bed::new();
    let guest = guest(&bed);
    let wire = Wire::new(&bed);
    let mut unchecked = frame(guest.packet(SERVER, 64).udp(1001, PORT), b"no checksum");
    unchecked[40..42].fill(0);
    let tcp = frame(guest.packet(SERVER, 64).tcp(1000, PORT, 7, 512).syn(), b"");
    let echo = frame(guest.packet(SERVER, 64).icmpv4_echo_request(77, 1), b"echo");
    let udp = frame(guest.packet(SERVER, 64).udp(1000, PORT), b"odd");
    // RFC 792 asks for 8 bytes of the transport; RFC 1812 for as much as fits.
    let cases = [
        (&udp, 28),
        (&udp, 31),
        (&unchecked, 39),
        (&tcp, 28),
        (&tcp, 36),
        (&tcp, 40),
        (&echo, 28),
        (&echo, 32),
    ];
    for (sent, embedded) in cases {
        for kind in [[UNREACHABLE, 1], [UNREACHABLE, 4], [TIME_EXCEEDED, 0], [PARAMETER_PROBLEM, 0]]
        {
            guest.send(sent);
            wire.send(&Wire::error(&wire.next(), kind, embedded));
            let got = loop {
                let frame = guest.receive(PATIENCE).expect("the error comes");
                if frame[26..30] == ROUTER.octets() {
                    break frame;
                }
            };
            // What the guest sent, one hop later.
            let mut mine = sent.clone();
            mine[22] -= 1;
            seal_ip(&mut mine);
            let macs = (GATEWAY_MAC.octets(), guest.mac);
            let mut expected = error(macs, (ROUTER, guest.address), kind, &mine, embedded);
            expected[22] -= 1;
            seal_ip(&mut expected);
            assert_eq!(got, expected, "{kind:?}, {embedded} bytes of {sent:02x?}");
        }
    }
}

#[test]
fn an_error_neither_ends_a_flow_nor_keeps_it_alive() {
    let bed = Bed::new();
    let guest = guest(&bed);
    let wire = Wire::new(&bed);
    guest.send(&frame(guest.packet(SERVER, 64).tcp(1000, PORT, 7, 512).syn(), b""));
    let seen = wire.next();
    next_tick();
    wire.send(&Wire::error(&seen, [UNREACHABLE, 1], 40));
    while guest.receive(PATIENCE).expect("the error comes")[26..30] != ROUTER.octets() {}
    let opening = Timers { tcp_closed: u32::MAX >> 1, ..AT_ONCE };
    // It stands as before: the answer (a reset, for nobody listens) closed it, not the error.
    assert_eq!(bed.host().sweep_with(&opening).expect("flows can be swept").live, 1);
    // And it was not used since: it expires by the tick in which the guest sent.
    assert_eq!(bed.host().sweep_with(&AT_ONCE).expect("flows can be swept").expired, 1);
    wire.send(&Wire::error(&seen, [UNREACHABLE, 1], 40));
    eventually(|| bed.host_drops(0, DropReason::IcmpError) == 1);
    assert_eq!(guest.receive(SILENCE), None);
}

/// Who drops it.
enum Judge {
    Proxy,
    /// The host, on account of a slot or of nobody.
    Host(u32),
}

#[test]
fn an_error_that_is_wrong_or_about_no_flow_is_dropped_and_named() {
    let bed = Bed::new();
    let guest = guest(&bed);
    let wire = Wire::new(&bed);
    let _server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    guest.send(&frame(guest.packet(SERVER, 64).udp(1000, PORT), b"payload"));
    let seen = wire.next();
    let good = Wire::error(&seen, [UNREACHABLE, 1], 35);
    // A change of the error, and whether its checksum is made anew.
    let changed = |at: usize, to: &[u8], inner: bool| {
        let mut bytes = good.clone();
        bytes[at..at + to.len()].copy_from_slice(to);
        if inner {
            let mut about = [&seen[..14], &bytes[42..]].concat();
            seal_ip(&mut about);
            bytes[42..].copy_from_slice(&about[14..]);
        }
        seal_icmp(&mut bytes);
        bytes
    };
    let mut bad_sum = good.clone();
    bad_sum[36] ^= 1;
    let short = Wire::error(&seen, [UNREACHABLE, 1], 24);
    for (judge, reason, bytes) in [
        (Judge::Host(1), DropReason::BadChecksum, bad_sum),
        (Judge::Proxy, DropReason::BadChecksum, changed(52, &[0, 0], false)),
        (Judge::Host(0), DropReason::IcmpError, changed(64, &[0, 1], false)),
        (Judge::Host(0), DropReason::IcmpError, changed(58, &[10, 0, 0, 11], true)),
        (Judge::Proxy, DropReason::IcmpError, changed(54, &[10, 0, 0, 11], true)),
        (Judge::Proxy, DropReason::IcmpError, changed(51, &[132], true)),
        (Judge::Proxy, DropReason::IcmpError, changed(42, &[0x46], true)),
        (Judge::Proxy, DropReason::IcmpError, changed(48, &[0, 1], true)),
        (Judge::Proxy, DropReason::IcmpError, changed(34, &[SOURCE_QUENCH], false)),
        (Judge::Proxy, DropReason::NoBlockHolder, changed(62, &10_000u16.to_be_bytes(), false)),
        (Judge::Proxy, DropReason::Truncated, short),
    ] {
        let count = || match judge {
            Judge::Proxy => bed.proxy_drops(VNI_A, reason),
            Judge::Host(scope) => bed.host_drops(scope, reason),
        };
        let before = count();
        wire.send(&bytes);
        eventually(|| count() == before + 1);
    }
    assert_eq!(guest.receive(SILENCE), None);
    wire.send(&good);
    assert!(guest.receive(PATIENCE).is_some());
}

#[test]
fn a_guest_s_refusal_reaches_the_server_s_socket() {
    let bed = Bed::new();
    let guest = guest(&bed);
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    let wire = Wire::new(&bed);
    guest.send(&frame(guest.packet(SERVER, 64).udp(1000, PORT), b"payload"));
    let peer = server.recv_from(&mut [0; 16]).expect("the server is reached").1;
    wire.next();
    server.connect(peer).expect("there is a route");
    server.send(b"answer").expect("it leaves");
    let answer = guest.receive(PATIENCE).expect("the answer comes");

    let macs = (guest.mac, GATEWAY_MAC.octets());
    guest.send(&error(macs, (guest.address, SERVER), [UNREACHABLE, 3], &answer, 34));
    let got = wire.next();
    assert_eq!(checksum(&got[14..34]), 0);
    assert_eq!(checksum(&got[34..]), 0);
    assert_eq!(checksum(&got[42..62]), 0);
    assert_eq!(got[58..62], SHARED.octets());
    assert_eq!(got[64..66], peer.port().to_be_bytes());
    let refused = server.recv(&mut [0; 16]).expect_err("the guest refused");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_guest_cannot_send_errors_about_what_it_did_not_get() {
    let bed = Bed::new();
    let guest = guest(&bed);
    let other = RawGuest::open(&bed, 2);
    bed.host().attach(2, VNI_A).expect("the slot is free");
    let wire = Wire::new(&bed);
    let _server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    other.send(&frame(other.packet(SERVER, 64).udp(1000, PORT), b"the other's"));
    wire.next();
    guest.send(&frame(guest.packet(SERVER, 64).udp(2000, PORT), b"mine"));
    wire.next();
    let macs = (guest.mac, GATEWAY_MAC.octets());
    // A packet from the server, as it would have come to a guest's port.
    let packet = |address: Ipv4Addr, port: u16| {
        let builder = etherparse::PacketBuilder::ethernet2(macs.1, macs.0)
            .ipv4(SERVER.octets(), address.octets(), 63)
            .udp(PORT, port);
        frame(builder, b"answer")
    };
    let refusal =
        |to: Ipv4Addr, about: &[u8]| error(macs, (guest.address, to), [UNREACHABLE, 3], about, 34);
    let mut bad_sum = refusal(SERVER, &packet(guest.address, 2000));
    bad_sum[36] ^= 1;
    for (reason, bytes) in [
        (DropReason::IcmpError, refusal(SERVER, &packet(guest.address, 1000))),
        (DropReason::IcmpError, refusal(SERVER, &packet(other.address, 1000))),
        (DropReason::IcmpError, refusal(ONLY_IN_B, &packet(guest.address, 2000))),
        (DropReason::IcmpError, refusal(SERVER, &packet(SHARED, PORTS.base))),
        (DropReason::BadChecksum, bad_sum),
    ] {
        let before = bed.host_drops(1, reason);
        guest.send(&bytes);
        assert_eq!(bed.host_drops(1, reason), before + 1, "{bytes:02x?}");
    }
    guest.send(&refusal(SERVER, &packet(guest.address, 2000)));
    assert_eq!(wire.next()[34..36], [UNREACHABLE, 3]);
}
