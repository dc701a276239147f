//! Which host holds which ports of a VPC's shared address.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use warren_proto::v1;

/// Ports below are left alone: servers with rules for "privileged" source ports are still around.
const FIRST: u32 = 1024;
/// One past the last.
const END: u32 = 65536;

/// Ports `base` to `base + count - 1`. `count` is a power of two and divides `base`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

    fn overlaps(self, other: Self) -> bool {
        self.base < other.end() && other.base < self.end()
    }
}

impl From<PortRange> for v1::PortRange {
    fn from(PortRange { base, count }: PortRange) -> Self {
        Self { base, count }
    }
}

/// The ranges of one shared address, by the name of the host that holds each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leases(BTreeMap<String, PortRange>);

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
    /// The range that a host holds.
    pub fn of(&self, host: &str) -> Option<PortRange> {
        self.0.get(host).copied()
    }

    /// Each host with its range, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, PortRange)> {
        self.0.iter().map(|(host, range)| (host.as_str(), *range))
    }

    /// Gives the host the lowest free range of `count` ports (a power of two, 64 to 32768). A host
    /// that holds a range keeps it.
    pub fn lease(&mut self, host: &str, count: u32) -> Result<PortRange, Exhausted> {
        if let Some(held) = self.of(host) {
            return Ok(held);
        }
        let range = (FIRST.next_multiple_of(count)..END)
            .step_by(count as usize)
            .map(|base| PortRange { base, count })
            .find(|range| range.end() <= END && !self.0.values().any(|held| held.overlaps(*range)))
            .ok_or(Exhausted { hosts: self.0.len(), wanted: count })?;
        self.0.insert(host.to_owned(), range);
        Ok(range)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn starts_at_1024_and_ends_at_65535() {
        let mut leases = Leases::default();
        for host in 0..63 {
            let range = leases.lease(&host.to_string(), 1024).unwrap();
            assert_eq!(range, PortRange { base: 1024 * (host + 1), count: 1024 });
        }
        let error = leases.lease("late", 1024).unwrap_err();
        assert_eq!(error, Exhausted { hosts: 63, wanted: 1024 });
        assert_eq!(leases.of("late"), None);
        assert_eq!(leases.lease("0", 1024).unwrap().base, 1024, "a host keeps its range");
    }

    #[test]
    fn the_largest_range_fits_once() {
        let mut leases = Leases::default();
        assert_eq!(leases.lease("a", 32768).unwrap().base, 32768);
        leases.lease("b", 32768).unwrap_err();
        assert_eq!(leases.lease("b", 16384).unwrap().base, 16384);
    }

    proptest! {
        #[test]
        fn ranges_are_aligned_inside_and_apart(
            wanted in prop::collection::vec((0_u32..40, 6_u32..16), 0..120),
        ) {
            let mut leases = Leases::default();
            for (host, log) in wanted {
                let before = leases.clone();
                if let Ok(range) = leases.lease(&host.to_string(), 1 << log) {
                    prop_assert_eq!(range.base % range.count, 0);
                    prop_assert!(range.base >= FIRST && range.end() <= END);
                    prop_assert_eq!(leases.of(&host.to_string()), Some(range));
                } else {
                    prop_assert_eq!(&leases, &before);
                }
                let mut all: Vec<_> = leases.iter().map(|(_, range)| range).collect();
                all.sort_by_key(|range| range.base);
                prop_assert!(all.windows(2).all(|pair| pair[0].end() <= pair[1].base));
            }
        }
    }
}
