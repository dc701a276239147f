//! The tunnel (RFC 7348), as a foreign end may speak it: by the programs' short cut and by the
//! kernel's VXLAN device.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

use etherparse::PacketBuilder;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, setsockopt,
    socket, sockopt,
};
use warren_dataplane::datapath::DropReason;
use warren_netns::capture::{Capture, vni};
use warren_netns::netns::Namespace;
use warren_netns::servers::udp;
use warren_netns::topology::{HOST, PROXY, ROGUE, SERVER, SHARED, UNDERLAY};

use crate::bed::{Bed, PORTS, VNI_A, eventually};
use crate::guest::{PATIENCE, RawGuest, SILENCE, frame};
use crate::icmp::checksum;

const PORT: u16 = 7000;
/// The VXLAN device, on host and proxy.
const DEVICE: &str = "wrn-vxlan";

/// The outer UDP checksum. Only a packet without one takes the short cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sum {
    None,
    Right,
    Wrong,
}

/// The two ways in.
const WAYS: [Sum; 2] = [Sum::None, Sum::Right];

/// What is sent to a tunnel's end.
#[derive(Clone, Debug)]
struct Sent {
    sum: Sum,
    tos: u8,
    /// The VXLAN header.
    header: [u8; 8],
    inner: Vec<u8>,
}

impl Sent {
    fn new(sum: Sum, inner: Vec<u8>) -> Self {
        let [_, high, middle, low] = VNI_A.to_be_bytes();
        Self { sum, tos: 0, header: [8, 0, 0, 0, high, middle, low, 0], inner }
    }

    fn send(&self, from: &Namespace, addresses: (Ipv4Addr, Ipv4Addr)) {
        let mut datagram = [50_000u16, 4789].map(u16::to_be_bytes).concat();
        let length = 8 + 8 + self.inner.len() as u16;
        datagram.extend(length.to_be_bytes());
        datagram.extend([0, 0]);
        datagram.extend(self.header);
        datagram.extend(&self.inner);
        let (source, destination) = (addresses.0.octets(), addresses.1.octets());
        let pseudo = [&source[..], &destination, &[0, 17], &length.to_be_bytes()].concat();
        let sum = match self.sum {
            Sum::None => 0,
            Sum::Right => checksum(&[&pseudo[..], &datagram].concat()),
            Sum::Wrong => checksum(&[&pseudo[..], &datagram].concat()) ^ 0x0101,
        };
        datagram[6..8].copy_from_slice(&sum.to_be_bytes());
        let [a, b, c, d] = destination;
        from.run(|| {
            let flags = SockFlag::SOCK_CLOEXEC;
            let raw = socket(AddressFamily::Inet, SockType::Raw, flags, SockProtocol::Udp)?;
            setsockopt(&raw, sockopt::Ipv4Tos, &i32::from(self.tos))?;
            let to = SockaddrIn::new(a, b, c, d, 0);
            sendto(raw.as_raw_fd(), &datagram, &to, MsgFlags::empty())
        })
        .expect("it leaves");
    }

    /// From the host to the proxy.
    fn to_proxy(&self, bed: &Bed) {
        self.send(&bed.topology.host, (HOST, PROXY));
    }

    /// From the proxy to the host.
    fn to_host(&self, bed: &Bed) {
        self.send(&bed.topology.proxy, (PROXY, HOST));
    }
}

/// What a guest of the host's sends to the server, as the proxy gets it.
fn outward(payload: &[u8]) -> Vec<u8> {
    let step = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
        .ipv4(SHARED.octets(), SERVER.octets(), 64)
        .udp(PORTS.base, PORT);
    frame(step, payload)
}

/// A frame's congestion mark becomes another (RFC 3168).
fn mark(frame: &mut [u8], ecn: u8) {
    frame[15] = frame[15] & !3 | ecn;
    frame[24..26].fill(0);
    let sum = checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
}

fn server(bed: &Bed) -> UdpSocket {
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    server
}

