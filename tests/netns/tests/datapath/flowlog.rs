//! What programs tell of flows: each that begins ends, with all that it carried.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;

use uuid::Uuid;

use warren_abi::flow::Timers;
use warren_abi::flowlog::{FlowEvent, What};
use warren_abi::maps::Traffic;
use warren_abi::wire::{TCP, UDP};
use warren_dataplane::datapath::{FlowEvents, FlowLogLevel, FlowLogOptions, PortRange};
use warren_dataplane::flowlog;
use warren_dataplane::flowlog::file::Files;
use warren_dataplane::flowlog::owners::{NamedVpc, Names, Owner};
use warren_netns::servers::udp;
use warren_netns::topology::{HOST, SERVER, SHARED};
use warren_proto::policy::Action;

use crate::bed::{Bed, VNI_A, eventually};
use crate::flows::{AT_ONCE, next_tick};
use crate::guest::{KernelGuest, PATIENCE, RawGuest, frame};
use crate::policy::restrict;

const PORT: u16 = 7000;
/// An address of the VPC that no machine has.
const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 77);

fn all(events: &mut FlowEvents) -> Vec<FlowEvent> {
    let mut found = Vec::new();
    while events.take(|event| found.push(*event)) {}
    found
}

/// Of which flow (a mapping has no peer), and what.
fn story(events: &[FlowEvent]) -> Vec<(u16, u16, What)> {
    let one = |event: &FlowEvent| {
        let what = What::from_index(event.what).expect("it is of this version");
        (event.key.guest_port.get(), event.key.peer_port.get(), what)
    };
    events.iter().map(one).collect()
}

fn traffic(packets: u64, bytes: u64) -> Traffic {
    Traffic { packets, bytes }
}

#[test]
fn a_udp_flow_and_its_mapping_begin_and_end_with_what_was_sent() {
    let bed = Bed::new();
    let mut events = bed.host().flow_events().expect("nobody reads them");
    assert!(bed.host().flow_events().is_none(), "one reader");
    let guest = RawGuest::open(&bed, 1);
    let generation = bed.host().attach(1, VNI_A).expect("the slot is free");
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    let mut seen = None;
    for _ in 0..3 {
        guest.send(&frame(guest.packet(SERVER, 64).udp(1000, PORT), b"hello"));
        seen = Some(server.recv_from(&mut [0; 16]).expect("the server is reached").1);
    }
    let seen = seen.expect("three came");
    server.send_to(b"world!", seen).expect("there is a route");
    assert!(guest.receive(PATIENCE).is_some());

    let begun = all(&mut events);
    assert_eq!(story(&begun), [(1000, 0, What::Begun), (1000, PORT, What::Begun)]);
    let [mapping, flow] = begun[..] else { panic!() };
    assert!(mapping.key.is_mapping() && mapping.sent == Traffic::NONE);
    assert_eq!(flow.sent, traffic(1, 33));
    for event in [mapping, flow] {
        assert_eq!(event.key.ifindex, bed.host().slots()[0].ifindex);
        assert_eq!((event.key.generation, event.vni), (generation, VNI_A));
        assert_eq!((event.port.get(), event.key.protocol), (seen.port(), u32::from(UDP)));
    }
    assert_eq!(IpAddr::from(flow.key.peer), IpAddr::V4(SERVER));

    next_tick();
    bed.host().sweep_with(&AT_ONCE).expect("flows can be swept");
    let ended = all(&mut events);
    assert_eq!(ended.len(), 2, "{ended:?}");
    for event in ended {
        assert_eq!(event.what, What::Expired as u8);
        assert_eq!((event.port, event.began), (flow.port, flow.began));
        assert!(event.at_ns > flow.at_ns && event.last >= event.began);
        let expected = if event.key.is_mapping() {
            [Traffic::NONE; 2]
        } else {
            [traffic(3, 99), traffic(1, 34)]
        };
        assert_eq!([event.sent, event.received], expected);
    }
    let totals = bed.host().flow_totals().expect("they can be read");
    assert_eq!((totals.of(What::Begun), totals.of(What::Expired), totals.lost), (1, 1, 0));
}

