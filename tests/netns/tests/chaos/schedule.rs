//! What fails when, and is mended again.

use std::collections::BTreeMap;
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

/// The faults that are there, and until when.
pub struct Schedule {
    rng: StdRng,
    faults: Vec<(Instant, Fault)>,
    count: BTreeMap<&'static str, u32>,
}

impl Schedule {
    pub fn new(rng: StdRng) -> Self {
        Self { rng, faults: Vec::new(), count: BTreeMap::new() }
    }

    /// Lets some time pass, and something fail or be mended.
    pub fn turn(&mut self, cluster: &mut Cluster) {
        std::thread::sleep(Duration::from_millis(self.rng.random_range(20..400)));
        let now = Instant::now();
        let over: Vec<_> = self.faults.extract_if(.., |(until, _)| *until <= now).collect();
        for (_, fault) in over {
            self.mend(cluster, fault);
        }
        let Some(fault) = self.next() else { return };
        let lasts = Duration::from_millis(self.rng.random_range(30..3000));
        self.begin(cluster, fault);
        self.faults.push((now + lasts, fault));
    }

    /// Mends everything, and tells what failed.
    pub fn finish(mut self, cluster: &mut Cluster) -> String {
        for (_, fault) in std::mem::take(&mut self.faults) {
            self.mend(cluster, fault);
        }
        format!("{:?}", self.count)
    }

    /// Something that may fail now.
    fn next(&mut self) -> Option<Fault> {
        let wrong: Vec<usize> = self.faults.iter().filter_map(|(_, fault)| fault.proxy()).collect();
        if self.rng.random_ratio(1, 8) {
            let host = self.rng.random_range(0..HOSTS);
            let fault = Fault::Host { host };
            return self.faults.iter().all(|(_, it)| *it != fault).then_some(fault);
        }
        let proxy = self.rng.random_range(0..PROXIES);
        if wrong.len() >= MOST || wrong.contains(&proxy) {
            return None;
        }
        let hooks: [&[&str]; 3] = [&["ingress"], &["egress"], &["ingress", "egress"]];
        let cable = [None, None, Some(0), Some(1), Some(2)];
        Some(match self.rng.random_range(0..6) {
            0 | 1 => Fault::Cut { proxy, cable: *cable.choose(&mut self.rng)? },
            2 => Fault::Silent { proxy, hooks: hooks.choose(&mut self.rng)? },
            3 => Fault::Killed { proxy },
            4 => Fault::Paused { proxy },
            _ => Fault::Drained { proxy },
        })
    }

    fn begin(&mut self, cluster: &mut Cluster, fault: Fault) {
        let (name, done) = match fault {
            Fault::Cut { proxy, cable } => ("cut", cluster.grid.cut(cables(cluster, proxy, cable))),
            Fault::Silent { proxy, hooks } => {
                ("silent", cluster.grid.block(&cluster.grid.proxies[proxy].cables[0], hooks))
            }
            Fault::Killed { proxy } => ("killed", cluster.kill_proxy(proxy)),
            Fault::Paused { proxy } => ("paused", cluster.signal_proxy(proxy, Signal::SIGSTOP)),
            Fault::Drained { proxy } => ("drained", self.order(cluster, Some(proxy))),
            Fault::Host { host } => {
                cluster.close_host(host);
                ("host", Ok(()))
            }
        };
        done.unwrap_or_else(|error| panic!("{fault:?}: {error:#}"));
        *self.count.entry(name).or_default() += 1;
    }

    fn mend(&self, cluster: &mut Cluster, fault: Fault) {
        let done = match fault {
            Fault::Cut { proxy, cable } => cluster.grid.mend(cables(cluster, proxy, cable)),
            Fault::Silent { proxy, .. } => {
                cluster.grid.unblock(&cluster.grid.proxies[proxy].cables[0])
            }
            Fault::Killed { proxy } => cluster.start_proxy(proxy),
            Fault::Paused { proxy } => cluster.signal_proxy(proxy, Signal::SIGCONT),
            Fault::Drained { .. } => self.order(cluster, None),
            Fault::Host { host } => cluster.open_host(host),
        };
        done.unwrap_or_else(|error| panic!("the end of {fault:?}: {error:#}"));
    }

    /// Tells the proxies whose daemons listen who may own addresses.
    fn order(&self, cluster: &Cluster, without: Option<usize>) -> anyhow::Result<()> {
        let order: Vec<_> = (0..PROXIES).filter(|proxy| Some(*proxy) != without).collect();
        let is_paused =
            |index| self.faults.iter().any(|(_, fault)| *fault == Fault::Paused { proxy: index });
        for index in (0..PROXIES).filter(|index| cluster.has_proxy(*index) && !is_paused(*index)) {
            VNIS.iter().try_for_each(|vni| cluster.apply_at(index, *vni, &order))?;
        }
        Ok(())
    }
}

fn cables(cluster: &Cluster, proxy: usize, cable: Option<usize>) -> &[String] {
    let cables = &cluster.grid.proxies[proxy].cables;
    match cable {
        Some(index) => &cables[index..=index],
        None => cables,
    }
}
