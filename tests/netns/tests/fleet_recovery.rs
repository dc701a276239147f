//! A host's daemon finds what an earlier one left: what fits goes on, everything else ends.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;
use warren_abi::probe::{Operation, Outcome};
use warren_netns::fleet::{
    self, Daemon, Fleet, FleetOptions, GUEST, HOSTILE, TEMPLATE, VPCS, kvm_or_skip,
};
use warren_proto::v1;
use warren_vmm::control::socket_path;

const OPTIONS: FleetOptions = FleetOptions { slots: 5, parked: 2, guest: GUEST };
const PATIENCE: Duration = Duration::from_secs(20);
const REAPED: &str = "warren_orphans_reaped_total";

async fn instance(fleet: &Fleet) -> v1::Instance {
    let started = fleet.run(VPCS[0], None).await;
    let log = || std::fs::read_to_string(fleet.run.path().join("host.log")).unwrap_or_default();
    let (response, _) = started.unwrap_or_else(|error| panic!("{error:#}; host's log:\n{}", log()));
    response.instance.expect("a started microVM is described")
}

/// Its processes, without those that are known.
fn others(fleet: &Fleet, known: &[&v1::Instance]) -> BTreeSet<Pid> {
    let pids = fleet.microvms().into_iter().map(|microvm| microvm.pid);
    pids.filter(|pid| !known.iter().any(|instance| instance.pid as i32 == pid.as_raw())).collect()
}

