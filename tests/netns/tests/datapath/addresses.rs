//! Several shared addresses of one VPC: each with a VNI of its own, all on the proxy's interface.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use warren_abi::wire::Arp;
use warren_dataplane::datapath::{DropReason, HostVpc, ProxyVpc, ProxyVpcV6};
use warren_netns::capture::Capture;
use warren_netns::servers::udp;
use warren_netns::topology::{HOST, PROXY, SERVER, SHARED, SHARED_V6, VPC_INTERFACES};

use crate::bed::{Bed, PORTS, VNI_A, eventually, proxy_vpc};
use crate::guest::{PATIENCE, RawGuest, SILENCE, frame};

const PORT: u16 = 7000;
/// VNI of the second address.
const VNI_C: u32 = 300;
const SECOND: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 101);

/// The second address, as the proxy knows it.
fn second() -> ProxyVpc {
    ProxyVpc { shared_address: SECOND, ..proxy_vpc(VNI_C, vec![(PORTS, HOST)]) }
}

fn apply(bed: &Bed, vpc: &ProxyVpc) {
    bed.topology.proxy.run(|| bed.proxy().apply_vpc(vpc)).expect("the proxy takes the VPC");
}

/// A guest with each of both addresses, and the same ports of each.
fn bed() -> (Bed, [RawGuest; 2]) {
    let bed = Bed::new();
    apply(&bed, &second());
    let vpc = HostVpc {
        vni: VNI_C,
        shared_address: SECOND,
        shared_address_v6: None,
        ports: PORTS,
        proxy_address: PROXY.into(),
        proxies: Vec::new(),
    };
    bed.host().apply_vpc(&vpc).expect("the host takes the VPC");
    let guests = [(1, VNI_A), (2, VNI_C)].map(|(slot, vni)| {
        bed.host().attach(slot, vni).expect("the slot is free");
        RawGuest::open(&bed, slot)
    });
    (bed, guests)
}

/// Where the server sees a guest's port.
fn seen(guest: &RawGuest, port: u16, server: &UdpSocket) -> SocketAddr {
    guest.send(&frame(guest.packet(SERVER, 64).udp(port, PORT), b"who am I?"));
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    server.recv_from(&mut [0; 16]).expect("the server is reached").1
}

/// Whether the guest gets what the server sends there.
fn gets(guest: &RawGuest, server: &UdpSocket, to: SocketAddr) -> bool {
    server.send_to(b"reply", to).expect("it can be sent");
    guest.receive(PATIENCE).is_some_and(|got| got.ends_with(b"reply"))
}

#[test]
fn each_guest_is_seen_as_its_own_and_gets_what_is_for_that() {
    let (bed, [a, c]) = bed();
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let (from_a, from_c) = (seen(&a, 1000, &server), seen(&c, 1000, &server));
    assert_eq!((from_a.ip(), from_c.ip()), (IpAddr::from(SHARED), IpAddr::from(SECOND)));
    assert!(gets(&a, &server, from_a) && gets(&c, &server, from_c));
    // The same port of the other address is another's.
    server.send_to(b"stray", (SECOND, from_a.port())).expect("it can be sent");
    server.send_to(b"stray", (SHARED, from_c.port())).expect("it can be sent");
    assert!(from_a.port() == from_c.port() || a.receive(SILENCE).is_none());
    let both = [a.receive(SILENCE), c.receive(SILENCE)];
    assert_eq!(both.iter().flatten().count(), if from_a.port() == from_c.port() { 2 } else { 0 });
}

#[test]
fn guests_with_different_addresses_reach_each_other() {
    let (bed, [a, c]) = bed();
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let (from_a, from_c) = (seen(&a, 1000, &server), seen(&c, 2000, &server));
    let a_to_c = frame(a.packet(SECOND, 64).udp(1000, from_c.port()), b"from a");
    let c_to_a = frame(c.packet(SHARED, 64).udp(2000, from_a.port()), b"from c");
    a.send(&a_to_c);
    eventually(|| bed.host_drops(0, DropReason::NoFlow) == 1);
    for _ in 0..3 {
        c.send(&c_to_a);
        let got = a.receive(PATIENCE).expect("it comes");
        assert!(got.ends_with(b"from c"));
        assert_eq!(got[26..30], SECOND.octets());
        a.send(&a_to_c);
        let got = c.receive(PATIENCE).expect("it comes");
        assert!(got.ends_with(b"from a"));
        assert_eq!(got[26..30], SHARED.octets());
    }
}

