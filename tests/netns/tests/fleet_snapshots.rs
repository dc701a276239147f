//! A running microVM is kept under a name and cloned, by the command line, in a whole fleet.

use std::collections::HashSet;
use std::process::Output;

use serde_json::{Value, json};
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, VPCS, kvm_or_skip};
use warren_netns::servers;

fn warren(fleet: &Fleet, line: &str) -> Output {
    fleet.cli().unwrap().args(line.split_whitespace()).output().unwrap()
}

fn json(fleet: &Fleet, line: &str) -> Value {
    let output = warren(fleet, &format!("{line} --output json"));
    assert!(output.status.success(), "{line}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// It fails, and its complaint contains this.
fn refused(fleet: &Fleet, line: &str, complaint: &str) {
    let output = warren(fleet, line);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains(complaint), "{line}: {output:?}");
}

fn recall(fleet: &Fleet, id: &str) -> Value {
    json(fleet, &format!("vm probe {id} recall"))["outcome"]["recalled"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_microvm_is_snapshotted_and_cloned_within_its_vpc() {
    if !kvm_or_skip("a_running_microvm_is_snapshotted_and_cloned_within_its_vpc") {
        return;
    }
    // One slot is the pool's, which makes room for the last clone.
    let options = FleetOptions { slots: 6, parked: 1, guest: GUEST };
    let mut fleet = Fleet::start(options).await.unwrap();
    let _redis = servers::redis(&fleet.topology.vpcs[0], fleet.run.path()).unwrap();
    let vpc = VPCS[0];
    let group = format!("security-group create {vpc} web --rule");
    let group = [group.split_whitespace().collect(), vec!["100 allow tcp 6379"]].concat();
    let created = fleet.cli().unwrap().args(group).output().unwrap();
    assert!(created.status.success(), "{created:?}");

    let origin = json(&fleet, &format!("vm run --vpc {vpc} --security-group web"));
    let origin = origin[0]["id"].as_str().unwrap().to_owned();
    json(&fleet, &format!("vm probe {origin} remember before"));
    assert_eq!(json(&fleet, "vm snapshots"), json!([]));
    let taken = json(&fleet, &format!("vm snapshot {} golden", &origin[..8]));
    assert_eq!((&taken["name"], &taken["vpc"]), (&json!("golden"), &json!(vpc)));
    assert_eq!((&taken["instance"], &taken["host"]), (&json!(origin), &json!("host")));
    assert!(taken["bytes"].as_u64().unwrap() > 0, "{taken}");
    assert_eq!(json(&fleet, "vm snapshots --host host"), json!([taken]));
    json(&fleet, &format!("vm probe {origin} remember after"));

    let clones = json(&fleet, "vm clone --from golden --count 3");
    let mut identities = HashSet::new();
    for clone in clones.as_array().unwrap() {
        let id = clone["id"].as_str().unwrap();
        assert_eq!(clone["vpc"], vpc);
        // Not less restricted than its origin.
        assert_eq!(clone["security_groups"], json!(["web"]), "{clone}");
        assert_eq!(recall(&fleet, id), "before");
        let pinged = warren(&fleet, &format!("vm probe {id} redis 10.0.0.10:6379 PING"));
        assert!(String::from_utf8_lossy(&pinged.stdout).contains("PONG"), "{pinged:?}");
        let identity = &json(&fleet, &format!("vm probe {id} identity"))["outcome"]["identity"];
        assert_eq!(identity["instance_id"], clone["id"]);
        for what in ["instance_id", "mac", "address", "random", "hostname"] {
            assert!(identities.insert(identity[what].to_string()), "{what} is another's: {clone}");
        }
    }
    assert_eq!(recall(&fleet, &origin), "after");

    refused(&fleet, &format!("vm snapshot {origin} golden"), "has a snapshot \"golden\"");
    refused(&fleet, &format!("vm snapshot {origin} ../golden"), "no name of a snapshot");
    refused(&fleet, "vm clone --from silver", "no snapshot \"silver\"");
    let other = warren_proto::v1::RunInstanceRequest {
        vpc: VPCS[1].to_owned(),
        snapshot: "golden".to_owned(),
        ..Default::default()
    };
    let error = fleet.control().await.unwrap().run_instance(other).await.unwrap_err();
    assert!(error.message().contains("its clones cannot be in tenant-b"), "{error}");
    let mut agent = fleet.agent(Daemon::Host).await.unwrap();
    let other = warren_proto::v1::StartInstanceRequest {
        vpc: VPCS[1].to_owned(),
        snapshot: "golden".to_owned(),
        ..Default::default()
    };
    let error = agent.start_instance(other).await.unwrap_err();
    assert!(error.message().contains("cannot be in another one"), "{error}");

    // A daemon that restarts knows its snapshots and finds the clones of them.
    fleet.kill_and_restart(Daemon::Host).await.unwrap();
    assert_eq!(json(&fleet, "vm snapshots"), json!([taken]));
    let id = clones[0]["id"].as_str().unwrap();
    assert_eq!(recall(&fleet, id), "before");
    // A clone is snapshotted as its origin was.
    json(&fleet, &format!("vm probe {id} remember branch"));
    json(&fleet, &format!("vm snapshot {id} branch"));
    assert!(warren(&fleet, &format!("vm stop {id}")).status.success());
    for (from, state) in [("branch", "branch"), ("golden", "before")] {
        let clone = json(&fleet, &format!("vm clone --from {from} --hostname of-{from}"));
        let id = clone[0]["id"].as_str().unwrap();
        assert_eq!(recall(&fleet, id), state);
        assert_eq!(clone[0]["hostname"], format!("of-{from}"));
    }

    assert_eq!(json(&fleet, "vm snapshot-rm golden branch").as_array().unwrap().len(), 2);
    assert_eq!(json(&fleet, "vm snapshots"), json!([]));
    refused(&fleet, "vm snapshot-rm golden", "no snapshot \"golden\"");
    refused(&fleet, "vm clone --from golden", "no snapshot \"golden\"");
    let kept = std::fs::read_dir(fleet.dir(Daemon::Host).join("snapshots")).unwrap().count();
    assert_eq!(kept, 0, "files of snapshots that were removed");
    assert_eq!(json(&fleet, "vm ls").as_array().unwrap().len(), 5, "clones run on");
}
