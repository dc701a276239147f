//! Time, from the time stamp counter.

use core::arch::x86_64::_rdtsc;

use smoltcp::time::Instant;
use warren_abi::microvm::Identity;

/// Nanoseconds since release, and the wall clock.
#[derive(Clone, Copy)]
pub struct Clock {
    tsc: u64,
    /// Nanoseconds per tick, times 2^32.
    scale: u64,
    wall_clock_ns: u64,
}

impl Clock {
    /// The clock of a clone with this identity.
    pub fn new(identity: &Identity) -> Self {
        let scale = ((1_000_000_000u128 << 32) / u128::from(identity.tsc_hz.max(1))) as u64;
        Self { tsc: identity.tsc, scale, wall_clock_ns: identity.wall_clock_ns }
    }

    /// Nanoseconds since release.
    pub fn now_ns(&self) -> u64 {
        // SAFETY: reads a counter; ring 3 may (CR4.TSD is clear).
        let ticks = unsafe { _rdtsc() }.saturating_sub(self.tsc);
        ((u128::from(ticks) * u128::from(self.scale)) >> 32) as u64
    }

    /// Nanoseconds since 1970.
    pub fn wall_clock_ns(&self) -> u64 {
        self.wall_clock_ns + self.now_ns()
    }

    /// The same as [`Clock::now_ns`], for smoltcp.
    pub fn instant(&self) -> Instant {
        Instant::from_micros((self.now_ns() / 1000) as i64)
    }
}
