//! Link-local services to whole microVMs of two tenants.

use warren_abi::probe::{Endpoint, Operation, Outcome};
use warren_abi::services::{DNS, METADATA};
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, VPCS, kvm_or_skip};
use warren_netns::servers::unbound;

const OPTIONS: FleetOptions = FleetOptions { slots: 4, parked: 2, guest: GUEST };

fn look_up(name: &str) -> Operation {
    let to = Endpoint { address: DNS.octets(), port: 53 };
    Operation::DnsQuery { to, name: name.to_owned() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_microvm_resolves_names_of_its_vpc_and_finds_its_metadata() {
    if !kvm_or_skip("a_microvm_resolves_names_of_its_vpc_and_finds_its_metadata") {
        return;
    }
    let mut fleet = Fleet::start(OPTIONS).await.unwrap();
    let addresses = [[10, 0, 0, 77], [10, 0, 0, 88]];
    let mut resolvers = Vec::new();
    for (vpc, [a, b, c, d]) in fleet.topology.vpcs.iter().zip(addresses) {
        let record = format!("db.corp.internal. 300 A {a}.{b}.{c}.{d}");
        resolvers.push(unbound(vpc, fleet.run.path(), "corp.internal.", &[&record]).unwrap());
    }
    let mut instances = Vec::new();
    for (vpc, address) in VPCS.iter().zip(addresses) {
        // Its first act, before its host has it on its list.
        let (response, reply) = fleet.run(vpc, Some(look_up("db"))).await.unwrap();
        assert_eq!(reply.unwrap().outcome, Ok(Outcome::Dns(vec![address])));
        instances.push(response.instance.unwrap());
    }
    let to = Endpoint { address: METADATA.octets(), port: 80 };
    let page = Operation::HttpGet { to, host: "metadata".into(), path: "/".into() };
    let outcome = fleet.probe(&instances[0].id, page).await.unwrap().outcome;
    assert!(matches!(outcome, Ok(Outcome::Http { status: 401, .. })), "{outcome:?}");

    fleet.kill_and_restart(Daemon::Host).await.unwrap();
    for (instance, address) in instances.iter().zip(addresses) {
        let outcome = fleet.probe(&instance.id, look_up("db.corp.internal")).await.unwrap().outcome;
        assert_eq!(outcome, Ok(Outcome::Dns(vec![address])));
    }
}
