//! What becomes of the microVMs that an earlier daemon left: a pure decision.
//!
//! One that fits what this daemon is configured to is its own from now on: an instance goes on, one of
//! the pool waits on. All others are orphans, which nobody would ever end: this daemon does.

use std::fmt;

use warren_vmm::control::{State, Tier};

/// A microVM that answered at its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<R> {
    /// The host has its slot.
    pub has_slot: bool,
    /// How far it is.
    pub state: State,
    /// It is what this daemon's zygote makes.
    pub is_current: bool,
    /// Who it is; none: it is nobody yet, or that cannot be read.
    pub record: Option<R>,
    /// Its slot is connected to the VPC of its record.
    pub is_connected: bool,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate<R> {
    /// It waits in the pool, in this tier.
    Pool(Tier),
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
    /// It waits to be released, but another template, jail or version was configured since.
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
pub fn fate<R>(found: Found<R>) -> Fate<R> {
    let Found { has_slot, state, is_current, record, is_connected } = found;
    match (state, record) {
        _ if !has_slot => Fate::End(Orphan::NoSlot),
        (State::Pooled(tier), _) if is_current => Fate::Pool(tier),
        (State::Pooled(_), _) => Fate::End(Orphan::OtherMake),
        (State::Running, None) => Fate::End(Orphan::NoRecord),
        (State::Running, Some(record)) if is_connected => Fate::Serve(record),
        (State::Running, Some(_)) => Fate::End(Orphan::Disconnected),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNNING: Found<&str> = Found {
        has_slot: true,
        state: State::Running,
        is_current: true,
        record: Some("a"),
        is_connected: true,
    };
    const POOLED: Found<&str> =
        Found { state: State::Pooled(Tier::Loaded), record: None, is_connected: false, ..RUNNING };

    #[test]
    fn an_instance_goes_on_whatever_it_was_made_from() {
        assert_eq!(fate(RUNNING), Fate::Serve("a"));
        assert_eq!(fate(Found { is_current: false, ..RUNNING }), Fate::Serve("a"));
    }

    #[test]
    fn one_of_the_pool_goes_on_if_it_is_what_would_be_made_now() {
        assert_eq!(fate(POOLED), Fate::Pool(Tier::Loaded));
        let other = Found { is_current: false, ..POOLED };
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