#[test]
fn a_tcp_flow_ends_closed_with_all_its_bytes() {
    let bed = Bed::new();
    let mut events = bed.host().flow_events().expect("nobody reads them");
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let listener = bed.topology.vpcs[0].run(|| TcpListener::bind(("0.0.0.0", PORT)));
    let listener = listener.expect("the port is free");
    let stream = guest.namespace.run(|| TcpStream::connect((SERVER, PORT)));
    let mut stream = stream.expect("it answers");
    let mut accepted = listener.accept().expect("it connected").0;
    stream.write_all(&vec![7; 100_000]).expect("it stands");
    stream.shutdown(Shutdown::Write).expect("it stands");
    let mut got = Vec::new();
    accepted.read_to_end(&mut got).expect("it comes");
    accepted.write_all(&[8; 1000]).expect("it stands");
    drop(accepted);
    stream.read_to_end(&mut got).expect("it comes");
    assert_eq!(got.len(), 101_000);
    drop(stream);

    next_tick();
    bed.host().sweep_with(&AT_ONCE).expect("flows can be swept");
    let events = all(&mut events);
    let guest_port = events[0].key.guest_port.get();
    let expected = [(guest_port, PORT, What::Begun), (guest_port, PORT, What::Closed)];
    assert_eq!(story(&events), expected);
    let end = events[1];
    assert_eq!(end.key.protocol, u32::from(TCP));
    // Beside the payload there are headers of 40 bytes at least, and what was sent again.
    for (Traffic { packets, bytes }, payload) in [(end.sent, 100_000), (end.received, 1000)] {
        assert!((payload + 40 * packets..2 * payload + 60 * packets).contains(&bytes), "{end:?}");
        assert!(packets >= 3, "{end:?}");
    }
}

#[test]
fn each_other_end_has_its_reason() {
    let bed = Bed::new();
    let ports = PortRange { base: 8192, count: 64 };
    bed.apply_host(VNI_A, ports);
    bed.apply_proxy(VNI_A, vec![(ports, HOST)]);
    let mut events = bed.host().flow_events().expect("nobody reads them");
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let packet = || guest.packet(NOBODY, 64);
    let refuse = |port| {
        guest.send(&frame(packet().tcp(port, PORT, 7, 512).syn(), b""));
        guest.send(&frame(packet().tcp(port, PORT, 8, 512).rst(), b""));
    };
    for port in 1..=65 {
        refuse(port);
    }
    let taken: Vec<_> =
        all(&mut events).into_iter().filter(|event| event.what != What::Begun as u8).collect();
    assert_eq!(story(&taken).len(), 1, "there are 64 ports");
    assert_eq!((taken[0].what, taken[0].sent), (What::TakenOver as u8, traffic(2, 80)));

    next_tick();
    bed.host().sweep_with(&AT_ONCE).expect("flows can be swept");
    let reset = all(&mut events);
    assert_eq!(reset.len(), 64);
    assert!(reset.iter().all(|event| event.what == What::Reset as u8), "{reset:?}");

    // A mapping on a port that went to another host serves no new flow.
    guest.send(&frame(packet().udp(70, PORT), b"hello"));
    bed.apply_host(VNI_A, PortRange { base: 4096, count: 64 });
    guest.send(&frame(packet().udp(70, PORT + 1), b"hello"));
    let told = story(&all(&mut events));
    assert_eq!(
        told[2..],
        [(70, 0, What::Withdrawn), (70, 0, What::Begun), (70, PORT + 1, What::Begun)]
    );

    bed.host().detach(1).expect("it is attached");
    let rested = Timers { rest: 0, ..Timers::DEFAULT };
    bed.host().sweep_with(&rested).expect("flows can be swept");
    let gone = all(&mut events);
    assert_eq!(gone.len(), 3, "two flows and a mapping");
    assert!(gone.iter().all(|event| event.what == What::Detached as u8), "{gone:?}");

    let totals = bed.host().flow_totals().expect("they can be read");
    let ends = [What::TakenOver, What::Reset, What::Withdrawn, What::Detached, What::Closed];
    assert_eq!(ends.map(|what| totals.of(what)), [1, 64, 0, 2, 0]);
    assert_eq!(totals.of(What::Begun), 67);
}

