//! Guests that reach one another by the shared address (RFC 4787, REQ-9; RFC 5382, REQ-8;
//! RFC 5508, REQ-7).

use std::net::{SocketAddr, UdpSocket};

use warren_abi::flow::tcp;
use warren_abi::icmp::UNREACHABLE;
use warren_abi::wire::GATEWAY_MAC;
use warren_dataplane::datapath::{
    DropReason, HostDatapath, HostOptions, HostVpc, PortRange, Timers,
};
use warren_netns::capture::{Capture, vni};
use warren_netns::servers::udp;
use warren_netns::topology::{HOST, PROXY, ROGUE, SERVER, SHARED, UNDERLAY};

use crate::bed::{Bed, PORTS, VNI_A, eventually};
use crate::flows::{AT_ONCE, next_tick};
use crate::guest::{PATIENCE, RawGuest, SILENCE, frame};
use crate::icmp::{checksum, error};

const PORT: u16 = 7000;

/// Where the server sees a guest's port: what peers would tell each other of themselves.
fn mapped(guest: &RawGuest, port: u16, server: &UdpSocket) -> u16 {
    guest.send(&frame(guest.packet(SERVER, 64).udp(port, PORT), b"who am I?"));
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    let seen = server.recv_from(&mut [0; 16]).expect("the server is reached").1;
    assert_eq!(seen, SocketAddr::from((SHARED, seen.port())));
    seen.port()
}

/// Expects a frame from the shared address.
fn expect(guest: &RawGuest, from: u16, to: u16) -> Vec<u8> {
    let got = guest.receive(PATIENCE).expect("it comes");
    assert_eq!(checksum(&got[14..34]), 0);
    assert_eq!((&got[26..30], &got[30..34]), (&SHARED.octets()[..], &guest.address.octets()[..]));
    assert_eq!((&got[34..36], &got[36..38]), (&from.to_be_bytes()[..], &to.to_be_bytes()[..]));
    got
}

/// Two guests that know of each other's mappings reach one another as soon as both have written.
fn punch(bed: &Bed, a: &RawGuest, b: &RawGuest, dropped: impl Fn() -> u64) {
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let (from_a, from_b) = (mapped(a, 1000, &server), mapped(b, 2000, &server));
    let a_to_b = frame(a.packet(SHARED, 64).udp(1000, from_b), b"from a");
    let b_to_a = frame(b.packet(SHARED, 64).udp(2000, from_a), b"from b");
    let before = dropped();
    a.send(&a_to_b);
    eventually(|| dropped() == before + 1);
    assert_eq!(b.receive(SILENCE), None);
    for _ in 0..3 {
        b.send(&b_to_a);
        assert!(expect(a, from_b, 1000).ends_with(b"from b"));
        a.send(&a_to_b);
        let got = expect(b, from_a, 2000);
        assert!(got.ends_with(b"from a"));
        assert_eq!(got[22], 62, "each host took one off the time to live");
    }
    // From another port of b's, it is a stranger's.
    b.send(&frame(b.packet(SHARED, 64).udp(2001, from_a), b"from b"));
    assert_eq!(a.receive(SILENCE), None);

    // b refuses: a is told so of its own packet, as it sent it.
    a.send(&a_to_b);
    let got = expect(b, from_a, 2000);
    let macs = (b.mac, GATEWAY_MAC.octets());
    b.send(&error(macs, (b.address, SHARED), [UNREACHABLE, 3], &got, 34));
    let told = a.receive(PATIENCE).expect("the error comes");
    assert_eq!((told[23], &told[34..36]), (1, &[UNREACHABLE, 3][..]));
    assert_eq!(&told[26..30], SHARED.octets());
    assert_eq!((checksum(&told[14..34]), checksum(&told[34..])), (0, 0));
    assert_eq!(checksum(&told[42..62]), 0);
    assert_eq!((&told[54..58], &told[58..62]), (&a.address.octets()[..], &SHARED.octets()[..]));
    assert_eq!(told[62..64], 1000u16.to_be_bytes());
    assert_eq!(told[64..66], from_b.to_be_bytes());
}

#[test]
fn guests_of_one_host_reach_each_other_by_their_shared_ports() {
    let bed = Bed::new();
    let [a, b] = [1, 2].map(|slot| {
        bed.host().attach(slot, VNI_A).expect("the slot is free");
        RawGuest::open(&bed, slot)
    });
    punch(&bed, &a, &b, || bed.host_drops(0, DropReason::NoFlow));
}

#[test]
fn guests_of_two_hosts_reach_each_other_by_their_shared_ports() {
    let bed = Bed::new();
    let theirs = PortRange { base: 8192, count: 64 };
    bed.apply_proxy(VNI_A, vec![(PORTS, HOST), (theirs, ROGUE)]);
    let options = HostOptions {
        bpffs: bed.run.bpf().join("second"),
        underlay_address: ROGUE.into(),
        ..bed.host_options()
    };
    let second = bed.topology.rogue.run(|| HostDatapath::open(&options));
    let second = second.expect("the second host's data path opens");
    let vpc = HostVpc {
        vni: VNI_A,
        shared_address: SHARED,
        shared_address_v6: None,
        ports: theirs,
        proxy_address: PROXY.into(),
        proxies: Vec::new(),
    };
    second.apply_vpc(&vpc).expect("the host takes the VPC");
    bed.host().attach(1, VNI_A).expect("the slot is free");
    second.attach(1, VNI_A).expect("the slot is free");
    let a = RawGuest::open(&bed, 1);
    let b = RawGuest::open_on(&bed.topology.rogue, &second, 1);
    let dropped = || {
        let drops = second.drops().expect("counters can be read");
        let no_flow = drops.iter().find(|drop| drop.reason == DropReason::NoFlow);
        no_flow.map_or(0, |drop| drop.packets)
    };
    punch(&bed, &a, &b, dropped);
}

