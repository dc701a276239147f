//! How the pool of microVMs is filled: a pure decision.

use std::time::Duration;

use warren_vmm::control::Tier;

/// While starts arrive closer together than this, refilling waits: it would take their CPU.
const QUIET: Duration = Duration::from_millis(100);

/// So many microVMs in each tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tiers {
    /// Processes with KVM's objects.
    pub shells: u32,
    /// With the template's memory and state.
    pub loaded: u32,
    /// At their barrier.
    pub parked: u32,
}

impl Tiers {
    /// How many are in a tier.
    pub fn of(self, tier: Tier) -> u32 {
        match tier {
            Tier::Shell => self.shells,
            Tier::Loaded => self.loaded,
            Tier::Parked => self.parked,
        }
    }
}

/// What the pool is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// MicroVMs wanted in each tier.
    pub target: Tiers,
}

/// What to do about the pool now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refill {
    /// It is full.
    Full,
    /// Bring one to the second tier: from the first, or a new process.
    Now(Option<Tier>, Tier),
    /// Starts are arriving: look again after this time.
    After(Duration),
}

impl Policy {
    /// Decides from the microVMs that there are and the time since the last start.
    ///
    /// The highest tier is filled first, and from the next lower one that has any. Below a quarter of
    /// its target a tier no longer waits for a quiet moment: an empty pool costs the next start more
    /// than a busy CPU does.
    pub fn refill(self, now: Tiers, since_start: Duration) -> Refill {
        let lacking = |tier: &Tier| now.of(*tier) < self.target.of(*tier);
        let Some(to) = [Tier::Parked, Tier::Loaded, Tier::Shell].into_iter().find(lacking) else {
            return Refill::Full;
        };
        if now.of(to) >= self.target.of(to).div_ceil(4) && since_start < QUIET {
            return Refill::After(QUIET.saturating_sub(since_start));
        }
        let from = [Tier::Loaded, Tier::Shell].into_iter().find(|t| *t < to && now.of(*t) > 0);
        Refill::Now(from, to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSY: Duration = Duration::from_millis(1);

    fn tiers(shells: u32, loaded: u32, parked: u32) -> Tiers {
        Tiers { shells, loaded, parked }
    }

    #[test]
    fn waits_for_quiet_only_while_enough_are_parked() {
        let policy = Policy { target: tiers(0, 0, 64) };
        let refill = |parked, since| policy.refill(tiers(0, 0, parked), since);
        assert_eq!(refill(64, BUSY), Refill::Full);
        assert_eq!(refill(16, BUSY), Refill::After(Duration::from_millis(99)));
        assert_eq!(refill(15, BUSY), Refill::Now(None, Tier::Parked));
        assert_eq!(refill(63, QUIET), Refill::Now(None, Tier::Parked));
    }

    #[test]
    fn a_pool_of_none_is_full_and_a_pool_of_one_is_refilled_at_once() {
        let none = Policy { target: Tiers::default() };
        assert_eq!(none.refill(Tiers::default(), Duration::ZERO), Refill::Full);
        let one = Policy { target: tiers(0, 0, 1) };
        let now = Refill::Now(None, Tier::Parked);
        assert_eq!(one.refill(Tiers::default(), Duration::ZERO), now);
    }

    /// Whatever there is at first, the pool comes to hold what it is to, and no step undoes another.
    #[test]
    fn every_tier_fills_up_from_the_one_below_or_anew() {
        let target = tiers(3, 2, 4);
        for now in [tiers(0, 0, 0), tiers(3, 0, 0), tiers(0, 2, 1), tiers(5, 5, 0)] {
            let mut now = now;
            let mut steps = 0;
            while let Refill::Now(from, to) = (Policy { target }).refill(now, QUIET) {
                for (tier, change) in from.map(|from| (from, -1)).into_iter().chain([(to, 1)]) {
                    let field = match tier {
                        Tier::Shell => &mut now.shells,
                        Tier::Loaded => &mut now.loaded,
                        Tier::Parked => &mut now.parked,
                    };
                    *field =
                        field.checked_add_signed(change).expect("only from where there is one");
                }
                steps += 1;
                assert!(steps < 30, "it does not come to an end");
            }
            for tier in [Tier::Shell, Tier::Loaded, Tier::Parked] {
                assert!(now.of(tier) >= target.of(tier), "{now:?}");
            }
        }
    }
}