#[test]
fn what_changed_rules_forbid_ends_denied_unless_it_goes_on() {
    let bed = Bed::new();
    let mut events = bed.host().flow_events().expect("nobody reads them");
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let send = |to| guest.send(&frame(guest.packet(NOBODY, 64).udp(1000, to), b"hello"));
    (0..3).for_each(|to| send(PORT + to));
    restrict(&bed, 1, &["1 deny udp 7000-7001"], Action::Allow);
    (0..3).for_each(|to| send(PORT + to));
    restrict(&bed, 1, &["1 deny udp 7000"], Action::Allow);
    (0..3).for_each(|to| send(PORT + to));
    all(&mut events);

    let rested = Timers { rest: 0, ..Timers::DEFAULT };
    bed.host().sweep_with(&rested).expect("flows can be swept");
    assert_eq!(story(&all(&mut events)), [(1000, PORT, What::Denied)]);
    next_tick();
    bed.host().sweep_with(&AT_ONCE).expect("flows can be swept");
    let ended = story(&all(&mut events));
    assert_eq!(ended.len(), 3, "two flows and their mapping");
    assert!(ended.iter().all(|(.., what)| *what == What::Expired), "{ended:?}");
    let totals = bed.host().flow_totals().expect("they can be read");
    assert_eq!((totals.of(What::Denied), totals.of(What::Expired)), (1, 2));
}

/// One with a ring buffer of a page, which holds 42 events.
fn small(events: FlowLogLevel) -> Bed {
    let mut bed = Bed::closed();
    bed.flow_log = FlowLogOptions { events, bytes: 4096 };
    bed.open();
    bed.apply_host(VNI_A, crate::bed::PORTS);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    bed
}

#[test]
fn events_that_nobody_reads_are_lost_counted_and_no_packet_with_them() {
    let bed = small(FlowLogLevel::All);
    let guest = RawGuest::open(&bed, 1);
    let send = |port| guest.send(&frame(guest.packet(NOBODY, 64).udp(port, PORT), b"hello"));
    (1..=100).for_each(send);
    assert_eq!(bed.host().flows().expect("flows can be counted"), 100);
    let mut events = bed.host().flow_events().expect("nobody reads them");
    let told = all(&mut events);
    let totals = bed.host().flow_totals().expect("they can be read");
    assert!((30..=42).contains(&told.len()), "{}", told.len());
    assert_eq!(told.len() as u64 + totals.lost, 200);
    assert_eq!(totals.of(What::Begun), 100);
    // There is room again.
    send(101);
    assert_eq!(story(&all(&mut events)), [(101, 0, What::Begun), (101, PORT, What::Begun)]);
}

#[test]
fn events_outlive_their_reader() {
    let mut bed = small(FlowLogLevel::All);
    let guest = RawGuest::open(&bed, 1);
    let send = |port| guest.send(&frame(guest.packet(NOBODY, 64).udp(port, PORT), b"hello"));
    let mut events = bed.host().flow_events().expect("nobody reads them");
    send(1);
    assert_eq!(all(&mut events).len(), 2);
    send(2);
    assert!(events.take(|_| {}), "the mapping's");
    drop(events);
    send(3);
    bed.reopen_host();
    send(4);
    let mut events = bed.host().flow_events().expect("nobody reads them");
    let told = story(&all(&mut events));
    let ports: Vec<u16> = told.iter().map(|(port, ..)| *port).collect();
    assert_eq!(ports, [2, 3, 3, 4, 4], "in their order, none twice");
    assert_eq!(bed.host().flow_totals().expect("they can be read").of(What::Begun), 4);
}

#[test]
fn a_log_that_is_off_costs_nothing_and_one_of_ends_tells_only_them() {
    for (level, expected) in [(FlowLogLevel::Off, 0), (FlowLogLevel::Ends, 3)] {
        let bed = small(level);
        let guest = RawGuest::open(&bed, 1);
        let mut events = bed.host().flow_events().expect("nobody reads them");
        guest.send(&frame(guest.packet(NOBODY, 64).udp(1, PORT), b"hello"));
        next_tick();
        bed.host().sweep_with(&AT_ONCE).expect("flows can be swept");
        let told = story(&all(&mut events));
        assert_eq!(told.len(), expected, "the mapping's two, and the flow's end: {told:?}");
        let totals = bed.host().flow_totals().expect("they can be read");
        assert_eq!((totals.of(What::Begun), totals.of(What::Expired)), (1, 1));
    }
}

