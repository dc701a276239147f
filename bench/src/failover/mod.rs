//! `failover`: what tenants see of it when a proxy node dies, is drained or joins; beside it, a pair
//! of gateways as people build them from the kernel's VXLAN, nftables and keepalived.
//!
//! A node dies by its cables: all of them at once, in the underlay and in the VPCs. Its programs and
//! its daemon go on, and do not know.

mod load;
mod pair;
mod pulse;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use indicatif::ProgressIterator;
use warren_bench::figures::Figures;
use warren_netns::cluster::{Cluster, VNIS};
use warren_netns::netns::Namespace;

use self::load::{Idle, Load, Losses};
use self::pair::Pair;
use self::pulse::Pulse;

/// Deaths of Warren's proxies.
pub const ROUNDS: u32 = 50;
/// To one of the pair's gateways.
const PER_PEER: u32 = 5;
/// To one drain, and to one proxy that joins.
const PER_MOVE: u32 = 2;
/// Proxies.
const PROXIES: u8 = 3;
/// From a death until the cables are mended, and from then until the next.
const DEAD: Duration = Duration::from_millis(1200);
const QUIET: Duration = Duration::from_millis(800);
/// How long a move that loses nothing is watched.
const WATCHED: Duration = Duration::from_millis(400);
/// What is under way so long is lost.
const UNDER_WAY: Duration = Duration::from_millis(100);
/// How long the pair may take.
const PEER_PATIENCE: Duration = Duration::from_secs(8);

/// Runs it, with so many deaths.
pub fn run(deaths: u32) -> Result<Figures> {
    let mut bed = Bed::new()?;
    let mut peer = Peer::new()?;
    let [mut died, mut drained, mut joined, mut quiet] = [(); 4].map(|()| Seen::default());
    let mut replaced = Seen::default();
    for round in (0..deaths).progress() {
        died.add(bed.death()?);
        if round % PER_MOVE == 0 {
            drained.add(bed.drain()?);
            joined.add(bed.join()?);
            quiet.add(bed.nothing());
        }
        if round % PER_PEER == 0 {
            replaced.add(peer.death()?);
        }
    }
    let mut figures = Figures::new("failover");
    figures.count("datagrams_sent", bed.pulse.sent());
    let losses = bed.finish()?;
    figures.count("kills", u64::from(deaths));
    figures.count("connections", load::CONNECTIONS as u64);
    figures.count("connections_lost", losses.connections);
    figures.count("pgbench_errors", losses.database);
    figures.count("redis_errors", losses.redis);
    died.figures("", &mut figures);
    drained.figures("drain_", &mut figures);
    joined.figures("join_", &mut figures);
    quiet.figures("quiet_", &mut figures);
    let kills = replaced.gap_ms.len() as u64;
    let losses = peer.losses;
    figures.count("peer_kills", kills);
    figures.count("peer_connections_lost", losses.connections);
    figures.count("peer_pgbench_errors", losses.database);
    figures.count("peer_redis_errors", losses.redis);
    replaced.figures("peer_", &mut figures);
    Ok(figures)
}

/// What was seen of events of one kind.
#[derive(Default)]
struct Seen {
    gap_ms: Vec<f64>,
    stall_ms: Vec<f64>,
    lost: u64,
}

/// An event that is watched.
struct Watch<'a> {
    pulse: &'a Pulse,
    since: Instant,
    /// The first datagram.
    first: u64,
}

/// What was seen of one.
struct Sight {
    /// The longest times without a datagram and without anything by TCP.
    gap: Duration,
    stall: Duration,
    /// Datagrams that were sent meanwhile and did not come back.
    lost: u64,
}

impl<'a> Watch<'a> {
    fn begin(pulse: &'a Pulse) -> Self {
        Self { pulse, since: Instant::now(), first: pulse.sent() }
    }

    fn end(self) -> Sight {
        let Self { pulse, since, first } = self;
        let (gap, stall) = (pulse.datagrams.longest_gap(since), pulse.stream.longest_gap(since));
        let last = pulse.sent();
        std::thread::sleep(UNDER_WAY);
        Sight { gap, stall, lost: pulse.lost(first..last) }
    }
}

impl Seen {
    fn add(&mut self, Sight { gap, stall, lost }: Sight) {
        self.gap_ms.push(gap.as_secs_f64() * 1e3);
        self.stall_ms.push(stall.as_secs_f64() * 1e3);
        self.lost += lost;
    }

    fn figures(self, prefix: &str, figures: &mut Figures) {
        figures.distribution(&format!("{prefix}gap_ms"), self.gap_ms);
        figures.distribution(&format!("{prefix}tcp_stall_ms"), self.stall_ms);
        figures.count(&format!("{prefix}datagrams_lost"), self.lost);
    }
}

