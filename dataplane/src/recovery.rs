//! What becomes of the microVMs that an earlier daemon left: a pure decision.
//!
//! One that fits what this daemon is configured to is its own from now on: an instance goes on, one of
//! the pool waits on. All others are orphans, which nobody would ever end: this daemon does.

use std::fmt;

use warren_vmm::control::{State, Tier};

/// A microVM that answered at its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<P, R> {
    /// The host has its slot.
    pub has_slot: bool,
    /// How far it is.
    pub state: State,
    /// The pool whose zygote makes such; none: no zygote of this daemon does, or it runs.
    pub pool: Option<P>,
    /// Who it is; none: it is nobody yet, or that cannot be read.
    pub record: Option<R>,
    /// Its slot is connected to the VPC of its record.
    pub is_connected: bool,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate<P, R> {
    /// It waits in this pool, in this tier.
    Pool(P, Tier),
    /// It is this instance.
    Serve(R),
    /// It ends.
    End(Orphan),
}

/// Why a microVM is nobody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orphan {
    /// The host has fewer slots now.
    NoSlot,
    /// It waits to be released, but other templates, another jail or version were configured since.
    OtherMake,
    /// It runs, and who it is cannot be told.
    NoRecord,
    /// It runs, and its slot is not connected to its VPC: the daemon was killed while it ended it, or
    /// the data path was removed.
    Disconnected,
    /// It does not answer at its socket, or has none.
    Unreachable,
}

impl fmt::Display for Orphan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoSlot => "its slot is no more",
            Self::OtherMake => "it is of another template, jail or version",
            Self::NoRecord => "its record cannot be read",
            Self::Disconnected => "it is not connected to its VPC",
            Self::Unreachable => "it does not answer at its socket",
        })
    }
}

/// Decides. What runs is an instance's, and goes on whatever it was made from.
pub fn fate<P, R>(found: Found<P, R>) -> Fate<P, R> {
    let Found { has_slot, state, pool, record, is_connected } = found;
    match (state, pool, record) {
        _ if !has_slot => Fate::End(Orphan::NoSlot),
        (State::Pooled(tier), Some(pool), _) => Fate::Pool(pool, tier),
        (State::Pooled(_), None, _) => Fate::End(Orphan::OtherMake),
        (State::Running, _, None) => Fate::End(Orphan::NoRecord),
        (State::Running, _, Some(record)) if is_connected => Fate::Serve(record),
        (State::Running, _, Some(_)) => Fate::End(Orphan::Disconnected),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNNING: Found<&str, &str> = Found {
        has_slot: true,
        state: State::Running,
        pool: Some("small"),
        record: Some("a"),
        is_connected: true,
    };
    const POOLED: Found<&str, &str> =
        Found { state: State::Pooled(Tier::Loaded), record: None, is_connected: false, ..RUNNING };

    #[test]
    fn an_instance_goes_on_whatever_it_was_made_from() {
        assert_eq!(fate(RUNNING), Fate::Serve("a"));
        assert_eq!(fate(Found { pool: None, ..RUNNING }), Fate::Serve("a"));
    }

    #[test]
    fn one_of_a_pool_goes_on_if_it_is_what_would_be_made_now() {
        assert_eq!(fate(POOLED), Fate::Pool("small", Tier::Loaded));
        let other = Found { pool: None, ..POOLED };
        assert_eq!(fate(other), Fate::End(Orphan::OtherMake));
    }

    #[test]
    fn what_does_not_fit_ends() {
        for (found, orphan) in [
            (Found { has_slot: false, ..RUNNING }, Orphan::NoSlot),
            (Found { has_slot: false, ..POOLED }, Orphan::NoSlot),
            (Found { record: None, ..RUNNING }, Orphan::NoRecord),
            (Found { is_connected: false, ..RUNNING }, Orphan::Disconnected),
        ] {
            assert_eq!(fate(found), Fate::End(orphan), "{found:?}");
        }
    }
}
