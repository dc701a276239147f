//! The life of flows: ports, tenants, ends.

use std::io::Read;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use etherparse::{SlicedPacket, TransportSlice};
use warren_abi::flow::{TICK_NS, Timers};
use warren_dataplane::datapath::{DropReason, PortRange, SweepReport};
use warren_netns::servers::udp;
use warren_netns::topology::{HOST, SERVER};

use crate::bed::{Bed, VNI_A, eventually};
use crate::guest::{KernelGuest, PATIENCE, RawGuest, SILENCE, frame};

const PORT: u16 = 7000;
/// An address of the VPC that no machine has.
const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 77);

/// Whatever is idle ends.
pub const AT_ONCE: Timers = Timers {
    udp: 0,
    icmp: 0,
    tcp_opening: 0,
    tcp_established: 0,
    tcp_closing: 0,
    tcp_closed: 0,
    rest: 0,
};

/// Until what was just used counts as idle.
pub fn next_tick() {
    std::thread::sleep(Duration::from_nanos(TICK_NS) + Duration::from_millis(20));
}

/// The guest sends a datagram from `port`; returns where the server saw it come from.
fn seen_from(guest: &RawGuest, port: u16, server: &UdpSocket) -> SocketAddr {
    guest.send(&frame(guest.packet(SERVER, 64).udp(port, PORT), b"hello"));
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    server.recv_from(&mut [0; 16]).expect("the server is reached").1
}

#[test]
fn a_flow_keeps_its_port_and_replies_come_back_to_the_guest_s() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let first = seen_from(&guest, 1000, &server);
    assert_eq!(seen_from(&guest, 1000, &server), first);
    assert_ne!(seen_from(&guest, 1001, &server), first);
    server.send_to(b"world", first).expect("there is a route");
    let reply = guest.receive(PATIENCE).expect("the reply comes");
    let reply = SlicedPacket::from_ethernet(&reply).expect("it is whole");
    let Some(TransportSlice::Udp(reply)) = reply.transport else { panic!("it is UDP") };
    assert_eq!((reply.source_port(), reply.destination_port()), (PORT, 1000));
    assert_eq!(reply.payload(), b"world");
    assert_eq!(bed.host().flows().expect("flows can be counted"), 2);
}

#[test]
fn every_port_is_used_before_flows_are_refused() {
    let bed = Bed::new();
    let ports = PortRange { base: 8192, count: 64 };
    bed.apply_host(VNI_A, ports);
    bed.apply_proxy(VNI_A, vec![(ports, HOST)]);
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let other = udp(&bed.topology.vpcs[0], PORT + 1).expect("the port is free");
    other.set_read_timeout(Some(PATIENCE)).expect("it is not zero");

    let mut seen = std::collections::BTreeSet::new();
    for port in 1..=64 {
        seen.insert(seen_from(&guest, port, &server).port());
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), (8192..8192 + 64).collect::<Vec<_>>());
    guest.send(&frame(guest.packet(SERVER, 64).udp(65, PORT), b"one too many"));
    assert_eq!(bed.host_drops(1, DropReason::PortsExhausted), 1);
    // Nor is there one for another destination; but ports that stand serve that as well.
    guest.send(&frame(guest.packet(SERVER, 64).udp(65, PORT + 1), b"one too many"));
    assert_eq!(bed.host_drops(1, DropReason::PortsExhausted), 2);
    guest.send(&frame(guest.packet(SERVER, 64).udp(64, PORT + 1), b"hello"));
    other.recv(&mut [0; 16]).expect("the server is reached");
    seen_from(&guest, 64, &server);

    // Flows that ended give their ports back.
    next_tick();
    let report = bed.host().sweep_with(&AT_ONCE).expect("flows can be swept");
    assert_eq!(report, SweepReport { live: 0, expired: 65, stale: 0 });
    seen_from(&guest, 65, &server);
}

