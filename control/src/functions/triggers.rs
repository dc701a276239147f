//! Which calls a function answers: what makes a trigger, and which of them go together. Pure.

use std::collections::BTreeMap;

use croner::parser::{CronParser, Seconds, Year};
use serde::{Deserialize, Serialize};
use warren_proto::v1;
use warren_proto::v1::trigger::Kind as Message;

use super::FunctionsError;
use super::model::LATEST;
use crate::name::{self, InvalidName};

/// An event may wait for weeks so, with twice the time after each failure.
const MAX_RETRIES: u32 = 20;
/// A day: what waits longer is a timer's.
const MAX_BACKOFF_MS: u32 = 24 * 60 * 60 * 1000;
/// The time until the first retry of who gives none.
const BACKOFF_MS: u32 = 1000;

/// What is stored of a trigger: `trigger/NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trigger {
    /// Name.
    pub name: String,
    /// Name of the function.
    pub function: String,
    /// Name of an alias, a number, or `$LATEST`.
    pub alias: String,
    /// Which calls.
    pub kind: Kind,
}

/// Which calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Over HTTP.
    Http {
        /// Host name; empty: any.
        host: String,
        /// What the path begins with, such as `/a/b`; empty: any.
        prefix: String,
        /// Whether the function sees the path without it.
        strip: bool,
    },
    /// That nobody waits for.
    Event {
        /// How often one that failed is made again.
        retries: u32,
        /// The time until the first time.
        backoff_ms: u32,
        /// Name of the event trigger that gets what failed in the end; empty: none.
        dead_letter: String,
    },
    /// By the clock.
    Timer {
        /// Five fields, UTC.
        cron: String,
    },
}

/// All triggers, by name.
pub type Triggers = BTreeMap<String, Trigger>;

impl Trigger {
    /// The trigger that a message means.
    pub fn new(message: v1::Trigger) -> Result<Self, FunctionsError> {
        let v1::Trigger { name, function, alias, kind } = message;
        label("name", &name)?;
        label("function", &function)?;
        let kind = match kind {
            Some(Message::Http(v1::HttpTrigger { host, prefix, strip })) => {
                let host = host.to_ascii_lowercase();
                if !host.is_empty() {
                    name::host(&host)
                        .map_err(|InvalidName(problem)| invalid("http.host", problem))?;
                }
                let prefix = prefix.trim_end_matches('/').to_owned();
                check_prefix(&prefix)?;
                Kind::Http { host, prefix, strip }
            }
            Some(Message::Event(v1::EventTrigger { retries, backoff_ms, dead_letter })) => {
                if retries > MAX_RETRIES {
                    let problem = format!("{retries} are too many: at most {MAX_RETRIES}");
                    return Err(invalid("event.retries", problem));
                }
                if backoff_ms > MAX_BACKOFF_MS {
                    let problem = format!("{backoff_ms} is too long: at most {MAX_BACKOFF_MS}");
                    return Err(invalid("event.backoff_ms", problem));
                }
                let backoff_ms = if backoff_ms == 0 { BACKOFF_MS } else { backoff_ms };
                Kind::Event { retries, backoff_ms, dead_letter }
            }
            Some(Message::Timer(v1::TimerTrigger { cron })) => {
                check_cron(&cron)?;
                Kind::Timer { cron }
            }
            None => return Err(invalid("kind", "is missing: http, event or timer".into())),
        };
        let alias = if alias.is_empty() { LATEST.to_owned() } else { alias };
        Ok(Self { name, function, alias, kind })
    }

    /// Whether it can stand beside the others; of its own name there is none.
    pub fn check_beside(&self, others: &Triggers) -> Result<(), FunctionsError> {
        match &self.kind {
            Kind::Http { host, prefix, .. } => {
                let is_same = |other: &&Trigger| matches!(&other.kind, Kind::Http { host: theirs, prefix: its, .. } if theirs == host && its == prefix);
                match others.values().find(is_same) {
                    Some(other) => Err(FunctionsError::RouteTaken {
                        route: format!("{}{}", or(host, "any host"), or(prefix, "/")),
                        trigger: other.name.clone(),
                    }),
                    None => Ok(()),
                }
            }
            Kind::Event { dead_letter, .. } if !dead_letter.is_empty() => {
                match others.get(dead_letter).map(|other| &other.kind) {
                    Some(Kind::Event { .. }) => Ok(()),
                    _ => Err(FunctionsError::UnknownDeadLetter(dead_letter.clone())),
                }
            }
            Kind::Event { .. } | Kind::Timer { .. } => Ok(()),
        }
    }

    /// The trigger whose dead letters this one gets.
    pub fn dead_letters_of<'a>(&self, others: &'a Triggers) -> Option<&'a Trigger> {
        others.values().find(|other| {
            matches!(&other.kind, Kind::Event { dead_letter, .. } if *dead_letter == self.name)
        })
    }
}

impl From<&Trigger> for v1::Trigger {
    fn from(trigger: &Trigger) -> Self {
        let kind = match trigger.kind.clone() {
            Kind::Http { host, prefix, strip } => {
                Message::Http(v1::HttpTrigger { host, prefix, strip })
            }
            Kind::Event { retries, backoff_ms, dead_letter } => {
                Message::Event(v1::EventTrigger { retries, backoff_ms, dead_letter })
            }
            Kind::Timer { cron } => Message::Timer(v1::TimerTrigger { cron }),
        };
        Self {
            name: trigger.name.clone(),
            function: trigger.function.clone(),
            alias: trigger.alias.clone(),
            kind: Some(kind),
        }
    }
}

