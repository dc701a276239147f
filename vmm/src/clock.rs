//! The host's clocks, in nanoseconds.

use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

use crate::control::EndReason;
use crate::machine::host;

/// `CLOCK_MONOTONIC`.
pub fn monotonic_ns() -> Result<u64, EndReason> {
    read(ClockId::CLOCK_MONOTONIC)
}

/// `CLOCK_REALTIME`.
pub fn wall_clock_ns() -> Result<u64, EndReason> {
    read(ClockId::CLOCK_REALTIME)
}

/// What this thread has used of a processor (`CLOCK_THREAD_CPUTIME_ID`), its guest's share included.
pub fn processor_time() -> Result<Duration, EndReason> {
    read(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from_nanos)
}

fn read(clock: ClockId) -> Result<u64, EndReason> {
    clock_gettime(clock).map(nanoseconds).map_err(|errno| host(&errno))
}

fn nanoseconds(time: TimeSpec) -> u64 {
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}
