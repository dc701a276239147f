//! How the pools of microVMs are filled: pure decisions.

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

    /// How many there are in all.
    pub fn sum(self) -> u32 {
        [self.shells, self.loaded, self.parked].into_iter().fold(0, u32::saturating_add)
    }
}

/// How many each of a host's pools is to hold parked, of what is wanted of it: together with what they
/// are configured to hold, not more than there are slots. What is configured for one comes before what
/// is wanted of another; what is wanted of the first comes before what is wanted of the next.
pub fn bound(slots: u32, pools: &[(Policy, u32)]) -> Vec<u32> {
    let least = pools.iter().map(|(policy, _)| policy.least.sum()).fold(0, u32::saturating_add);
    let mut room = slots.saturating_sub(least);
    let bounded = pools.iter().map(|(policy, wanted)| {
        let least = policy.least.parked;
        let more = policy.target(Some(*wanted)).parked.saturating_sub(least).min(room);
        room -= more;
        least + more
    });
    bounded.collect()
}

/// What a pool is to hold.
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
    /// At least so many in each tier, and at most so many parked: if that is less, as many as at least.
    pub fn new(least: Tiers, parked_most: u32) -> Self {
        Self { least, parked_most: parked_most.max(least.parked) }
    }

    /// MicroVMs in each tier, if so many are wanted parked; none: the control plane did not say.
    pub fn target(self, wanted: Option<u32>) -> Tiers {
        let parked = wanted.unwrap_or_default().clamp(self.least.parked, self.parked_most);
        Tiers { parked, ..self.least }
    }

    /// Decides from the microVMs that there are, the time since the last start, and how many are wanted
    /// parked.
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
        Policy::new(tiers(shells, loaded, parked), 100)
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
            configured in prop::collection::vec(
                ((0_u32..20, 0_u32..20, 0_u32..20), 0_u32..100, any::<u32>()),
                1..5,
            ),
            more in 0_u32..100,
        ) {
            let pools = configured.iter().map(|((shells, loaded, parked), most, wanted)| {
                (Policy::new(tiers(*shells, *loaded, *parked), *most), *wanted)
            });
            let pools: Vec<_> = pools.collect();
            let slots = pools.iter().map(|(policy, _)| policy.least.sum()).sum::<u32>() + more;
            let bounded = bound(slots, &pools);
            let (mut all, mut unmet) = (0, false);
            for ((policy, wanted), bounded) in pools.iter().zip(&bounded) {
                let (alone, target) = (policy.target(Some(*wanted)), policy.target(Some(*bounded)));
                prop_assert_eq!(target, Tiers { parked: *bounded, ..policy.least });
                prop_assert!((policy.least.parked..=alone.parked).contains(bounded));
                all += target.sum();
                unmet |= *bounded < alone.parked;
            }
            prop_assert!(all <= slots);
            prop_assert!(all == slots || !unmet, "slots are left, and somebody wants them");
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
