//! How the pool of microVMs is filled: a pure decision.

use std::time::Duration;

use warren_vmm::control::Tier;

/// While starts arrive closer together than this, refilling waits: it would take their CPU.
const QUIET: Duration = Duration::from_millis(100);

/// What is too much is kept for so long after the last start.
const IDLE: Duration = Duration::from_mins(1);

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
    /// MicroVMs in each tier at least.
    least: Tiers,
    /// MicroVMs that are parked at most, whoever wants more.
    parked_most: u32,
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
    /// End one of this tier: there are more than are wanted.
    End(Tier),
}

impl Policy {
    /// At least so many in each tier, at most so many parked, and all together not more than there are
    /// slots: what is configured comes before what is wanted.
    pub fn new(least: Tiers, parked_most: u32, slots: u32) -> Self {
        let room = slots.saturating_sub(least.shells).saturating_sub(least.loaded);
        Self { least, parked_most: parked_most.min(room).max(least.parked) }
    }

    /// MicroVMs in each tier, if the control plane wants so many parked; none: it did not say.
    pub fn target(self, wanted: Option<u32>) -> Tiers {
        let parked = wanted.unwrap_or_default().clamp(self.least.parked, self.parked_most);
        Tiers { parked, ..self.least }
    }

    /// Decides from the microVMs that there are, the time since the last start, and what the control
    /// plane wants.
    ///
    /// The highest tier is filled first, and from the next lower one that has any. Below a quarter of
    /// its target a tier no longer waits for a quiet moment: an empty pool costs the next start more
    /// than a busy CPU does. What there is too much of is kept as long as starts come.
    pub fn refill(self, now: Tiers, since_start: Duration, wanted: Option<u32>) -> Refill {
        let target = self.target(wanted);
        let lacking = |tier: &Tier| now.of(*tier) < target.of(*tier);
        let tiers = [Tier::Parked, Tier::Loaded, Tier::Shell];
        let Some(to) = tiers.into_iter().find(lacking) else {
            let surplus = tiers.into_iter().find(|tier| now.of(*tier) > target.of(*tier));
            return surplus.filter(|_| since_start >= IDLE).map_or(Refill::Full, Refill::End);
        };
        if now.of(to) >= target.of(to).div_ceil(4) && since_start < QUIET {
            return Refill::After(QUIET.saturating_sub(since_start));
        }
        let from = [Tier::Loaded, Tier::Shell].into_iter().find(|t| *t < to && now.of(*t) > 0);
        Refill::Now(from, to)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BUSY: Duration = Duration::from_millis(1);

    fn tiers(shells: u32, loaded: u32, parked: u32) -> Tiers {
        Tiers { shells, loaded, parked }
    }

    fn policy(shells: u32, loaded: u32, parked: u32) -> Policy {
        Policy::new(tiers(shells, loaded, parked), 100, 1000)
    }

    #[test]
    fn waits_for_quiet_only_while_enough_are_parked() {
        let refill = |parked, since| policy(0, 0, 64).refill(tiers(0, 0, parked), since, None);
        assert_eq!(refill(64, BUSY), Refill::Full);
        assert_eq!(refill(16, BUSY), Refill::After(Duration::from_millis(99)));
        assert_eq!(refill(15, BUSY), Refill::Now(None, Tier::Parked));
        assert_eq!(refill(63, QUIET), Refill::Now(None, Tier::Parked));
    }

    #[test]
    fn a_pool_of_none_is_full_and_a_pool_of_one_is_refilled_at_once() {
        let refill = |policy: Policy| policy.refill(Tiers::default(), Duration::ZERO, None);
        assert_eq!(refill(policy(0, 0, 0)), Refill::Full);
        assert_eq!(refill(policy(0, 0, 1)), Refill::Now(None, Tier::Parked));
    }

    #[test]
    fn more_are_parked_while_they_are_wanted_and_ended_when_it_is_idle() {
        let policy = policy(0, 0, 4);
        let refill = |parked, since, wanted| policy.refill(tiers(0, 0, parked), since, wanted);
        assert_eq!(refill(4, QUIET, Some(10)), Refill::Now(None, Tier::Parked));
        assert_eq!(refill(10, QUIET, Some(10)), Refill::Full);
        assert_eq!(refill(10, QUIET, None), Refill::Full);
        assert_eq!(refill(10, IDLE, None), Refill::End(Tier::Parked));
        assert_eq!(refill(4, IDLE, Some(1)), Refill::Full);
    }

    proptest! {
        #[test]
        fn what_is_configured_is_held_to_whatever_is_wanted(
            (shells, loaded, parked) in (0_u32..20, 0_u32..20, 0_u32..20),
            (most, more) in (0_u32..100, 0_u32..100),
            wanted in prop::option::of(any::<u32>()),
        ) {
            let (least, slots) = (tiers(shells, loaded, parked), shells + loaded + parked + more);
            let target = Policy::new(least, most, slots).target(wanted);
            prop_assert_eq!((target.shells, target.loaded), (shells, loaded));
            prop_assert!(target.parked >= parked && target.parked <= parked.max(most));
            prop_assert!(target.shells + target.loaded + target.parked <= slots);
            prop_assert!(target.parked >= wanted.unwrap_or(0).min(most).min(parked + more));
        }

        /// Whatever there is at first, the pool comes to hold what it is to, and no step undoes another.
        #[test]
        fn every_tier_comes_to_hold_what_it_is_to(
            (shells, loaded, parked) in (0_u32..6, 0_u32..6, 0_u32..6),
            wanted in prop::option::of(0_u32..9),
        ) {
            let policy = policy(3, 2, 4);
            let mut now = tiers(shells, loaded, parked);
            for _ in 0..40 {
                let (less, more) = match policy.refill(now, IDLE, wanted) {
                    Refill::Now(from, to) => (from, Some(to)),
                    Refill::End(tier) => (Some(tier), None),
                    _ => break,
                };
                let changes = less.map(|tier| (tier, -1)).into_iter();
                for (tier, change) in changes.chain(more.map(|tier| (tier, 1))) {
                    let field = match tier {
                        Tier::Shell => &mut now.shells,
                        Tier::Loaded => &mut now.loaded,
                        Tier::Parked => &mut now.parked,
                    };
                    *field =
                        field.checked_add_signed(change).expect("only from where there is one");
                }
            }
            prop_assert_eq!(now, policy.target(wanted));
        }
    }
}
