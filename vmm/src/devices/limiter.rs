//! Rate limits: token buckets for bytes and operations.
//!
//! Pure: the caller says what time it is. A bucket lets through what arrives while it holds
//! anything, also if that is more than it holds; the rest is a debt that is paid before anything
//! else passes. So an item never waits for a bucket that is smaller than the item, and in any time
//! `t` no more than `burst + rate * t` and one item pass.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// How much may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What passes in the long run, in units (bytes, or operations) per second.
    pub per_second: NonZeroU64,
    /// What passes at once after a pause, in the same units. 0 is as good as 1.
    pub burst: u64,
}

impl Limit {
    /// So much per second, and what that is in 100 ms at once.
    pub fn per_second(per_second: NonZeroU64) -> Self {
        Self { per_second, burst: per_second.get() / 10 }
    }
}

/// A bucket of tokens.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    limit: Limit,
    /// When it is full again; a time that has passed means that it is.
    full_at: Instant,
}

impl Bucket {
    /// A full bucket.
    pub fn new(limit: Limit, now: Instant) -> Self {
        Self { limit, full_at: now }
    }

    /// When something may pass next; at once if that time has passed.
    pub fn ready_at(&self) -> Instant {
        // One token must be there.
        let burst = self.duration(self.limit.burst.saturating_sub(1));
        self.full_at.checked_sub(burst).unwrap_or(self.full_at)
    }

    /// Takes tokens out for what passes at this time.
    pub fn take(&mut self, tokens: u64, now: Instant) {
        let from = self.full_at.max(now);
        // Of a debt that no clock can count, the first century is enough.
        let century = Duration::from_hours(100 * 365 * 24);
        self.full_at = from + self.duration(tokens).min(century);
    }

    /// How long so many tokens take to come, rounded up to nanoseconds.
    fn duration(&self, tokens: u64) -> Duration {
        let nanoseconds = u128::from(tokens) * 1_000_000_000;
        let nanoseconds = nanoseconds.div_ceil(self.limit.per_second.get().into());
        Duration::from_nanos(nanoseconds.try_into().unwrap_or(u64::MAX))
    }
}

/// Limits of one direction of a device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Limiter {
    /// A limiter with full buckets; `None` is no limit.
    pub fn new(bytes: Option<Limit>, operations: Option<Limit>, now: Instant) -> Self {
        let bucket = |limit: Option<Limit>| limit.map(|limit| Bucket::new(limit, now));
        Self { bytes: bucket(bytes), operations: bucket(operations) }
    }

    /// One with full buckets of these rates per second; `None` is no limit.
    pub fn of_rates(bytes: Option<NonZeroU64>, operations: Option<NonZeroU64>) -> Self {
        let limit = |rate: Option<NonZeroU64>| rate.map(Limit::per_second);
        Self::new(limit(bytes), limit(operations), Instant::now())
    }

    /// When an operation may pass next, if that time is still to come.
    pub fn wait_until(&self, now: Instant) -> Option<Instant> {
        let ready = self.bytes.iter().chain(&self.operations).map(Bucket::ready_at).max()?;
        (ready > now).then_some(ready)
    }

    /// One operation of so many bytes passes.
    pub fn pass(&mut self, bytes: u64, now: Instant) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes, now);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1, now);
        }
    }

    fn is_unlimited(&self) -> bool {
        self.bytes.is_none() && self.operations.is_none()
    }

    /// [`Limiter::wait_until`] from now on. The clock is not asked if nothing is limited.
    pub fn stopped_until(&self) -> Option<Instant> {
        if self.is_unlimited() { None } else { self.wait_until(Instant::now()) }
    }

    /// [`Limiter::pass`] now.
    pub fn passed(&mut self, bytes: usize) {
        if !self.is_unlimited() {
            self.pass(bytes as u64, Instant::now());
        }
    }
}
