//! Connections that are reset while they stand (RFC 7857, section 2.2).

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};

use etherparse::{SlicedPacket, TcpSlice, TransportSlice};
use warren_dataplane::datapath::{DropReason, PortRange, SweepReport, Timers};
use warren_netns::topology::{HOST, SERVER};

use crate::bed::{Bed, VNI_A};
use crate::flows::next_tick;
use crate::guest::{KernelGuest, PATIENCE, RawGuest, frame};

const PORT: u16 = 7000;
/// All ports that the host has.
const PORTS: PortRange = PortRange { base: 8192, count: 64 };

fn bed() -> (Bed, TcpListener) {
    let bed = Bed::new();
    bed.apply_host(VNI_A, PORTS);
    bed.apply_proxy(VNI_A, vec![(PORTS, HOST)]);
    let listener = bed.topology.vpcs[0].run(|| TcpListener::bind(("0.0.0.0", PORT)));
    (bed, listener.expect("the port is free"))
}

/// Closes one end of a connection before it has read all: the kernel resets it then (RFC 9293,
/// section 3.6).
fn reset(end: TcpStream, mut other: &TcpStream) {
    other.write_all(b"unread").expect("it stands");
    end.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    end.peek(&mut [0; 1]).expect("it comes");
    drop(end);
    other.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    let error = other.read(&mut [0; 1]).expect_err("it was reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn what_the_guest_resets_is_over_and_its_port_serves_another() {
    let (bed, listener) = bed();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let connect = || guest.namespace.run(|| TcpStream::connect((SERVER, PORT)));
    let mut ends: Vec<_> = (0..PORTS.count)
        .map(|_| (connect().expect("it answers"), listener.accept().expect("it connected")))
        .collect();
    connect().expect_err("all ports are used by connections that stand");
    assert_eq!(bed.host_drops(1, DropReason::PortsExhausted), 1);

    let (end, (other, seen)) = ends.swap_remove(20);
    reset(end, &other);
    let _another = connect().expect("it answers");
    assert_eq!(listener.accept().expect("it connected").1.port(), seen.port());
    connect().expect_err("all ports are used by connections that stand");
}

#[test]
fn what_a_peer_resets_keeps_its_port_and_goes_on_if_the_guest_does() {
    let (bed, listener) = bed();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let send = |port, sequence, acknowledged: Option<u32>, payload: &[u8]| {
        let packet = guest.packet(SERVER, 64).tcp(port, PORT, sequence, 512);
        let packet = match acknowledged {
            Some(number) => packet.ack(number),
            None => packet.syn(),
        };
        guest.send(&frame(packet, payload));
    };
    let receive = |is_it: &dyn Fn(&TcpSlice) -> bool| loop {
        let got = guest.receive(PATIENCE).expect("it comes");
        let packet = SlicedPacket::from_ethernet(&got).expect("it is whole");
        let Some(TransportSlice::Tcp(segment)) = packet.transport else { continue };
        if is_it(&segment) {
            return (segment.destination_port(), segment.sequence_number());
        }
    };
    let connect = |port| {
        send(port, 1, None, b"");
        let (to, sequence) = receive(&|segment| segment.syn() && segment.ack());
        assert_eq!(to, port);
        send(port, 2, Some(sequence + 1), b"");
        (sequence + 1, listener.accept().expect("it connected"))
    };
    let mut ends: Vec<_> = (1..=PORTS.count as u16).map(connect).collect();
    let (next, (end, _)) = ends.remove(0);
    send(1, 2, Some(next), b"unread");
    end.peek(&mut [0; 1]).expect("it comes");
    drop(end);
    assert_eq!(receive(&|segment| segment.rst()), (1, next));

    // It may be forged: the port is not another's, however many want it.
    send(100, 1, None, b"");
    assert_eq!(bed.host_drops(1, DropReason::PortsExhausted), 1);
    next_tick();
    let timers = Timers { tcp_closed: 0, rest: 0, ..Timers::DEFAULT };
    let report = bed.host().sweep_with(&timers).expect("flows can be swept");
    assert_eq!(report, SweepReport { live: PORTS.count, expired: 0, stale: 0 });
    // Both ways go on; that the server has forgotten it, its own reset says.
    send(1, 8, Some(next), b"more");
    assert_eq!(receive(&|segment| segment.rst()), (1, next));

    // It has the time of what closes, no longer that of what stands.
    next_tick();
    let timers = Timers { tcp_closing: 0, ..timers };
    let report = bed.host().sweep_with(&timers).expect("flows can be swept");
    let live = PORTS.count - 1;
    assert_eq!(report, SweepReport { live, expired: 1, stale: 0 });
}
