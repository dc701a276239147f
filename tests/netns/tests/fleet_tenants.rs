//! Whole microVMs of two tenants whose VPCs have the same CIDR, with real servers in both.

use std::collections::HashSet;

use warren_abi::probe::{Endpoint, Operation, Outcome};
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, VPCS, kvm_or_skip};
use warren_netns::servers;
use warren_netns::topology::{SERVER, SHARED};
use warren_proto::v1::{self, InstanceState};

const OPTIONS: FleetOptions = FleetOptions { slots: 12, parked: 4, guest: GUEST };

fn at(port: u16) -> Endpoint {
    Endpoint { address: SERVER.octets(), port }
}

fn redis(commands: &[&[&str]]) -> Operation {
    let owned = |words: &&[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    Operation::Redis { to: at(6379), commands: commands.iter().map(owned).collect() }
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_with_one_cidr_reach_only_their_own_servers_from_one_address_each() {
    if !kvm_or_skip("tenants_with_one_cidr_reach_only_their_own_servers") {
        return;
    }
    let fleet = Fleet::start(OPTIONS).await.unwrap();
    let mut processes = Vec::new();
    for (namespace, name) in fleet.topology.vpcs.iter().zip(VPCS) {
        processes.push(servers::redis(namespace, fleet.run.path()).unwrap());
        processes.push(servers::nginx(namespace, fleet.run.path(), name).unwrap());
        assert_eq!(servers::redis_cli(namespace, &["set", "marker", name]).unwrap(), "OK");
    }
    let mut sources = HashSet::new();
    let mut identities = HashSet::new();
    for n in 0..6 {
        let name = VPCS[n % 2];
        let operation = redis(&[&["GET", "marker"], &["CLIENT", "INFO"]]);
        let (response, reply) = fleet.run(name, Some(operation)).await.unwrap();
        let Ok(Outcome::Redis(replies)) = reply.unwrap().outcome else { panic!("no replies") };
        assert_eq!(replies[0], format!("${}\r\n{name}\r\n", name.len()).as_bytes());
        let info = String::from_utf8_lossy(&replies[1]).into_owned();
        let address = info.split(' ').find_map(|word| word.strip_prefix("addr=")).unwrap();
        assert!(address.starts_with(&format!("{SHARED}:")), "Redis sees {address}");
        assert!(sources.insert((name, address.to_owned())), "{address} is used twice");

        let instance = response.instance.unwrap();
        let page = Operation::HttpGet { to: at(80), host: "shop".into(), path: "/".into() };
        let outcome = fleet.probe(&instance.id, page).await.unwrap().outcome;
        assert_eq!(outcome, Ok(Outcome::Http { status: 200, body: name.into() }));
        let outcome = fleet.probe(&instance.id, Operation::Identity).await.unwrap().outcome;
        let Ok(Outcome::Identity(identity)) = outcome else { panic!("{outcome:?}") };
        assert_eq!(identity.hostname, instance.hostname);
        assert!(identities.insert(identity.random), "two microVMs drew the same random bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_pool_makes_cold_clones_and_a_full_host_says_so() {
    if !kvm_or_skip("an_empty_pool_makes_cold_clones_and_a_full_host_says_so") {
        return;
    }
    let fleet = Fleet::start(FleetOptions { slots: 3, parked: 0, guest: GUEST }).await.unwrap();
    for _ in 0..3 {
        let (response, _) = fleet.run(VPCS[0], None).await.unwrap();
        assert!(response.timings.unwrap().cold);
    }
    let mut agent = fleet.agent(Daemon::Host).await.unwrap();
    let request = v1::StartInstanceRequest { vpc: VPCS[0].into(), ..Default::default() };
    let status = agent.start_instance(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status}");
    assert!(status.message().contains("slots"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_microvm_that_dies_is_reported_and_harms_nobody() {
    if !kvm_or_skip("a_microvm_that_dies_is_reported_and_harms_nobody") {
        return;
    }
    let fleet = Fleet::start(OPTIONS).await.unwrap();
    let _echo = servers::udp_echo(&fleet.topology.vpcs[0], 7).unwrap();
    let start = async || fleet.run(VPCS[0], None).await.unwrap().0.instance.unwrap();
    let (victim, neighbour) = (start().await, start().await);
    let pid = nix::unistd::Pid::from_raw(victim.pid as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let mut agent = fleet.agent(Daemon::Host).await.unwrap();
    let reported = async {
        loop {
            let list = agent.local_instances(v1::LocalInstancesRequest {}).await.unwrap();
            let list = list.into_inner().instances;
            let found = list.into_iter().find(|instance| instance.id == victim.id).unwrap();
            if found.state() == InstanceState::Failed {
                return found;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    let reported = tokio::time::timeout(std::time::Duration::from_secs(10), reported).await;
    assert!(!reported.expect("it is reported").reason.is_empty());

    let error = fleet.probe(&victim.id, Operation::Identity).await.unwrap_err();
    assert!(error.to_string().contains("ended"), "{error}");
    let echo = Operation::UdpEcho { to: at(7), count: 10, length: 64, interval_us: 0 };
    let outcome = fleet.probe(&neighbour.id, echo).await.unwrap().outcome;
    assert!(matches!(outcome, Ok(Outcome::Udp { received: 10, .. })), "{outcome:?}");
    fleet.stop(&victim.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zygote_that_is_killed_is_replaced() {
    if !kvm_or_skip("a_zygote_that_is_killed_is_replaced") {
        return;
    }
    let options = FleetOptions { slots: 3, parked: 0, guest: GUEST };
    let mut fleet = Fleet::start(options).await.unwrap();
    let (before, _) = fleet.run(VPCS[0], None).await.unwrap();
    let daemon = fleet.process(Daemon::Host).pid();
    let children = format!("/proc/{daemon}/task/{daemon}/children");
    let children = std::fs::read_to_string(children).unwrap();
    // Beside it, the shell that shortened grace periods may still be there.
    let is_vmm = |pid: &&str| {
        std::fs::read_to_string(format!("/proc/{pid}/comm"))
            .is_ok_and(|name| name == "warren-vmm\n")
    };
    let zygote = children.split_whitespace().find(is_vmm).expect("there is a zygote");
    let zygote = nix::unistd::Pid::from_raw(zygote.parse().unwrap());
    nix::sys::signal::kill(zygote, nix::sys::signal::Signal::SIGKILL).unwrap();

    fleet.run(VPCS[0], None).await.expect("a microVM starts without the old zygote");
    let id = before.instance.unwrap().id;
    let outcome = fleet.probe(&id, Operation::Identity).await.unwrap().outcome;
    assert!(outcome.is_ok(), "a microVM of the old zygote lives on: {outcome:?}");
}
