//! Which host holds which ports of a VPC's shared address.
//!
//! A host begins with few ports and gets more ahead of need, by powers of two: its range doubles
//! where it is, or it gets one elsewhere and keeps the former one for as long as flows of that time
//! last. What a host gives back, or what is taken from one that is gone, is fenced first: it is
//! another's only after every proxy has dropped its holder, and a rest.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use warren_proto::v1;

/// Ports below are left alone: servers with rules for "privileged" source ports are still around.
const FIRST: u32 = 1024;
/// One past the last.
const END: u32 = 65536;
/// What ranges are made of: the smallest.
pub const LEAST: u32 = 64;
/// The most that one host holds in one range.
pub const MOST: u32 = 32768;
/// Ports that an instance is expected to need before the first report of what it uses.
const PORTS_PER_INSTANCE: u32 = 16;

/// How long ports are nobody's after every proxy has dropped their holder: peers may still send, and
/// know the address and port as the former holder's (RFC 6888, REQ-8).
pub const REST: Duration = Duration::from_mins(2);
/// For how long a host must have needed less before its range shrinks.
pub const SHRINK_AFTER: Duration = Duration::from_mins(10);

/// Ports `base` to `base + count - 1`. `count` is a power of two and divides `base`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortRange {
    /// The first.
    pub base: u32,
    /// How many.
    pub count: u32,
}

impl PortRange {
    /// One past the last.
    fn end(self) -> u32 {
        self.base + self.count
    }

    /// Whether they have a port in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.base < other.end() && other.base < self.end()
    }

    /// Whether all of the other's ports are in this one.
    pub fn contains(self, other: Self) -> bool {
        self.base <= other.base && other.end() <= self.end()
    }

    /// Numbers of its blocks of 64.
    pub fn blocks(self) -> std::ops::Range<u32> {
        self.base / LEAST..self.end() / LEAST
    }
}

impl From<PortRange> for v1::PortRange {
    fn from(PortRange { base, count }: PortRange) -> Self {
        Self { base, count }
    }
}

impl From<v1::PortRange> for PortRange {
    fn from(v1::PortRange { base, count }: v1::PortRange) -> Self {
        Self { base, count }
    }
}

/// What one host holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Where its flows begin.
    pub ports: PortRange,
    /// Where they began before: those that last go on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<PortRange>,
}

impl Lease {
    /// All that it holds.
    pub fn ranges(&self) -> impl Iterator<Item = PortRange> {
        [self.ports].into_iter().chain(self.former.iter().copied())
    }
}

/// The ranges of one shared address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored")]
pub struct Leases {
    /// By the name of the host.
    hosts: BTreeMap<String, Lease>,
    /// Nobody's any more, and not yet to be given to another.
    fenced: Vec<PortRange>,
}

/// As they are stored, or were by the first release.
#[derive(Deserialize)]
#[serde(untagged)]
enum Stored {
    Now { hosts: BTreeMap<String, Lease>, fenced: Vec<PortRange> },
    First(BTreeMap<String, PortRange>),
}

impl From<Stored> for Leases {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::Now { hosts, fenced } => Self { hosts, fenced },
            Stored::First(hosts) => {
                let lease = |(name, ports)| (name, Lease { ports, former: Vec::new() });
                Self { hosts: hosts.into_iter().map(lease).collect(), fenced: Vec::new() }
            }
        }
    }
}

/// No range of the wanted size is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{hosts} hosts hold its ports, and no {wanted} in a row are left for another")]
pub struct Exhausted {
    /// How many hosts hold a range.
    pub hosts: usize,
    /// How many ports were wanted.
    pub wanted: u32,
}

impl Leases {
    /// What a host holds.
    pub fn of(&self, host: &str) -> Option<&Lease> {
        self.hosts.get(host)
    }

    /// How many hosts hold something.
    pub fn hosts(&self) -> usize {
        self.hosts.len()
    }

