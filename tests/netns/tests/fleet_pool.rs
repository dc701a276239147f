//! The control plane has hosts hold more microVMs ready when many starts come.

use std::time::{Duration, Instant};

use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, VPCS, kvm_or_skip};

const OPTIONS: FleetOptions = FleetOptions { slots: 12, parked: 1, guest: GUEST };
const MOST: u32 = 5;
const TARGET: &str = r#"warren_parked_target{template="default"}"#;
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until so many are to be parked and are, as `warren host ls` has it.
async fn wait_for_pool(fleet: &Fleet, expected: u32) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let hosts = fleet.warren("host ls --output json").unwrap();
        let hosts: serde_json::Value = serde_json::from_str(&hosts).unwrap();
        let host = hosts.as_array().unwrap().iter().find(|host| host["role"] == "host").unwrap();
        if host["parked_target"] == expected && host["parked"] == expected {
            return;
        }
        assert!(Instant::now() < deadline, "not {expected} are parked: {host}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The log has a span for each stage of an instance's start, in that of the start.
fn assert_spans(log: &str, id: &str) {
    let closed = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok();
    let spans: Vec<_> = log
        .lines()
        .filter_map(closed)
        .filter(|l| l["span"]["instance"] == id && l["fields"]["message"] == "close")
        .collect();
    let (whole, stages) = spans.split_last().expect("spans in the log");
    assert_eq!((&whole["span"]["name"], &whole["span"]["vpc"]), (&"start".into(), &VPCS[0].into()));
    let names: Vec<_> = stages.iter().filter_map(|line| line["span"]["stage"].as_str()).collect();
    let expected = ["fork", "jail", "shell", "load", "park", "clone", "attach", "release", "ready"];
    assert_eq!(names, expected, "{log}");
    assert!(stages.iter().all(|line| line["span"]["duration_ns"].as_u64() > Some(0)), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_with_many_starts_holds_more_ready() {
    if !kvm_or_skip("a_host_with_many_starts_holds_more_ready") {
        return;
    }
    let mut fleet = Fleet::start(OPTIONS).await.unwrap();
    fleet.configure(Daemon::Host, "parked_most", &MOST.to_string()).unwrap();
    fleet.configure(Daemon::Host, "log_format", "'json'").unwrap();
    fleet.kill_and_restart(Daemon::Host).await.unwrap();
    wait_for_pool(&fleet, OPTIONS.parked).await;
    let mut started = Vec::new();
    for _ in 0..4 {
        let (response, _) = fleet.run(VPCS[0], None).await.unwrap();
        started.push(response.instance.unwrap().id);
    }
    assert_spans(&fleet.process(Daemon::Host).log(), &started[0]);
    // Half as many again as were started, but not more than the host is configured to.
    wait_for_pool(&fleet, MOST).await;
    assert_eq!(fleet.metric(Daemon::Host, TARGET).unwrap(), u64::from(MOST));
    // A host that restarts is told again.
    fleet.kill_and_restart(Daemon::Host).await.unwrap();
    wait_for_pool(&fleet, MOST).await;
    for id in started {
        fleet.stop(&id).await.unwrap();
    }
}
