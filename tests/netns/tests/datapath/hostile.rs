//! What must not get through, and under which reason it is counted.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::Duration;

use etherparse::{PacketBuilder, SlicedPacket};
use warren_abi::wire::{GATEWAY, GATEWAY_MAC, VXLAN_PORT, Vxlan};
use warren_dataplane::datapath::{DropReason, PortRange};
use warren_netns::capture::Capture;
use warren_netns::netns::Namespace;
use warren_netns::servers::{udp, udp_echo};
use warren_netns::topology::{HOST, ONLY_IN_B, PROXY, SERVER, SHARED};

use crate::bed::{Bed, PORTS, VNI_A, VNI_B, eventually};
use crate::guest::{PATIENCE, RawGuest, SILENCE, frame};

const PORT: u16 = 7000;

/// An ARP request as Ethernet frame.
fn arp(source: [u8; 6], sender_mac: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let arp = etherparse::ArpPacket::new(
        etherparse::ArpHardwareId::ETHERNET,
        etherparse::EtherType::IPV4,
        etherparse::ArpOperation::REQUEST,
        &sender_mac,
        &sender.octets(),
        &[0; 6],
        &target.octets(),
    )
    .expect("the lengths fit");
    let mut bytes = Vec::new();
    PacketBuilder::ethernet2(source, [0xff; 6])
        .arp(arp)
        .write(&mut bytes)
        .expect("a vector takes everything");
    bytes
}

/// What a host puts into a UDP datagram for the tunnel.
fn tunnelled(vni: u32, from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Vec<u8> {
    let header = Vxlan::new(vni);
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&{ header.flags }.to_ne_bytes());
    bytes.extend_from_slice(&{ header.vni }.to_ne_bytes());
    let inner = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
        .ipv4(from.0.octets(), to.0.octets(), 64)
        .udp(from.1, to.1);
    bytes.extend(frame(inner, b"hostile"));
    bytes
}

/// Sends a datagram to a tunnel's end.
fn send_tunnelled(from: &Namespace, to: Ipv4Addr, payload: &[u8]) {
    let sent = from.run(|| UdpSocket::bind("0.0.0.0:0")?.send_to(payload, (to, VXLAN_PORT)));
    assert_eq!(sent.expect("there is a route"), payload.len());
}

#[test]
fn every_address_but_its_own_resolves_to_the_gateway() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    for target in [GATEWAY, SERVER] {
        guest.send(&arp(guest.mac, guest.mac, guest.address, target));
        let reply = guest.receive(PATIENCE).expect("it is answered in place");
        let reply = SlicedPacket::from_ethernet(&reply).expect("it is whole");
        let Some(etherparse::NetSlice::Arp(reply)) = reply.net else { panic!("it is ARP") };
        assert_eq!(reply.operation(), etherparse::ArpOperation::REPLY);
        assert_eq!(reply.sender_hw_addr(), GATEWAY_MAC.octets());
        assert_eq!(reply.sender_protocol_addr(), target.octets());
        assert_eq!(reply.target_protocol_addr(), guest.address.octets());
    }
    guest.send(&arp(guest.mac, guest.mac, guest.address, guest.address));
    assert_eq!(guest.receive(SILENCE), None);
    assert_eq!(bed.host_drops(1, DropReason::UnexpectedArp), 1);
}

#[test]
fn a_guest_cannot_speak_as_another() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let other = bed.host().slots()[1].clone();
    let underlay = Capture::start(&bed.topology.proxy, "under0").expect("captures can be made");

    let from_mac = PacketBuilder::ethernet2(other.mac, GATEWAY_MAC.octets())
        .ipv4(guest.address.octets(), SERVER.octets(), 64)
        .udp(1000, PORT);
    guest.send(&frame(from_mac, b"x"));
    assert_eq!(bed.host_drops(1, DropReason::SpoofedMac), 1);

    let from_address = PacketBuilder::ethernet2(guest.mac, GATEWAY_MAC.octets())
        .ipv4(other.address.octets(), SERVER.octets(), 64)
        .udp(1000, PORT);
    guest.send(&frame(from_address, b"x"));
    assert_eq!(bed.host_drops(1, DropReason::SpoofedAddress), 1);

    guest.send(&arp(other.mac, guest.mac, guest.address, GATEWAY));
    guest.send(&arp(guest.mac, other.mac, guest.address, GATEWAY));
    guest.send(&arp(guest.mac, guest.mac, other.address, GATEWAY));
    assert_eq!(bed.host_drops(1, DropReason::SpoofedArp), 3);
    assert_eq!(guest.receive(SILENCE), None);

    let frames = underlay.drain().expect("the capture can be read");
    assert!(frames.iter().all(|frame| warren_netns::capture::vni(&frame.bytes).is_none()));
}

