//! When to make more parked microVMs: a pure decision.

use std::time::Duration;

/// While starts arrive closer together than this, refilling waits: it would take their CPU.
const QUIET: Duration = Duration::from_millis(100);

/// What the pool is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Parked microVMs wanted.
    pub target: u32,
}

/// What to do about the pool now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refill {
    /// It is full.
    Full,
    /// Make one more.
    Now,
    /// Starts are arriving: look again after this time.
    After(Duration),
}

impl Policy {
    /// Decides from the number of parked microVMs and the time since the last start.
    ///
    /// Below a quarter of the target it no longer waits for a quiet moment: an empty pool costs
    /// the next start more than a busy CPU does.
    pub fn refill(self, parked: u32, since_start: Duration) -> Refill {
        if parked >= self.target {
            Refill::Full
        } else if parked < self.target.div_ceil(4) || since_start >= QUIET {
            Refill::Now
        } else {
            Refill::After(QUIET.saturating_sub(since_start))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_quiet_only_while_enough_are_parked() {
        let policy = Policy { target: 64 };
        let busy = Duration::from_millis(1);
        assert_eq!(policy.refill(64, busy), Refill::Full);
        assert_eq!(policy.refill(16, busy), Refill::After(Duration::from_millis(99)));
        assert_eq!(policy.refill(15, busy), Refill::Now);
        assert_eq!(policy.refill(63, QUIET), Refill::Now);
    }

    #[test]
    fn a_pool_of_none_is_full_and_a_pool_of_one_is_refilled_at_once() {
        assert_eq!(Policy { target: 0 }.refill(0, Duration::ZERO), Refill::Full);
        assert_eq!(Policy { target: 1 }.refill(0, Duration::ZERO), Refill::Now);
    }
}
