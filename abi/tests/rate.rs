//! How fast packets may come.

use proptest::prelude::*;
use warren_abi::rate::Rate;

proptest! {
    /// In any span of time pass at most the burst and one packet for each interval; and who keeps
    /// to the interval always passes.
    #[test]
    fn a_rate_is_kept(
        gaps in prop::collection::vec(0u64..50, 1..200),
        interval_ns in 1u64..20,
        burst in 1u64..10,
    ) {
        let rate = Rate { interval_ns, burst };
        let (mut now, mut due, mut passed) = (1_000, 0, Vec::new());
        for gap in gaps {
            now += gap;
            let waited = passed.last().is_none_or(|last| now - last >= interval_ns);
            match rate.admit(due, now) {
                Some(next) => {
                    due = next;
                    passed.push(now);
                }
                None => prop_assert!(!waited || burst > 1, "{now} was refused"),
            }
        }
        for (index, first) in passed.iter().enumerate() {
            for (count, last) in (1..).zip(&passed[index..]) {
                prop_assert!(count <= burst + (last - first) / interval_ns);
            }
        }
        prop_assert!(rate.admit(due, due).is_some(), "all is forgotten in the end");
    }
}