#[test]
fn what_is_not_understood_is_dropped_and_named() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let good = frame(guest.packet(SERVER, 64).udp(1000, PORT), b"payload");
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        bytes
    };
    let to = |address: [u8; 4]| changed(&|bytes| bytes[30..34].copy_from_slice(&address));
    let icmp = |kind| {
        let mut bytes = frame(guest.packet(SERVER, 64).icmpv4_echo_request(1, 1), b"payload");
        bytes[34] = kind;
        bytes
    };
    let tcp = |flags: u8| {
        let mut bytes = frame(guest.packet(SERVER, 64).tcp(1000, PORT, 1, 1), b"");
        bytes[47] = flags;
        bytes
    };
    let cases: Vec<(DropReason, Vec<u8>)> = vec![
        (DropReason::NotIpv4, changed(&|bytes| bytes[12..14].copy_from_slice(&[0x81, 0x37]))),
        (
            DropReason::NotIpv4,
            changed(&|bytes| {
                bytes.splice(12..12, [0x81, 0, 0, 42]);
            }),
        ),
        (
            DropReason::NotIpv4,
            changed(&|bytes| {
                bytes.splice(12..12, [0x88, 0xa8, 0, 42]);
            }),
        ),
        (DropReason::Truncated, good[..14].to_vec()),
        (DropReason::Truncated, good[..40].to_vec()),
        (DropReason::Truncated, changed(&|bytes| bytes[16..18].copy_from_slice(&[5, 0xdc]))),
        (DropReason::Truncated, changed(&|bytes| bytes[16..18].copy_from_slice(&[0, 20]))),
        (DropReason::BadHeader, changed(&|bytes| bytes[14] = 0x46)),
        (DropReason::BadHeader, changed(&|bytes| bytes[14] = 0x65)),
        (DropReason::BadHeader, {
            let mut bytes = tcp(2);
            bytes[46] = 0x40;
            bytes
        }),
        (DropReason::UnsupportedProtocol, changed(&|bytes| bytes[23] = 132)),
        (DropReason::UnsupportedProtocol, icmp(0)),
        (DropReason::UnsupportedProtocol, icmp(13)),
        (DropReason::Truncated, icmp(3)),
        (DropReason::IcmpError, icmp(5)),
        (DropReason::TtlExceeded, changed(&|bytes| bytes[22] = 1)),
        (DropReason::TtlExceeded, changed(&|bytes| bytes[22] = 0)),
        (DropReason::NoService, to([169, 254, 169, 254])),
        (DropReason::BadDestination, to([169, 254, 1, 1])),
        (DropReason::BadDestination, to([127, 0, 0, 1])),
        (DropReason::BadDestination, to([224, 0, 0, 1])),
        (DropReason::BadDestination, to([255, 255, 255, 255])),
        (DropReason::BadDestination, to([0, 0, 0, 0])),
        (DropReason::NoFlow, tcp(0x10)),
        (DropReason::NoFlow, tcp(0x12)),
        (DropReason::NoFlow, tcp(0x04)),
        (DropReason::TooBig, frame(guest.packet(SERVER, 64).udp(1000, PORT), &[0; 1423])),
    ];
    for (reason, bytes) in cases {
        let before = bed.host_drops(1, reason);
        guest.send(&bytes);
        assert_eq!(bed.host_drops(1, reason), before + 1, "{reason}: {bytes:02x?}");
    }
    // The largest that fits does get through.
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    guest.send(&frame(guest.packet(SERVER, 64).udp(1000, PORT), &[0; 1422]));
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    assert_eq!(server.recv(&mut [0; 2000]).expect("it arrives"), 1422);
}

#[test]
fn only_the_holder_of_a_port_block_speaks_for_it() {
    let bed = Bed::new();
    // The host holds ports in the first VPC; in the second, nobody does.
    bed.apply_proxy::<IpAddr>(VNI_B, vec![]);
    let in_a = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    let in_b = udp_echo(&bed.topology.vpcs[1], PORT).expect("the server starts");
    let (host, rogue) = (&bed.topology.host, &bed.topology.rogue);
    let port = PORTS.base;

    send_tunnelled(rogue, PROXY, &tunnelled(VNI_A, (SHARED, port), (SERVER, PORT)));
    eventually(|| bed.proxy_drops(VNI_A, DropReason::NotBlockHolder) == 1);
    send_tunnelled(host, PROXY, &tunnelled(VNI_B, (SHARED, port), (SERVER, PORT)));
    eventually(|| bed.proxy_drops(VNI_B, DropReason::NotBlockHolder) == 1);
    let beyond = port + PORTS.count as u16;
    send_tunnelled(host, PROXY, &tunnelled(VNI_A, (SHARED, beyond), (SERVER, PORT)));
    eventually(|| bed.proxy_drops(VNI_A, DropReason::NotBlockHolder) == 2);

    send_tunnelled(host, PROXY, &tunnelled(VNI_A, (ONLY_IN_B, port), (SERVER, PORT)));
    eventually(|| bed.proxy_drops(VNI_A, DropReason::SpoofedAddress) == 1);
    send_tunnelled(host, PROXY, &tunnelled(VNI_A, (SHARED, port), ([8, 8, 8, 8].into(), PORT)));
    eventually(|| bed.proxy_drops(VNI_A, DropReason::NoRoute) == 1);
    send_tunnelled(host, PROXY, &tunnelled(VNI_A, (SHARED, port), (SHARED, PORT)));
    eventually(|| bed.proxy_drops(VNI_A, DropReason::NoBlockHolder) == 1);
    send_tunnelled(host, PROXY, &tunnelled(300, (SHARED, port), (SERVER, PORT)));
    eventually(|| bed.proxy_drops(0, DropReason::UnknownVpc) == 1);
    assert_eq!((in_a.count(), in_b.count()), (0, 0));

    // The same from the holder is forwarded.
    send_tunnelled(host, PROXY, &tunnelled(VNI_A, (SHARED, port), (SERVER, PORT)));
    eventually(|| in_a.count() == 1);
}

