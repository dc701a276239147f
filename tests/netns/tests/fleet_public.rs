//! Public egress, from the command line to the microVMs' packets.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use warren_abi::probe::{Endpoint, Operation, Outcome};
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, kvm_or_skip};
use warren_netns::servers::{udp_at, udp_echo, udp_echo_at};
use warren_netns::topology::{SERVER, VPC_INTERFACES};

const ECHO: u16 = 7;
/// A server behind the gateway of the public network.
const AWAY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// Whether datagrams come back from there, in a moment: what is applied is deployed just after it is
/// stored.
async fn reaches(fleet: &Fleet, id: &str, there: Ipv4Addr) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    let to = Endpoint { address: there.octets(), port: ECHO };
    while Instant::now() < deadline {
        let echo = Operation::UdpEcho { to, count: 1, length: 64, interval_us: 1000 };
        let reply = fleet.probe_within(id, echo, 1000).await.unwrap();
        if matches!(reply.outcome, Ok(Outcome::Udp { received: 1, .. })) {
            return true;
        }
    }
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn each_tenant_leaves_by_its_own_address_with_a_vpc_or_without() {
    if !kvm_or_skip("each_tenant_leaves_by_its_own_address") {
        return;
    }
    let options = FleetOptions { slots: 4, parked: 1, guest: GUEST };
    let mut fleet = Fleet::without_vpcs(options).await.unwrap();
    let [inside, gateway] = &fleet.topology.vpcs;
    for words in ["addr add 203.0.113.1/24 dev eth0", &format!("addr add {AWAY}/32 dev lo")] {
        gateway.ip(words).unwrap();
    }
    let _inside = udp_echo(inside, ECHO).unwrap();
    let _away = udp_echo_at(gateway, (AWAY, ECHO)).unwrap();
    let witness = udp_at(gateway, (AWAY, ECHO + 1)).unwrap();
    witness.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let [interface, outside] = VPC_INTERFACES;
    let network = format!("--cidr 203.0.113.0/24 --interface {outside} --gateway 203.0.113.1");
    fleet.warren(&format!("vpc create blue-out {network} --shared-address 203.0.113.7")).unwrap();
    fleet.warren(&format!("vpc create red {network} --shared-address 203.0.113.8")).unwrap();
    let blue = "--cidr 10.0.0.0/24 --shared-address 10.0.0.100 --public blue-out";
    fleet.warren(&format!("vpc create blue {blue} --interface {interface}")).unwrap();

    let mut ids = Vec::new();
    for (vpc, public) in [("blue", "203.0.113.7"), ("red", "203.0.113.8")] {
        let id = fleet.run(vpc, None).await.unwrap().0.instance.unwrap().id;
        assert!(reaches(&fleet, &id, AWAY).await, "{vpc}");
        let to = Endpoint { address: AWAY.octets(), port: ECHO + 1 };
        let knock = Operation::UdpEcho { to, count: 1, length: 64, interval_us: 1000 };
        fleet.probe_within(&id, knock, 1000).await.unwrap();
        assert_eq!(witness.recv_from(&mut [0; 64]).unwrap().1.ip().to_string(), public);
        ids.push(id);
    }
    assert!(reaches(&fleet, &ids[0], SERVER).await, "the VPC is there as well");
    for daemon in [Daemon::Control, Daemon::Proxy] {
        fleet.kill_and_restart(daemon).await.unwrap();
        for id in &ids {
            assert!(reaches(&fleet, id, AWAY).await, "it outlives {}", daemon.name());
        }
    }
    let error = fleet.run("blue-out", None).await.expect_err("its ports are blue's").to_string();
    assert!(error.contains("VPC blue leaves by the addresses of VPC blue-out"), "{error}");
    let taken = "--cidr 10.0.0.0/24 --shared-address 10.0.0.101 --public red";
    let error = fleet.warren(&format!("vpc create green {taken} --interface {interface}"));
    assert!(error.unwrap_err().to_string().contains("red has microVMs of its own"));
}
