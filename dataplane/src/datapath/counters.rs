//! Reading the counters of dropped packets.

use aya::maps::{MapData, PerCpuArray, PerCpuValues};
use warren_abi::drop::Drop as DropReason;
use warren_abi::maps::names;

use super::{DropCount, Error};

/// Counters per scope and reason.
pub(super) struct Counters {
    map: PerCpuArray<MapData, u64>,
}

/// Entries of the map for scopes 0 to `last`.
pub(super) const fn entries(last: u32) -> u32 {
    (last + 1) * DropReason::STRIDE
}

impl Counters {
    pub fn new(map: PerCpuArray<MapData, u64>) -> Self {
        Self { map }
    }

    /// Appends a scope's counters that are not zero to `found`, under the name `shown`.
    pub fn read(&self, scope: u32, shown: u32, found: &mut Vec<DropCount>) -> Result<(), Error> {
        for &reason in DropReason::ALL {
            let values = self
                .map
                .get(&(scope * DropReason::STRIDE + reason as u32), 0)
                .map_err(|source| Error::map(names::DROPS, source))?;
            let packets = values.iter().sum();
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
        for &reason in DropReason::ALL {
            let zeroes =
                PerCpuValues::try_from(vec![0; cpus]).map_err(|source| error(source.into()))?;
            self.map.set(scope * DropReason::STRIDE + reason as u32, zeroes, 0).map_err(error)?;
        }
        Ok(())
    }
}
