//! What operators ask about flows, of a whole fleet: who talks to whom, and who had a port.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Output;

use serde_json::Value;
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, VPCS, kvm_or_skip};
use warren_netns::topology::{SERVER, SHARED};

const PORT: u16 = 7070;

fn warren(fleet: &Fleet, words: &[&str]) -> Output {
    fleet.cli().unwrap().args(words).output().unwrap()
}

fn json(fleet: &Fleet, words: &[&str]) -> Vec<Value> {
    let output = warren(fleet, &[words, &["--output", "json"]].concat());
    assert!(output.status.success(), "{words:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The lines of the host's log.
fn log(fleet: &Fleet) -> Vec<Value> {
    let text = std::fs::read_to_string(fleet.flow_log()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flow_is_listed_while_it_lives_and_its_port_is_known_afterwards() {
    if !kvm_or_skip("a_flow_is_listed_while_it_lives_and_its_port_is_known_afterwards") {
        return;
    }
    let options = FleetOptions { slots: 4, parked: 1, guest: GUEST };
    let mut fleet = Fleet::start(options).await.unwrap();
    // So that an instance's flows go with it.
    fleet.append_config(Daemon::Host, "[nat.timeouts]\nrest = 0\n").unwrap();
    fleet.kill_and_restart(Daemon::Host).await.unwrap();
    let listener = fleet.topology.vpcs[0].run(|| TcpListener::bind(("0.0.0.0", PORT))).unwrap();
    let peers = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        stream.write_all(b"hello").unwrap();
        // Until the guest closes it.
        stream.read_to_end(&mut Vec::new()).ok();
        peer
    });
    let ids: Vec<String> = [VPCS[0], VPCS[1]]
        .iter()
        .map(|vpc| json(&fleet, &["vm", "run", "--vpc", vpc])[0]["id"].as_str().unwrap().into())
        .collect();
    let to = format!("{SERVER}:{PORT}");
    let probed = warren(&fleet, &["vm", "probe", &ids[0], "tcp-connect", &to]);
    assert!(probed.status.success(), "{probed:?}");
    let seen = peers.join().unwrap();
    assert_eq!(seen.ip(), SHARED);
    let port = seen.port().to_string();

    let flows = json(&fleet, &["flows", "--vpc", VPCS[0], "--instance", &ids[0][..8]]);
    let [flow] = &flows[..] else { panic!("{flows:?}") };
    assert_eq!((&flow["instance"], &flow["vpc"]), (&ids[0].as_str().into(), &VPCS[0].into()));
    assert_eq!((&flow["nat_port"], &flow["peer_port"]), (&seen.port().into(), &PORT.into()));
    assert_eq!(flow["nat_address"], SHARED.to_string());
    assert_eq!(flow["peer_address"], SERVER.to_string());
    assert!(flow["packets_out"].as_u64() >= Some(3) && flow["bytes_in"].as_u64() > Some(80));
    assert_eq!(json(&fleet, &["flows", "--instance", &ids[1]]), Vec::<Value>::new());
    let nowhere = warren(&fleet, &["flows", "--vpc", "nowhere"]);
    assert_eq!(nowhere.status.code(), Some(4), "{nowhere:?}");

    let asked = ["nat-log", "--vpc", VPCS[0], "--port", &port];
    let live = json(&fleet, &asked);
    let [had] = &live[..] else { panic!("{live:?}") };
    assert_eq!((&had["instance"], &had["live"]), (&ids[0].as_str().into(), &true.into()));
    assert_eq!(json(&fleet, &["nat-log", "--vpc", VPCS[1], "--port", &port]), Vec::<Value>::new());

    let metrics = fleet.scrape(Daemon::Host).unwrap();
    let vni = flow["vni"].as_u64().unwrap();
    for line in [
        format!(r#"warren_ports_used{{vni="{vni}",protocol="tcp"}} 1"#),
        format!(r#"warren_ports{{vni="{vni}"}} 64"#),
        r#"warren_flow_log_events_total{outcome="lost"} 0"#.to_owned(),
        r#"warren_flows_ended_total{reason="detached"} 0"#.to_owned(),
    ] {
        assert!(metrics.lines().any(|other| other == line), "no `{line}` in\n{metrics}");
    }

    let carried = |direction| {
        let name = format!(r#"warren_vpc_bytes_total{{vni="{vni}",direction="{direction}"}} "#);
        let value = metrics.lines().find_map(|line| line.strip_prefix(&name));
        value.unwrap_or_else(|| panic!("no {name}")).parse::<u64>().unwrap()
    };
    // The Ethernet headers are not the flow's.
    for (direction, field) in [("out", "bytes_out"), ("in", "bytes_in")] {
        assert!(carried(direction) > flow[field].as_u64().unwrap(), "{metrics}");
    }

    // A daemon that is killed forgets nothing of it.
    fleet.kill_and_restart(Daemon::Host).await.unwrap();
    assert!(warren(&fleet, &["vm", "stop", &ids[0]]).status.success());
    let over = || {
        let found = json(&fleet, &[&asked[..], &["--since", "10m"]].concat());
        let [had] = &found[..] else { panic!("{found:?}") };
        // It is gone from the table a moment before its end is in the log.
        (had["live"] == false && !had["reason"].is_null()).then(|| had.clone())
    };
    let mut had = None;
    for _ in 0..100 {
        had = over();
        if had.is_some() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let had = had.expect("the flow ends with its instance");
    assert_eq!((&had["instance"], &had["reason"]), (&ids[0].as_str().into(), &"detached".into()));
    let (start, end) = (had["start"].as_str().unwrap(), had["end"].as_str().unwrap());
    let at = |time: &str| json(&fleet, &[&asked[..], &["--at", time]].concat());
    assert_eq!(at(start), std::slice::from_ref(&had));
    assert_eq!(at(end), std::slice::from_ref(&had));
    assert_eq!(at("1h"), Vec::<Value>::new(), "before it began");
    assert_eq!(json(&fleet, &asked), Vec::<Value>::new(), "nobody has it now");

    let log = log(&fleet);
    let of_flow = |event: &str| {
        let is_it = |line: &&Value| line["event"] == event && line["nat_srcport"] == seen.port();
        let lines: Vec<_> = log.iter().filter(is_it).collect();
        let [only] = lines[..] else { panic!("{log:?}") };
        only.clone()
    };
    let (start, end) = (of_flow("flow-start"), of_flow("flow-end"));
    assert_eq!((&start["instance"], &end["instance"]), (&had["instance"], &had["instance"]));
    assert!(end["packets_out"].as_u64() >= flow["packets_out"].as_u64(), "{end}");
    assert_eq!(end["host"], "host");
}
