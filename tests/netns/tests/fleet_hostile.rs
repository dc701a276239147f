//! Guests that fault, never return or attack their virtqueues: what users and neighbours see of it.

use std::time::Duration;

use warren_netns::fleet::{Daemon, Fleet, FleetOptions, HOSTILE, VPCS, kvm_or_skip};
use warren_proto::v1::{self, InstanceState};

async fn start(fleet: &Fleet) -> v1::Instance {
    fleet.run(VPCS[0], None).await.unwrap().0.instance.unwrap()
}

/// Calls a guest with a line; the hostile guest sends back what it does not understand.
async fn call(fleet: &Fleet, id: &str, line: &str) -> Result<Vec<u8>, tonic::Status> {
    let mut agent = fleet.agent(Daemon::Host).await.unwrap();
    let request = v1::InvokeInstanceRequest { id: id.into(), invocation: line.into() };
    Ok(agent.invoke_instance(request).await?.into_inner().reply)
}

/// Waits until the agent reports a microVM as failed, and returns the reason.
async fn reported(fleet: &Fleet, id: &str) -> String {
    let mut agent = fleet.agent(Daemon::Host).await.unwrap();
    let reported = async {
        loop {
            let list = agent.local_instances(v1::LocalInstancesRequest {}).await.unwrap();
            let list = list.into_inner().instances;
            let instance = list.into_iter().find(|instance| instance.id == id).unwrap();
            if instance.state() == InstanceState::Failed {
                return instance.reason;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let limit = Duration::from_secs(30);
    tokio::time::timeout(limit, reported).await.expect("the end of a microVM is reported")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_guest_is_reported_with_its_reason_and_its_neighbour_goes_on() {
    if !kvm_or_skip("a_hostile_guest_is_reported_with_its_reason_and_its_neighbour_goes_on") {
        return;
    }
    let options = FleetOptions { slots: 6, parked: 2, guest: HOSTILE };
    let fleet = Fleet::start(options).await.unwrap();
    let neighbour = start(&fleet).await;
    for (deed, reason) in [
        ("fault wild", "#PF page fault"),
        ("fault undefined", "#UD invalid opcode"),
        ("panic", "panic"),
        ("loop", "watchdog"),
        ("queue net-tx address-outside", "virtqueue net"),
    ] {
        let villain = start(&fleet).await;
        let (answer, reason_seen) =
            tokio::join!(call(&fleet, &villain.id, deed), reported(&fleet, &villain.id));
        assert!(answer.is_err(), "{deed}: the caller is told, and does not hang: {answer:?}");
        assert!(reason_seen.contains(reason), "{deed}: {reason_seen}");
        let echo = call(&fleet, &neighbour.id, "are you there").await;
        assert_eq!(echo.unwrap(), b"are you there", "{deed}: the neighbour goes on");
        fleet.stop(&villain.id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_never_returns_can_be_stopped_at_once() {
    if !kvm_or_skip("a_guest_that_never_returns_can_be_stopped_at_once") {
        return;
    }
    let options = FleetOptions { slots: 2, parked: 1, guest: HOSTILE };
    let fleet = Fleet::start(options).await.unwrap();
    let villain = start(&fleet).await;
    let stop = async {
        // In the middle of its loop, before its watchdog ends it.
        tokio::time::sleep(Duration::from_millis(200)).await;
        fleet.stop(&villain.id).await.unwrap();
    };
    let (answer, ()) = tokio::join!(call(&fleet, &villain.id, "loop"), stop);
    assert!(answer.is_err(), "{answer:?}");
    let mut agent = fleet.agent(Daemon::Host).await.unwrap();
    let left = agent.local_instances(v1::LocalInstancesRequest {}).await.unwrap();
    assert_eq!(left.into_inner().instances, [], "a stopped microVM is not listed as failed");
}