#[test]
fn a_host_listens_to_the_vpc_s_proxy_only() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let forged = tunnelled(VNI_A, (SERVER, PORT), (SHARED, PORTS.base));
    send_tunnelled(&bed.topology.rogue, HOST, &forged);
    eventually(|| bed.host_drops(0, DropReason::NotFromProxy) == 1);
    // What a proxy sends that no guest asked for goes nowhere either.
    send_tunnelled(&bed.topology.proxy, HOST, &forged);
    eventually(|| bed.host_drops(0, DropReason::NoFlow) == 1);
    let astray = tunnelled(VNI_A, (SERVER, PORT), (SERVER, PORTS.base));
    send_tunnelled(&bed.topology.proxy, HOST, &astray);
    eventually(|| bed.host_drops(0, DropReason::NotSharedAddress) == 1);
    send_tunnelled(&bed.topology.proxy, HOST, &tunnelled(300, (SERVER, 1), (SHARED, 1)));
    eventually(|| bed.host_drops(0, DropReason::UnknownVpc) == 1);
    assert_eq!(guest.receive(SILENCE), None);
}

#[test]
fn a_vpc_reaches_the_port_blocks_and_nothing_else_of_the_proxy() {
    let bed = Bed::new();
    let vpc = &bed.topology.vpcs[0];
    let listener = bed.topology.proxy.run(|| UdpSocket::bind("0.0.0.0:5000"));
    let listener = listener.expect("the port is free");
    listener.set_read_timeout(Some(SILENCE)).expect("it is not zero");
    let send = |to: Ipv4Addr, port: u16| {
        vpc.run(|| UdpSocket::bind("0.0.0.0:0")?.send_to(b"x", (to, port))).expect("a route");
    };

    send(SHARED, 5000);
    eventually(|| bed.proxy_drops(VNI_A, DropReason::NoBlockHolder) == 0);
    eventually(|| bed.proxy_drops(VNI_A, DropReason::NoFlow) == 0);
    send(SHARED, 10_000);
    eventually(|| bed.proxy_drops(VNI_A, DropReason::NoBlockHolder) == 1);
    // The underlay's address of the proxy, by way of the VPC.
    vpc.ip(&format!("route add {PROXY} via {SHARED}")).expect("it is on-link");
    send(PROXY, 5000);
    eventually(|| bed.proxy_drops(VNI_A, DropReason::NotSharedAddress) == 1);
    assert!(listener.recv(&mut [0; 16]).is_err());
    // The host that holds port 5000 got the first one: no flow has it there.
    eventually(|| bed.host_drops(0, DropReason::NoFlow) == 1);
}

#[test]
fn a_packet_from_the_vpc_that_is_too_big_for_the_tunnel_is_counted() {
    let bed = Bed::new();
    let vpc = &bed.topology.vpcs[0];
    let send = |length: usize| {
        let payload = vec![0; length];
        vpc.run(|| UdpSocket::bind("0.0.0.0:0")?.send_to(&payload, (SHARED, PORTS.base)))
            .expect("there is a route");
    };
    send(1422);
    eventually(|| bed.host_drops(0, DropReason::NoFlow) == 1);
    send(1423);
    eventually(|| bed.proxy_drops(VNI_A, DropReason::TooBig) == 1);
}

#[test]
fn a_block_changes_hands_at_once() {
    let bed = Bed::new();
    let server = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    let payload = tunnelled(VNI_A, (SHARED, PORTS.base + 64), (SERVER, PORT));
    let halves =
        [PortRange { base: PORTS.base, count: 64 }, PortRange { base: PORTS.base + 64, count: 64 }];
    bed.apply_proxy(VNI_A, vec![(halves[0], HOST), (halves[1], warren_netns::topology::ROGUE)]);
    send_tunnelled(&bed.topology.host, PROXY, &payload);
    eventually(|| bed.proxy_drops(VNI_A, DropReason::NotBlockHolder) == 1);
    send_tunnelled(&bed.topology.rogue, PROXY, &payload);
    eventually(|| server.count() == 1);
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(bed.proxy_drops(VNI_A, DropReason::NotBlockHolder), 1);
}
