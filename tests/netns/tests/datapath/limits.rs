//! Limits of a slot: what is beyond them is dropped and counted, and nobody else's concern.

use std::time::Instant;

use warren_abi::icmp::UNREACHABLE;
use warren_dataplane::datapath::{DropReason, Error, Limits, Restrictions, Usage};
use warren_netns::servers::udp;
use warren_netns::topology::SERVER;

use crate::bed::{Bed, VNI_A};
use crate::flows::{AT_ONCE, next_tick};
use crate::guest::{PATIENCE, RawGuest, SILENCE, frame};

const PORT: u16 = 7000;

fn with(limits: Limits) -> Restrictions {
    Restrictions { limits, ..Restrictions::default() }
}

/// Most that passes at a rate, if what may come at once is that of so many seconds, since then.
fn most(rate: f64, ahead: f64, since: Instant) -> u64 {
    // The programs' clock ticks every few milliseconds.
    (rate * (since.elapsed().as_secs_f64() + ahead + 0.02)) as u64 + 2
}

#[test]
fn what_a_guest_sends_beyond_its_rates_is_dropped_and_its_neighbour_s_is_not() {
    let bed = Bed::new();
    let guests = [RawGuest::open(&bed, 1), RawGuest::open(&bed, 2)];
    let limits = Limits { packets_per_second: 100, ..Limits::default() };
    bed.host().attach_restricted(1, VNI_A, &with(limits)).expect("the slot is free");
    bed.host().attach(2, VNI_A).expect("the slot is free");
    let send = |guest: &RawGuest, payload: &[u8]| {
        guest.send(&frame(guest.packet(SERVER, 64).udp(1000, PORT), payload));
    };
    let start = Instant::now();
    for _ in 0..1000 {
        for guest in &guests {
            send(guest, b"x");
        }
    }
    let dropped = bed.host_drops(1, DropReason::PacketLimit);
    assert!(1000 - dropped <= most(100.0, 0.1, start), "{dropped}");
    assert!(1000 - dropped >= 10, "{dropped}");

    // 100 packets of 1,028 bytes a second.
    let limits = Limits { bits_per_second: 8 * 102_800, ..Limits::default() };
    bed.host().restrict(1, &with(limits)).expect("the slot is attached");
    let start = Instant::now();
    for _ in 0..500 {
        for guest in &guests {
            send(guest, &[0; 1000]);
        }
    }
    let beyond = bed.host_drops(1, DropReason::BitLimit);
    assert!(500 - beyond <= most(100.0, 0.1, start), "{beyond}");
    assert!(500 - beyond >= 10, "{beyond}");
    assert_eq!(bed.host_drops(1, DropReason::PacketLimit), dropped);
    let drops = bed.host().drops().expect("counters can be read");
    assert!(drops.iter().all(|drop| drop.scope != 2), "{drops:?}");

    bed.host().restrict(1, &Restrictions::default()).expect("the slot is attached");
    (0..100).for_each(|_| send(&guests[0], b"x"));
    assert_eq!(bed.host_drops(1, DropReason::BitLimit), beyond, "no limit, no loss");
}

#[test]
fn what_comes_for_a_guest_beyond_its_rates_is_dropped() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    let limits = Limits { packets_per_second: 50, ..Limits::default() };
    bed.host().attach_restricted(1, VNI_A, &with(limits)).expect("the slot is free");
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    guest.send(&frame(guest.packet(SERVER, 64).udp(1000, PORT), b"x"));
    let (_, seen) = server.recv_from(&mut [0; 8]).expect("the server is reached");
    let start = Instant::now();
    for _ in 0..300 {
        server.send_to(b"y", seen).expect("there is a route");
    }
    let mut received = 0;
    while guest.receive(SILENCE).is_some() {
        received += 1;
    }
    assert!((5..=most(50.0, 0.1, start)).contains(&received), "{received}");
    assert_eq!(bed.host_drops(1, DropReason::PacketLimit), 300 - received);
    // What the guest sends has a rate of its own.
    guest.send(&frame(guest.packet(SERVER, 64).udp(1000, PORT), b"z"));
    server.recv_from(&mut [0; 8]).expect("the server is reached");
}

