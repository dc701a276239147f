//! The clock that spans are measured on.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// The beginning of a span, on `CLOCK_MONOTONIC` and on the wall clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start_ns: u64,
    /// Wall clock at the beginning, in nanoseconds since 1970.
    pub unix_ns: u64,
}

impl Clock {
    /// Begins now.
    pub fn start() -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { start_ns: monotonic_ns(), unix_ns: unix.as_nanos() as u64 }
    }

    /// Nanoseconds from the beginning to a moment on `CLOCK_MONOTONIC`; 0 if it lies before.
    pub fn since(self, monotonic_ns: u64) -> u64 {
        monotonic_ns.saturating_sub(self.start_ns)
    }

    /// A moment on `CLOCK_MONOTONIC`, perhaps before the beginning, in nanoseconds since 1970.
    pub fn unix_at(self, monotonic_ns: u64) -> u64 {
        self.unix_ns.wrapping_add(monotonic_ns.wrapping_sub(self.start_ns))
    }

    /// Nanoseconds from the beginning until now.
    pub fn elapsed(self) -> u64 {
        self.since(monotonic_ns())
    }
}

/// Nanoseconds on `CLOCK_MONOTONIC`.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("Linux has this clock");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}
