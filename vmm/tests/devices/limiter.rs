//! Token buckets against what they promise.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use warren_vmm::devices::limiter::{Bucket, Limit, Limiter};

fn limit(per_second: u64, burst: u64) -> Limit {
    Limit { per_second: NonZeroU64::new(per_second).unwrap(), burst }
}

proptest! {
    /// In any stretch of time no more passes than burst, rate and one item allow.
    #[test]
    fn no_stretch_of_time_lets_more_through(
        per_second in 1u64..1_000_000,
        burst in 0u64..100_000,
        items in proptest::collection::vec((1u64..70_000, 0u64..50_000_000), 1..100),
    ) {
        let begin = Instant::now();
        let mut bucket = Bucket::new(limit(per_second, burst), begin);
        let (mut now, mut passed) = (begin, Vec::new());
        for (tokens, pause) in items {
            now += Duration::from_nanos(pause);
            if bucket.ready_at() <= now {
                bucket.take(tokens, now);
                passed.push((now, tokens));
            }
        }
        for first in 0..passed.len() {
            let mut sum = 0;
            for &(time, tokens) in &passed[first..] {
                let allowed = u128::from(burst.max(1)) * 1_000_000_000
                    + u128::from(per_second) * (time - passed[first].0).as_nanos();
                // Without the last item, which may be a debt.
                prop_assert!(u128::from(sum) * 1_000_000_000 <= allowed);
                sum += tokens;
            }
        }
    }

    /// Who always waits as long as he is told gets the whole rate.
    #[test]
    fn waiting_as_told_gives_the_whole_rate(
        per_second in 1u64..1_000_000,
        burst in 0u64..10_000,
        items in proptest::collection::vec(1u64..10_000, 1..100),
    ) {
        let begin = Instant::now();
        let mut bucket = Bucket::new(limit(per_second, burst), begin);
        let mut now = begin;
        for &tokens in &items {
            now = now.max(bucket.ready_at());
            bucket.take(tokens, now);
        }
        let total: u64 = items[..items.len() - 1].iter().sum();
        let needed = (total + 1).saturating_sub(burst.max(1)) as f64 / per_second as f64;
        let took = (now - begin).as_secs_f64();
        // Each item is rounded up to a nanosecond.
        prop_assert!((took - needed).abs() < 1e-6, "{took} s instead of {needed}");
    }

    /// No times and numbers overflow.
    #[test]
    fn the_largest_numbers_are_harmless(
        per_second in 1u64..,
        burst: u64,
        tokens: [u64; 8],
    ) {
        let now = Instant::now();
        let mut bucket = Bucket::new(limit(per_second, burst), now);
        for tokens in tokens {
            bucket.take(tokens, now);
            let _ = bucket.ready_at();
        }
    }
}

#[test]
fn both_limits_hold_and_the_later_time_counts() {
    let now = Instant::now();
    let mut limiter = Limiter::new(Some(limit(1000, 1000)), Some(limit(10, 2)), now);
    assert_eq!(limiter.wait_until(now), None);
    limiter.pass(10, now);
    assert_eq!(limiter.wait_until(now), None);
    limiter.pass(10, now);
    // No operation is left; in 100 ms there is one.
    let wait = limiter.wait_until(now).unwrap() - now;
    assert_eq!(wait, Duration::from_millis(100));
    let later = now + wait;
    assert_eq!(limiter.wait_until(later), None);
    // A debt of bytes: 1000 were there, and 3000 are taken; the first byte is there after 2 s.
    limiter.pass(3000, later);
    let wait = limiter.wait_until(later).unwrap() - later;
    assert_eq!(wait, Duration::from_millis(2001));
}

#[test]
fn no_limit_lets_everything_through() {
    let now = Instant::now();
    let mut limiter = Limiter::default();
    limiter.pass(u64::MAX, now);
    assert_eq!(limiter.wait_until(now), None);
}