#[test]
fn the_last_address_keeps_the_interface_whoever_came_first() {
    let (mut bed, [a, c]) = bed();
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let addresses = |bed: &Bed| {
        let words = format!("-o -4 addr show dev {}", VPC_INTERFACES[0]);
        bed.topology.proxy.ip_lines(&words).expect("they are shown")
    };
    assert_eq!(addresses(&bed).len(), 2);
    bed.topology.proxy.run(|| bed.proxy().remove_vpc(VNI_A)).expect("it is forgotten");
    let left = addresses(&bed);
    assert!(left.len() == 1 && left[0].contains(&SECOND.to_string()), "{left:?}");
    for _ in 0..2 {
        let from_c = seen(&c, 1000, &server);
        assert!(gets(&c, &server, from_c));
        bed.reopen_proxy();
    }
    a.send(&frame(a.packet(SERVER, 64).udp(1000, PORT), b"in vain"));
    server.set_read_timeout(Some(SILENCE)).expect("it is not zero");
    server.recv_from(&mut [0; 16]).expect_err("its address is gone");
    bed.topology.proxy.run(|| bed.proxy().remove_vpc(VNI_C)).expect("it is forgotten");
    assert_eq!(addresses(&bed), [""; 0]);
}

#[test]
fn an_address_is_one_vni_s_on_an_interface() {
    let (bed, _guests) = bed();
    let vpc = ProxyVpc { vni: 301, ..second() };
    let error =
        bed.topology.proxy.run(|| bed.proxy().apply_vpc(&vpc)).expect_err("it is another's");
    assert!(error.to_string().contains("10.0.0.101, which is of VNI 300"), "{error}");
}

#[test]
fn both_families_have_several() {
    let bed = Bed::dual();
    let shared_v6 = (u128::from(SHARED_V6) + 1).into();
    let cidr = warren_netns::topology::CIDR_V6.parse().expect("it is a CIDR");
    let v6 = ProxyVpcV6 { shared_address: shared_v6, cidr, gateway: None };
    apply(&bed, &ProxyVpc { v6: Some(v6), ..second() });
    let lines = |bed: &Bed| {
        let words = format!("-o -6 addr show dev {}", VPC_INTERFACES[0]);
        bed.topology.proxy.ip_lines(&words).expect("they are shown").len()
    };
    assert_eq!(lines(&bed), 3, "both, and a link-local one");
    for address in [SHARED_V6, shared_v6] {
        let ping =
            bed.topology.vpcs[0].command("ip").args(["neigh", "show", "dev", "eth0"]).output();
        assert!(ping.is_ok());
        let socket =
            bed.topology.vpcs[0].run(|| UdpSocket::bind("[::]:0")).expect("there is a port");
        socket.send_to(b"knock", (address, 9)).expect("it can be sent");
        eventually(|| {
            let known = bed.topology.vpcs[0].ip_lines("-6 neigh show dev eth0");
            let known = known.expect("they are shown");
            known
                .iter()
                .any(|line| line.starts_with(&format!("{address} ")) && line.contains("lladdr"))
        });
    }
    bed.topology.proxy.run(|| bed.proxy().remove_vpc(VNI_A)).expect("it is forgotten");
    assert_eq!(lines(&bed), 2, "the link-local one is still needed");
}

/// The senders in whose name the proxy asks for its neighbour when it probes it.
fn probes(bed: &Bed) -> Vec<Ipv4Addr> {
    let capture = Capture::start(&bed.topology.vpcs[0], "eth0").expect("it can be captured");
    let words = format!("neigh change {SERVER} dev {} nud probe", VPC_INTERFACES[0]);
    bed.topology.proxy.ip(&words).expect("it is a neighbour");
    let mut senders = Vec::new();
    while let Some(frame) = capture.next(SILENCE).expect("it can be read") {
        let bytes = &frame.bytes;
        if bytes[12..14] == [8, 6] && bytes[20..22] == [0, Arp::REQUEST.get() as u8] {
            senders.push(Ipv4Addr::new(bytes[28], bytes[29], bytes[30], bytes[31]));
        }
    }
    senders
}

#[test]
fn a_proxy_asks_for_neighbours_in_the_name_of_no_address_that_another_owns() {
    let (bed, [a, _c]) = bed();
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    seen(&a, 1000, &server);
    assert_eq!(probes(&bed), [SHARED], "its own");
    bed.topology.proxy.run(|| bed.proxy().set_claim(VNI_A, None)).expect("it is known");
    assert_eq!(probes(&bed), [Ipv4Addr::UNSPECIFIED]);
    let words = format!("neigh show {SERVER} dev {}", VPC_INTERFACES[0]);
    let known = || bed.topology.proxy.ip_lines(&words).expect("it is shown").join("");
    eventually(|| known().contains("REACHABLE"));
}

#[test]
fn what_a_switch_floods_is_not_forwarded_again() {
    let (bed, [a, _c]) = bed();
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let from_a = seen(&a, 1000, &server);
    let wire = Capture::start(&bed.topology.vpcs[0], "eth0").expect("it can be captured");
    assert!(gets(&a, &server, from_a));
    let frames = wire.drain().expect("they can be read");
    let reply = frames.iter().rfind(|frame| frame.bytes.ends_with(b"reply")).expect("it was sent");
    let mut others = reply.bytes.clone();
    others[5] ^= 1;
    wire.send(&others).expect("it can be sent");
    eventually(|| bed.proxy_drops(VNI_A, DropReason::OtherMac) == 1);
    assert_eq!(a.receive(SILENCE), None);
    wire.send(&reply.bytes).expect("it can be sent");
    assert!(a.receive(PATIENCE).is_some());
}
