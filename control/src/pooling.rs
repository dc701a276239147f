//! How many microVMs a host should hold parked: by how many starts were placed there of late, decided
//! without any I/O.
//!
//! What starts take has to last until the host knows of it and has others parked. So many more at
//! once, and fewer only after a while in which fewer were enough.

use std::collections::VecDeque;

/// Seconds in which starts are answered from what is parked: until the next heartbeat tells the host,
/// and it has refilled its pool.
const REFILL: u64 = 2;
/// What was so many seconds ago, or longer, is forgotten.
const MEMORY: u64 = 300;
/// So much more than was ever needed in that time, in hundredths.
const SAFETY: u32 = 150;

/// The starts that were placed on a host, of late.
#[derive(Clone, Debug, Default)]
pub struct Demand {
    /// Seconds in which there were any, in their order, with how many.
    seconds: VecDeque<(u64, u32)>,
}

impl Demand {
    /// A start is placed there, in this second on a clock that does not go back.
    pub fn start(&mut self, second: u64) {
        self.forget(second);
        match self.seconds.back_mut() {
            Some((last, starts)) if *last == second => *starts = starts.saturating_add(1),
            _ => self.seconds.push_back((second, 1)),
        }
    }

    /// How many should be parked now, of so many slots without an instance.
    pub fn parked(&self, second: u64, free: u32) -> u32 {
        let old = self.seconds.partition_point(|(then, _)| then + MEMORY <= second);
        let within = |last: usize| {
            let (end, _) = self.seconds[last];
            let recent = self.seconds.range(old..=last).rev();
            let within = recent.take_while(move |(then, _)| then + REFILL > end);
            within.fold(0, |sum: u32, (_, starts)| sum.saturating_add(*starts))
        };
        let most = (old..self.seconds.len()).map(within).max().unwrap_or_default();
        most.saturating_mul(SAFETY).div_ceil(100).min(free)
    }

    fn forget(&mut self, second: u64) {
        while self.seconds.front().is_some_and(|(then, _)| then + MEMORY <= second) {
            self.seconds.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn demand(starts: &[u32]) -> Demand {
        let mut demand = Demand::default();
        for (second, starts) in (0..).zip(starts) {
            (0..*starts).for_each(|_| demand.start(second));
        }
        demand
    }

    #[test]
    fn a_burst_is_remembered_for_five_minutes() {
        let demand = demand(&[0, 10, 4, 1]);
        assert_eq!(demand.parked(3, 100), 21, "half as many again as 10 and 4");
        assert_eq!(demand.parked(300, 100), 21);
        assert_eq!(demand.parked(301, 100), 8, "the 10 are forgotten");
        assert_eq!(demand.parked(303, 100), 0);
        assert_eq!(Demand::default().parked(0, 100), 0);
    }

    proptest! {
        /// Who holds what is said each second has enough for the same starts once more, whatever they
        /// were, unless there are not so many slots.
        #[test]
        fn there_are_enough_for_the_same_once_more(
            starts in prop::collection::vec(0_u32..50, 1..30),
            free in 0_u32..200,
        ) {
            let now = starts.len() as u64 - 1;
            let parked = demand(&starts).parked(now, free);
            prop_assert!(parked <= free);
            for window in starts.windows(REFILL as usize).chain([&starts[..1]]) {
                prop_assert!(parked >= window.iter().sum::<u32>().min(free));
            }
            let most = starts.windows(REFILL as usize).map(|w| w.iter().sum::<u32>()).max();
            let most = most.unwrap_or(starts[0]);
            prop_assert!(parked <= most * 2, "nor many more than that");
        }

        #[test]
        fn more_starts_never_mean_fewer_parked_and_in_the_end_there_are_none(
            starts in prop::collection::vec(0_u32..50, 1..30),
            more in 0_usize..30,
        ) {
            let now = starts.len() as u64 - 1;
            let fewer = demand(&starts);
            let mut with = starts.clone();
            with[more % starts.len()] += 1;
            prop_assert!(demand(&with).parked(now, 1000) >= fewer.parked(now, 1000));
            prop_assert_eq!(fewer.parked(now + MEMORY, 1000), 0);
        }

        /// However long it goes on.
        #[test]
        fn little_is_remembered(seconds in prop::collection::vec(0_u64..100, 1..1000)) {
            let (mut demand, mut now) = (Demand::default(), 0);
            for pause in seconds {
                now += pause;
                demand.start(now);
                prop_assert!(demand.seconds.len() as u64 <= MEMORY);
            }
        }
    }
}
