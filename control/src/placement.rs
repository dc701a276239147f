//! Which host a microVM starts on: a choice over a snapshot of the fleet, without any I/O.

/// A host, as the choice sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// Name.
    pub name: &'a str,
    /// Its heartbeat is not late.
    pub alive: bool,
    /// Slots in all.
    pub slots: u32,
    /// Instances that run, and instances whose start is under way.
    pub taken: u32,
}

impl Candidate<'_> {
    fn free(&self) -> u32 {
        self.slots.saturating_sub(self.taken)
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
    /// None is alive.
    #[error("no host is alive: start warrend in its host role on one")]
    NoHost,
    /// No host has a free slot.
    #[error(
        "no host has a free slot: all {slots} slots of {hosts} alive host(s) are taken; add a host or stop an instance"
    )]
    Full {
        /// Hosts that are alive.
        hosts: usize,
        /// Their slots.
        slots: u32,
    },
}

/// The `wanted` host, or else the alive one with the most free slots; of equals, the first.
pub fn place<'a>(
    hosts: &[Candidate<'a>],
    wanted: Option<&str>,
) -> Result<Candidate<'a>, PlacementError> {
    if let Some(name) = wanted {
        let host = hosts
            .iter()
            .find(|host| host.name == name)
            .ok_or_else(|| PlacementError::UnknownHost(name.to_owned()))?;
        if !host.alive {
            return Err(PlacementError::DeadHost(name.to_owned()));
        }
        if host.free() == 0 {
            return Err(PlacementError::FullHost { name: name.to_owned(), slots: host.slots });
        }
        return Ok(*host);
    }
    let mut best: Option<&Candidate<'a>> = None;
    for host in hosts.iter().filter(|host| host.alive) {
        if best.is_none_or(|best| host.free() > best.free()) {
            best = Some(host);
        }
    }
    match best {
        None => Err(PlacementError::NoHost),
        Some(host) if host.free() > 0 => Ok(*host),
        Some(_) => {
            let alive = hosts.iter().filter(|host| host.alive);
            Err(PlacementError::Full {
                hosts: alive.clone().count(),
                slots: alive.map(|host| host.slots).fold(0, u32::saturating_add),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn host(name: &str, alive: bool, slots: u32, taken: u32) -> Candidate<'_> {
        Candidate { name, alive, slots, taken }
    }

    #[test]
    fn the_most_free_alive_host_and_the_first_of_equals() {
        let hosts = [
            host("a", true, 4, 2),
            host("b", true, 8, 5),
            host("c", true, 3, 0),
            host("d", false, 100, 0),
        ];
        assert_eq!(place(&hosts, None).unwrap().name, "b");
    }

    #[test]
    fn the_wanted_host_or_the_reason_why_not() {
        let hosts = [host("a", true, 4, 4), host("b", true, 4, 3), host("c", false, 4, 0)];
        assert_eq!(place(&hosts, Some("b")).unwrap().name, "b");
        let error = |name: &str| place(&hosts, Some(name)).unwrap_err();
        assert_eq!(error("a"), PlacementError::FullHost { name: "a".into(), slots: 4 });
        assert_eq!(error("c"), PlacementError::DeadHost("c".into()));
        assert_eq!(error("x"), PlacementError::UnknownHost("x".into()));
    }

    #[test]
    fn nowhere_to_go() {
        assert_eq!(place(&[], None), Err(PlacementError::NoHost));
        assert_eq!(place(&[host("a", false, 4, 0)], None), Err(PlacementError::NoHost));
        // More taken than there are slots, as after a host came back with fewer.
        let full = [host("a", true, 4, 6), host("b", true, 0, 0)];
        assert_eq!(place(&full, None), Err(PlacementError::Full { hosts: 2, slots: 4 }));
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
                let chosen = place(&hosts, None).unwrap().name;
                let most_free = hosts.iter().map(Candidate::free).max().unwrap();
                let chosen = hosts.iter_mut().find(|host| host.name == chosen).unwrap();
                prop_assert_eq!(chosen.free(), most_free);
                chosen.taken += 1;
            }
            prop_assert!(hosts.iter().all(|host| host.taken == host.slots));
            prop_assert!(place(&hosts, None).is_err());
        }
    }
}
