//! Which gateway fires the timers: one at a time, and the same one as long as it can. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// A gateway whose stream ended goes on to fire, and comes back within a second if it can. Another one
/// is told to after this time.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Who fires.
#[derive(Debug)]
pub struct Duty {
    /// Name of the gateway that was told so last.
    last: Option<String>,
    /// Its stream; none: it went away.
    holder: Option<u64>,
    vacant_since: Instant,
}

impl Duty {
    /// Nobody watches yet; `last` was told so before.
    pub fn new(last: Option<String>, now: Instant) -> Self {
        Self { last, holder: None, vacant_since: now }
    }

    /// Whether the gateway of this name and stream fires from now on.
    pub fn take(&mut self, stream: u64, name: &str, now: Instant) -> bool {
        let is_due = match &self.last {
            None => true,
            Some(last) => last == name || now.duration_since(self.vacant_since) >= PATIENCE,
        };
        if self.holder.is_none() && is_due {
            self.holder = Some(stream);
            self.last = Some(name.to_owned());
        }
        self.holder == Some(stream)
    }

    /// A stream ended.
    pub fn leave(&mut self, stream: u64, now: Instant) {
        if self.holder == Some(stream) {
            self.holder = None;
            self.vacant_since = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_fires_until_it_is_away_for_long() {
        let mut now = Instant::now();
        let mut duty = Duty::new(None, now);
        assert!(duty.take(1, "a", now) && duty.take(1, "a", now));
        assert!(!duty.take(2, "b", now));
        duty.leave(2, now);
        assert!(!duty.take(3, "b", now), "it was not the one that left");
        duty.leave(1, now);
        now += PATIENCE / 2;
        assert!(!duty.take(3, "b", now));
        assert!(duty.take(4, "a", now), "it came back");
        assert!(!duty.take(3, "b", now + PATIENCE));
        duty.leave(4, now);
        now += PATIENCE;
        assert!(duty.take(3, "b", now));
        assert!(!duty.take(5, "a", now), "it was too late");
    }

    #[test]
    fn a_restart_waits_for_the_one_that_fired() {
        let now = Instant::now();
        let mut duty = Duty::new(Some("a".into()), now);
        assert!(!duty.take(1, "b", now));
        assert!(duty.take(2, "a", now));
        let mut duty = Duty::new(Some("a".into()), now);
        assert!(duty.take(1, "b", now + PATIENCE));
    }
}