#[test]
fn tcp_uses_a_port_again_for_another_destination_and_whatever_udp_has() {
    let bed = Bed::new();
    let ports = PortRange { base: 8192, count: 64 };
    bed.apply_host(VNI_A, ports);
    bed.apply_proxy(VNI_A, vec![(ports, HOST)]);
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let syn = |from: u16, to: u16| {
        // Nobody is there who would refuse: a refused flow's port may be had.
        guest.send(&frame(guest.packet(NOBODY, 64).tcp(from, to, 7, 512).syn(), b""));
        bed.host_drops(1, DropReason::PortsExhausted)
    };
    for port in 1..=64 {
        guest.send(&frame(guest.packet(SERVER, 64).udp(port, PORT), b"all of UDP's"));
        assert_eq!(syn(port, PORT), 0);
    }
    assert_eq!(syn(65, PORT), 1);
    assert_eq!(syn(65, PORT + 1), 1);
    assert_eq!(bed.host().flows().expect("flows can be counted"), 64 + 64 + 1);
}

#[test]
fn a_udp_port_is_the_same_for_all_destinations_and_no_other_guest_s() {
    let bed = Bed::new();
    let guests = [RawGuest::open(&bed, 1), RawGuest::open(&bed, 2)];
    let servers = [PORT, PORT + 1].map(|port| {
        let server = udp(&bed.topology.vpcs[0], port).expect("the port is free");
        server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        server
    });
    let seen = |guest: &RawGuest, port: u16, server: usize| {
        let to = PORT + server as u16;
        guest.send(&frame(guest.packet(SERVER, 64).udp(port, to), b"hello"));
        servers[server].recv_from(&mut [0; 16]).expect("the server is reached").1
    };
    bed.host().attach(1, VNI_A).expect("the slot is free");
    bed.host().attach(2, VNI_A).expect("the slot is free");
    let mut ports = std::collections::BTreeSet::new();
    for guest in &guests {
        for port in 1000..1100 {
            let first = seen(guest, port, 0);
            assert_eq!(seen(guest, port, 1), first);
            assert!(ports.insert(first.port()), "{first} is another's");
        }
    }
    // Who was written to may answer; who was not, may not, whatever port is mapped.
    let one = seen(&guests[0], 2000, 0);
    servers[1].send_to(b"unasked", one).expect("there is a route");
    eventually(|| bed.host_drops(0, DropReason::NoFlow) == 1);
    servers[0].send_to(b"answer", one).expect("there is a route");
    assert!(guests[0].receive(PATIENCE).is_some());
    assert_eq!(guests[0].receive(SILENCE), None);
}

#[test]
fn a_udp_port_is_kept_as_long_as_one_of_its_flows() {
    let mut bed = Bed::new();
    bed.timers = Timers { udp: 3, ..AT_ONCE };
    bed.reopen_host();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let other = udp(&bed.topology.vpcs[0], PORT + 1).expect("the port is free");
    other.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    let first = seen_from(&guest, 1000, &server);
    next_tick();
    next_tick();
    // The answer keeps the flow alive, and the flow its port.
    server.send_to(b"answer", first).expect("there is a route");
    assert!(guest.receive(PATIENCE).is_some());
    next_tick();
    next_tick();
    let report = bed.host().sweep().expect("flows can be swept");
    assert_eq!(report, SweepReport { live: 1, expired: 0, stale: 0 });
    guest.send(&frame(guest.packet(SERVER, 64).udp(1000, PORT + 1), b"hello"));
    assert_eq!(other.recv_from(&mut [0; 16]).expect("the server is reached").1, first);
    next_tick();
    let report = bed.host().sweep_with(&AT_ONCE).expect("flows can be swept");
    assert_eq!(report, SweepReport { live: 0, expired: 2, stale: 0 });
    // The ports are free again: all that is left of the table is empty.
    let report = bed.host().sweep_with(&AT_ONCE).expect("flows can be swept");
    assert_eq!(report, SweepReport::default());
}

