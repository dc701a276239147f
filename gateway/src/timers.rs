//! Timer triggers: each time becomes an event of the timer, which is then delivered as others are.
//!
//! Of several gateways the one fires that the control plane told so. It keeps that and when its
//! timers fired, and goes on alone when the control plane is away.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;

use crate::events::Events;
use crate::events::store::StoreError;
use crate::shared::SharedRoutes;

/// Times are met this exactly.
const TICK: Duration = Duration::from_millis(500);
/// A time that was missed by no more than this, because the gateway was not there, is made up for.
const MAKE_UP: SignedDuration = SignedDuration::from_secs(60);

/// An expression that is none.
#[derive(Debug, thiserror::Error)]
#[error("\"{text}\" is no cron expression: {problem}; write five fields, such as \"*/5 * * * *\"")]
pub struct CronError {
    text: String,
    problem: String,
}

/// Five fields as of crontab(5), in UTC.
pub fn parse(text: &str) -> Result<Cron, CronError> {
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
    let cron = parser.parse(text);
    cron.map_err(|error| CronError { text: text.to_owned(), problem: error.to_string() })
}

/// The last of its times after `since`, up to `now`. Those between are left out.
pub fn last_due(cron: &Cron, since: Timestamp, now: Timestamp) -> Option<Timestamp> {
    let now = now.to_zoned(TimeZone::UTC);
    let last = cron.find_previous_occurrence(&now, true).ok()?.timestamp();
    (last > since).then_some(last)
}

/// The timers of a gateway.
pub struct Timers {
    /// Where the times become events.
    pub events: Arc<Events>,
    /// The triggers.
    pub routes: SharedRoutes,
    /// Whether this gateway is the one that fires.
    pub fires: watch::Receiver<bool>,
}

impl Timers {
    /// Fires for ever, whenever this gateway is to.
    pub async fn run(mut self) {
        // What another gateway fired before must not be made up for: only a gateway that fires when
        // it starts goes on where it stopped.
        let mut goes_on = *self.fires.borrow();
        loop {
            if self.fires.wait_for(|fires| *fires).await.is_err() {
                return;
            }
            let mut fired = BTreeMap::new();
            let began = Timestamp::now();
            while *self.fires.borrow() {
                let from = |stored: Timestamp| if goes_on { stored } else { began };
                if let Err(error) = self.tick(&mut fired, from).await {
                    tracing::error!("timers: {error}");
                }
                tokio::time::sleep(TICK).await;
            }
            goes_on = false;
        }
    }

    /// Fires what is due; `fired` is until when each timer has.
    async fn tick(
        &self,
        fired: &mut BTreeMap<String, Timestamp>,
        from: impl Fn(Timestamp) -> Timestamp,
    ) -> Result<(), StoreError> {
        let (routes, now) = (self.routes.get(), Timestamp::now());
        fired.retain(|name, _| routes.timer(name).is_some());
        for (name, text) in routes.timers() {
            let cron = match parse(text) {
                Ok(cron) => cron,
                Err(error) => {
                    tracing::debug!(timer = name, "{error}");
                    continue;
                }
            };
            let since = if let Some(since) = fired.get(name) {
                *since
            } else {
                let store = self.events.store();
                let stored = store.fired(name.to_owned(), now.as_millisecond()).await?;
                from(Timestamp::from_millisecond(stored).unwrap_or(now))
            };
            // A clock that is set forward does not fire what it jumped over.
            let since = since.max(now.saturating_sub(MAKE_UP).unwrap_or(now));
            fired.insert(name.to_owned(), since);
            if let Some(at) = last_due(&cron, since, now) {
                self.events.fire(name, at).await?;
                fired.insert(name.to_owned(), at);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn the_last_time_that_is_due() {
        let cron = parse("*/5 * * * *").unwrap();
        let due = |since, now| last_due(&cron, at(since), at(now));
        assert_eq!(due("2026-01-01T00:00:00Z", "2026-01-01T00:04:59Z"), None);
        let five = Some(at("2026-01-01T00:05:00Z"));
        assert_eq!(due("2026-01-01T00:00:00Z", "2026-01-01T00:05:00Z"), five);
        assert_eq!(due("2026-01-01T00:00:00Z", "2026-01-01T00:05:00.3Z"), five);
        assert_eq!(due("2026-01-01T00:05:00Z", "2026-01-01T00:05:00.6Z"), None);
        let twenty = Some(at("2026-01-01T00:20:00Z"));
        assert_eq!(due("2026-01-01T00:00:00Z", "2026-01-01T00:21:00Z"), twenty);
    }

    #[test]
    fn five_fields_and_no_others() {
        for text in ["", "* * * *", "* * * * * *", "61 * * * *", "x"] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(&format!("\"{text}\"")) && error.contains("five"), "{error}");
        }
        for text in ["0 4 * * 1-5", "*/10 0-6,22 1 JAN MON"] {
            assert!(parse(text).is_ok(), "{text}");
        }
    }
}