#[test]
fn what_the_standard_allows_is_taken_by_either_way() {
    let bed = Bed::new();
    let server = server(&bed);
    let device = Capture::start(&bed.topology.proxy, DEVICE).expect("captures can be made");
    device.ignore_outgoing().expect("it can be set");
    for sum in WAYS {
        let plain = Sent::new(sum, outward(b"plain"));
        let mut reserved = Sent::new(sum, outward(b"reserved"));
        // All but the VNI: only the flag I must be set.
        reserved.header[..4].copy_from_slice(&[0xff; 4]);
        reserved.header[7] = 0xff;
        // Whatever the inner frame's MAC addresses are, it is for this end.
        let mut other = Sent::new(sum, outward(b"other"));
        other.inner[..6].copy_from_slice(&[0x52, 0x54, 0, 1, 2, 3]);
        for (sent, payload) in [(plain, &b"plain"[..]), (reserved, b"reserved"), (other, b"other")]
        {
            sent.to_proxy(&bed);
            let mut buffer = [0; 16];
            let length = server.recv(&mut buffer);
            let length = length.unwrap_or_else(|error| panic!("{sent:?}: {error}"));
            assert_eq!(&buffer[..length], payload);
        }
        let by_device = device.drain().expect("the capture can be read").len();
        assert_eq!(by_device, if sum == Sum::None { 0 } else { 3 }, "{sum:?}");
    }
}

#[test]
fn what_the_standard_forbids_is_dropped_by_either_way() {
    let bed = Bed::new();
    let server = server(&bed);
    for sum in WAYS {
        // The device drops these itself.
        let mut without_flag = Sent::new(sum, outward(b"no VNI"));
        without_flag.header[0] = 0;
        without_flag.to_proxy(&bed);
        Sent::new(Sum::Wrong, outward(b"wrong checksum")).to_proxy(&bed);

        let count = |reason| bed.proxy_drops(VNI_A, reason);
        let mut tagged = Sent::new(sum, outward(b"tagged"));
        tagged.inner.splice(12..12, [0x81, 0, 0, 42]);
        let before = count(DropReason::NotIpv4);
        tagged.to_proxy(&bed);
        eventually(|| count(DropReason::NotIpv4) == before + 1);
        let mut unknown = Sent::new(sum, outward(b"unknown"));
        unknown.header[4] = 0x7f;
        let before = bed.proxy_drops(0, DropReason::UnknownVpc);
        unknown.to_proxy(&bed);
        eventually(|| bed.proxy_drops(0, DropReason::UnknownVpc) == before + 1);
        let before = count(DropReason::NotBlockHolder);
        Sent::new(sum, outward(b"rogue")).send(&bed.topology.rogue, (ROGUE, PROXY));
        eventually(|| count(DropReason::NotBlockHolder) == before + 1);

        let count = |reason| bed.host_drops(0, reason);
        let before = count(DropReason::NotFromProxy);
        Sent::new(sum, outward(b"rogue")).send(&bed.topology.rogue, (ROGUE, HOST));
        eventually(|| count(DropReason::NotFromProxy) == before + 1);
        let mut tagged = Sent::new(sum, outward(b"tagged"));
        tagged.inner.splice(12..12, [0x88, 0xa8, 0, 42]);
        let before = count(DropReason::NotIpv4);
        tagged.to_host(&bed);
        eventually(|| count(DropReason::NotIpv4) == before + 1);
    }
    // Nothing of all this arrived.
    Sent::new(Sum::None, outward(b"good")).to_proxy(&bed);
    let mut buffer = [0; 16];
    let length = server.recv(&mut buffer).expect("it arrives");
    assert_eq!(&buffer[..length], b"good");
}

/// What a packet is marked with after the tunnel (RFC 6040, section 4.2); none: it is dropped.
fn decapsulated(inner: u8, outer: u8) -> Option<u8> {
    const NOT_ECT: u8 = 0;
    const ECT_1: u8 = 1;
    const ECT_0: u8 = 2;
    const CE: u8 = 3;
    match (inner, outer) {
        (NOT_ECT, CE) => None,
        (NOT_ECT, _) => Some(NOT_ECT),
        (_, CE) => Some(CE),
        (ECT_0, ECT_1) => Some(ECT_1),
        (inner, _) => Some(inner),
    }
}

