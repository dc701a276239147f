//! What fails when, and is mended again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use warren_netns::cluster::{Cluster, MORE_VNIS, VNIS};
use warren_netns::servers::Server;

const PROXIES: usize = 3;
const HOSTS: usize = 2;
/// Of a proxy: into the underlay, and into each VPC.
const CABLES: usize = 3;
/// Proxies that something is wrong with at a time: one of them serves.
const MOST: usize = PROXIES - 1;

/// The first proxy of each address.
const ORDERS: [(usize, u32); 4] =
    [(0, VNIS[0]), (0, VNIS[1]), (1, MORE_VNIS[0]), (2, MORE_VNIS[1])];

/// The proxies, this one first.
fn order_from(first: usize) -> Vec<usize> {
    (0..PROXIES).map(|index| (first + index) % PROXIES).collect()
}

/// Prepares what the schedule needs: the VPCs' second addresses, and detours.
pub fn prepare(cluster: &Cluster) -> anyhow::Result<Vec<Server>> {
    for (first, vni) in ORDERS.into_iter().filter(|(_, vni)| MORE_VNIS.contains(vni)) {
        cluster.add(vni, &order_from(first))?;
    }
    cluster.grid.lay_detours()
}

/// Something that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// All cables of a proxy, or one of them: both ends see it.
    Cut { proxy: usize, cable: Option<usize> },
    /// What a proxy sends by one of its cables is lost, or what it is sent, or both: nobody sees it.
    Silent { proxy: usize, cable: usize, hooks: &'static [&'static str] },
    /// A proxy's daemon is killed.
    Killed { proxy: usize },
    /// A proxy's daemon is stopped in its tracks.
    Paused { proxy: usize },
    /// A proxy is to own nothing.
    Drained { proxy: usize },
    /// A host's daemon is killed.
    Host { host: usize },
    /// What comes by a cable of a proxy's is doubled and overtaken now and then.
    Disturbed { proxy: usize, cable: usize },
    /// The same of a host's.
    HostDisturbed { host: usize },
}

impl Fault {
    fn proxy(self) -> Option<usize> {
        match self {
            Self::Cut { proxy, .. }
            | Self::Silent { proxy, .. }
            | Self::Killed { proxy }
            | Self::Paused { proxy }
            | Self::Drained { proxy } => Some(proxy),
            Self::Host { .. } | Self::Disturbed { .. } | Self::HostDisturbed { .. } => None,
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
            Fault::Disturbed { .. } | Fault::HostDisturbed { .. } => "disturbed",
        };
        *self.count.entry(name).or_default() += 1;
        match fault {
            Fault::Cut { proxy, cable } => cluster.grid.cut(cables(cluster, proxy, cable)),
            Fault::Silent { proxy, cable, hooks } => {
                cluster.grid.block(&cluster.grid.proxies[proxy].cables[cable], hooks)
            }
            Fault::Killed { proxy } => cluster.kill_proxy(proxy),
            Fault::Paused { proxy } => cluster.signal_proxy(proxy, Signal::SIGSTOP),
            Fault::Drained { proxy } => order(cluster, Some(proxy), paused),
            Fault::Host { host } => {
                cluster.close_host(host);
                Ok(())
            }
            Fault::Disturbed { proxy, cable } => {
                cluster.grid.disturb(&cluster.grid.proxies[proxy].cables[cable])
            }
            Fault::HostDisturbed { host } => {
                cluster.grid.disturb(&cluster.grid.hosts[host].cables[0])
            }
        }
    }
}

/// Something that may fail beside what has failed.
fn next(rng: &mut StdRng, faults: &[(Duration, Fault)]) -> Option<Fault> {
    let harmless = match rng.random_range(0..8) {
        0 => Some(Fault::Host { host: rng.random_range(0..HOSTS) }),
        1 => Some(Fault::HostDisturbed { host: rng.random_range(0..HOSTS) }),
        2 => Some(Fault::Disturbed {
            proxy: rng.random_range(0..PROXIES),
            cable: rng.random_range(0..CABLES),
        }),
        _ => None,
    };
    if let Some(fault) = harmless {
        return faults.iter().all(|(_, other)| *other != fault).then_some(fault);
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
        2 => Fault::Silent { proxy, cable: rng.random_range(0..CABLES), hooks: hooks.choose(rng)? },
        3 => Fault::Killed { proxy },
        4 => Fault::Paused { proxy },
        _ => Fault::Drained { proxy },
    })
}

fn mend(cluster: &mut Cluster, fault: Fault, paused: &BTreeSet<usize>) -> anyhow::Result<()> {
    match fault {
        Fault::Cut { proxy, cable } => cluster.grid.mend(cables(cluster, proxy, cable)),
        Fault::Silent { proxy, cable, hooks } => {
            cluster.grid.unblock(&cluster.grid.proxies[proxy].cables[cable], hooks)
        }
        Fault::Killed { proxy } => cluster.start_proxy(proxy),
        Fault::Paused { proxy } => cluster.signal_proxy(proxy, Signal::SIGCONT),
        Fault::Drained { .. } => order(cluster, None, paused),
        Fault::Host { host } => cluster.open_host(host),
        Fault::Disturbed { proxy, cable } => {
            cluster.grid.calm(&cluster.grid.proxies[proxy].cables[cable])
        }
        Fault::HostDisturbed { host } => cluster.grid.calm(&cluster.grid.hosts[host].cables[0]),
    }
}

/// Tells the proxies whose daemons listen who may own addresses.
fn order(
    cluster: &Cluster,
    without: Option<usize>,
    paused: &BTreeSet<usize>,
) -> anyhow::Result<()> {
    let listens = |index: &usize| cluster.has_proxy(*index) && !paused.contains(index);
    for index in (0..PROXIES).filter(listens) {
        for (first, vni) in ORDERS {
            let mut order = order_from(first);
            order.retain(|proxy| Some(*proxy) != without);
            cluster.apply_at(index, vni, &order)?;
        }
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
