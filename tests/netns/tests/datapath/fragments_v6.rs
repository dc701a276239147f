//! Fragments in IPv6 (RFC 8200, section 4.5), and of both families over an underlay of IPv6.

use std::net::{Ipv6Addr, SocketAddr, UdpSocket};

use etherparse::PacketBuilder;
use warren_abi::icmp::v6::TOO_BIG;
use warren_dataplane::datapath::DropReason;
use warren_netns::capture::Capture;
use warren_netns::servers::{udp_at, udp_echo_at};
use warren_netns::topology::{SERVER, SERVER_V6, SHARED_V6};

use crate::bed::{Bed, VNI_A, eventually};
use crate::fragments::{Daemon, large_datagrams, payload};
use crate::guest::{PATIENCE, RawGuest, SILENCE};
use crate::icmp::checksum;
use crate::v6::{own, packet, plug};

const PORT: u16 = 7000;
const ANY: Ipv6Addr = Ipv6Addr::UNSPECIFIED;
/// Where the transport begins, behind Ethernet's and IP's headers, and behind a fragment's.
const WHOLE: usize = 54;
const PIECE: usize = 62;

/// A fragment with the headers of a frame.
fn piece(frame: &[u8], id: u32, offset: usize, more: bool, payload: &[u8]) -> Vec<u8> {
    let mut bytes = frame[..WHOLE].to_vec();
    bytes[18..20].copy_from_slice(&(8 + payload.len() as u16).to_be_bytes());
    let protocol = std::mem::replace(&mut bytes[20], 44);
    bytes.extend([protocol, 0]);
    bytes.extend((offset as u16 | u16::from(more)).to_be_bytes());
    bytes.extend(id.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// What a frame's IP packet is divided into, each of at most `size` bytes of payload.
fn divided(frame: &[u8], id: u32, size: usize) -> Vec<Vec<u8>> {
    let payload = &frame[WHOLE..];
    let parts = payload.chunks(size).enumerate();
    let parts = parts.map(|(index, part)| {
        piece(frame, id, index * size, (index + 1) * size < payload.len(), part)
    });
    parts.collect()
}

fn guest(bed: &Bed, slot: u32) -> RawGuest {
    bed.host().attach(slot, VNI_A).expect("the slot is free");
    RawGuest::open(bed, slot)
}

fn server(bed: &Bed) -> UdpSocket {
    let server = udp_at(&bed.topology.vpcs[0], (ANY, PORT)).expect("the port is free");
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    server
}

/// A datagram of a guest's to the server.
fn datagram(guest: &RawGuest, payload: &[u8]) -> Vec<u8> {
    let step = packet(guest, SERVER_V6, 64).udp(1000, PORT);
    let mut frame = Vec::new();
    step.write(&mut frame, payload).expect("a vector takes everything");
    frame
}

/// The next datagram, and where it came from.
fn received(server: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 65536];
    let (length, from) = server.recv_from(&mut buffer).expect("it arrives, whole");
    buffer.truncate(length);
    (buffer, from)
}

#[test]
fn large_datagrams_go_both_ways_between_kernels() {
    let bed = Bed::dual();
    let _daemon = Daemon::start(&bed);
    let guest = plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let _echo = udp_echo_at(&bed.topology.vpcs[0], (ANY, PORT)).expect("the server starts");
    large_datagrams(&guest, (SERVER_V6, PORT));
}

#[test]
fn large_datagrams_of_both_families_go_over_an_underlay_of_ipv6() {
    let bed = Bed::over_v6();
    let _daemon = Daemon::start(&bed);
    let guest = plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let _echo = udp_echo_at(&bed.topology.vpcs[0], (ANY, PORT)).expect("the server starts");
    large_datagrams(&guest, (SERVER, PORT));
    large_datagrams(&guest, (SERVER_V6, PORT));
}

#[test]
fn a_guest_s_fragments_pass_in_order_without_the_daemon_and_in_any_order_with_it() {
    for bed in [Bed::dual(), Bed::over_v6()] {
        let (guest, server) = (guest(&bed, 1), server(&bed));
        let sent = payload(4000, 1);
        let whole = datagram(&guest, &sent);
        for part in divided(&whole, 1, 1360) {
            guest.send(&part);
        }
        let (got, first) = received(&server);
        assert!(got == sent);
        let SocketAddr::V6(from) = first else { panic!("it is of IPv6") };
        assert_eq!(*from.ip(), SHARED_V6);
        let _daemon = Daemon::start(&bed);
        for (id, order) in [(2, [2, 1, 0]), (3, [1, 0, 2]), (4, [0, 2, 1]), (2, [2, 0, 1])] {
            let parts = divided(&whole, id, 1360);
            for index in order {
                guest.send(&parts[index]);
            }
            let (got, from) = received(&server);
            assert!(got == sent, "{order:?}");
            assert_eq!(from, first, "a fragment has its flow's port");
        }
        // All there is in one: it is of no other's datagram (RFC 6946).
        let parts = divided(&whole, 9, 1360);
        guest.send(&parts[0]);
        let small = datagram(&guest, b"atomic");
        guest.send(&piece(&small, 9, 0, false, &small[WHOLE..]));
        assert_eq!(received(&server).0, b"atomic");
        guest.send(&parts[1]);
        guest.send(&parts[2]);
        assert!(received(&server).0 == sent);
        assert_eq!(bed.host().drops().expect("counters can be read"), []);
        // The server's kernel tells of its multicast groups, behind an extension header.
        let mut drops = bed.proxy().drops().expect("counters can be read");
        drops.retain(|drop| drop.reason != DropReason::ExtensionHeader);
        assert_eq!(drops, []);
    }
}

#[test]
fn a_vpc_s_fragments_reach_the_guest_in_any_order_and_too_big_ones_are_answered() {
    let bed = Bed::dual();
    let (guest, server) = (guest(&bed, 1), server(&bed));
    guest.send(&datagram(&guest, b"hello"));
    let (_, from) = received(&server);
    let wire = Capture::start(&bed.topology.vpcs[0], "eth0").expect("captures can be made");
    server.send_to(b"hello", from).expect("there is a route");
    guest.receive(PATIENCE).expect("it comes");
    let next = |is_it: fn(&[u8]) -> bool| loop {
        let seen = wire.next(PATIENCE).expect("it can be read").expect("it is there").bytes;
        if seen.len() > PIECE && is_it(&seen) {
            break seen;
        }
    };
    let seen = next(|seen| seen[38..54] == SHARED_V6.octets() && seen[20] == 17);
    let mac = |at: usize| -> [u8; 6] { seen[at..at + 6].try_into().expect("they are six") };
    let _daemon = Daemon::start(&bed);
    let sent = payload(4000, 2);
    let step = PacketBuilder::ethernet2(mac(6), mac(0))
        .ipv6(SERVER_V6.octets(), SHARED_V6.octets(), 64)
        .udp(PORT, from.port());
    let mut whole = Vec::new();
    step.write(&mut whole, &sent).expect("a vector takes everything");
    for (id, order) in [(1, [0, 1, 2]), (2, [2, 1, 0]), (3, [1, 0, 2])] {
        let parts = divided(&whole, id, 1400);
        for index in order {
            wire.send(&parts[index]).expect("the wire takes it");
        }
        let mut datagram = vec![None; 4008];
        while datagram.iter().any(Option::is_none) {
            let got = guest.receive(PATIENCE).expect("all parts come");
            assert_eq!(&got[38..54], &own(1).octets()[..]);
            assert_eq!((got[20], got[WHOLE]), (44, 17));
            let offset = usize::from(u16::from_be_bytes([got[56], got[57]]) & 0xfff8);
            for (index, byte) in got[PIECE..].iter().enumerate() {
                datagram[offset + index] = Some(*byte);
            }
        }
        let datagram: Vec<u8> = datagram.into_iter().flatten().collect();
        assert_eq!(datagram[2..4], 1000u16.to_be_bytes(), "the guest's own port");
        assert!(datagram[8..] == sent, "{order:?}");
        let addresses = [SERVER_V6.octets(), own(1).octets()].concat();
        let length = 4008u32.to_be_bytes();
        let covered = [&addresses[..], &length, &[0, 0, 0, 17], &datagram].concat();
        assert_eq!(checksum(&covered), 0);
    }
    assert_eq!(bed.proxy_drops(VNI_A, DropReason::TooBig), 0);
    // They fill the VPC's MTU, and are more than the tunnel carries: its sender is told.
    let parts = divided(&whole, 4, 1448);
    wire.drain().expect("it can be read");
    wire.send(&parts[0]).expect("the wire takes it");
    let told = next(|seen| seen[20] == 58 && seen[WHOLE] == TOO_BIG);
    assert_eq!(&told[22..54], &[SHARED_V6.octets(), SERVER_V6.octets()].concat()[..]);
    assert_eq!(told[58..62], 1450u32.to_be_bytes());
    // It embeds the headers, IP's, the fragment's and the datagram's.
    assert_eq!(told[62..62 + 40 + 8 + 4], parts[0][14..14 + 40 + 8 + 4]);
    let length = u32::from(u16::from_be_bytes([told[18], told[19]]));
    let pseudo = [&told[22..54], &length.to_be_bytes(), &[0, 0, 0, 58]].concat();
    assert_eq!(checksum(&[&pseudo[..], &told[WHOLE..]].concat()), 0);
    assert_eq!(bed.proxy_drops(VNI_A, DropReason::TooBig), 1);
}

#[test]
fn fragments_that_cannot_be_judged_are_dropped_and_named() {
    let bed = Bed::dual();
    let guest = guest(&bed, 1);
    let whole = datagram(&guest, &payload(64, 6));
    let mut tcp = Vec::new();
    let step = packet(&guest, SERVER_V6, 64).tcp(1000, PORT, 7, 512).syn();
    step.write(&mut tcp, &payload(64, 7)).expect("a vector takes everything");
    let mut id = 100;
    let mut expect = |reason, parts: &[Vec<u8>]| {
        id += 1;
        let before = bed.host_drops(1, reason);
        for part in parts {
            let mut part = part.clone();
            part[58..62].copy_from_slice(&u32::to_be_bytes(id));
            guest.send(&part);
        }
        eventually(|| bed.host_drops(1, reason) == before + 1);
    };
    let part = |frame: &[u8], offset, more, length| {
        piece(frame, 0, offset, more, &frame[WHOLE..WHOLE + length])
    };
    // RFC 1858: the flags are not in the first one; RFC 3128: in another one over it.
    expect(DropReason::BadFragment, &[part(&tcp, 0, true, 16)]);
    expect(DropReason::BadFragment, &[part(&tcp, 16, false, 40)]);
    // A SYN in fragments.
    expect(DropReason::BadFragment, &[part(&tcp, 0, true, 24)]);
    // Not a multiple of 8, nothing at all, beyond the largest packet.
    expect(DropReason::BadFragment, &[part(&whole, 0, true, 33)]);
    expect(DropReason::BadFragment, &[part(&whole, 32, true, 0)]);
    expect(DropReason::BadFragment, &[part(&whole, 65_528, false, 8)]);
    // Over the first one (RFC 5722).
    expect(DropReason::BadFragment, &[part(&whole, 0, true, 32), part(&whole, 24, false, 16)]);
    // Extension headers in the datagram, one more fragment's, or no transport that is translated.
    for (next_header, reason) in [
        (0, DropReason::ExtensionHeader),
        (60, DropReason::ExtensionHeader),
        (44, DropReason::UnsupportedProtocol),
        (132, DropReason::UnsupportedProtocol),
    ] {
        let mut other = part(&whole, 0, true, 32);
        other[WHOLE] = next_header;
        expect(reason, &[other]);
    }
    // Of somebody else.
    let mut spoofed = part(&whole, 0, true, 32);
    spoofed[37] ^= 3;
    expect(DropReason::SpoofedAddress, &[spoofed]);
    // Its first one never comes.
    let _daemon = Daemon::start(&bed);
    expect(DropReason::Fragment, &[part(&whole, 40, false, 24)]);
    let server = server(&bed);
    server.set_read_timeout(Some(SILENCE)).expect("it is not zero");
    server.recv(&mut [0; 16]).expect_err("nothing whole arrives");
}
