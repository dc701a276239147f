//! Which host a microVM starts on: a choice over a snapshot of the fleet, without any I/O.
#![deny(missing_docs)]

use std::collections::BTreeSet;

/// A host, as the choice sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// Name.
    pub name: &'a str,
    /// Its heartbeat is not late.
    pub alive: bool,
    /// Slots in all.
    pub slots: u32,
    /// Instances that run, and instances whose start is under way.
    pub taken: u32,
    /// Names of its templates.
    pub templates: Vec<&'a str>,
}

impl Candidate<'_> {
    fn free(&self) -> u32 {
        self.slots.saturating_sub(self.taken)
    }

    fn has(&self, template: Option<&str>) -> bool {
        template.is_none_or(|template| self.templates.contains(&template))
    }
}

/// Why no host was chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// The wanted host never registered.
    #[error("there is no host \"{0}\": `warren host ls` lists them")]
    UnknownHost(String),
    /// The wanted host's heartbeats stopped.
    #[error("host {0} is not alive: is warrend running there?")]
    DeadHost(String),
    /// The wanted host has no free slot.
    #[error("host {name} has no free slot: all {slots} are taken; stop an instance there")]
    FullHost {
        /// Name.
        name: String,
        /// Slots in all.
        slots: u32,
    },
    /// The wanted host does not have the template.
    #[error("host {name} has no template \"{template}\": it has {}", known.join(", "))]
    NotThere {
        /// Name.
        name: String,
        /// The template.
        template: String,
        /// Those that it has.
        known: Vec<String>,
    },
    /// No host that is alive has the template.
    #[error(
        "no host that is alive has a template \"{template}\": there are {}; `warren template ls` lists them",
        known.join(", ")
    )]
    NoTemplate {
        /// The template.
        template: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// None is alive.
    #[error("no host is alive: start warrend in its host role on one")]
    NoHost,
    /// No host has a free slot.
    #[error(
        "no host has a free slot: all {slots} slots of {hosts} alive host(s) are taken; add a host or stop an instance"
    )]
    Full {
        /// Hosts that are alive and have the template.
        hosts: usize,
        /// Their slots.
        slots: u32,
    },
}

