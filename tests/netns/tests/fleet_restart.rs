//! Daemons are killed with SIGKILL and started again while microVMs talk to their VPCs.
//!
//! The microVMs are called through their own sockets, as a relay does: a call must not end with
//! the daemon.

use std::time::Duration;

use warren_abi::probe::{self, Endpoint, Operation, Outcome, Reply};
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, TEMPLATE, VPCS, kvm_or_skip};
use warren_netns::servers;
use warren_netns::topology::SERVER;
use warren_proto::v1::{self, InstanceState};
use warren_vmm::client;
use warren_vmm::control::socket_path;

const OPTIONS: FleetOptions = FleetOptions { slots: 8, parked: 3, guest: GUEST };
const ECHO: u16 = 7;
const BULK: u16 = 9000;
/// Datagrams of a stream, one each millisecond.
const DATAGRAMS: u32 = 8000;
/// A transfer that takes as long.
const BYTES: u64 = 32_000_000;
const BYTES_PER_SECOND: u64 = 4_000_000;

async fn instance(fleet: &Fleet, vpc: &str) -> v1::Instance {
    let (response, _) = fleet.run(vpc, None).await.expect("a microVM starts");
    response.instance.expect("a started microVM is described")
}

/// Calls the probe without any daemon in between.
async fn call(fleet: &Fleet, instance: &v1::Instance, operation: Operation) -> Reply {
    let request = probe::encode(&probe::Request { operation, timeout_ms: 30_000 });
    let socket = socket_path(&fleet.sockets(TEMPLATE), instance.slot);
    let reply = client::invoke(&socket, &request, Duration::from_secs(40)).await;
    probe::decode(&reply.expect("the microVM answers")).expect("a reply of the probe")
}

fn stream() -> Operation {
    let to = Endpoint { address: SERVER.octets(), port: ECHO };
    Operation::UdpEcho { to, count: DATAGRAMS, length: 256, interval_us: 1000 }
}

fn transfer() -> Operation {
    let to = Endpoint { address: SERVER.octets(), port: BULK };
    Operation::BulkReceive { to, bytes: BYTES }
}