/// Warren's proxies, and the load.
struct Bed {
    cluster: Cluster,
    pulse: Pulse,
    idle: Idle,
    load: Load,
    _guests: Vec<warren_netns::guest::KernelGuest>,
}

impl Bed {
    fn new() -> Result<Self> {
        let cluster = Cluster::new(1, PROXIES)?;
        let guests = vec![cluster.guest(0, 1, VNIS[0])?, cluster.guest(0, 2, VNIS[0])?];
        let namespaces: Vec<Namespace> = guests.iter().map(|it| it.namespace.clone()).collect();
        let vpc = &cluster.grid.vpcs[0];
        let load = Load::start(&namespaces[0], vpc, cluster.run().path())?;
        let idle = Idle::open(&namespaces, vpc, 0)?;
        let pulse = Pulse::start(&namespaces[0], vpc)?;
        std::thread::sleep(QUIET);
        Ok(Self { cluster, pulse, idle, load, _guests: guests })
    }

    /// Cuts the owner off.
    fn death(&mut self) -> Result<Sight> {
        let owner = self.cluster.owner(VNIS[0])?;
        let grid = &self.cluster.grid;
        let watch = Watch::begin(&self.pulse);
        grid.cut(&grid.proxies[owner].cables)?;
        std::thread::sleep(DEAD);
        let seen = watch.end();
        ensure!(self.cluster.owner(VNIS[0])? != owner, "nobody took over from proxy {owner}");
        grid.mend(&grid.proxies[owner].cables)?;
        std::thread::sleep(QUIET);
        Ok(seen)
    }

    /// Takes the owner out of the order of succession.
    fn drain(&mut self) -> Result<Sight> {
        let owner = self.cluster.owner(VNIS[0])?;
        let all: Vec<usize> = (0..PROXIES.into()).collect();
        let others: Vec<_> = all.iter().copied().filter(|proxy| *proxy != owner).collect();
        let watch = Watch::begin(&self.pulse);
        self.cluster.apply(VNIS[0], &others)?;
        std::thread::sleep(WATCHED);
        let seen = watch.end();
        ensure!(self.cluster.owner(VNIS[0])? != owner, "proxy {owner} was not drained");
        self.cluster.apply(VNIS[0], &all)?;
        std::thread::sleep(WATCHED);
        Ok(seen)
    }

    /// Has a proxy join that did not know of the VPC.
    fn join(&mut self) -> Result<Sight> {
        let owner = self.cluster.owner(VNIS[0])?;
        let all: Vec<usize> = (0..PROXIES.into()).collect();
        let new = (owner + 1) % all.len();
        self.cluster.remove_at(new, VNIS[0])?;
        std::thread::sleep(WATCHED);
        let watch = Watch::begin(&self.pulse);
        self.cluster.apply(VNIS[0], &all)?;
        std::thread::sleep(WATCHED);
        Ok(watch.end())
    }

    /// As long as a move, without one: what the machine itself does.
    fn nothing(&self) -> Sight {
        let watch = Watch::begin(&self.pulse);
        std::thread::sleep(WATCHED);
        watch.end()
    }

    fn finish(self) -> Result<Losses> {
        let (database, redis) = self.load.finish()?;
        Ok(Losses { connections: self.idle.lost(), database, redis })
    }
}

/// The gateways, and the load, which is begun anew for each death.
struct Peer {
    pair: Pair,
    losses: Losses,
    turn: u16,
}

impl Peer {
    fn new() -> Result<Self> {
        Ok(Self { pair: Pair::new()?, losses: Losses::default(), turn: 0 })
    }

    fn death(&mut self) -> Result<Sight> {
        let Self { pair, losses, turn } = self;
        let (guests, vpc) = (&pair.guests, &pair.grid.vpcs[0]);
        let load = Load::start(&guests[0], vpc, pair.run.path())?;
        let idle = Idle::open(guests, vpc, *turn)?;
        *turn += 1;
        let pulse = Pulse::start(&guests[0], vpc)?;
        std::thread::sleep(QUIET);
        let master = pair.master()?;
        let watch = Watch::begin(&pulse);
        pair.grid.cut(&pair.grid.proxies[master].cables)?;
        std::thread::sleep(DEAD);
        while !pulse.datagrams.is_alive() && watch.since.elapsed() < PEER_PATIENCE {
            std::thread::sleep(Duration::from_millis(10));
        }
        let seen = watch.end();
        losses.connections += idle.lost();
        let (database, redis) = load.finish()?;
        losses.database += database;
        losses.redis += redis;
        pair.grid.mend(&pair.grid.proxies[master].cables)?;
        std::thread::sleep(QUIET);
        Ok(seen)
    }
}
