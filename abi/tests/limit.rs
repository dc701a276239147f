//! Rates, over all that may come.

use proptest::prelude::*;
use warren_abi::limit::{Bucket, MAX_RATE, Tally};

const SECOND: u64 = 1_000_000_000;

proptest! {
    /// Whatever comes whenever: in no stretch of time passes more than the rate allows, but for
    /// what may come at once and the last one; and what comes no faster than the rate all passes.
    #[test]
    fn a_rate_is_kept(
        rate in 1u64..1_000_000,
        ahead_ns in 1u64..2 * SECOND,
        arrivals in prop::collection::vec((0u64..SECOND / 10, 1u64..2000), 1..200),
    ) {
        let mut bucket = Bucket::per_second(rate);
        let (mut now, mut passed, mut last) = (SECOND, 0u64, 0);
        for (wait, units) in arrivals {
            now += wait;
            if let Some(due_ns) = bucket.admit(units, now, ahead_ns) {
                bucket.due_ns = due_ns;
                passed += units;
                last = units;
            }
            let since = u128::from(now - SECOND + ahead_ns);
            let most = since * u128::from(rate) / u128::from(SECOND) + u128::from(last) + 1;
            // A rate is held to within a part in 2^20.
            prop_assert!(u128::from(passed) <= most + most / 500_000, "{passed} of {most}");
        }
        now = now.max(bucket.due_ns);
        for _ in 0..100 {
            let due_ns = bucket.admit(1, now, ahead_ns);
            prop_assert!(due_ns.is_some());
            bucket.due_ns = due_ns.unwrap_or(0);
            now = bucket.due_ns.max(now);
        }
    }

    #[test]
    fn a_rate_reads_back(rate in 0u64..=1_000_000_000) {
        let found = Bucket::per_second(rate).rate();
        prop_assert!(found.abs_diff(rate) <= rate / 1_000_000 + rate * rate / 500_000_000_000_000);
    }
}

#[test]
fn without_a_limit_all_pass_and_the_largest_rate_is_one() {
    assert_eq!(Bucket::per_second(0).admit(1 << 40, 5, 1), Some(5));
    assert_eq!(Bucket::per_second(0).rate(), 0);
    assert!(Bucket::per_second(MAX_RATE).cost > 0);
}

#[test]
fn a_tally_is_of_one_attachment() {
    let two = Tally::new(7, 2);
    assert_eq!((two.count(7), two.count(6)), (2, 0));
    assert_eq!(two.more(7, 3), Some(Tally::new(7, 3)));
    assert_eq!(two.more(7, 2), None);
    assert_eq!(two.more(7, 0), Some(Tally::new(7, 3)));
    assert_eq!(two.more(8, 1), Some(Tally::new(8, 1)), "the next tenant begins with none");
    assert_eq!(two.less(7), Some(Tally::new(7, 1)));
    assert_eq!(two.less(6), None, "what a former tenant leaves is not this one's");
    assert_eq!(Tally::new(7, 0).less(7), None);
}
