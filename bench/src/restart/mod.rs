//! `restart`: what a kill or an upgrade of the daemons costs the traffic.
//!
//! A guest sends numbered datagrams to a server that sends them back, at half the rate at which
//! none is lost beside a TCP transfer and a database's clients, which go on meanwhile. In one round
//! daemons are killed and upgraded, in the next they are left alone, in turn.

mod standin;

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::loaded_programs;
use indicatif::ProgressIterator;
use warren_bench::figures::Figures;
use warren_dataplane::datapath::{HostDatapath, HostOptions};
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, TEMPLATE, VPCS, built};
use warren_netns::guest::KernelGuest;
use warren_netns::netns::Namespace;
use warren_netns::postgres;
use warren_netns::process::Process;
use warren_netns::topology::SERVER;

use crate::options;
use crate::sequence::{Echo, Outcome, stream};
use standin::StandIn;

/// Pairs of rounds.
const ROUNDS: u32 = 12;
/// Kills in a round, of the daemons in turn; each is upgraded at its end as well.
const KILLS: u32 = 10;
const SLOTS: u32 = 8;
const ECHO: u16 = 7;
/// Bits a second of the TCP transfer: a part of what goes, so that not its queues lose datagrams.
const TCP_RATE: &str = "100M";
/// Datagrams a second that are more than anything here can take.
const MOST: f64 = 200_000.0;
/// Rates that are tried, each half way between one that came through and one that did not, and for
/// how long.
const CALIBRATIONS: u32 = 7;
const CALIBRATION: Duration = Duration::from_secs(2);

/// Objects that differ, and do the same.
const OBJECTS: [&str; 2] = ["warren-ebpf.o", "warren-ebpf-other.o"];

pub async fn run() -> Result<Figures> {
    let options = FleetOptions { slots: SLOTS, parked: 0, guest: GUEST };
    let mut fleet = Fleet::start(options).await?;
    let (guest, _stand_in) = plug(&mut fleet).await?;
    let vpc = fleet.topology.vpcs[0].clone();
    let dir = fleet.run.path().to_owned();
    let _echo = Echo::start(&vpc, ECHO)?;
    let _database = postgres::start(&vpc, &dir)?;
    let bed = Bed { guest: guest.namespace.clone(), vpc, dir };

    let load = Load::start(&bed)?;
    let capacity = calibrate(&bed.guest)?;
    ensure!(capacity > 0.0, "no datagram comes back");
    load.finish()?;
    let mut rounds = Rounds { rate: capacity / 2.0, ..Rounds::default() };
    for round in (0..ROUNDS).progress() {
        rounds.with_restarts(&mut fleet, &bed, round).await?;
        rounds.without_restarts(&bed)?;
    }
    drop(guest);
    let mut figures = Figures::new("restart");
    rounds.figures(capacity, &mut figures);
    Ok(figures)
}

/// Between whom traffic goes, and where its programs write.
struct Bed {
    guest: Namespace,
    vpc: Namespace,
    dir: PathBuf,
}

/// A guest with a kernel's network stack in the place of an instance in the first tenant's VPC.
async fn plug(fleet: &mut Fleet) -> Result<(KernelGuest, StandIn)> {
    let (started, _) = fleet.run(VPCS[0], None).await?;
    let slot = started.instance.context("an instance without description")?.slot;
    // The data path is this process's while the daemon is away.
    fleet.process(Daemon::Host).kill()?;
    let stand_in = StandIn::replace(&fleet.sockets(TEMPLATE), slot).await?;
    let options = HostOptions {
        bpffs: fleet.run.bpf().join(Daemon::Host.name()),
        ..options::host(&fleet.run, SLOTS)?
    };
    let guest = fleet.topology.host.run(|| -> Result<KernelGuest> {
        let datapath = HostDatapath::open(&options)?;
        let tap = File::from(datapath.open_tap(slot)?);
        let slot = &datapath.slots()[slot as usize - 1];
        KernelGuest::plug(tap, slot.address, slot.mac, datapath.mtu())
    })?;
    fleet.kill_and_restart(Daemon::Host).await?;
    Ok((guest, stand_in))
}

/// The tag of the program at a daemon's tunnel: a hash of its instructions.
fn program_at_tunnel(fleet: &Fleet, daemon: Daemon) -> Result<u64> {
    let pin = fleet.run.bpf().join(daemon.name()).join("links/tunnel");
    let id = FdLink::from(PinnedLink::from_pin(pin)?).info()?.program_id();
    let mut programs = loaded_programs().flatten();
    Ok(programs.find(|program| program.id() == id).context("no such program")?.tag())
}

/// The most datagrams a second that all come back, beside the load.
fn calibrate(guest: &Namespace) -> Result<f64> {
    let (mut least, mut most) = (0.0, MOST);
    for _ in (0..CALIBRATIONS).progress() {
        let rate = f64::midpoint(least, most);
        let start = Instant::now();
        let wanted = || start.elapsed() < CALIBRATION;
        let outcome = stream(guest, SocketAddrV4::new(SERVER, ECHO), rate, wanted)?;
        // The sender itself may be too slow.
        let is_enough = outcome.sent as f64 >= 0.95 * rate * CALIBRATION.as_secs_f64();
        if outcome.lost() == 0 && is_enough { least = rate } else { most = rate }
    }
    Ok(least)
}

fn iperf_server(vpc: &Namespace, dir: &Path) -> Result<Process> {
    let mut command = vpc.command("iperf3");
    command.arg("--server");
    let mut process = Process::start("iperf3", command, &dir.join("iperf3.log"))?;
    process.wait_until(Duration::from_secs(10), || {
        vpc.run(|| TcpStream::connect((Ipv4Addr::LOCALHOST, 5201)).is_ok())
    })?;
    Ok(process)
}