    /// Each host with what it holds, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Lease)> {
        self.hosts.iter().map(|(host, lease)| (host.as_str(), lease))
    }

    /// What waits until every proxy has dropped its holder, and then rests.
    pub fn fenced(&self) -> &[PortRange] {
        &self.fenced
    }

    /// Gives the host a range of `count` ports (a power of two, 64 to 32768), or one that is so
    /// large instead of its own. A range grows and shrinks where it is, if it can.
    pub fn lease(&mut self, host: &str, count: u32) -> Result<PortRange, Exhausted> {
        let held = self.hosts.get(host);
        if let Some(lease) = held.filter(|lease| lease.ports.count == count) {
            return Ok(lease.ports);
        }
        let in_place = held.map(|lease| PortRange { base: lease.ports.base & !(count - 1), count });
        let in_place = in_place.filter(|range| self.is_free_for(*range, host));
        let Some(range) = in_place.or_else(|| self.find(count)) else {
            return Err(Exhausted { hosts: self.hosts.len(), wanted: count });
        };
        let Some(lease) = self.hosts.get_mut(host) else {
            self.hosts.insert(host.to_owned(), Lease { ports: range, former: Vec::new() });
            return Ok(range);
        };
        let before = std::mem::replace(&mut lease.ports, range);
        if before.contains(range) {
            lease.former.extend(without(before, range));
        } else {
            lease.former.push(before);
            lease.former.retain(|former| !range.contains(*former));
        }
        Ok(range)
    }

    /// Takes from the host what it held before and does not use any more. Whether that is so.
    pub fn settle(&mut self, host: &str, is_used: impl Fn(PortRange) -> bool) -> bool {
        let Some(lease) = self.hosts.get_mut(host) else { return false };
        let (used, unused) = lease.former.iter().partition(|range| is_used(**range));
        lease.former = used;
        self.fence(unused)
    }

    /// Takes everything from a host that is gone. Whether it held something.
    pub fn forget(&mut self, host: &str) -> bool {
        let lease = self.hosts.remove(host);
        self.fence(lease.iter().flat_map(Lease::ranges).collect())
    }

    /// A fenced range has rested.
    pub fn free(&mut self, range: PortRange) {
        self.fenced.retain(|fenced| *fenced != range);
    }

    fn fence(&mut self, ranges: Vec<PortRange>) -> bool {
        let count = self.fenced.len();
        self.fenced.extend(ranges);
        self.fenced.len() > count
    }

    /// Whether nobody but the host holds any of it, and the host none of it as part of more.
    fn is_free_for(&self, range: PortRange, host: &str) -> bool {
        let mut others = self.hosts.iter().filter(|(name, _)| *name != host);
        let own = self.hosts.get(host).into_iter().flat_map(|lease| &lease.former);
        range.base >= FIRST
            && !others.any(|(_, lease)| lease.ranges().any(|held| held.overlaps(range)))
            && !self.fenced.iter().any(|fenced| fenced.overlaps(range))
            && !own.clone().any(|held| held.overlaps(range) && !range.contains(*held))
    }

    /// The first of `count` ports in the largest free range: where it is most likely to grow.
    fn find(&self, count: u32) -> Option<PortRange> {
        let mut free = [true; (END / LEAST) as usize];
        let held = self.hosts.values().flat_map(Lease::ranges);
        let below = PortRange { base: 0, count: FIRST };
        for range in held.chain(self.fenced.iter().copied()).chain([below]) {
            range.blocks().for_each(|block| free[block as usize] = false);
        }
        let sizes = std::iter::successors(Some(MOST), |size| Some(size / 2));
        sizes.take_while(|size| *size >= count).find_map(|size| {
            let mut places = (0..END).step_by(size as usize);
            let is_free = |base: &u32| {
                let range = PortRange { base: *base, count: size };
                range.blocks().all(|block| free[block as usize])
            };
            places.find(is_free).map(|base| PortRange { base, count })
        })
    }
}

/// What is left of a range without a part of it, in ranges.
fn without(range: PortRange, part: PortRange) -> Vec<PortRange> {
    let mut rest = Vec::new();
    let mut range = range;
    while range.count > part.count {
        let count = range.count / 2;
        let (low, high) =
            (PortRange { count, ..range }, PortRange { base: range.base + count, count });
        let (with, other) = if low.contains(part) { (low, high) } else { (high, low) };
        rest.push(other);
        range = with;
    }
    rest
}

/// What a host needs ports for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Ports in use.
    pub in_use: u32,
    /// Instances that run or start.
    pub instances: u32,
}