#[test]
fn flows_begin_no_faster_than_they_may_and_those_that_are_there_go_on() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    let _server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    let limits = Limits { new_flows_per_second: 20, ..Limits::default() };
    bed.host().attach_restricted(1, VNI_A, &with(limits)).expect("the slot is free");
    let send = |port| guest.send(&frame(guest.packet(SERVER, 64).udp(port, PORT), b"x"));
    let start = Instant::now();
    (1..=200).for_each(send);
    let flows = u64::from(bed.host().flows().expect("flows can be counted"));
    assert!((20..=most(20.0, 1.0, start)).contains(&flows), "{flows}");
    assert_eq!(bed.host_drops(1, DropReason::NewFlowLimit), 200 - flows);
    assert_eq!(guest.receive(SILENCE), None, "it is to try again, not to give up");
    let before = bed.host_drops(1, DropReason::NewFlowLimit);
    (0..100).for_each(|_| send(1));
    assert_eq!(bed.host_drops(1, DropReason::NewFlowLimit), before);
}

fn send(guest: &RawGuest, port: u16, to: u16) {
    guest.send(&frame(guest.packet(SERVER, 64).udp(port, to), b"x"));
}

/// Expects to be told that it may not.
fn refused(guest: &RawGuest) {
    let answer = guest.receive(PATIENCE).expect("the answer comes");
    assert_eq!(answer[34..36], [UNREACHABLE, 13]);
}

#[test]
fn a_guest_has_no_more_flows_and_ports_than_it_may() {
    let mut bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    let limits = Limits { flows: 8, ports: 4, ..Limits::default() };
    bed.host().attach_restricted(1, VNI_A, &with(limits)).expect("the slot is free");
    let send = |port, to| send(&guest, port, to);
    let refused = || refused(&guest);
    // No server answers.
    let server = (PORT..PORT + 8).map(|port| udp(&bed.topology.vpcs[0], port));
    let _servers: Vec<_> = server.collect::<Result<_, _>>().expect("the ports are free");
    (1..=4).for_each(|port| send(port, PORT));
    assert_eq!(bed.host().usage(1).expect("it is a slot"), Usage { flows: 4, ports: 4 });
    send(5, PORT);
    refused();
    assert_eq!(bed.host_drops(1, DropReason::PortLimit), 1);
    // A port of UDP's serves other peers.
    (1..=4).for_each(|to| send(1, PORT + to));
    assert_eq!(bed.host().usage(1).expect("it is a slot"), Usage { flows: 8, ports: 4 });
    send(1, PORT + 5);
    refused();
    assert_eq!(bed.host_drops(1, DropReason::FlowLimit), 1);
    assert_eq!(bed.host().flows().expect("flows can be counted"), 8);

    // What ended makes room; and a daemon that restarts knows what is held.
    next_tick();
    let rest = warren_abi::flow::Timers { rest: 100, ..AT_ONCE };
    bed.host().sweep_with(&rest).expect("flows can be swept");
    assert_eq!(bed.host().flows().expect("flows can be counted"), 8, "their ports rest");
    assert_eq!(bed.host().usage(1).expect("it is a slot"), Usage::default());
    (5..=8).for_each(|port| send(port, PORT));
    assert_eq!(bed.host().usage(1).expect("it is a slot"), Usage { flows: 4, ports: 4 });
    send(9, PORT);
    refused();
    bed.reopen_host();
    send(10, PORT);
    refused();
    assert_eq!(bed.host().usage(1).expect("it is a slot"), Usage { flows: 4, ports: 4 });

    // The slot's next tenant begins with none, whatever the former one left.
    bed.host().detach(1).expect("it is attached");
    bed.host().attach_restricted(1, VNI_A, &with(limits)).expect("the slot is free");
    (1..=4).for_each(|port| send(port, PORT));
    assert_eq!(bed.host().usage(1).expect("it is a slot"), Usage { flows: 4, ports: 4 });
    bed.host().sweep_with(&AT_ONCE).expect("flows can be swept");
    assert_eq!(bed.host().usage(1).expect("it is a slot"), Usage { flows: 4, ports: 4 });
}

#[test]
fn limits_that_make_no_sense_are_refused() {
    let bed = Bed::new();
    let too_slow = Limits { bits_per_second: 999, ..Limits::default() };
    let too_fast = Limits { packets_per_second: u64::MAX, ..Limits::default() };
    for limits in [too_slow, too_fast] {
        let attached = bed.host().attach_restricted(1, VNI_A, &with(limits));
        assert!(matches!(attached, Err(Error::Invalid { .. })), "{attached:?}");
    }
    bed.host().attach(1, VNI_A).expect("it was not attached");
}