/// A TCP transfer and a database's clients, until they are stopped.
struct Load {
    transfer: Process,
    clients: Process,
    /// Of the transfer: a server takes no other client until it noticed that the last one is gone.
    _server: Process,
}

impl Load {
    fn start(Bed { guest, vpc, dir }: &Bed) -> Result<Self> {
        let server = iperf_server(vpc, dir)?;
        let start = |name: &str, command| {
            let log = dir.join(name);
            // What the last one said is not this one's.
            std::fs::remove_file(&log).ok();
            Process::start(name, command, &log)
        };
        let mut transfer = guest.command("iperf3");
        transfer.args(["--client", &SERVER.to_string(), "-t", "3600", "-b", TCP_RATE]);
        let mut clients = postgres::pgbench(guest, SERVER)?;
        clients.args(["--no-vacuum", "--client", "2", "-T", "3600", "-P", "1", "postgres"]);
        Ok(Self {
            transfer: start("transfer", transfer)?,
            clients: start("pgbench", clients)?,
            _server: server,
        })
    }

    /// The transactions a second, in each second. Both must still be at it.
    fn finish(mut self) -> Result<Vec<f64>> {
        for process in [&mut self.transfer, &mut self.clients] {
            ensure!(!process.has_ended()?, "a connection broke: {}", process.log());
        }
        let report = self.clients.log();
        ensure!(!report.contains("aborted"), "a client of the database broke off:\n{report}");
        let tps = report.lines().filter_map(|line| {
            let (_, rest) = line.strip_prefix("progress: ")?.split_once(", ")?;
            rest.split_once(" tps")?.0.parse().ok()
        });
        Ok(tps.collect())
    }
}

/// What was counted.
#[derive(Default)]
struct Rounds {
    /// Datagrams a second.
    rate: f64,
    kills: u64,
    upgrades: u64,
    with: Traffic,
    without: Traffic,
    /// How long a daemon was away, in milliseconds: from the signal until it serves again.
    away_ms: Vec<f64>,
    /// How long the last round with restarts took: those without take as long.
    took: Duration,
}

#[derive(Default)]
struct Traffic {
    sent: u64,
    lost: u64,
    tps: Vec<f64>,
}

impl Traffic {
    fn add(&mut self, outcome: Outcome, tps: Vec<f64>) {
        self.sent += outcome.sent;
        self.lost += outcome.lost();
        self.tps.extend(tps);
    }
}

impl Rounds {
    async fn with_restarts(&mut self, fleet: &mut Fleet, bed: &Bed, round: u32) -> Result<()> {
        let load = Load::start(bed)?;
        let (start, wanted) = (Instant::now(), Arc::new(AtomicBool::new(true)));
        let streaming = self.stream(&bed.guest, wanted.clone());
        // Whatever happens in here, the stream must end.
        let result = self.restart(fleet, round).await;
        wanted.store(false, Ordering::SeqCst);
        let outcome = streaming.join().expect("it does not panic")?;
        result?;
        self.took = start.elapsed();
        self.with.add(outcome, load.finish()?);
        Ok(())
    }

    async fn restart(&mut self, fleet: &mut Fleet, round: u32) -> Result<()> {
        for n in 0..KILLS {
            let daemon = [Daemon::Host, Daemon::Proxy][n as usize % 2];
            let clock = Instant::now();
            fleet.kill_and_restart(daemon).await?;
            self.away_ms.push(clock.elapsed().as_secs_f64() * 1e3);
            self.kills += 1;
        }
        let object = built(OBJECTS[(round as usize + 1) % OBJECTS.len()])?;
        for daemon in [Daemon::Host, Daemon::Proxy] {
            let before = program_at_tunnel(fleet, daemon)?;
            fleet.upgrade(daemon, &object).await?;
            let after = program_at_tunnel(fleet, daemon)?;
            ensure!(after != before, "the program is the same as before");
            self.upgrades += 1;
        }
        Ok(())
    }

    fn without_restarts(&mut self, bed: &Bed) -> Result<()> {
        let load = Load::start(bed)?;
        let wanted = Arc::new(AtomicBool::new(true));
        let streaming = self.stream(&bed.guest, wanted.clone());
        std::thread::sleep(self.took);
        wanted.store(false, Ordering::SeqCst);
        let outcome = streaming.join().expect("it does not panic")?;
        self.without.add(outcome, load.finish()?);
        Ok(())
    }

    fn stream(&self, guest: &Namespace, wanted: Arc<AtomicBool>) -> JoinHandle<Result<Outcome>> {
        let (guest, rate) = (guest.clone(), self.rate);
        std::thread::spawn(move || {
            stream(&guest, SocketAddrV4::new(SERVER, ECHO), rate, || wanted.load(Ordering::SeqCst))
        })
    }

    fn figures(self, capacity: f64, figures: &mut Figures) {
        figures.count("kills", self.kills);
        figures.count("upgrades", self.upgrades);
        figures.count("capacity_pps", capacity as u64);
        figures.count("rate_pps", self.rate as u64);
        figures.count("sent", self.with.sent);
        figures.count("lost", self.with.lost);
        figures.count("sent_without_kills", self.without.sent);
        figures.count("lost_without_kills", self.without.lost);
        figures.distribution("restart_ms", self.away_ms);
        figures.distribution("pgbench_tps", self.with.tps);
        figures.distribution("pgbench_tps_without_kills", self.without.tps);
    }
}