/// How many ports so many instances need to start with.
pub fn needed(instances: u32) -> u32 {
    instances.saturating_mul(PORTS_PER_INSTANCE).min(MOST)
}

/// How many ports a host with this demand should hold, if it holds `held` now, or none: at least
/// `first`, and twice of what it needs. Fewer only if that is a quarter.
pub fn wanted(held: Option<u32>, first: u32, demand: Demand) -> u32 {
    let needed = demand.in_use.max(needed(demand.instances)).saturating_mul(2).max(first);
    let needed = needed.min(MOST).next_power_of_two();
    match held {
        Some(held) if needed.saturating_mul(4) <= held => held / 2,
        Some(held) => needed.max(held),
        None => needed,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn range(base: u32, count: u32) -> PortRange {
        PortRange { base, count }
    }

    #[test]
    fn all_ports_from_1024_to_65535_are_leased() {
        let mut leases = Leases::default();
        let mut bases: Vec<_> =
            (0..63).map(|host| leases.lease(&host.to_string(), 1024).unwrap().base).collect();
        bases.sort_unstable();
        assert_eq!(bases, (1..64).map(|index| index * 1024).collect::<Vec<_>>());
        let error = leases.lease("late", 1024).unwrap_err();
        assert_eq!(error, Exhausted { hosts: 63, wanted: 1024 });
        assert_eq!(leases.of("late"), None);
        assert_eq!(leases.lease("0", 1024).unwrap(), leases.of("0").unwrap().ports);
    }

    #[test]
    fn the_largest_range_fits_once() {
        let mut leases = Leases::default();
        assert_eq!(leases.lease("a", 32768).unwrap().base, 32768);
        leases.lease("b", 32768).unwrap_err();
        assert_eq!(leases.lease("b", 16384).unwrap().base, 16384);
    }

    #[test]
    fn hosts_have_room_to_grow_where_they_are() {
        let mut leases = Leases::default();
        for host in ["a", "b", "c", "d"] {
            leases.lease(host, 64).unwrap();
        }
        for count in [128, 256, 512, 1024, 2048, 4096] {
            for host in ["a", "b", "c", "d"] {
                let before = leases.of(host).unwrap().ports;
                let grown = leases.lease(host, count).unwrap();
                assert!(grown.contains(before), "{host}: {before:?} became {grown:?}");
                assert_eq!(leases.of(host).unwrap().former, []);
            }
        }
    }

    #[test]
    fn who_cannot_grow_where_it_is_keeps_the_former_range() {
        let mut leases = Leases::default();
        let first = leases.lease("a", 64).unwrap();
        leases.hosts.insert(
            "beside".into(),
            Lease { ports: range(first.base ^ 64, 64), former: Vec::new() },
        );
        let grown = leases.lease("a", 128).unwrap();
        assert!(!grown.overlaps(first));
        assert_eq!(leases.of("a").unwrap().former, [first]);
        // As long as flows last there.
        assert!(!leases.settle("a", |range| range == first));
        assert!(leases.settle("a", |_| false));
        assert_eq!(leases.of("a").unwrap().former, []);
        assert_eq!(leases.fenced(), [first]);
    }

    #[test]
    fn what_is_given_back_is_nobody_s_until_it_rested() {
        let mut leases = Leases::default();
        let whole = leases.lease("a", 32768).unwrap();
        let half = leases.lease("a", 16384).unwrap();
        let other = range(half.base + 16384, 16384);
        assert_eq!((half.base, leases.of("a").unwrap().former.as_slice()), (32768, &[other][..]));
        // Back again before it was given up: it is as before.
        assert_eq!(leases.clone().lease("a", 32768), Ok(whole));
        leases.settle("a", |_| false);
        assert_eq!(leases.fenced(), [other]);
        assert_ne!(leases.lease("a", 32768), Ok(whole));
        assert_eq!(leases.lease("b", 16384).unwrap().base, 16384);
        leases.lease("c", 16384).unwrap_err();
        leases.free(other);
        assert_eq!(leases.lease("c", 16384), Ok(other));
    }

    #[test]
    fn a_host_that_is_forgotten_leaves_everything_fenced() {
        let mut leases = Leases::default();
        let first = leases.lease("a", 128).unwrap();
        let half = leases.lease("a", 64).unwrap();
        assert!(leases.forget("a"));
        assert!(!leases.forget("a"));
        assert_eq!(leases.of("a"), None);
        assert_eq!(leases.fenced(), [half, range(first.base + 64, 64)]);
    }

    #[test]
    fn ports_are_wanted_ahead_of_need() {
        let demand = |in_use, instances| Demand { in_use, instances };
        assert_eq!(wanted(None, 64, demand(0, 0)), 64);
        assert_eq!(wanted(None, 64, demand(0, 5)), 256, "16 for each instance, twice");
        assert_eq!(wanted(Some(64), 64, demand(32, 1)), 64);
        assert_eq!(wanted(Some(64), 64, demand(33, 1)), 128, "when half is used");
        assert_eq!(wanted(Some(64), 64, demand(300, 1)), 1024);
        assert_eq!(wanted(Some(1024), 64, demand(200, 1)), 1024);
        assert_eq!(wanted(Some(1024), 64, demand(100, 1)), 512, "step by step");
        assert_eq!(wanted(Some(1024), 1024, demand(0, 0)), 1024, "never below the first");
        assert_eq!(wanted(Some(32768), 64, demand(u32::MAX, u32::MAX)), 32768);
    }

    #[test]
    fn what_the_first_release_stored_is_read() {
        let stored = r#"{"h1":{"base":1024,"count":64}}"#;
        let leases: Leases = serde_json::from_str(stored).unwrap();
        assert_eq!(leases.of("h1").unwrap().ports, range(1024, 64));
        let again = serde_json::to_string(&leases).unwrap();
        assert_eq!(serde_json::from_str::<Leases>(&again).unwrap(), leases);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Lease(u8, u32),
        Settle(u8, u8),
        Forget(u8),
        Free(prop::sample::Index),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..20u8, 6..16u32).prop_map(|(host, log)| Step::Lease(host, 1 << log)),
            2 => (0..20u8, any::<u8>()).prop_map(|(host, used)| Step::Settle(host, used)),
            1 => (0..20u8).prop_map(Step::Forget),
            2 => any::<prop::sample::Index>().prop_map(Step::Free),
        ]
    }

    proptest! {
        #[test]
        fn nothing_is_held_twice_and_nothing_passes_on_without_a_fence(
            steps in prop::collection::vec(step(), 0..150),
        ) {
            let mut leases = Leases::default();
            for step in steps {
                let before = leases.clone();
                match &step {
                    Step::Lease(host, count) => {
                        if let Ok(range) = leases.lease(&host.to_string(), *count) {
                            prop_assert_eq!((range.base % range.count, range.count), (0, *count));
                            prop_assert!(range.base >= FIRST && range.end() <= END);
                            prop_assert_eq!(leases.of(&host.to_string()).unwrap().ports, range);
                        } else {
                            prop_assert_eq!(&leases, &before);
                        }
                    }
                    Step::Settle(host, used) => {
                        let is_used = |range: PortRange| (range.base / 64) as u8 & used != 0;
                        leases.settle(&host.to_string(), is_used);
                    }
                    Step::Forget(host) => {
                        leases.forget(&host.to_string());
                    }
                    Step::Free(index) if !leases.fenced.is_empty() => {
                        leases.free(*index.get(leases.fenced()));
                    }
                    Step::Free(_) => {}
                }
                let mut all: Vec<_> = leases.iter().flat_map(|(_, lease)| lease.ranges()).collect();
                all.extend(leases.fenced());
                all.sort_unstable();
                prop_assert!(all.windows(2).all(|pair| pair[0].end() <= pair[1].base));
                // Whoever held a port holds it, or it is fenced, unless it was fenced before.
                for (host, lease) in before.iter() {
                    for block in lease.ranges().flat_map(PortRange::blocks) {
                        let block = PortRange { base: block * LEAST, count: LEAST };
                        let mut held = leases.of(host).into_iter().flat_map(Lease::ranges);
                        let is_fenced = leases.fenced.iter().any(|range| range.contains(block));
                        prop_assert!(held.any(|range| range.contains(block)) || is_fenced);
                    }
                }
            }
        }
    }
}
