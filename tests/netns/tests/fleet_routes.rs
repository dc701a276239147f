//! A VPC's route table, from the command line to the microVM's packets.

use std::time::{Duration, Instant};

use warren_abi::probe::{Endpoint, Operation};
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, VPCS, kvm_or_skip};
use warren_netns::servers;

const ECHO: u16 = 7;
/// Behind the server of the VPC.
const BEHIND: [u8; 4] = [198, 51, 100, 1];

/// Whether datagrams come back from there.
async fn reaches(fleet: &Fleet, id: &str) -> bool {
    let to = Endpoint { address: BEHIND, port: ECHO };
    let echo = Operation::UdpEcho { to, count: 1, length: 64, interval_us: 1000 };
    let reply = fleet.probe_within(id, echo, 1000).await.unwrap();
    matches!(reply.outcome, Ok(warren_abi::probe::Outcome::Udp { received: 1, .. }))
}

/// Whether it becomes so in a moment: routes are deployed just after they are stored.
async fn becomes(fleet: &Fleet, id: &str, reached: bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if reaches(fleet, id).await == reached {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn routes_of_the_command_line_lead_a_microvm_and_outlive_the_daemons() {
    if !kvm_or_skip("routes_of_the_command_line_lead_a_microvm") {
        return;
    }
    let options = FleetOptions { slots: 4, parked: 1, guest: GUEST };
    let mut fleet = Fleet::start(options).await.unwrap();
    let server = &fleet.topology.vpcs[0];
    server.ip("addr add 198.51.100.1/32 dev lo").unwrap();
    server.ip("route add 10.0.0.100 dev eth0 src 198.51.100.1").unwrap();
    let _echo = servers::udp_echo(server, ECHO).unwrap();
    let (started, _) = fleet.run(VPCS[0], None).await.unwrap();
    let id = started.instance.unwrap().id;

    assert!(!reaches(&fleet, &id).await, "there is no route");
    let vpc = VPCS[0];
    fleet.warren(&format!("route add {vpc} 198.51.100.0/24 --via 10.0.0.10")).unwrap();
    assert!(becomes(&fleet, &id, true).await);
    for daemon in [Daemon::Control, Daemon::Proxy] {
        fleet.kill_and_restart(daemon).await.unwrap();
        assert!(reaches(&fleet, &id).await, "a table outlives {}", daemon.name());
    }
    let file = fleet.run.path().join("routes");
    let mut routes: Vec<String> = (0..9999)
        .map(|n| format!("100.{}.{}.0/24 via 10.0.0.10\n", 64 + n / 256, n % 256))
        .collect();
    routes.push("198.51.100.0/25 blackhole\n".to_owned());
    std::fs::write(&file, routes.concat()).unwrap();
    let listed = fleet.warren(&format!("route replace {vpc} --file {}", file.display())).unwrap();
    assert_eq!(listed.lines().count(), 1 + 1 + 10_000, "a header, the CIDR, the table");
    assert!(becomes(&fleet, &id, false).await);
    assert!(fleet.drops(Daemon::Proxy, "blackhole").await.unwrap() > 0);
    fleet.warren(&format!("route delete {vpc} 198.51.100.0/25")).unwrap();
    fleet.warren(&format!("route add {vpc} 198.51.100.1/32 --via 10.0.0.10")).unwrap();
    assert!(becomes(&fleet, &id, true).await);
}
