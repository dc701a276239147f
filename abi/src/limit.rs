//! How much a slot may send, receive and hold.
//!
//! Rates are those of the generic cell rate algorithm (ITU-T I.371), a token bucket whose state is
//! one time. What a slot holds is counted exactly: whoever brings a flow's state to one that counts
//! counts up before, whoever takes it away from there counts down after.

use crate::drop::Drop;
use crate::maps::OutKey;
use crate::wire::UDP;

/// Bits behind the point of [`Bucket::cost`].
const FRACTION: u32 = 20;
/// Nanoseconds in a second.
const SECOND_NS: u64 = 1_000_000_000;
/// What packets and bits may come at once: as much as in a tenth of a second.
pub const PACKETS_AHEAD_NS: u64 = SECOND_NS / 10;
/// What flows may begin at once: as many as in a second.
pub const FLOWS_AHEAD_NS: u64 = SECOND_NS;
/// Most units a second that a rate can be of.
pub const MAX_RATE: u64 = SECOND_NS << (FRACTION - 8);

/// A rate, and how far it is used up.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// When it has been used less than it may be, in nanoseconds of `CLOCK_MONOTONIC`.
    pub due_ns: u64,
    /// Time for one unit, in nanoseconds, with 20 bits behind the point; 0: there is no limit.
    pub cost: u64,
}

impl Bucket {
    /// So many units a second, from 1 to [`MAX_RATE`]; 0: as many as come.
    pub const fn per_second(rate: u64) -> Self {
        let cost = match rate {
            0 => 0,
            rate => (SECOND_NS << FRACTION) / rate,
        };
        Self { due_ns: 0, cost }
    }

    /// How many units a second; 0: there is no limit.
    pub const fn rate(self) -> u64 {
        match self.cost {
            0 => 0,
            cost => ((SECOND_NS << FRACTION) + cost / 2) / cost,
        }
    }

    /// What is due after some units, if they may come now: if what came before is not too far
    /// `ahead_ns`. So the first of many may, however large.
    #[inline(always)]
    pub const fn admit(self, units: u64, now_ns: u64, ahead_ns: u64) -> Option<u64> {
        let start = if self.due_ns > now_ns { self.due_ns } else { now_ns };
        if start - now_ns >= ahead_ns {
            return None;
        }
        Some(start.wrapping_add(units.wrapping_mul(self.cost) >> FRACTION))
    }
}

/// The rates of one direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Packets, as there are on the wire.
    pub packets: Bucket,
    /// Bytes of IP packets.
    pub bytes: Bucket,
}

/// The limits of a slot: the first 64 bytes concern each packet, the rest flows that begin.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// What the guest sends.
    pub sent: Rates,
    /// What the guest receives.
    pub received: Rates,
    /// Flows that begin.
    pub begun: Bucket,
    /// Most flows at one time; 0: there is no limit.
    pub flows: u32,
    /// Most ports at one time; 0: there is no limit.
    pub ports: u32,
}

impl Limits {
    /// None.
    pub const NONE: Self = {
        let rates = Rates { packets: Bucket::per_second(0), bytes: Bucket::per_second(0) };
        Self { sent: rates, received: rates, begun: Bucket::per_second(0), flows: 0, ports: 0 }
    };
}

/// How many a slot holds under one of its attachments: a word, so that it changes atomically.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally(pub u64);

impl Tally {
    /// So many under an attachment of this generation.
    #[inline]
    pub const fn new(generation: u32, count: u32) -> Self {
        Self((generation as u64) << 32 | count as u64)
    }

    /// How many there are under an attachment.
    #[inline]
    pub const fn count(self, generation: u32) -> u32 {
        if (self.0 >> 32) as u32 == generation { self.0 as u32 } else { 0 }
    }

    /// One more under the slot's present attachment, unless it has as many as it may; `most` 0:
    /// there is no limit.
    #[inline(always)]
    pub const fn more(self, generation: u32, most: u32) -> Option<Self> {
        let count = self.count(generation);
        if most != 0 && count >= most {
            return None;
        }
        Some(Self::new(generation, count.wrapping_add(1)))
    }

    /// One less, of those under this attachment; none if it has none any more.
    #[inline(always)]
    pub const fn less(self, generation: u32) -> Option<Self> {
        match self.count(generation) {
            0 => None,
            count => Some(Self::new(generation, count - 1)),
        }
    }
}

/// What a slot holds.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Flows, and not mappings.
    pub flows: Tally,
    /// Ports: of UDP, one for each mapping, else one for each flow.
    pub ports: Tally,
}

/// What an entry of the table of flows amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share(pub u32);

impl Share {
    /// A flow.
    pub const FLOW: Self = Self(1);
    /// A port.
    pub const PORT: Self = Self(2);

    /// What a flow or a mapping amounts to.
    #[inline(always)]
    pub const fn of(key: &OutKey) -> Self {
        if key.is_mapping() {
            Self::PORT
        } else if key.protocol == UDP as u32 {
            Self::FLOW
        } else {
            Self(Self::FLOW.0 | Self::PORT.0)
        }
    }

    /// Whether the other is a part of it.
    #[inline(always)]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// A reason as a number that is not 0, and back: how functions return it that return scalars.
#[inline(always)]
pub const fn code(reason: Drop) -> u32 {
    reason as u32 + 1
}
