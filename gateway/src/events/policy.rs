//! What becomes of an event after a delivery. Pure.

use std::time::Duration;

use warren_proto::v1::EventTrigger;

/// The first time until a failed delivery is made again, where the trigger does not say.
const BACKOFF: Duration = Duration::from_secs(1);
/// It does not become longer than this.
const BACKOFF_MAX: Duration = Duration::from_hours(1);

/// What becomes of an event whose delivery failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// It is delivered again after this time.
    Again(Duration),
    /// It becomes the event of this trigger.
    DeadLetter(String),
    /// It is dropped.
    Drop,
}

/// After `failed` deliveries, at least 1. What came as a dead letter does not become another one:
/// two triggers could send it to and fro for ever.
pub fn after_failure(trigger: &EventTrigger, failed: u32, is_dead_letter: bool) -> Next {
    if failed <= trigger.retries {
        let first = match trigger.backoff_ms {
            0 => BACKOFF,
            ms => Duration::from_millis(ms.into()),
        };
        let factor = 2_u32.checked_pow(failed - 1).unwrap_or(u32::MAX);
        return Next::Again(first.saturating_mul(factor).min(BACKOFF_MAX));
    }
    match trigger.dead_letter.as_str() {
        target if !target.is_empty() && !is_dead_letter => Next::DeadLetter(target.to_owned()),
        _ => Next::Drop,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trigger(retries: u32, backoff_ms: u32, dead_letter: &str) -> EventTrigger {
        EventTrigger { retries, backoff_ms, dead_letter: dead_letter.to_owned() }
    }

    #[test]
    fn each_time_after_twice_the_time_then_the_dead_letter() {
        let trigger = trigger(3, 100, "lost");
        let next = |failed| after_failure(&trigger, failed, false);
        let again = |ms| Next::Again(Duration::from_millis(ms));
        assert_eq!([next(1), next(2), next(3)], [again(100), again(200), again(400)]);
        assert_eq!(next(4), Next::DeadLetter("lost".into()));
        assert_eq!(after_failure(&trigger, 4, true), Next::Drop);
    }

    #[test]
    fn the_time_has_a_default_and_a_limit() {
        assert_eq!(after_failure(&trigger(1, 0, ""), 1, false), Next::Again(BACKOFF));
        assert_eq!(after_failure(&trigger(90, 0, ""), 80, false), Next::Again(BACKOFF_MAX));
        assert_eq!(after_failure(&trigger(0, 0, ""), 1, false), Next::Drop);
    }
}
