//! Ports of a host's that it gets ahead of need.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use warren_abi::probe::{Endpoint, Operation};
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, VPCS, kvm_or_skip};
use warren_netns::topology::SERVER;

const PORT: u16 = 7070;
const PATIENCE: Duration = Duration::from_mins(1);

/// The ports that the host has in the first VPC, as it says itself.
fn ports(fleet: &Fleet) -> u32 {
    let metrics = fleet.scrape(Daemon::Host).unwrap();
    let value = metrics.lines().find_map(|line| line.strip_prefix("warren_ports{vni=\"4096\"} "));
    value.expect("the host knows the VPC").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn more_connections_than_a_host_has_ports_get_it_more_before_one_fails() {
    if !kvm_or_skip("more_connections_than_a_host_has_ports_get_it_more_before_one_fails") {
        return;
    }
    let options = FleetOptions { slots: 4, parked: 1, guest: GUEST };
    let fleet = Fleet::start(options).await.unwrap();
    let listener = fleet.topology.vpcs[0].run(|| TcpListener::bind(("0.0.0.0", PORT))).unwrap();
    let seen = Arc::new(Mutex::new(BTreeSet::new()));
    let sources = seen.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            sources.lock().unwrap().insert(stream.unwrap().peer_addr().unwrap().port());
        }
    });
    let (started, _) = fleet.run(VPCS[0], None).await.unwrap();
    let id = started.instance.unwrap().id;
    assert_eq!(ports(&fleet), 64);
    let to = Endpoint { address: SERVER.octets(), port: PORT };
    let deadline = Instant::now() + PATIENCE;
    // Each closes at once, and its port serves no other connection to the same server for a while.
    while seen.lock().unwrap().len() <= 64 {
        let reply = fleet.probe(&id, Operation::TcpConnect { to }).await.unwrap();
        assert!(reply.outcome.is_ok(), "{reply:?}");
        assert!(Instant::now() < deadline, "the host has {} ports", ports(&fleet));
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(ports(&fleet) >= 128);
    let seen = seen.lock().unwrap().clone();
    let (first, last) = (seen.first().unwrap(), seen.last().unwrap());
    assert!(last - first < 256, "it grew where it was: {seen:?}");
    for (daemon, reason) in [
        (Daemon::Host, "ports-exhausted"),
        (Daemon::Proxy, "not-block-holder"),
        (Daemon::Proxy, "no-block-holder"),
    ] {
        assert_eq!(fleet.drops(daemon, reason).await.unwrap(), 0, "{reason}");
    }
    assert_eq!(fleet.shut_down().unwrap(), Vec::<String>::new());
}
