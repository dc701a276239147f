//! `[nat]`: how long flows may be idle, and what the standards say of it.

use serde::Deserialize;

use crate::datapath::Timers;

/// The NAT.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nat {
    /// How long flows may be idle.
    #[serde(default)]
    pub timeouts: Timeouts,
}

/// How long flows may be idle, in seconds, 604,800 (a week) at most. What a standard forbids is an
/// error; what it advises against, a warning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// UDP: at least 120 (RFC 4787, REQ-5).
    pub udp: u32,
    /// ICMP echo: at least 60 (RFC 5508, REQ-2).
    pub icmp: u32,
    /// TCP until the connection stands: at least 10, and 240 are advised (RFC 7857, section 2.1).
    pub tcp_opening: u32,
    /// TCP while it stands: at least 7,440 (RFC 5382, REQ-5).
    pub tcp_established: u32,
    /// TCP after one side closed it, or the peer reset it: at least 240 (RFC 5382, REQ-5).
    pub tcp_closing: u32,
    /// TCP after both sides closed it, or it was reset: at least 10, and 240 are advised (RFC 7857,
    /// section 2.2).
    pub tcp_closed: u32,
    /// How long a port rests before another flow gets it, unless there is no other: 120 are advised
    /// (RFC 6888, REQ-8).
    pub rest: u32,
}

impl Default for Timeouts {
    /// As [`Timers::DEFAULT`].
    fn default() -> Self {
        Self {
            udp: 300,
            icmp: 60,
            tcp_opening: 240,
            tcp_established: 7440,
            tcp_closing: 240,
            tcp_closed: 240,
            rest: 120,
        }
    }
}

/// A week.
const MOST: u32 = 7 * 24 * 60 * 60;

/// What a time-out must and should be at least, in seconds.
struct Bound {
    key: &'static str,
    seconds: u32,
    least: u32,
    advised: u32,
    source: &'static str,
}

impl Timeouts {
    fn bounds(&self) -> [Bound; 7] {
        let bound =
            |key, seconds, least, advised, source| Bound { key, seconds, least, advised, source };
        let transitory = "RFC 5382, REQ-5";
        [
            bound("nat.timeouts.udp", self.udp, 120, 120, "RFC 4787, REQ-5"),
            bound("nat.timeouts.icmp", self.icmp, 60, 60, "RFC 5508, REQ-2"),
            bound("nat.timeouts.tcp_opening", self.tcp_opening, 10, 240, "RFC 7857, section 2.1"),
            bound("nat.timeouts.tcp_established", self.tcp_established, 7440, 7440, transitory),
            bound("nat.timeouts.tcp_closing", self.tcp_closing, 240, 240, transitory),
            bound("nat.timeouts.tcp_closed", self.tcp_closed, 10, 240, "RFC 7857, section 2.2"),
            bound("nat.timeouts.rest", self.rest, 0, 120, "RFC 6888, REQ-8"),
        ]
    }

    /// The first key that is out of its range, and what it must be.
    pub(super) fn problem(&self) -> Option<(&'static str, String)> {
        self.bounds().into_iter().find_map(|Bound { key, seconds, least, source, .. }| {
            if seconds < least {
                Some((key, format!("must be at least {least} seconds ({source})")))
            } else if seconds > MOST {
                Some((key, format!("must be at most {MOST} seconds")))
            } else {
                None
            }
        })
    }

    /// What may be as it is, but is not advised.
    pub fn warnings(&self) -> Vec<String> {
        let bounds = self.bounds().into_iter().filter(|bound| bound.seconds < bound.advised);
        bounds
            .map(|Bound { key, seconds, advised, source, .. }| {
                format!("{key} is {seconds} seconds; {source} advises {advised} at least")
            })
            .collect()
    }

    /// As the programs count them.
    pub fn timers(&self) -> Timers {
        Timers {
            udp: Timers::seconds(self.udp),
            icmp: Timers::seconds(self.icmp),
            tcp_opening: Timers::seconds(self.tcp_opening),
            tcp_established: Timers::seconds(self.tcp_established),
            tcp_closing: Timers::seconds(self.tcp_closing),
            tcp_closed: Timers::seconds(self.tcp_closed),
            rest: Timers::seconds(self.rest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_data_path_s_and_as_advised() {
        let timeouts = Timeouts::default();
        assert_eq!(timeouts.timers(), Timers::DEFAULT);
        assert_eq!(timeouts.warnings(), Vec::<String>::new());
        assert_eq!(timeouts.problem(), None);
    }

    #[test]
    fn what_is_forbidden_is_an_error_and_what_is_not_advised_a_warning() {
        let given = Timeouts::default();
        for (key, forbidden, unwise) in [
            ("udp", Timeouts { udp: 119, ..given }, None),
            ("icmp", Timeouts { icmp: 59, ..given }, None),
            ("tcp_established", Timeouts { tcp_established: 7439, ..given }, None),
            ("tcp_closing", Timeouts { tcp_closing: 239, ..given }, None),
            (
                "tcp_opening",
                Timeouts { tcp_opening: 9, ..given },
                Some(Timeouts { tcp_opening: 239, ..given }),
            ),
            (
                "tcp_closed",
                Timeouts { tcp_closed: 9, ..given },
                Some(Timeouts { tcp_closed: 10, ..given }),
            ),
            ("rest", Timeouts { rest: MOST + 1, ..given }, Some(Timeouts { rest: 0, ..given })),
        ] {
            let (found, problem) = forbidden.problem().expect("it is forbidden");
            assert_eq!(found, format!("nat.timeouts.{key}"));
            assert!(problem.starts_with("must be at"), "{problem}");
            let Some(unwise) = unwise else { continue };
            assert_eq!(unwise.problem(), None);
            let warnings = unwise.warnings();
            assert!(warnings.len() == 1 && warnings[0].contains(key), "{warnings:?}");
        }
    }
}