#[test]
fn a_reply_to_a_flow_that_ended_is_dropped() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let seen = seen_from(&guest, 1000, &server);
    assert_eq!(bed.host().sweep().expect("flows can be swept").live, 1);
    next_tick();
    assert_eq!(bed.host().sweep_with(&AT_ONCE).expect("flows can be swept").expired, 1);
    server.send_to(b"late", seen).expect("there is a route");
    eventually(|| bed.host_drops(0, DropReason::NoFlow) == 1);
    assert_eq!(guest.receive(SILENCE), None);
    assert_eq!(bed.host().flows().expect("flows can be counted"), 0);
}

#[test]
fn what_a_former_tenant_asked_for_never_reaches_the_next() {
    let bed = Bed::new();
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let former = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let seen = seen_from(&former, 1000, &server);
    bed.host().detach(1).expect("the slot can be detached");
    server.send_to(b"late", seen).expect("there is a route");
    eventually(|| bed.host_drops(1, DropReason::StaleFlow) == 1);
    assert_eq!(former.receive(SILENCE), None);
    former.send(&frame(former.packet(SERVER, 64).udp(1000, PORT), b"late"));
    assert_eq!(bed.host_drops(1, DropReason::Detached), 1);

    // The same VPC, the same slot, the same port: another tenant's flow all the same.
    drop(former);
    let next = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    server.send_to(b"later", seen).expect("there is a route");
    eventually(|| bed.host_drops(1, DropReason::StaleFlow) == 2);
    let own = seen_from(&next, 1000, &server);
    assert_ne!(own, seen);
    server.send_to(b"later still", seen).expect("there is a route");
    eventually(|| bed.host_drops(1, DropReason::StaleFlow) == 3);
    assert_eq!(next.receive(SILENCE), None);
    server.send_to(b"mine", own).expect("there is a route");
    assert!(next.receive(PATIENCE).is_some());

    let report = bed.host().sweep().expect("flows can be swept");
    assert_eq!(report, SweepReport { live: 1, expired: 0, stale: 0 }, "its port rests");
    let rested = Timers { rest: 0, ..Timers::DEFAULT };
    let report = bed.host().sweep_with(&rested).expect("flows can be swept");
    assert_eq!(report, SweepReport { live: 1, expired: 0, stale: 1 });
    server.send_to(b"much later", seen).expect("there is a route");
    eventually(|| bed.host_drops(0, DropReason::NoFlow) == 1);
}

#[test]
fn tcp_s_end_is_seen_and_its_port_comes_free() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let listener = bed.topology.vpcs[0].run(|| TcpListener::bind(("0.0.0.0", PORT)));
    let listener = listener.expect("the port is free");
    let connect = || guest.namespace.run(|| TcpStream::connect((SERVER, PORT)));
    let (closing, staying) = (connect().expect("it answers"), connect().expect("it answers"));
    closing.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    let mut accepted = listener.accept().expect("it connected").0;
    let kept = listener.accept().expect("it connected").0;

    // Only flows that are closed end: those that stand have more than 2 hours.
    let closed = Timers { tcp_closed: 0, rest: 0, ..Timers::DEFAULT };
    next_tick();
    let sweep = || bed.host().sweep_with(&closed).expect("flows can be swept");
    assert_eq!(sweep(), SweepReport { live: 2, expired: 0, stale: 0 });
    closing.shutdown(Shutdown::Write).expect("it stands");
    assert_eq!(accepted.read(&mut [0; 1]).expect("the end comes"), 0);
    next_tick();
    assert_eq!(sweep(), SweepReport { live: 2, expired: 0, stale: 0 });
    drop(accepted);
    assert_eq!((&closing).read(&mut [0; 1]).expect("the end comes"), 0);
    next_tick();
    assert_eq!(sweep(), SweepReport { live: 1, expired: 1, stale: 0 });
    drop((staying, kept));
}

#[test]
fn a_refused_connection_holds_its_port_for_a_moment_only() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let refused = guest.namespace.run(|| TcpStream::connect((SERVER, PORT)));
    assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    next_tick();
    let closed = Timers { tcp_closed: 0, rest: 0, ..Timers::DEFAULT };
    let report = bed.host().sweep_with(&closed).expect("flows can be swept");
    assert_eq!(report, SweepReport { live: 0, expired: 1, stale: 0 });
}
