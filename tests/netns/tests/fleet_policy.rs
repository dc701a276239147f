//! Security groups and limits, from the command line to a microVM's packets.

use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::Value;
use warren_abi::probe::{Endpoint, Operation, Outcome};
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, VPCS, kvm_or_skip};
use warren_netns::servers::udp_echo;
use warren_netns::topology::SERVER;

const ECHO: u16 = 7;
const VPC: &str = VPCS[0];

fn warren(fleet: &Fleet, words: &[&str]) -> Output {
    fleet.cli().unwrap().args(words).args(["--output", "json"]).output().unwrap()
}

fn json(fleet: &Fleet, words: &[&str]) -> Value {
    let output = warren(fleet, words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Starts a microVM and returns its id.
fn run(fleet: &Fleet, flags: &[&str]) -> String {
    let started = json(fleet, &[&["vm", "run", "--vpc", VPC], flags].concat());
    started[0]["id"].as_str().unwrap().to_owned()
}

/// Datagrams that came back of so many, one each `interval_us`.
async fn echoed(fleet: &Fleet, id: &str, count: u32, interval_us: u32) -> u32 {
    let to = Endpoint { address: SERVER.octets(), port: ECHO };
    let echo = Operation::UdpEcho { to, count, length: 64, interval_us };
    let reply = fleet.probe_within(id, echo, count * interval_us / 1000 + 500).await.unwrap();
    match reply.outcome {
        Ok(Outcome::Udp { received, .. }) => received,
        Err(_) => 0,
        Ok(other) => panic!("{other:?}"),
    }
}

/// Whether a datagram comes back, or in a moment does: changes are deployed just after they are
/// stored.
async fn becomes(fleet: &Fleet, id: &str, reached: bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if (echoed(fleet, id, 1, 1000).await > 0) == reached {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    false
}

/// How often each rule of a group decided, by its number.
fn hits(fleet: &Fleet, group: &str, id: u64) -> u64 {
    let rules = json(fleet, &["security-group", "show", VPC, group]);
    let rule = rules.as_array().unwrap().iter().find(|rule| rule["id"] == id);
    rule.expect("it is there")["hits"].as_u64().unwrap()
}

/// The microVM as `vm ls` lists it, once it does hold so many flows: hosts tell once a second.
async fn listed(fleet: &Fleet, id: &str, flows: u64) -> Value {
    for _ in 0..50 {
        let list = json(fleet, &["vm", "ls"]);
        let mut list = list.as_array().unwrap().iter();
        let row = list.find(|row| row["id"] == id).expect("it is there");
        if row["usage"]["flows"] == flows {
            return row.clone();
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{id} never has {flows} flows: {}", json(fleet, &["vm", "ls"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_of_the_command_line_judge_a_microvm_s_live_flow_and_outlive_the_daemons() {
    if !kvm_or_skip("rules_of_the_command_line_judge_a_microvm_s_live_flow") {
        return;
    }
    let options = FleetOptions { slots: 6, parked: 1, guest: GUEST };
    let mut fleet = Fleet::start(options).await.unwrap();
    let echo = udp_echo(&fleet.topology.vpcs[0], ECHO).unwrap();
    let made = ["security-group", "create", VPC, "echo", "--rule", "100 allow udp 7"];
    json(&fleet, &made);
    json(&fleet, &["security-group", "create", VPC, "nothing"]);
    json(&fleet, &["vpc", "guard", VPC, "--security-group", "echo", "--default-egress", "deny"]);
    let id = run(&fleet, &[]);
    assert!(echoed(&fleet, &id, 1, 1000).await == 1, "its host had the rule when it started");

    // A flow is under way when a rule comes that denies it.
    let (probed, ()) = tokio::join!(echoed(&fleet, &id, 3000, 1000), async {
        let before = echo.count();
        while echo.count() < before + 100 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let deny = ["security-group", "add-rule", VPC, "echo", "9 deny udp to 10.0.0.0/24"];
        json(&fleet, &deny);
    });
    assert!((100..3000).contains(&probed), "{probed} came back");
    assert!(fleet.drops(Daemon::Host, "denied").await.unwrap() > 0);
    let denied = hits(&fleet, "echo", 2);
    assert!(denied > 0 && hits(&fleet, "echo", 1) > 0);

    for daemon in [Daemon::Control, Daemon::Host] {
        fleet.kill_and_restart(daemon).await.unwrap();
        assert_eq!(echoed(&fleet, &id, 3, 1000).await, 0, "rules outlive {}", daemon.name());
        assert!(hits(&fleet, "echo", 2) > denied, "and counters {}", daemon.name());
    }
    json(&fleet, &["security-group", "remove-rule", VPC, "echo", "2"]);
    assert!(becomes(&fleet, &id, true).await);
    assert!(hits(&fleet, "echo", 1) > 1);

    // A microVM with a group of its own: nothing is about its flows, and the default denies.
    let own = run(&fleet, &["--security-group", "nothing"]);
    assert_eq!(echoed(&fleet, &own, 3, 1000).await, 0);
    let before = json(&fleet, &["vpc", "guard", VPC])["hits"].as_u64().unwrap();
    assert!(before > 0);
    json(&fleet, &["vpc", "guard", VPC, "--default-egress", "allow"]);
    assert!(becomes(&fleet, &own, true).await);
    let refused = warren(&fleet, &["vm", "run", "--vpc", VPC, "--security-group", "red"]);
    assert_eq!(refused.status.code(), Some(4), "{refused:?}");
    let refused = warren(&fleet, &["security-group", "delete", VPC, "nothing"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");

    // Ten at once, and a hundred a second.
    let slow = run(&fleet, &["--limit", "packets=100,flows=50"]);
    let row = listed(&fleet, &slow, 0).await;
    let limits = [&row["limits"]["packets"], &row["limits"]["flows"], &row["limits"]["ports"]];
    assert_eq!(limits, [&Value::from(100), &Value::from(50), &Value::Null]);
    let received = echoed(&fleet, &slow, 500, 200).await;
    assert!((1..500).contains(&received), "{received} came back");
    assert_eq!(listed(&fleet, &slow, 1).await["usage"]["ports"], 1);
    assert!(fleet.drops(Daemon::Host, "packet-limit").await.unwrap() > 0);
    fleet.kill_and_restart(Daemon::Host).await.unwrap();
    let received = echoed(&fleet, &slow, 500, 200).await;
    assert!((1..500).contains(&received), "{received} came back after a restart");
}