fn invalid(field: &'static str, problem: String) -> FunctionsError {
    FunctionsError::Invalid { field, problem }
}

pub(super) fn label(field: &'static str, text: &str) -> Result<(), FunctionsError> {
    name::label(text).map_err(|InvalidName(problem)| invalid(field, problem))
}

fn or<'a>(text: &'a str, otherwise: &'a str) -> &'a str {
    if text.is_empty() { otherwise } else { text }
}

/// Gateways compare it with decoded paths: what has another form fits none.
fn check_prefix(prefix: &str) -> Result<(), FunctionsError> {
    let is_segment = |segment: &str| {
        let never = |character: char| {
            matches!(character, '%' | '?' | '#')
                || character.is_whitespace()
                || character.is_control()
        };
        !matches!(segment, "" | "." | "..") && !segment.contains(never)
    };
    let mut segments = prefix.split('/');
    if prefix.is_empty() || segments.next() == Some("") && segments.all(is_segment) {
        return Ok(());
    }
    let problem = format!(
        "\"{prefix}\" is none: write segments with / before each, such as /shop/v2, without ., .., %, ? and #"
    );
    Err(invalid("http.prefix", problem))
}

fn check_cron(cron: &str) -> Result<(), FunctionsError> {
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
    parser.parse(cron).map(drop).map_err(|error| {
        let problem =
            format!("\"{cron}\" is none: {error}; write five fields, such as \"*/5 * * * *\"");
        invalid("timer.cron", problem)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn http(host: &str, prefix: &str) -> Message {
        let (host, prefix) = (host.into(), prefix.into());
        Message::Http(v1::HttpTrigger { host, prefix, strip: true })
    }

    fn event(retries: u32, dead_letter: &str) -> Message {
        let dead_letter = dead_letter.into();
        Message::Event(v1::EventTrigger { retries, backoff_ms: 0, dead_letter })
    }

    fn timer(cron: &str) -> Message {
        Message::Timer(v1::TimerTrigger { cron: cron.into() })
    }

    fn trigger(name: &str, kind: Message) -> Result<Trigger, FunctionsError> {
        let (name, function, alias) = (name.into(), "web".into(), String::new());
        Trigger::new(v1::Trigger { name, function, alias, kind: Some(kind) })
    }

    #[test]
    fn each_has_one_form() {
        let shop = trigger("t", http("Shop.Example.com", "/a/b/")).unwrap();
        assert_eq!(shop.alias, LATEST);
        let (host, prefix) = ("shop.example.com".into(), "/a/b".into());
        assert_eq!(shop.kind, Kind::Http { host, prefix, strip: true });
        assert_eq!(trigger("t", http("", "/")).unwrap(), trigger("t", http("", "")).unwrap());
        let again = Trigger::new((&shop).into()).unwrap();
        assert_eq!(again, shop);
    }

    #[test]
    fn what_is_none_is_refused_with_field_and_remedy() {
        let cases = [
            (trigger("T", http("", "")), "name: "),
            (trigger("t", http("a_b", "")), "http.host: "),
            (trigger("t", http("", "a")), "http.prefix: \"a\""),
            (trigger("t", http("", "/a//b")), "http.prefix: "),
            (trigger("t", http("", "/a/../b")), "http.prefix: "),
            (trigger("t", http("", "/a%2f")), "http.prefix: "),
            (trigger("t", event(21, "")), "event.retries: 21"),
            (trigger("t", timer("* * * *")), "timer.cron: \"* * * *\""),
            (trigger("t", timer("0 0 0 1 1 *")), "timer.cron: "),
            (trigger("t", timer("99 * * * *")), "timer.cron: "),
        ];
        for (refused, text) in cases {
            let error = refused.unwrap_err().to_string();
            assert!(error.contains(text), "{error:?} should contain {text:?}");
        }
        assert!(trigger("t", timer("*/5 * * * 1-5")).is_ok());
    }

    #[test]
    fn those_that_stand_beside_each_other() {
        let all: Triggers =
            [("a", http("h.example", "/x")), ("b", event(1, "")), ("c", event(1, "b"))]
                .into_iter()
                .map(|(name, kind)| (name.to_owned(), trigger(name, kind).unwrap()))
                .collect();
        let beside = |kind| trigger("d", kind).unwrap().check_beside(&all);
        assert!(beside(http("h.example", "")).is_ok() && beside(http("", "/x")).is_ok());
        let error = beside(http("h.example", "/x/")).unwrap_err().to_string();
        assert!(error.contains("h.example/x") && error.contains("\"a\""), "{error}");
        assert!(beside(event(0, "b")).is_ok());
        for other in ["a", "d", "x"] {
            let error = beside(event(0, other)).unwrap_err();
            assert!(matches!(error, FunctionsError::UnknownDeadLetter(_)), "{error}");
        }
        let found = |name: &str| all[name].dead_letters_of(&all).map(|of| of.name.as_str());
        assert_eq!((found("b"), found("c")), (Some("c"), None));
    }
}
