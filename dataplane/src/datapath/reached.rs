//! What came from VPCs, to a proxy's MAC address, as programs note it.

use std::net::Ipv4Addr;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};

use warren_abi::maps::{Reached, names};

use super::Error;
use super::mapping::Mapping;
use super::programs::{MapSpec, Programs};

/// Words of an entry.
const WORDS: usize = size_of::<Reached>() / size_of::<u64>();

/// The entries of all scopes.
pub(super) struct ReachedVpcs(Mapping);

impl ReachedVpcs {
    /// Its map, for so many scopes.
    pub fn map_spec(scopes: u32) -> MapSpec {
        MapSpec::new::<u32, Reached>(names::REACHED, scopes)
    }

    pub fn open(programs: &mut Programs, scopes: u32) -> Result<Self, Error> {
        let map = programs.data(names::REACHED)?;
        let words = NonZeroUsize::MIN.saturating_add(scopes as usize * WORDS - 1);
        Mapping::open(names::REACHED, &map, words).map(Self)
    }

    /// When something came last, in nanoseconds of `CLOCK_MONOTONIC_COARSE`; 0: never.
    pub fn at(&self, scope: u32) -> u64 {
        self.word(scope, 0).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Who answered last who was asked for by ARP, and the MAC address of that one.
    pub fn neighbour(&self, scope: u32) -> Option<(Ipv4Addr, [u8; 6])> {
        let mut bytes = [0; 16];
        for (index, chunk) in bytes.chunks_exact_mut(8).enumerate() {
            let word = self.word(scope, index + 1)?.load(Ordering::Relaxed);
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        let address: [u8; 4] = *bytes.first_chunk()?;
        let mac: [u8; 6] = *bytes[4..].first_chunk()?;
        (address != [0; 4]).then_some((address.into(), mac))
    }

    /// Nothing came yet.
    pub fn clear(&self, scope: u32) {
        for word in (0..WORDS).filter_map(|index| self.word(scope, index)) {
            word.store(0, Ordering::Relaxed);
        }
    }

    fn word(&self, scope: u32, index: usize) -> Option<&AtomicU64> {
        self.0.word(scope as usize * WORDS + index)
    }
}