#[test]
fn many_events_wake_their_reader() {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let bed = Bed::new();
    let events = bed.host().flow_events().expect("nobody reads them");
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let is_woken = |patience| {
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(patience)).expect("it can be polled") == 1
    };
    let (woken, stop) = (std::sync::atomic::AtomicBool::new(false), 900);
    std::thread::scope(|scope| {
        scope.spawn(|| woken.store(is_woken(5000u16), std::sync::atomic::Ordering::SeqCst));
        eventually(|| true);
        for port in 1..=stop {
            guest.send(&frame(guest.packet(NOBODY, 64).udp(port, PORT), b"hello"));
        }
    });
    assert!(woken.into_inner());
}

/// Names of everything.
struct Source(warren_dataplane::datapath::HostDatapath);

impl Names for Source {
    fn owner(&self, ifindex: u32, _: u32) -> Owner {
        let slot = self.0.slot_of(ifindex).expect("it is a slot's");
        let instance = Some(Uuid::from_u128(u128::from(slot.number)));
        let (address, address_v6) = (Some(slot.address), Some(slot.address_v6));
        Owner { slot: Some(slot.number), address, address_v6, instance }
    }
    fn vpc(&self, vni: u32) -> Option<NamedVpc> {
        assert_eq!(vni, VNI_A);
        let name = "blue".to_owned();
        Some(NamedVpc { name, shared_address: SHARED, shared_address_v6: None })
    }
}

impl flowlog::Source for Source {
    fn lost(&self) -> Option<u64> {
        Some(self.0.flow_totals().expect("they can be read").lost)
    }
}

#[test]
fn a_log_goes_on_over_restarts_rotates_and_tells_what_it_lacks() {
    let mut bed = small(FlowLogLevel::All);
    let files = Files { path: bed.run.path().join("log/flows"), max_bytes: 5_000, keep: 100 };
    let start = |bed: &mut Bed| {
        let events = bed.host().flow_events().expect("nobody reads them");
        let options = flowlog::Options {
            files: files.clone(),
            host: "h1".to_owned(),
            memory: bed.run.path().join("lost"),
        };
        let source = Source(bed.host.take().expect("it is open"));
        flowlog::start(options, events, Arc::new(source)).expect("it can be written")
    };
    let guest = RawGuest::open(&bed, 1);
    let send = |port| guest.send(&frame(guest.packet(NOBODY, 64).udp(port, PORT), b"hello"));
    // Too many for the buffer before there is a log, and one more before there is the next.
    (1..=100).for_each(send);
    let log = start(&mut bed);
    eventually(|| log.counts().written() > 30);
    drop(log);
    bed.reopen_host();
    send(101);
    let lost = bed.host().flow_totals().expect("they can be read").lost;
    next_tick();
    let log = start(&mut bed);
    drop(log);

    let lines: Vec<serde_json::Value> = files
        .open()
        .expect("they are there")
        .into_iter()
        .rev()
        .flat_map(|file| {
            assert!(file.metadata().expect("it is there").len() <= 5_000);
            let text = std::io::read_to_string(file).expect("it can be read");
            let lines: Vec<_> = text.lines().map(serde_json::from_str).collect();
            lines.into_iter().map(|line| line.expect("it is JSON"))
        })
        .collect();
    assert!(files.open().expect("they are there").len() > 1, "it was rotated");
    let told: Vec<_> = lines.iter().filter(|line| line["event"] == "lost").collect();
    assert_eq!(told.len(), 1, "once: {told:?}");
    assert_eq!(told[0]["events"], lost);
    let of_flows = lines.iter().filter(|line| line["event"] != "lost").collect::<Vec<_>>();
    assert_eq!(of_flows.len() as u64 + lost, 202);
    let newest = of_flows.last().expect("there are some");
    assert_eq!((&newest["event"], &newest["srcport"]), (&"flow-start".into(), &101.into()));
    assert_eq!((&newest["vpc"], &newest["slot"]), (&"blue".into(), &1.into()));
    assert_eq!(newest["instance"], Uuid::from_u128(1).to_string());
    assert_eq!(newest["dstaddr"], NOBODY.to_string());
}
