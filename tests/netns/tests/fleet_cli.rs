//! The command line against a whole fleet: what the README says works.

use std::process::Output;

use serde_json::Value;
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, VPCS, kvm_or_skip};
use warren_netns::servers;

fn warren(fleet: &Fleet, words: &[&str]) -> Output {
    fleet.cli().unwrap().args(words).output().unwrap()
}

fn json(fleet: &Fleet, words: &[&str]) -> Value {
    let output = warren(fleet, &[words, &["--output", "json"]].concat());
    assert!(output.status.success(), "{words:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_microvm_is_run_probed_listed_and_stopped() {
    if !kvm_or_skip("a_microvm_is_run_probed_listed_and_stopped") {
        return;
    }
    let options = FleetOptions { slots: 4, parked: 1, guest: GUEST };
    let fleet = Fleet::start(options).await.unwrap();
    let _redis = servers::redis(&fleet.topology.vpcs[0], fleet.run.path()).unwrap();

    let hosts = json(&fleet, &["host", "ls"]);
    assert_eq!(hosts.as_array().unwrap().len(), 2, "{hosts}");
    let vpcs = json(&fleet, &["vpc", "ls"]);
    assert_eq!(vpcs[0]["name"], VPCS[0], "{vpcs}");
    let vni = &vpcs[0]["vni"];

    let started = json(&fleet, &["vm", "run", "--vpc", VPCS[0]]);
    let listed = json(&fleet, &["vm", "ls"]);
    let id = listed[0]["id"].as_str().unwrap();
    assert!(started.to_string().contains(id), "{started}");

    let probed = warren(&fleet, &["vm", "probe", id, "redis", "10.0.0.10:6379", "PING"]);
    assert!(probed.status.success(), "{probed:?}");
    assert!(String::from_utf8_lossy(&probed.stdout).contains("PONG"), "{probed:?}");
    let refused = warren(&fleet, &["vm", "probe", id, "tcp-connect", "10.0.0.10:81"]);
    assert!(!refused.status.success(), "a failed probe is an error: {refused:?}");

    let outside = ["tcp-connect", "203.0.113.1:80", "--timeout-ms", "500"];
    warren(&fleet, &[&["vm", "probe", id], &outside[..]].concat());
    let drops = json(&fleet, &["drops", "--host", "proxy"]);
    let no_route = |drop: &Value| drop["reason"] == "no-route" && drop["vpc"] == VPCS[0];
    assert!(drops.as_array().unwrap().iter().any(no_route), "the VPC has no gateway: {drops}");

    let host = fleet.scrape(Daemon::Host).unwrap();
    for line in ["warren_slots 4", "warren_instances 1", "warren_start_seconds_count 1"] {
        assert!(host.lines().any(|other| other == line), "no `{line}` in\n{host}");
    }
    let proxy = fleet.scrape(Daemon::Proxy).unwrap();
    let no_route = format!(r#"warren_dropped_packets_total{{reason="no-route",vni="{vni}"}} "#);
    assert!(proxy.contains(&no_route), "{proxy}");

    let unknown = warren(&fleet, &["vm", "run", "--vpc", "nowhere"]);
    let message = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(!unknown.status.success() && message.contains("nowhere"), "{message}");

    assert!(warren(&fleet, &["vm", "stop", &id[..8]]).status.success());
    assert_eq!(json(&fleet, &["vm", "ls"]), serde_json::json!([]));
}
