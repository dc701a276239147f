//! The limits of a host's slots, and what each holds.

use std::collections::HashMap;

use aya::maps::{Array, MapData};
use warren_abi::limit::{Bucket, MAX_RATE, Rates};
use warren_abi::maps::{self, names};

use super::Error;
use super::programs::{MapSpec, Programs};

/// Least bits a second that a limit can be of.
const MIN_BITS: u64 = 1000;

/// How much a slot may send, receive and hold; 0: as much as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Packets a second, in each direction; a tenth of a second's at once.
    pub packets_per_second: u64,
    /// Bits of IP packets a second, in each direction, from 1,000; a tenth of a second's at once.
    pub bits_per_second: u64,
    /// Flows that begin, a second; a second's at once.
    pub new_flows_per_second: u64,
    /// Flows at one time, but for those that are over.
    pub flows: u32,
    /// Ports at one time: of UDP one for each of the guest's, else one for each flow.
    pub ports: u32,
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Flows.
    pub flows: u32,
    /// Ports.
    pub ports: u32,
}

impl Limits {
    /// Whether each packet counts.
    pub(super) fn concern_packets(&self) -> bool {
        self.packets_per_second != 0 || self.bits_per_second != 0
    }

    fn check(&self) -> Result<(), Error> {
        if (1..MIN_BITS).contains(&self.bits_per_second) {
            let remedy = "give at least 1000, or 0 for no limit";
            return Err(Error::invalid("bits a second", self.bits_per_second, remedy));
        }
        let rates =
            [self.packets_per_second, self.bits_per_second.div_ceil(8), self.new_flows_per_second];
        match rates.into_iter().find(|rate| *rate > MAX_RATE) {
            Some(rate) => Err(Error::invalid("rate", rate, "give less, or 0 for no limit")),
            None => Ok(()),
        }
    }

    fn value(&self) -> maps::Limits {
        let bytes = Bucket::per_second(self.bits_per_second.div_ceil(8));
        let rates = Rates { packets: Bucket::per_second(self.packets_per_second), bytes };
        maps::Limits {
            sent: rates,
            received: rates,
            begun: Bucket::per_second(self.new_flows_per_second),
            flows: self.flows,
            ports: self.ports,
        }
    }
}

/// The maps of limits, with room for slots up to this number.
pub(super) fn map_specs(room: u32, slots: u32) -> [MapSpec; 2] {
    [
        MapSpec::new::<u32, maps::Limits>(names::LIMITS, room + 1).at_least(slots + 1),
        MapSpec::new::<u32, maps::Held>(names::HELD, room + 1).at_least(slots + 1),
    ]
}

/// The limits that are in force. This process is the only one to set them.
pub(super) struct SlotLimits {
    map: Array<MapData, maps::Limits>,
    held: Array<MapData, maps::Held>,
    /// Of the slots that this process wrote.
    known: HashMap<u32, Limits>,
}

impl SlotLimits {
    pub fn open(programs: &mut Programs) -> Result<Self, Error> {
        let (map, held) = (programs.map(names::LIMITS)?, programs.map(names::HELD)?);
        Ok(Self { map, held, known: HashMap::new() })
    }

    /// Sets a slot's limits. Rates begin unused.
    pub fn set(&mut self, slot: u32, limits: &Limits) -> Result<(), Error> {
        limits.check()?;
        if self.known.get(&slot) == Some(limits) {
            return Ok(());
        }
        self.map
            .set(slot, limits.value(), 0)
            .map_err(|source| Error::map(names::LIMITS, source))?;
        self.known.insert(slot, *limits);
        Ok(())
    }

    /// What a slot holds under an attachment of this generation.
    pub fn usage(&self, slot: u32, generation: u32) -> Result<Usage, Error> {
        let held = self.held.get(&slot, 0).map_err(|source| Error::map(names::HELD, source))?;
        let (flows, ports) = (held.flows.count(generation), held.ports.count(generation));
        Ok(Usage { flows, ports })
    }
}
