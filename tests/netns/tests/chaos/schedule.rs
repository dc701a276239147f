//! What fails when, and is mended again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use warren_netns::cluster::{Cluster, VNIS};

const PROXIES: usize = 3;
const HOSTS: usize = 2;
/// Proxies that something is wrong with at a time: one of them serves.
const MOST: usize = PROXIES - 1;

/// Something that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// All cables of a proxy, or one of them: both ends see it.
    Cut { proxy: usize, cable: Option<usize> },
    /// What a proxy sends in the underlay is lost, or what it is sent, or both: nobody sees it.
    Silent { proxy: usize, hooks: &'static [&'static str] },
    /// A proxy's daemon is killed.
    Killed { proxy: usize },
    /// A proxy's daemon is stopped in its tracks.
    Paused { proxy: usize },
    /// A proxy is to own nothing.
    Drained { proxy: usize },
    /// A host's daemon is killed.
    Host { host: usize },
}

impl Fault {
    fn proxy(self) -> Option<usize> {
        match self {
            Self::Cut { proxy, .. }
            | Self::Silent { proxy, .. }
            | Self::Killed { proxy }
            | Self::Paused { proxy }
            | Self::Drained { proxy } => Some(proxy),
            Self::Host { .. } => None,
        }
    }
}

/// Faults, with when they begin and when they are mended: all of a seed's random numbers.
pub struct Schedule {
    /// By their time: whether a fault begins.
    steps: Vec<(Duration, bool, Fault)>,
    count: BTreeMap<&'static str, u32>,
}

impl Schedule {
    /// What happens in this time.
    pub fn new(mut rng: StdRng, length: Duration) -> Self {
        let (mut steps, mut faults) = (Vec::new(), Vec::new());
        let mut now = Duration::ZERO;
        while now < length {
            if let Some(fault) = next(&mut rng, &faults) {
                let end = now + Duration::from_millis(rng.random_range(30..3000));
                steps.extend([(now, true, fault), (end, false, fault)]);
                faults.push((end, fault));
            }
            now += Duration::from_millis(rng.random_range(20..400));
            faults.retain(|(end, _)| *end > now);
        }
        steps.sort_by_key(|(when, ..)| *when);
        Self { steps, count: BTreeMap::new() }
    }

    /// Lets it happen, and tells how often what failed.
    pub fn run(mut self, cluster: &mut Cluster) -> String {
        let start = Instant::now();
        let mut paused = BTreeSet::new();
        for (when, begins, fault) in std::mem::take(&mut self.steps) {
            std::thread::sleep(when.saturating_sub(start.elapsed()));
            if let Fault::Paused { proxy } = fault {
                if begins {
                    paused.insert(proxy)
                } else {
                    paused.remove(&proxy)
                };
            }
            let done = if begins {
                self.begin(cluster, fault, &paused)
            } else {
                mend(cluster, fault, &paused)
            };
            let what = if begins { "begins" } else { "ends" };
            done.unwrap_or_else(|error| panic!("{fault:?} {what}: {error:#}"));
        }
        format!("{:?}", self.count)
    }

    fn begin(
        &mut self,
        cluster: &mut Cluster,
        fault: Fault,
        paused: &BTreeSet<usize>,
    ) -> anyhow::Result<()> {
        let name = match fault {
            Fault::Cut { .. } => "cut",
            Fault::Silent { .. } => "silent",
            Fault::Killed { .. } => "killed",
            Fault::Paused { .. } => "paused",
            Fault::Drained { .. } => "drained",
            Fault::Host { .. } => "host",
        };
        *self.count.entry(name).or_default() += 1;
        match fault {
            Fault::Cut { proxy, cable } => cluster.grid.cut(cables(cluster, proxy, cable)),
            Fault::Silent { proxy, hooks } => {
                cluster.grid.block(&cluster.grid.proxies[proxy].cables[0], hooks)
            }
            Fault::Killed { proxy } => cluster.kill_proxy(proxy),
            Fault::Paused { proxy } => cluster.signal_proxy(proxy, Signal::SIGSTOP),
            Fault::Drained { proxy } => order(cluster, Some(proxy), paused),
            Fault::Host { host } => {
                cluster.close_host(host);
                Ok(())
            }
        }
    }
}

/// Something that may fail beside what has failed.
fn next(rng: &mut StdRng, faults: &[(Duration, Fault)]) -> Option<Fault> {
    if rng.random_ratio(1, 8) {
        let host = Fault::Host { host: rng.random_range(0..HOSTS) };
        return faults.iter().all(|(_, fault)| *fault != host).then_some(host);
    }
    let wrong: Vec<usize> = faults.iter().filter_map(|(_, fault)| fault.proxy()).collect();
    let proxy = rng.random_range(0..PROXIES);
    if wrong.len() >= MOST || wrong.contains(&proxy) {
        return None;
    }
    let hooks: [&[&str]; 3] = [&["ingress"], &["egress"], &["ingress", "egress"]];
    let cable = [None, None, Some(0), Some(1), Some(2)];
    Some(match rng.random_range(0..6) {
        0 | 1 => Fault::Cut { proxy, cable: *cable.choose(rng)? },
        2 => Fault::Silent { proxy, hooks: hooks.choose(rng)? },
        3 => Fault::Killed { proxy },
        4 => Fault::Paused { proxy },
        _ => Fault::Drained { proxy },
    })
}

fn mend(cluster: &mut Cluster, fault: Fault, paused: &BTreeSet<usize>) -> anyhow::Result<()> {
    match fault {
        Fault::Cut { proxy, cable } => cluster.grid.mend(cables(cluster, proxy, cable)),
        Fault::Silent { proxy, .. } => cluster.grid.unblock(&cluster.grid.proxies[proxy].cables[0]),
        Fault::Killed { proxy } => cluster.start_proxy(proxy),
        Fault::Paused { proxy } => cluster.signal_proxy(proxy, Signal::SIGCONT),
        Fault::Drained { .. } => order(cluster, None, paused),
        Fault::Host { host } => cluster.open_host(host),
    }
}

/// Tells the proxies whose daemons listen who may own addresses.
fn order(
    cluster: &Cluster,
    without: Option<usize>,
    paused: &BTreeSet<usize>,
) -> anyhow::Result<()> {
    let order: Vec<_> = (0..PROXIES).filter(|proxy| Some(*proxy) != without).collect();
    let listens = |index: &usize| cluster.has_proxy(*index) && !paused.contains(index);
    for index in (0..PROXIES).filter(listens) {
        VNIS.iter().try_for_each(|vni| cluster.apply_at(index, *vni, &order))?;
    }
    Ok(())
}

fn cables(cluster: &Cluster, proxy: usize, cable: Option<usize>) -> &[String] {
    let cables = &cluster.grid.proxies[proxy].cables;
    match cable {
        Some(index) => &cables[index..=index],
        None => cables,
    }
}
