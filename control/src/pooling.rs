//! How many microVMs of each template a host should hold parked: by how many starts were placed there of
//! late, decided without any I/O.
//!
//! What starts take has to last until the host knows of it and has others parked. So many more at
//! once, and fewer only after a while in which fewer were enough.

use std::collections::{BTreeMap, HashMap, VecDeque};

/// Seconds in which starts are answered from what is parked: until the next heartbeat tells the host,
/// and it has refilled its pool.
const REFILL: u64 = 2;
/// What was so many seconds ago, or longer, is forgotten.
const MEMORY: u64 = 300;
/// So much more than was ever needed in that time, in hundredths.
const SAFETY: u32 = 150;

/// The starts that were placed on a host, of late, by template.
#[derive(Clone, Debug, Default)]
pub struct Demand(BTreeMap<String, Starts>);

impl Demand {
    /// A start of a template is placed there, in this second on a clock that does not go back.
    pub fn start(&mut self, template: &str, second: u64) {
        self.0.entry(template.to_owned()).or_default().add(second);
    }

    /// The host has these templates, and no others any more.
    pub fn keep(&mut self, has: impl Fn(&str) -> bool) {
        self.0.retain(|template, _| has(template));
    }

    /// How many of each template should be parked now; of all together, not more than there are slots
    /// without an instance. If those are too few, each template has its share of them.
    pub fn parked(&self, second: u64, mut free: u32) -> HashMap<String, u32> {
        let enough: Vec<_> = self.0.iter().map(|(name, it)| (name, it.enough(second))).collect();
        let mut wanted: u64 = enough.iter().map(|(_, parked)| u64::from(*parked)).sum();
        let mut of = |enough: u32| {
            let share = match u64::from(enough) {
                all if wanted <= u64::from(free) => all,
                all => all * u64::from(free) / wanted,
            };
            // The next one's share is of what is left, and the last one has all of that.
            wanted -= u64::from(enough);
            free -= share as u32;
            share as u32
        };
        enough.into_iter().map(|(name, parked)| (name.clone(), of(parked))).collect()
    }
}

/// The starts of one template.
#[derive(Clone, Debug, Default)]
struct Starts {
    /// Seconds in which there were any, in their order, with how many.
    seconds: VecDeque<(u64, u32)>,
}

impl Starts {
    fn add(&mut self, second: u64) {
        self.forget(second);
        match self.seconds.back_mut() {
            Some((last, starts)) if *last == second => *starts = starts.saturating_add(1),
            _ => self.seconds.push_back((second, 1)),
        }
    }

    /// How many should be parked, if there are slots for them.
    fn enough(&self, second: u64) -> u32 {
        let old = self.seconds.partition_point(|(then, _)| then + MEMORY <= second);
        let within = |last: usize| {
            let (end, _) = self.seconds[last];
            let recent = self.seconds.range(old..=last).rev();
            let within = recent.take_while(move |(then, _)| then + REFILL > end);
            within.fold(0, |sum: u32, (_, starts)| sum.saturating_add(*starts))
        };
        let most = (old..self.seconds.len()).map(within).max().unwrap_or_default();
        most.saturating_mul(SAFETY).div_ceil(100)
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

    fn starts(numbers: &[u32]) -> Starts {
        let mut starts = Starts::default();
        for (second, number) in (0..).zip(numbers) {
            (0..*number).for_each(|_| starts.add(second));
        }
        starts
    }

    #[test]
    fn a_burst_is_remembered_for_five_minutes() {
        let starts = starts(&[0, 10, 4, 1]);
        assert_eq!(starts.enough(3), 21, "half as many again as 10 and 4");
        assert_eq!(starts.enough(300), 21);
        assert_eq!(starts.enough(301), 8, "the 10 are forgotten");
        assert_eq!(starts.enough(303), 0);
        assert_eq!(Starts::default().enough(0), 0);
    }

    #[test]
    fn templates_are_told_apart_and_forgotten_when_they_are_no_more() {
        let mut demand = Demand::default();
        (0..4).for_each(|_| demand.start("small", 0));
        (0..2).for_each(|_| demand.start("large", 0));
        let parked = |demand: &Demand, free| demand.parked(0, free);
        assert_eq!(parked(&demand, 100), [("small".into(), 6), ("large".into(), 3)].into());
        assert_eq!(parked(&demand, 3), [("small".into(), 2), ("large".into(), 1)].into());
        assert_eq!(parked(&demand, 0), [("small".into(), 0), ("large".into(), 0)].into());
        demand.keep(|template| template == "large");
        assert_eq!(parked(&demand, 100), [("large".into(), 3)].into());
    }

    proptest! {
        /// Who holds what is said each second has enough for the same starts once more, whatever they
        /// were.
        #[test]
        fn there_are_enough_for_the_same_once_more(
            numbers in prop::collection::vec(0_u32..50, 1..30),
        ) {
            let now = numbers.len() as u64 - 1;
            let enough = starts(&numbers).enough(now);
            for window in numbers.windows(REFILL as usize).chain([&numbers[..1]]) {
                prop_assert!(enough >= window.iter().sum::<u32>());
            }
            let most = numbers.windows(REFILL as usize).map(|w| w.iter().sum::<u32>()).max();
            let most = most.unwrap_or(numbers[0]);
            prop_assert!(enough <= most * 2, "nor many more than that");
        }

        #[test]
        fn more_starts_never_mean_fewer_parked_and_in_the_end_there_are_none(
            numbers in prop::collection::vec(0_u32..50, 1..30),
            more in 0_usize..30,
        ) {
            let now = numbers.len() as u64 - 1;
            let fewer = starts(&numbers);
            let mut with = numbers.clone();
            with[more % numbers.len()] += 1;
            prop_assert!(starts(&with).enough(now) >= fewer.enough(now));
            prop_assert_eq!(fewer.enough(now + MEMORY), 0);
        }

        /// However long it goes on.
        #[test]
        fn little_is_remembered(seconds in prop::collection::vec(0_u64..100, 1..1000)) {
            let (mut starts, mut now) = (Starts::default(), 0);
            for pause in seconds {
                now += pause;
                starts.add(now);
                prop_assert!(starts.seconds.len() as u64 <= MEMORY);
            }
        }

        /// All templates together have what they want or all that there is, and each its share of it.
        #[test]
        fn free_slots_are_shared_out(
            numbers in prop::collection::vec(0_u32..50, 1..6),
            free in 0_u32..200,
        ) {
            let templates = numbers.iter().enumerate().map(|(n, number)| {
                (format!("template-{n}"), starts(&[*number]))
            });
            let demand = Demand(templates.collect());
            let (parked, wanted) = (demand.parked(0, free), demand.parked(0, u32::MAX));
            let all: u32 = wanted.values().sum();
            prop_assert_eq!(parked.values().sum::<u32>(), all.min(free));
            for (template, wanted) in &wanted {
                let fair = (u64::from(*wanted) * u64::from(free)).checked_div(u64::from(all));
                let fair = fair.unwrap_or_default().min(u64::from(*wanted)) as u32;
                prop_assert!(parked[template] <= *wanted);
                prop_assert!(parked[template].abs_diff(fair) <= numbers.len() as u32);
            }
        }
    }
}