/// Runs a paced stream and a transfer, restarts daemons in between, and expects nothing lost.
async fn nothing_is_lost(fleet: &mut Fleet, restarts: &[Daemon]) {
    let _echo = servers::udp_echo(&fleet.topology.vpcs[0], ECHO).unwrap();
    let _source =
        servers::bulk_source(&fleet.topology.vpcs[0], BULK, BYTES, BYTES_PER_SECOND).unwrap();
    let (streaming, transferring) =
        (instance(fleet, VPCS[0]).await, instance(fleet, VPCS[0]).await);
    let socket = |instance: &v1::Instance| socket_path(&fleet.sockets(TEMPLATE), instance.slot);
    let calls = [(socket(&streaming), stream()), (socket(&transferring), transfer())];
    let calls = calls.map(|(socket, operation)| {
        tokio::spawn(async move {
            let request = probe::encode(&probe::Request { operation, timeout_ms: 30_000 });
            let reply = client::invoke(&socket, &request, Duration::from_secs(40)).await;
            probe::decode::<Reply>(&reply.expect("the microVM answers")).unwrap()
        })
    });
    for daemon in restarts {
        tokio::time::sleep(Duration::from_millis(300)).await;
        fleet.kill_and_restart(*daemon).await.unwrap();
    }
    assert!(!calls[0].is_finished(), "the stream must last longer than the restarts");
    assert!(!calls[1].is_finished(), "the transfer must last longer than the restarts");
    let [stream, transfer] = calls;
    match stream.await.unwrap().outcome {
        Ok(Outcome::Udp { sent, received, .. }) => {
            assert_eq!((sent, received), (DATAGRAMS, DATAGRAMS), "datagrams sent, and back");
        }
        other => panic!("the stream ended with {other:?}"),
    }
    let outcome = transfer.await.unwrap().outcome;
    assert_eq!(outcome, Ok(Outcome::Bulk { bytes: BYTES, corrupt_at: None }));
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_warrend_loses_no_packet_and_no_microvm() {
    if !kvm_or_skip("killing_warrend_loses_no_packet_and_no_microvm") {
        return;
    }
    let mut fleet = Fleet::start(OPTIONS).await.unwrap();
    let bystander = instance(&fleet, VPCS[1]).await;
    nothing_is_lost(&mut fleet, &[Daemon::Host, Daemon::Host]).await;

    let listed = fleet.agent(Daemon::Host).await.unwrap();
    let listed = { listed }.local_instances(v1::LocalInstancesRequest {}).await.unwrap();
    let listed = listed.into_inner().instances;
    assert_eq!(listed.len(), 3, "all microVMs are found again: {listed:?}");
    assert!(listed.iter().all(|instance| instance.state() == InstanceState::Running));
    let again = listed.iter().find(|instance| instance.id == bystander.id).unwrap();
    assert_eq!(again, &bystander, "what is known of a microVM survives the daemon");
    let identity = call(&fleet, &bystander, Operation::Identity).await.outcome.unwrap();
    let Outcome::Identity(identity) = identity else { panic!("{identity:?}") };
    assert_eq!(identity.hostname, bystander.hostname);

    // The new daemon ends what the old one started, and starts others.
    fleet.stop(&bystander.id).await.unwrap();
    let next = instance(&fleet, VPCS[1]).await;
    assert_ne!(next.id, bystander.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_the_proxys_daemon_loses_no_packet_and_no_connection() {
    if !kvm_or_skip("killing_the_proxys_daemon_loses_no_packet_and_no_connection") {
        return;
    }
    let mut fleet = Fleet::start(OPTIONS).await.unwrap();
    nothing_is_lost(&mut fleet, &[Daemon::Proxy, Daemon::Proxy]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_control_plane_comes_back_with_its_vpcs_and_learns_its_instances_again() {
    if !kvm_or_skip("a_killed_control_plane_comes_back") {
        return;
    }
    let mut fleet = Fleet::start(OPTIONS).await.unwrap();
    let before = instance(&fleet, VPCS[0]).await;
    fleet.kill_and_restart(Daemon::Control).await.unwrap();
    let mut control = fleet.control().await.unwrap();
    let instances = control.list_instances(v1::ListInstancesRequest {}).await.unwrap();
    assert_eq!(instances.into_inner().instances, [before]);
    let vpcs = control.list_vpcs(v1::ListVpcsRequest {}).await.unwrap().into_inner().vpcs;
    assert_eq!(vpcs.iter().map(|vpc| &vpc.name[..]).collect::<Vec<_>>(), VPCS);
    instance(&fleet, VPCS[1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_control_plane_and_its_state_daemons_go_on_with_what_they_last_knew() {
    if !kvm_or_skip("without_a_control_plane_and_its_state") {
        return;
    }
    let mut fleet = Fleet::start(OPTIONS).await.unwrap();
    let _echo = servers::udp_echo(&fleet.topology.vpcs[0], ECHO).unwrap();
    let before = instance(&fleet, VPCS[0]).await;
    let echoes = async |fleet: &Fleet, instance: &v1::Instance| {
        let to = Endpoint { address: SERVER.octets(), port: ECHO };
        let operation = Operation::UdpEcho { to, count: 20, length: 64, interval_us: 1000 };
        let reply = call(fleet, instance, operation).await;
        let Ok(Outcome::Udp { sent, received, .. }) = reply.outcome else { panic!("{reply:?}") };
        assert_eq!((sent, received), (20, 20));
    };
    fleet.lose_control().unwrap();
    echoes(&fleet, &before).await;
    for daemon in [Daemon::Proxy, Daemon::Host] {
        fleet.kill_and_restart_alone(daemon).unwrap();
        echoes(&fleet, &before).await;
    }
    // Whoever asks the agent gets more, on the ports that the host holds.
    let mut agent = fleet.agent(Daemon::Host).await.unwrap();
    let request = v1::StartInstanceRequest { vpc: VPCS[0].to_owned(), ..Default::default() };
    let started = agent.start_instance(request).await.unwrap().into_inner().instance.unwrap();
    echoes(&fleet, &started).await;
}