#[test]
fn a_guest_reaches_its_own_shared_port_and_no_echo_does() {
    let bed = Bed::new();
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let guest = RawGuest::open(&bed, 1);
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let port = mapped(&guest, 1000, &server);
    guest.send(&frame(guest.packet(SHARED, 64).udp(1000, port), b"myself"));
    assert!(expect(&guest, port, 1000).ends_with(b"myself"));
    guest.send(&frame(guest.packet(SHARED, 64).icmpv4_echo_request(1, 1), b"anybody?"));
    eventually(|| bed.proxy_drops(VNI_A, DropReason::BadDestination) == 1);
    // Nobody has this port.
    guest.send(&frame(guest.packet(SHARED, 64).udp(1000, 60_000), b"anybody?"));
    eventually(|| bed.proxy_drops(VNI_A, DropReason::NoBlockHolder) == 1);
    assert_eq!(guest.receive(SILENCE), None);
}

/// A TCP segment without data.
fn segment(guest: &RawGuest, from: u16, to: u16, flags: u8, number: u32, ack: u32) -> Vec<u8> {
    let mut step = guest.packet(SHARED, 64).tcp(from, to, number, 512);
    if flags & tcp::SYN != 0 {
        step = step.syn();
    }
    if flags & tcp::ACK != 0 {
        step = step.ack(ack);
    }
    frame(step, b"")
}

/// RFC 9293, figure 8: both SYNs cross, each is answered by a SYN with an ACK. Guests open to each
/// other, so that either has the connection as its own, through the filter of both.
#[test]
fn two_guests_open_one_tcp_connection_at_the_same_time() {
    let bed = Bed::new();
    let ports = PortRange { base: 8192, count: 64 };
    bed.apply_host(VNI_A, ports);
    bed.apply_proxy(VNI_A, vec![(ports, HOST)]);
    let underlay = Capture::start(&bed.topology.proxy, UNDERLAY).expect("captures can be made");
    let (from, of_b) = (1000, ports.base + 5);
    let dropped = || bed.host_drops(0, DropReason::NoFlow);
    let opened = |slot| {
        bed.host().attach(slot, VNI_A).expect("the slot is free");
        RawGuest::open(&bed, slot)
    };
    let b = opened(2);
    // Not by the very port that it is to reach, which then would be taken towards itself.
    let (a, of_a) = loop {
        let a = opened(1);
        a.send(&segment(&a, from, of_b, tcp::SYN, 7, 0));
        let port = loop {
            let seen = underlay.next(PATIENCE).expect("it can be read").expect("it comes").bytes;
            let is_it = vni(&seen) == Some(VNI_A) && seen[86..88] == of_b.to_be_bytes();
            if is_it && seen[80..84] == SHARED.octets() {
                break u16::from_be_bytes([seen[84], seen[85]]);
            }
        };
        if port != of_b {
            break (a, port);
        }
        assert!(a.receive(PATIENCE).is_some(), "what it sent to its own port");
        bed.host().detach(1).expect("it is attached");
    };
    eventually(|| dropped() == 1);
    // TCP's ports are chosen at random for each destination. With all of them in use towards this
    // one, one is the port that a wrote to, and one its own.
    let before = dropped();
    for port in 1..=ports.count as u16 {
        b.send(&segment(&b, port, of_a, tcp::SYN, 9, 0));
    }
    let got = expect(&a, of_b, from);
    assert_eq!(got[47], tcp::SYN);
    eventually(|| dropped() == before + 62);
    assert_eq!(a.receive(SILENCE), None);
    assert!(b.receive(PATIENCE).is_some(), "what it sent to its own port");

    a.send(&segment(&a, from, of_b, tcp::SYN, 7, 0));
    let got = b.receive(PATIENCE).expect("it comes");
    assert_eq!((&got[26..30], got[47]), (&SHARED.octets()[..], tcp::SYN));
    let port = u16::from_be_bytes([got[36], got[37]]);
    // RFC 9293: both are in SYN-RECEIVED now.
    for flags in [tcp::SYN | tcp::ACK, tcp::ACK] {
        let number = u32::from(flags == tcp::ACK);
        a.send(&segment(&a, from, of_b, flags, 7 + number, 10));
        assert_eq!(expect(&b, of_a, port)[47], flags);
        b.send(&segment(&b, port, of_a, flags, 9 + number, 8));
        assert_eq!(expect(&a, of_b, from)[47], flags);
    }
    // Both flows stand; all others are still opening.
    next_tick();
    let standing = Timers { tcp_established: 1000, ..AT_ONCE };
    assert_eq!(bed.host().sweep_with(&standing).expect("flows can be swept").live, 2);
}
