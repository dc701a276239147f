//! The `warren` binary against a control plane with agents that only remember what they are told.

#[path = "../../control/tests/fake/mod.rs"]
mod fake;

use std::os::unix::fs::PermissionsExt;
use std::process::{Output, Stdio};

use fake::{Told, World};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pcap_file::pcapng::blocks::interface_statistics::InterfaceStatisticsOption;
use pcap_file::pcapng::{Block, PcapNgReader};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};
use warren_abi::probe::{Outcome, Reply, Request, Timings, decode, encode};

/// Runs a command line.
async fn warren(world: &World, line: &str) -> Output {
    tokio::process::Command::new(env!("CARGO_BIN_EXE_warren"))
        .args(line.split_whitespace())
        .env("WARREN_ENDPOINT", world.endpoint().to_string())
        .output()
        .await
        .unwrap()
}

/// Standard output of a command that must succeed.
async fn done(world: &World, line: &str) -> String {
    let output = warren(world, line).await;
    assert!(output.status.success(), "{line}: {output:?}");
    assert!(output.stderr.is_empty(), "{line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

async fn json(world: &World, line: &str) -> Value {
    serde_json::from_str(&done(world, &format!("{line} --output json")).await).unwrap()
}

/// Exit code and standard error of a command that must fail.
async fn failed(world: &World, line: &str) -> (i32, String) {
    let output = warren(world, line).await;
    assert!(!output.status.success(), "{line}: {output:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

const CREATE: &str =
    "vpc create blue --cidr 10.1.0.0/16 --shared-address 10.1.0.9 --interface eth1";

#[tokio::test]
async fn from_an_empty_fleet_to_microvms_and_back() {
    let world = World::new().await;
    assert_eq!(json(&world, "vpc ls").await, serde_json::json!([]));
    let vpc = json(&world, CREATE).await;
    assert_eq!(vpc["vni"], 4096);
    assert_eq!(json(&world, CREATE).await, vpc, "the same again is no error");

    let output = warren(&world, "vm run --vpc blue").await;
    assert!(output.stdout.is_empty(), "no header without a microVM: {output:?}");
    let (code, error) = failed(&world, "vm run --vpc blue").await;
    assert_eq!(
        (code, error.as_str()),
        (3, "error: no host is alive: start warrend in its host role on one\n")
    );
    let _h1 = world.host("h1", 1).await;
    let _p1 = world.proxy("p1", 9).await;
    let hosts = done(&world, "host ls").await;
    assert!(
        hosts.starts_with("NAME") && hosts.contains("\nh1") && hosts.contains("\np1"),
        "{hosts}"
    );

    let started = json(&world, "vm run --vpc blue --count 3").await;
    let ids: Vec<_> =
        started.as_array().unwrap().iter().map(|vm| vm["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 3);
    assert_eq!(started[0]["timings"]["ready_ns"], 1_500_000);
    let table = done(&world, "vm run --vpc blue --hostname web --host h1").await;
    assert!(table.contains("web") && table.contains("1500.0 µs"), "{table}");
    let listed = json(&world, "vm ls").await;
    assert_eq!(listed.as_array().unwrap().len(), 4);

    // Two run, the third is one too many for 4 slots: those that started are told.
    let stopped = json(&world, &format!("vm stop {} {}", &ids[0][..13], ids[1])).await;
    assert_eq!(stopped.as_array().unwrap().len(), 2);
    let output = warren(&world, "vm run --vpc blue --count 3 --output json").await;
    assert_eq!(output.status.code(), Some(5));
    let started: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(started.as_array().unwrap().len(), 2);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.starts_with("error: 1 of 3 failed, the first because no host has a free"),
        "{error}"
    );
}

#[tokio::test]
async fn a_vpc_with_ipv6_reaches_the_agents() {
    let world = World::new().await;
    let (_h1, _p1) = (world.host("h1", 1).await, world.proxy("p1", 9).await);
    let line = format!(
        "{CREATE} --cidr-v6 2001:db8:1::/64 --shared-address-v6 2001:DB8:1::9 --gateway-v6 fe80::1"
    );
    let vpc = json(&world, &line).await;
    assert_eq!(json(&world, "vpc ls").await, serde_json::json!([vpc]));
    assert_eq!(
        [&vpc["cidr_v6"], &vpc["shared_address_v6"], &vpc["gateway_v6"]],
        ["2001:db8:1::/64", "2001:db8:1::9", "fe80::1"]
    );
    let routes = done(&world, "route list blue").await;
    assert!(routes.contains("::/0             via    fe80::1   vpc"), "{routes}");
    done(&world, "vm run --vpc blue").await;
    for name in ["h1", "p1"] {
        let applied = world.log.applied(name).pop().unwrap();
        assert_eq!(applied.shared_address_v6, "2001:db8:1::9", "{name}");
    }

    let other = "vpc create x --cidr 10.1.0.0/16 --shared-address 10.1.0.8 --interface eth1";
    for (line, code, part) in [
        (CREATE.to_owned(), 1, "exists with another definition"),
        (format!("{other} --cidr-v6 fd00::/64"), 2, "--shared-address-v6"),
        (format!("{other} --cidr-v6 fd00::/64 --shared-address-v6 fd01::9"), 2, "not inside"),
        (
            format!("{other} --cidr-v6 2001:db8:1::/64 --shared-address-v6 2001:db8:1::9"),
            1,
            "2001:db8:1::9 on eth1 is the shared address of VPC \"blue\"",
        ),
        ("route add blue 2001:db8:9::/48 --via 2001:db8:1::9".into(), 2, "shared address"),
        ("route add blue 2001:db8:9::/48 --via 2001:db8:2::1".into(), 2, "not on-link"),
    ] {
        let (got, error) = failed(&world, &line).await;
        assert_eq!(got, code, "{line}: {error}");
        assert!(error.contains(part), "{line}: {error}");
    }
}

#[tokio::test]
async fn errors_are_sentences_with_codes() {
    let world = World::new().await;
    done(&world, CREATE).await;
    let other = CREATE.replace("10.1.0.0/16", "10.1.0.0/17");
    let cases = [
        (other.as_str(), 1, "VPC \"blue\" exists with another definition"),
        (
            "vpc create x --cidr 10.1.0.1/16 --shared-address 10.1.0.8 --interface e",
            2,
            "write 10.1.0.0/16",
        ),
        ("vm run --vpc red", 4, "there is no VPC \"red\""),
        ("vm stop 3a", 4, "hint: `warren vm ls` lists them"),
        ("vm run --vpc blue --name web --count 2", 2, "--hostname names one microVM"),
        ("vm probe 3a tcp-connect nowhere", 2, "invalid value 'nowhere'"),
        (
            "--endpoint unix:/nowhere/control.sock vm ls",
            3,
            "nothing listens at unix:/nowhere/control.sock",
        ),
        ("--endpoint unix:/nowhere/control.sock vm ls", 3, "hint: start warren-control"),
    ];
    for (line, code, part) in cases {
        let (got, error) = failed(&world, line).await;
        assert_eq!(got, code, "{line}: {error}");
        assert!(error.contains(part), "{line}: {error}");
    }
}

#[tokio::test]
async fn drops_are_listed_with_names_and_silent_hosts_hide_no_other() {
    let world = World::new().await;
    let (h1, p1) = (world.host("h1", 1).await, world.proxy("p1", 9).await);
    assert_eq!(json(&world, "drops").await, serde_json::json!([]));
    let vni = json(&world, CREATE).await["vni"].as_u64().unwrap() as u32;
    let started = json(&world, "vm run --vpc blue").await;
    h1.behaviour.drop_packets(1, "spoofed-mac", 3);
    h1.behaviour.drop_packets(0, "not-from-proxy", 2);
    p1.behaviour.drop_packets(vni, "no-route", 1);

    let drops = json(&world, "drops").await;
    assert_eq!(drops.as_array().unwrap().len(), 3, "{drops}");
    let spoofed = serde_json::json!({
        "host": "h1", "slot": 1, "vni": null, "instance": started[0]["id"], "vpc": "blue",
        "reason": "spoofed-mac", "packets": 3,
    });
    assert_eq!(drops[0], spoofed);
    assert_eq!(drops[2]["vni"], vni);
    let table = done(&world, "drops --host p1").await;
    assert!(table.contains("VNI 4096") && table.contains("no-route"), "{table}");
    assert!(!table.contains("h1"), "{table}");
    let (code, error) = failed(&world, "drops --host h9").await;
    assert_eq!((code, error.contains("no host or proxy \"h9\"")), (4, true), "{error}");

    h1.behaviour.open.send_replace(false);
    let output = warren(&world, "drops --output json").await;
    assert_eq!(output.status.code(), Some(3));
    let drops: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((drops.as_array().unwrap().len(), &drops[0]["host"]), (1, &"p1".into()));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.starts_with("error: 1 of 2 failed"), "{error}");
    assert!(error.contains("the drops of h1 are not known: its agent did not answer"), "{error}");
}

/// `warren drops --follow`, when it has read the counters once.
async fn follow_drops(world: &World) -> (Child, Lines<BufReader<ChildStdout>>) {
    let mut followed = tokio::process::Command::new(env!("CARGO_BIN_EXE_warren"))
        .args(["drops", "--follow", "--output", "json"])
        .env("WARREN_ENDPOINT", world.endpoint().to_string())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let lines = BufReader::new(followed.stdout.take().unwrap()).lines();
    fake::eventually("the counters were read once", || async {
        world.log.position(|_, told| *told == Told::ListDrops).is_some()
    })
    .await;
    (followed, lines)
}

#[tokio::test]
async fn drops_are_followed_until_interrupted() {
    let world = World::new().await;
    let h1 = world.host("h1", 1).await;
    h1.behaviour.drop_packets(2, "no-flow", 40);
    let (mut followed, mut lines) = follow_drops(&world).await;

    h1.behaviour.drop_packets(2, "no-flow", 2);
    let line = lines.next_line().await.unwrap().expect("a line for the increase");
    let increase: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&increase["slot"], &increase["packets"]), (&2.into(), &2.into()), "{increase}");

    let pid = Pid::from_raw(followed.id().unwrap() as i32);
    kill(pid, Signal::SIGINT).unwrap();
    assert!(followed.wait().await.unwrap().success());
    assert_eq!(lines.next_line().await.unwrap(), None, "nothing rose after that");
}

#[tokio::test]
async fn following_ends_when_nobody_reads_it() {
    let world = World::new().await;
    let h1 = world.host("h1", 1).await;
    let (mut followed, lines) = follow_drops(&world).await;
    drop(lines);
    h1.behaviour.drop_packets(2, "no-flow", 1);
    assert!(followed.wait().await.unwrap().success(), "as of `warren drops --follow | head`");
}

#[tokio::test]
async fn probes_report_outcomes_and_failures() {
    let world = World::new().await;
    let (h1, _p1) = (world.host("h1", 1).await, world.proxy("p1", 9).await);
    done(&world, CREATE).await;
    let started = json(&world, "vm run --vpc blue").await;
    let id = started[0]["id"].as_str().unwrap();
    let answer = |outcome| {
        let timings =
            Timings { start_ns: 1000, connected_ns: 3500, first_byte_ns: 0, end_ns: 9000 };
        *h1.behaviour.reply.lock().unwrap() = Some(encode(&Reply { outcome, timings }));
    };

    answer(Ok(Outcome::Done));
    let line = format!("vm probe {} tcp-connect 10.1.0.20:6379 --timeout-ms 70", &id[..8]);
    let text = done(&world, &line).await;
    assert!(text.starts_with("done\n") && text.contains("connected after 2.5 µs"), "{text}");
    let asked = world.log.all().pop().unwrap().1;
    let Told::Invoke(invoke) = asked else { panic!("{asked:?}") };
    assert_eq!(invoke.id, id);
    assert_eq!(decode::<Request>(&invoke.invocation).unwrap().timeout_ms, 70);

    answer(Err("connection refused".into()));
    let output = warren(&world, &format!("{line} --output json")).await;
    assert_eq!(output.status.code(), Some(6));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["error"], "connection refused");
    assert_eq!(output.stderr, b"error: the probe failed: connection refused\n");

    *h1.behaviour.reply.lock().unwrap() = Some(vec![255; 3]);
    let (code, error) = failed(&world, &line).await;
    assert_eq!(code, 1);
    assert!(error.contains("not a probe's"), "{error}");
}

#[tokio::test]
async fn routes_are_added_listed_replaced_and_deleted() {
    let world = World::new().await;
    done(&world, &format!("{CREATE} --gateway 10.1.0.1")).await;
    let added = json(&world, "route add blue 10.9.0.0/16 --via 10.1.0.2").await;
    assert_eq!(
        added,
        serde_json::json!({
            "prefix": "10.9.0.0/16", "kind": "via", "via": "10.1.0.2", "origin": "table",
        })
    );
    done(&world, "route add blue 10.9.0.0/16 --via 10.1.0.2").await;
    done(&world, "route add blue 0.0.0.0/0 --blackhole").await;
    assert_eq!(
        done(&world, "route list blue").await,
        "PREFIX       KIND       NEXT HOP  ORIGIN\n\
         10.1.0.0/16  local      -         vpc\n\
         0.0.0.0/0    blackhole  -         table\n\
         10.9.0.0/16  via        10.1.0.2  table\n"
    );
    done(&world, "route delete blue 0.0.0.0/0 10.9.0.0/16").await;
    let listed = json(&world, "route list blue").await;
    assert_eq!(listed[1]["via"], "10.1.0.1", "the gateway is in force again: {listed}");

    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("routes");
    let line = format!("route replace blue --file {}", file.display());
    std::fs::write(&file, "fd00::/8 local # all of it\n\n2001:db8::/32 via fd00::1\n").unwrap();
    assert_eq!(json(&world, &line).await.as_array().unwrap().len(), 4);
    std::fs::write(&file, "10.9.0.0/16 local\n10.9.0.0/16 over there\n").unwrap();
    let (code, error) = failed(&world, &line).await;
    assert_eq!((code, error.contains("line 2: \"10.9.0.0/16 over there\"")), (2, true), "{error}");

    for (line, code, part) in [
        ("route add blue fd00::/8 --blackhole", 1, "has the route fd00::/8 local already"),
        ("route add blue 10.9.0.1/16 --local", 2, "write 10.9.0.0/16"),
        ("route add blue 10.9.0.0/16 --via 10.8.0.1", 2, "10.8.0.1 of 10.9.0.0/16 is not on-link"),
        ("route delete blue fd00::/8", 2, "fd00::1 of 2001:db8::/32 is not on-link"),
        ("route delete blue 10.1.0.0/16", 4, "can be overruled, not deleted"),
        ("route list red", 4, "there is no VPC \"red\""),
        ("route replace blue --file /nowhere/routes", 2, "cannot read /nowhere/routes"),
    ] {
        let (got, error) = failed(&world, line).await;
        assert_eq!(got, code, "{line}: {error}");
        assert!(error.contains(part), "{line}: {error}");
    }
}

#[tokio::test]
async fn a_capture_is_a_file_of_its_owners_with_what_was_lost() {
    let world = World::new().await;
    done(&world, CREATE).await;
    let _h1 = world.host("h1", 1).await;
    let _p1 = world.proxy("p1", 9).await;
    let started = json(&world, "vm run --vpc blue").await;
    let id = started[0]["id"].as_str().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.pcapng");
    let line = format!("capture {} -o json -w {}", &id[..13], path.display());

    let output = warren(&world, &format!("{line} --filter tcp")).await;
    assert!(output.status.success(), "{output:?}");
    let row: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&row["instance"], &row["ended"]), (&id.into(), &"instance".into()));
    assert_eq!((&row["inside"], &row["outside"]), (&1.into(), &1.into()), "{row}");
    assert_eq!((&row["inside_lost"], &row["outside_lost"]), (&0.into(), &3.into()), "{row}");
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);

    let file = std::fs::read(&path).unwrap();
    let mut reader = PcapNgReader::new(&file[..]).unwrap();
    let (mut packets, mut lost) = (vec![], vec![]);
    while let Some(block) = reader.next_block() {
        match block.unwrap().0 {
            Block::EnhancedPacket(packet) => {
                let ns = packet.timestamp.as_nanos();
                assert_eq!((&*packet.data, packet.original_len), (&b"tcp"[..], 100));
                packets.push((packet.interface_id, ns));
            }
            Block::InterfaceStatistics(statistics) => {
                lost.extend(statistics.options.into_iter().filter_map(|option| match option {
                    InterfaceStatisticsOption::IsbOsDrop(lost) => Some(lost),
                    _ => None,
                }));
            }
            _ => {}
        }
    }
    assert_eq!((packets, lost), (vec![(0, 5), (1, 6)], vec![0, 3]));

    let (code, error) = failed(&world, &format!("{line} --filter wrong")).await;
    assert_eq!((code, error.as_str()), (2, "error: host h1: filter: syntax error\n"));
    assert_eq!(std::fs::read(&path).unwrap(), file, "a wrong filter leaves the file alone");
    let nowhere = format!("capture {id} -w {}", directory.path().join("no/x").display());
    let (code, error) = failed(&world, &nowhere).await;
    assert!(code == 1 && error.contains("no/x: No such file"), "{error}");
    let (code, _) = failed(&world, "capture nobody -w -").await;
    assert_eq!(code, 4);
}
