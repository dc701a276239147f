//! How long flows may be idle: as it is configured.

use std::net::{TcpListener, TcpStream};

use warren_dataplane::datapath::{DropReason, SweepReport, Timers};
use warren_netns::servers::udp;
use warren_netns::topology::SERVER;

use crate::bed::{Bed, VNI_A, eventually};
use crate::flows::{AT_ONCE, next_tick};
use crate::guest::{KernelGuest, PATIENCE, RawGuest, SILENCE, frame};

const PORT: u16 = 7000;

#[test]
fn a_restart_with_other_timers_applies_them_to_flows_that_are_there() {
    let mut bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    guest.send(&frame(guest.packet(SERVER, 64).udp(1000, PORT), b"hello"));
    let seen = server.recv_from(&mut [0; 16]).expect("the server is reached").1;
    next_tick();
    let sweep = |bed: &Bed| bed.host().sweep().expect("flows can be swept");
    assert_eq!(sweep(&bed), SweepReport { live: 1, expired: 0, stale: 0 });

    bed.timers = Timers { udp: 0, rest: 1 << 16, ..Timers::DEFAULT };
    bed.reopen_host();
    // Expired for whoever would come in, and at rest; were it removed, it would be counted so.
    server.send_to(b"late", seen).expect("there is a route");
    eventually(|| bed.host_drops(1, DropReason::NoFlow) == 1);
    assert_eq!(guest.receive(SILENCE), None);
    assert_eq!(sweep(&bed), SweepReport::default());
    assert_eq!(bed.host().flows().expect("flows can be counted"), 1);

    bed.timers = Timers { udp: 1 << 16, ..bed.timers };
    bed.reopen_host();
    server.send_to(b"in time", seen).expect("there is a route");
    assert!(guest.receive(PATIENCE).is_some());

    bed.timers = AT_ONCE;
    bed.reopen_host();
    next_tick();
    assert_eq!(sweep(&bed), SweepReport { live: 0, expired: 1, stale: 0 });
}

#[test]
fn tcp_s_timers_are_apart() {
    let mut bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let listener = bed.topology.vpcs[0].run(|| TcpListener::bind(("0.0.0.0", PORT)));
    let listener = listener.expect("the port is free");
    let connect = || guest.namespace.run(|| TcpStream::connect((SERVER, PORT)));
    let (stands, closing) = (connect().expect("it answers"), connect().expect("it answers"));
    let accepted = [0, 1].map(|_| listener.accept().expect("it connected").0);
    closing.shutdown(std::net::Shutdown::Write).expect("it stands");
    next_tick();
    let long = Timers::DEFAULT;
    for (timers, expired) in [
        (Timers { tcp_opening: 0, tcp_closed: 0, rest: 0, ..long }, 0),
        (Timers { tcp_closing: 0, rest: 0, ..long }, 1),
        (Timers { tcp_established: 0, rest: 0, ..long }, 1),
    ] {
        bed.timers = timers;
        bed.reopen_host();
        assert_eq!(bed.host().sweep().expect("flows can be swept").expired, expired, "{timers:?}");
    }
    drop((stands, closing, accepted));
}