#[test]
fn all_congestion_marks_come_out_of_the_tunnel_as_they_should() {
    let bed = Bed::new();
    let wire = Capture::start(&bed.topology.vpcs[0], "eth0").expect("captures can be made");
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let server = server(&bed);
    guest.send(&frame(guest.packet(SERVER, 64).udp(1000, PORT), b"hello"));
    let port = server.recv_from(&mut [0; 16]).expect("the server is reached").1.port();
    let step = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
        .ipv4(SERVER.octets(), SHARED.octets(), 64)
        .udp(PORT, port);
    let inward = frame(step, b"answer");
    for sum in WAYS {
        for (inner, outer) in (0..16).map(|both| (both >> 2, both & 3)) {
            let sent = |mut frame: Vec<u8>| {
                mark(&mut frame, inner);
                Sent { tos: outer, ..Sent::new(sum, frame) }
            };
            let expected = decapsulated(inner, outer);
            wire.drain().expect("the capture can be read");
            sent(outward(b"marked")).to_proxy(&bed);
            let patience = if expected.is_some() { PATIENCE } else { SILENCE };
            let seen = loop {
                match wire.next(patience).expect("the capture can be read") {
                    Some(frame) if frame.bytes.ends_with(b"marked") => break Some(frame.bytes),
                    Some(_) => {}
                    None => break None,
                }
            };
            let what = format!("{sum:?}: {inner:02b} in {outer:02b}");
            assert_eq!(seen.map(|frame| frame[15] & 3), expected, "to the VPC, {what}");
            sent(inward.clone()).to_host(&bed);
            let seen = guest.receive(patience);
            if let Some(frame) = &seen {
                assert_eq!(checksum(&frame[14..34]), 0);
            }
            assert_eq!(seen.map(|frame| frame[15] & 3), expected, "to the guest, {what}");
        }
    }
}

#[test]
fn a_vni_has_24_bits_and_a_flow_one_port_of_its_own() {
    const LAST: u32 = (1 << 24) - 1;
    let bed = Bed::new();
    let remove = || bed.proxy().remove_vpc(VNI_A);
    bed.topology.proxy.run(remove).expect("it can be removed");
    bed.apply_host(LAST, PORTS);
    bed.apply_proxy(LAST, vec![(PORTS, HOST)]);
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, LAST).expect("the slot is free");
    let server = server(&bed);
    let underlay = Capture::start(&bed.topology.host, UNDERLAY).expect("captures can be made");
    let mut ports = std::collections::BTreeSet::new();
    for flow in 0..8 {
        for _ in 0..2 {
            guest.send(&frame(guest.packet(SERVER, 64).udp(1000 + flow, PORT), b"hello"));
            let from = server.recv_from(&mut [0; 16]).expect("the server is reached").1;
            server.send_to(b"answer", from).expect("there is a route");
            assert!(guest.receive(PATIENCE).is_some());
        }
        let mut of_flow = std::collections::BTreeSet::new();
        let frames = underlay.drain().expect("the capture can be read");
        let tunnelled: Vec<_> = frames.iter().filter(|frame| vni(&frame.bytes).is_some()).collect();
        assert_eq!(tunnelled.len(), 4, "two each way");
        for frame in tunnelled {
            let outer = &frame.bytes[34..50];
            // Flags, reserved, VNI, reserved: exactly as the standard wants them sent.
            assert_eq!(outer[8..16], [8, 0, 0, 0, 0xff, 0xff, 0xff, 0]);
            of_flow.insert(u16::from_be_bytes([outer[0], outer[1]]));
            assert_eq!(outer[2..4], 4789u16.to_be_bytes());
        }
        assert_eq!(of_flow.len(), 1, "one port, both ways");
        ports.extend(of_flow);
    }
    assert!(ports.iter().all(|port| *port >= 49152));
    assert!(ports.len() > 4, "flows are told apart: {ports:?}");
}
