//! What programs tell of flows that begin and end: events from their ring buffer, and counters.

use std::os::fd::{AsFd, BorrowedFd};

use aya::maps::ring_buf::RingBufItem;
use aya::maps::{MapData, PerCpuArray, RingBuf};
use warren_abi::flowlog::{FlowEvent, LOST, What, level};
use warren_abi::maps::{FlowCounts, names};

use super::Error;
use super::programs::Programs;

/// What programs tell of flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowLogOptions {
    /// Which events.
    pub events: FlowLogLevel,
    /// Size of the ring buffer, in bytes: a power of two, a multiple of the page size. Fixed when it
    /// is made. An event takes 96.
    pub bytes: u32,
}

impl Default for FlowLogOptions {
    /// None; room for 43,690.
    fn default() -> Self {
        Self { events: FlowLogLevel::Off, bytes: 4 << 20 }
    }
}

/// Which events of flows are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowLogLevel {
    /// None.
    Off,
    /// That a flow ended; that a mapping, which holds a port, began or ended.
    Ends,
    /// Also that a flow began.
    All,
}

impl FlowLogLevel {
    /// As programs take it.
    pub(super) fn bits(self) -> u32 {
        match self {
            Self::Off => level::OFF,
            Self::Ends => level::ENDS,
            Self::All => level::ENDS | level::STARTS,
        }
    }
}

/// The reading end of the events. What one reader left is there for the next, in this process or
/// another; two at a time would get in each other's way.
pub struct FlowEvents {
    ring: RingBuf<MapData>,
}

impl FlowEvents {
    pub(super) fn new(programs: &mut Programs) -> Result<Self, Error> {
        Ok(Self { ring: programs.map(names::FLOW_EVENTS)? })
    }

    /// Gives the next event to `f`. It is taken only when `f` returns: if the process dies in it,
    /// the event is there for the next one. False: there is none.
    pub fn take(&mut self, f: impl FnOnce(&FlowEvent)) -> bool {
        let Some(item) = self.ring.next() else { return false };
        if let Some(event) = FlowEvent::from_bytes(&item) {
            f(&event);
        }
        drop::<RingBufItem<'_>>(item);
        true
    }
}

impl AsFd for FlowEvents {
    /// Readable when many events wait. Fewer do not wake anybody: look several times a second.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

/// How many flows began and ended since the maps were made. Mappings are not counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowTotals {
    /// How often each happened.
    pub counts: Vec<(What, u64)>,
    /// Events that were lost, since the ring buffer was full.
    pub lost: u64,
}

impl FlowTotals {
    /// How often this happened.
    pub fn of(&self, what: What) -> u64 {
        self.counts.iter().find(|(other, _)| *other == what).map_or(0, |(_, count)| *count)
    }
}

/// The programs' counters of flows.
pub(super) struct FlowCounters {
    map: PerCpuArray<MapData, FlowCounts>,
}

impl FlowCounters {
    pub fn new(programs: &mut Programs) -> Result<Self, Error> {
        Ok(Self { map: programs.map(names::FLOW_COUNTS)? })
    }

    pub fn read(&self) -> Result<FlowTotals, Error> {
        let error = |source| Error::map(names::FLOW_COUNTS, source);
        let cpus = self.map.get(&0, 0).map_err(error)?;
        let sum = |index: usize| cpus.iter().map(|counts| counts[index]).sum();
        let counts = What::ALL.iter().map(|what| (*what, sum(*what as usize))).collect();
        Ok(FlowTotals { counts, lost: sum(LOST) })
    }
}