/// The name of the `wanted` host, or else of the alive one with the most free slots of those that have
/// the template; of equals, of the first.
pub fn place<'a>(
    hosts: &[Candidate<'a>],
    wanted: Option<&str>,
    template: Option<&str>,
) -> Result<&'a str, PlacementError> {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    if let Some(name) = wanted {
        let host = hosts
            .iter()
            .find(|host| host.name == name)
            .ok_or_else(|| PlacementError::UnknownHost(name.to_owned()))?;
        let name = name.to_owned();
        return match template {
            _ if !host.alive => Err(PlacementError::DeadHost(name)),
            Some(template) if !host.has(Some(template)) => {
                let (template, known) = (template.to_owned(), owned(&host.templates));
                Err(PlacementError::NotThere { name, template, known })
            }
            _ if host.free() == 0 => Err(PlacementError::FullHost { name, slots: host.slots }),
            _ => Ok(host.name),
        };
    }
    let alive = || hosts.iter().filter(|host| host.alive);
    let mut best: Option<&Candidate<'a>> = None;
    for host in alive().filter(|host| host.has(template)) {
        if best.is_none_or(|best| host.free() > best.free()) {
            best = Some(host);
        }
    }
    match (best, template) {
        (Some(host), _) if host.free() > 0 => Ok(host.name),
        (Some(_), _) => {
            let full = alive().filter(|host| host.has(template));
            Err(PlacementError::Full {
                hosts: full.clone().count(),
                slots: full.map(|host| host.slots).fold(0, u32::saturating_add),
            })
        }
        (None, Some(template)) if alive().next().is_some() => {
            let known: BTreeSet<_> = alive().flat_map(|host| host.templates.clone()).collect();
            let known = owned(&known.into_iter().collect::<Vec<_>>());
            Err(PlacementError::NoTemplate { template: template.to_owned(), known })
        }
        (None, _) => Err(PlacementError::NoHost),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host(name: &str, alive: bool, slots: u32, taken: u32) -> Candidate<'_> {
        Candidate { name, alive, slots, taken, templates: vec!["small"] }
    }

    /// Any host that has any template.
    fn place_any<'a>(hosts: &[Candidate<'a>]) -> Result<&'a str, PlacementError> {
        place(hosts, None, None)
    }

    #[test]
    fn the_most_free_alive_host_and_the_first_of_equals() {
        let hosts = [
            host("a", true, 4, 2),
            host("b", true, 8, 5),
            host("c", true, 3, 0),
            host("d", false, 100, 0),
        ];
        assert_eq!(place_any(&hosts), Ok("b"));
    }

    #[test]
    fn the_wanted_host_or_the_reason_why_not() {
        let hosts = [host("a", true, 4, 4), host("b", true, 4, 3), host("c", false, 4, 0)];
        assert_eq!(place(&hosts, Some("b"), None), Ok("b"));
        let error = |name: &str| place(&hosts, Some(name), None).unwrap_err();
        assert_eq!(error("a"), PlacementError::FullHost { name: "a".into(), slots: 4 });
        assert_eq!(error("c"), PlacementError::DeadHost("c".into()));
        assert_eq!(error("x"), PlacementError::UnknownHost("x".into()));
    }

    #[test]
    fn nowhere_to_go() {
        assert_eq!(place_any(&[]), Err(PlacementError::NoHost));
        assert_eq!(place_any(&[host("a", false, 4, 0)]), Err(PlacementError::NoHost));
        // More taken than there are slots, as after a host came back with fewer.
        let full = [host("a", true, 4, 6), host("b", true, 0, 0)];
        assert_eq!(place_any(&full), Err(PlacementError::Full { hosts: 2, slots: 4 }));
    }

    #[test]
    fn only_hosts_that_have_the_template() {
        let large =
            |name| Candidate { templates: vec!["small", "large"], ..host(name, true, 2, 1) };
        let dead = Candidate { templates: vec!["huge"], ..host("d", false, 9, 0) };
        let hosts = [host("a", true, 9, 0), large("b"), dead];
        let of = |template| place(&hosts, None, Some(template));
        assert_eq!((of("small"), of("large")), (Ok("a"), Ok("b")));
        let known = vec!["large".to_owned(), "small".to_owned()];
        let template = "huge".to_owned();
        assert_eq!(of("huge"), Err(PlacementError::NoTemplate { template, known }));
        let there = place(&hosts, Some("a"), Some("large")).unwrap_err().to_string();
        assert_eq!(there, "host a has no template \"large\": it has small");
        let full = [host("a", true, 9, 0), Candidate { taken: 2, ..large("b") }];
        let error = place(&full, None, Some("large"));
        assert_eq!(error, Err(PlacementError::Full { hosts: 1, slots: 2 }));
        assert_eq!(place(&[], None, Some("large")), Err(PlacementError::NoHost));
    }

    proptest! {
        #[test]
        fn filling_the_fleet_uses_each_slot_once_and_stays_even(
            slots in prop::collection::vec(0_u32..12, 1..8),
        ) {
            let names: Vec<String> = (0..slots.len()).map(|index| index.to_string()).collect();
            let mut hosts: Vec<_> = names
                .iter()
                .zip(&slots)
                .map(|(name, slots)| host(name, true, *slots, 0))
                .collect();
            for _ in 0..slots.iter().sum() {
                let chosen = place_any(&hosts).unwrap();
                let most_free = hosts.iter().map(Candidate::free).max().unwrap();
                let chosen = hosts.iter_mut().find(|host| host.name == chosen).unwrap();
                prop_assert_eq!(chosen.free(), most_free);
                chosen.taken += 1;
            }
            prop_assert!(hosts.iter().all(|host| host.taken == host.slots));
            prop_assert!(place_any(&hosts).is_err());
        }
    }
}
