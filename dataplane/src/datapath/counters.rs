//! Reading the counters of dropped packets.

use aya::maps::{MapData, PerCpuArray, PerCpuValues};
use warren_abi::drop::Drop as DropReason;
use warren_abi::maps::{Drops, names};

use super::{DropCount, Error};

/// Counters per scope and reason.
pub(super) struct Counters {
    map: PerCpuArray<MapData, Drops>,
}

impl Counters {
    pub fn new(map: PerCpuArray<MapData, Drops>) -> Self {
        Self { map }
    }

    /// Appends a scope's counters that are not zero to `found`, under the name `shown`.
    pub fn read(&self, scope: u32, shown: u32, found: &mut Vec<DropCount>) -> Result<(), Error> {
        let values = self.map.get(&scope, 0).map_err(|source| Error::map(names::DROPS, source))?;
        for &reason in DropReason::ALL {
            let packets = values.iter().map(|drops| drops[reason as usize]).sum();
            if packets > 0 {
                found.push(DropCount { scope: shown, reason, packets });
            }
        }
        Ok(())
    }

    /// Sets a scope's counters to zero.
    pub fn clear(&mut self, scope: u32) -> Result<(), Error> {
        let error = |source| Error::map(names::DROPS, source);
        let cpus = aya::util::nr_cpus()
            .map_err(|(path, source)| Error::system("count CPUs by", path, source))?;
        let zeroes = PerCpuValues::try_from(vec![[0; DropReason::COUNTERS]; cpus])
            .map_err(|source| error(source.into()))?;
        self.map.set(scope, zeroes, 0).map_err(error)
    }
}