/// A process that ended is in its group for a moment still.
async fn assert_ends(fleet: &Fleet, pid: Pid) {
    let deadline = Instant::now() + PATIENCE;
    while others(fleet, &[]).contains(&pid) {
        assert!(Instant::now() < deadline, "{pid} lives on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn assert_serves(fleet: &Fleet, instance: &v1::Instance) {
    let reply = fleet.probe(&instance.id, Operation::Identity).await.expect("it answers");
    let Ok(Outcome::Identity(identity)) = reply.outcome else { panic!("{reply:?}") };
    assert_eq!(identity.hostname, instance.hostname);
}

async fn listed(fleet: &Fleet) -> Vec<String> {
    let mut agent = fleet.agent(Daemon::Host).await.unwrap();
    let listed = agent.local_instances(v1::LocalInstancesRequest {}).await.unwrap().into_inner();
    listed.instances.into_iter().map(|instance| instance.id).collect()
}

async fn listed_by_control(fleet: &Fleet) -> Vec<String> {
    let mut control = fleet.control().await.unwrap();
    let listed = control.list_instances(v1::ListInstancesRequest::default()).await.unwrap();
    listed.into_inner().instances.into_iter().map(|instance| instance.id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_is_reaped_and_its_slot_is_used_again() {
    if !kvm_or_skip("an_orphan_is_reaped_and_its_slot_is_used_again") {
        return;
    }
    let mut fleet = Fleet::start(OPTIONS).await.unwrap();
    let (kept, lost) = (instance(&fleet).await, instance(&fleet).await);
    fleet.wait_parked(2).await.unwrap();
    fleet.process(Daemon::Host).kill().unwrap();
    // One whose socket is gone, and one that does not answer.
    std::fs::remove_file(socket_path(&fleet.sockets(TEMPLATE), lost.slot)).unwrap();
    let pooled = others(&fleet, &[&kept, &lost]);
    let silent = *pooled.first().expect("one of the pool");
    kill(silent, Signal::SIGSTOP).unwrap();
    fleet.kill_and_restart(Daemon::Host).await.unwrap();

    assert_eq!(fleet.metric(Daemon::Host, REAPED).unwrap(), 2);
    let log = fleet.process(Daemon::Host).log();
    assert_eq!(log.matches("killing an orphaned microVM").count(), 2, "{log}");
    assert_eq!(listed(&fleet).await, std::slice::from_ref(&kept.id));
    assert_serves(&fleet, &kept).await;
    fleet.wait_parked(2).await.unwrap();
    assert_ends(&fleet, Pid::from_raw(lost.pid as i32)).await;
    let now = others(&fleet, &[&kept]);
    assert!(!now.contains(&silent), "{now:?}");
    assert!(now.contains(pooled.last().unwrap()), "one that fits waits on: {pooled:?}, {now:?}");
    // What was started just before the crash is the control plane's until the second heartbeat.
    let deadline = Instant::now() + PATIENCE;
    while listed_by_control(&fleet).await != std::slice::from_ref(&kept.id) {
        assert!(Instant::now() < deadline, "the control plane knows of one that was lost");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // All slots but that of the one that was kept.
    let mut slots = BTreeSet::from([kept.slot]);
    for _ in 1..OPTIONS.slots {
        slots.insert(instance(&fleet).await.slot);
    }
    assert_eq!(slots.len() as u32, OPTIONS.slots, "{slots:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_the_configuration_ends_and_instances_go_on() {
    if !kvm_or_skip("what_does_not_fit_the_configuration_ends_and_instances_go_on") {
        return;
    }
    let mut fleet = Fleet::start(OPTIONS).await.unwrap();
    let mut instances = [instance(&fleet).await, instance(&fleet).await];
    instances.sort_by_key(|instance| instance.slot);
    let [low, high] = &instances;
    fleet.wait_parked(2).await.unwrap();
    let pooled = others(&fleet, &[low, high]);
    assert_eq!(pooled.len(), 2);

    let template = fleet::template(&fleet.run, HOSTILE).unwrap();
    fleet.configure(Daemon::Host, "path", &format!("'{}'", template.display())).unwrap();
    fleet.kill_and_restart(Daemon::Host).await.unwrap();
    assert_eq!(fleet.metric(Daemon::Host, REAPED).unwrap(), 2);
    fleet.wait_parked(2).await.unwrap();
    for pid in pooled {
        assert_ends(&fleet, pid).await;
    }
    for instance in [low, high] {
        assert_serves(&fleet, instance).await;
    }

    // Too few slots for the higher one.
    fleet.configure(Daemon::Host, "slots", &(high.slot - 1).to_string()).unwrap();
    fleet.configure(Daemon::Host, "parked", "0").unwrap();
    fleet.kill_and_restart(Daemon::Host).await.unwrap();
    assert_eq!(listed(&fleet).await, std::slice::from_ref(&low.id));
    assert_ends(&fleet, Pid::from_raw(high.pid as i32)).await;
    assert!(!socket_path(&fleet.sockets(TEMPLATE), high.slot).exists());
    assert_serves(&fleet, low).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn state_of_another_boot_is_discarded() {
    if !kvm_or_skip("state_of_another_boot_is_discarded") {
        return;
    }
    let mut fleet = Fleet::start(OPTIONS).await.unwrap();
    let before = instance(&fleet).await;
    let dir = fleet.dir(Daemon::Host);
    let boot = std::fs::read_to_string(dir.join("boot-id")).unwrap();
    fleet.process(Daemon::Host).kill().unwrap();
    std::fs::write(dir.join("boot-id"), "00000000-0000-0000-0000-000000000000").unwrap();
    let vpcs = std::fs::read_to_string(dir.join("vpcs.json")).unwrap();
    std::fs::write(dir.join("vpcs.json"), vpcs.replace(VPCS[0], "ghost")).unwrap();
    fleet.kill_and_restart(Daemon::Host).await.unwrap();

    let log = fleet.process(Daemon::Host).log();
    assert!(log.contains("vpcs.json: it is of another boot"), "{log}");
    assert_eq!(std::fs::read_to_string(dir.join("boot-id")).unwrap(), boot);
    let mut agent = fleet.agent(Daemon::Host).await.unwrap();
    let request = v1::StartInstanceRequest { vpc: "ghost".into(), ..Default::default() };
    let refused = agent.start_instance(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("not known on this host"), "{refused}");
    // No process outlives its boot, but this one did: it is nobody's.
    assert_ends(&fleet, Pid::from_raw(before.pid as i32)).await;
    // The control plane tells all that is true.
    let after = instance(&fleet).await;
    assert_serves(&fleet, &after).await;
}
