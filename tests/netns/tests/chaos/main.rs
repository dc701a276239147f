//! Proxies and hosts' daemons that fail at random, under the traffic of two tenants on two hosts: two
//! hosts, three proxies, two VPCs with the same addresses, two shared ones each.
//!
//! The schedule is that of a seed, which is printed: `WARREN_CHAOS_SEED` gives one, and
//! `WARREN_CHAOS_SECONDS` how long it goes on (`cargo xtask chaos`).

mod schedule;
mod talk;

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use warren_netns::cluster::{Cluster, MORE_VNIS, VNIS};
use warren_netns::guest::KernelGuest;
use warren_netns::postgres;
use warren_netns::process::Process;
use warren_netns::servers;
use warren_netns::topology::SERVER;

use crate::schedule::{Schedule, prepare};
use crate::talk::{Talk, Tenant};

const SECONDS: u64 = 120;
/// For so long, packets are doubled and overtaken.
const DISTURBED: Duration = Duration::from_secs(10);
/// For so long after everything was mended, what was lost comes again.
const AFTER: Duration = Duration::from_secs(3);
/// Bits a second of the transfer, and transactions a second.
const TCP_RATE: &str = "20M";
const TRANSACTIONS: &str = "100";
/// What no packet of these tenants may be dropped for, whatever fails.
const NEVER: [&str; 7] = [
    "internal",
    "no-block-holder",
    "not-block-holder",
    "not-from-proxy",
    "spoofed-address",
    "unknown-vpc",
    "ports-exhausted",
];

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}=\"{text}\" is no number")))
}

/// A guest of each VPC with each of its addresses, on each host.
fn plug(cluster: &Cluster) -> (Vec<Tenant>, Vec<KernelGuest>) {
    let vnis = [VNIS, MORE_VNIS];
    let all = (0..2).flat_map(|address| (0..2).map(move |host| (address, host)));
    let all = all.flat_map(|(address, host)| (0..2).map(move |vpc| Tenant { host, vpc, address }));
    let tenants: Vec<_> = all.collect();
    let plug = |it: &Tenant| {
        let slot = 1 + it.vpc + 2 * it.address;
        cluster.guest(it.host, slot as u32, vnis[it.address][it.vpc]).expect("it is plugged")
    };
    let guests = tenants.iter().map(plug).collect();
    (tenants, guests)
}

#[test]
fn what_is_doubled_or_overtaken_is_not_lost() {
    let cluster = Cluster::new(2, 3).expect("it starts");
    let _detours = prepare(&cluster).expect("it can be prepared");
    let (tenants, guests) = plug(&cluster);
    let vpcs = cluster.grid.vpcs.clone();
    let _servers: Vec<_> =
        vpcs.iter().zip(0..).map(|(vpc, index)| talk::serve(vpc, index)).collect();
    let machines = || cluster.grid.hosts.iter().chain(&cluster.grid.proxies);
    for cable in machines().flat_map(|machine| &machine.cables) {
        cluster.grid.disturb(cable).expect("it can be disturbed");
    }
    let talks = talk::start(&tenants, &guests);
    std::thread::sleep(DISTURBED);
    let told: Vec<_> = talks.into_iter().map(Talk::finish).collect();
    for (tenant, told) in tenants.iter().zip(&told) {
        assert_eq!(told.lost, 0, "{tenant:?}: {told}");
        assert!(told.lines > 0 && told.connections > 0, "{tenant:?}: {told}");
    }
    assert!(told.iter().any(|told| told.twice > 0), "nothing was doubled");
    assert!(told.iter().any(|told| told.overtaken > 0), "nothing was overtaken");
}

#[test]
fn nothing_that_fails_breaks_a_connection_or_mixes_up_tenants() {
    let seed = number("WARREN_CHAOS_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    let seconds = number("WARREN_CHAOS_SECONDS").unwrap_or(SECONDS);
    // Also seen when the test passes.
    talk::say(&format!("chaos: seed {seed}, {seconds} s"));
    let mut cluster = Cluster::new(2, 3).expect("it starts");
    let _detours = prepare(&cluster).expect("it can be prepared");
    let dir = cluster.run().path().to_owned();
    let (tenants, guests) = plug(&cluster);
    let vpcs = cluster.grid.vpcs.clone();
    let _servers: Vec<_> =
        vpcs.iter().zip(0..).map(|(vpc, index)| talk::serve(vpc, index)).collect();
    let talks = talk::start(&tenants, &guests);

    let _database = postgres::start(&vpcs[0], &dir).expect("it starts");
    let _cache = servers::redis(&vpcs[1], &dir).expect("it starts");
    let _receiver = servers::iperf3(&vpcs[1], &dir).expect("it starts");
    let mut clients = postgres::pgbench(&guests[0].namespace, SERVER).expect("it is there");
    clients.args([
        "--no-vacuum",
        "--client",
        "2",
        "-T",
        "86400",
        "--rate",
        TRANSACTIONS,
        "postgres",
    ]);
    let mut transfer = guests[1].namespace.command("iperf3");
    transfer.args(["--client", &SERVER.to_string(), "-t", "86400", "-b", TCP_RATE]);
    let cached = talk::count_up(&guests[3].namespace);
    let mut processes = [("pgbench", clients), ("transfer", transfer)].map(|(name, command)| {
        Process::start(name, command, &dir.join(format!("{name}.log"))).expect("it starts")
    });

    let schedule = Schedule::new(StdRng::seed_from_u64(seed), Duration::from_secs(seconds));
    let events = schedule.run(&mut cluster);
    std::thread::sleep(AFTER);

    for process in &mut processes {
        assert!(!process.has_ended().expect("it can be asked"), "{}", process.log());
        let log = process.log();
        assert!(!log.contains("error") && !log.contains("aborted"), "{log}");
    }
    let counted = cached.finish();
    let told: Vec<_> = talks.into_iter().map(Talk::finish).collect();
    let lost: u64 = told.iter().map(|told| told.lost).sum();
    let mut counted_lost = cluster.grid.lost().expect("it is counted");
    let mut lines =
        vec![format!("chaos: seed {seed}: {events}"), format!("cache: {counted} requests")];
    for (tenant, told) in tenants.iter().zip(told) {
        lines.push(format!("{tenant:?}: {told}"));
        assert!(told.came_back_last, "{tenant:?} is cut off: {told}");
    }
    for host in 0..2 {
        for drop in cluster.host(host).drops().expect("they can be read") {
            let reason = drop.reason.name();
            lines.push(format!("host {host}: {reason} {}", drop.packets));
            counted_lost += drop.packets;
            assert!(!NEVER.contains(&reason), "host {host} dropped {} for {reason}", drop.packets);
        }
    }
    for proxy in 0..3 {
        for drop in cluster.drops_at(proxy).expect("they can be read") {
            let reason = drop.reason.as_str();
            lines.push(format!("proxy {proxy}: {reason} {}", drop.packets));
            counted_lost += drop.packets;
            assert!(
                !NEVER.contains(&reason),
                "proxy {proxy} dropped {} for {reason}",
                drop.packets
            );
        }
    }
    lines.push(format!("{lost} datagrams lost, {counted_lost} packets counted as lost"));
    talk::say(&lines.join("\n"));
    assert!(lost <= counted_lost, "something is lost and not counted");
}
