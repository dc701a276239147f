//! The hosts as this gateway knows them, and the choice of one for a cold start. Pure.

use std::collections::{BTreeMap, BTreeSet};

use warren_placement::{Candidate, PlacementError, place};
use warren_proto::v1::FleetHost;

use crate::routes::Version;

/// A host that was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Its name.
    pub name: String,
    /// Where its agent listens.
    pub endpoint: String,
    /// Where its relay listens.
    pub relay: String,
}

/// Why no host was chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoHost {
    /// No host that is alive, has a relay, and did not refuse yet can attach to the VPC.
    #[error("no host that is alive has a relay and VPC {0}, or each refused: `warren host ls`")]
    Vpc(String),
    /// The scheduler's reason.
    #[error(transparent)]
    Placement(#[from] PlacementError),
}

struct Member {
    host: FleetHost,
    /// Starts of this gateway that are under way.
    starting: u32,
    /// Instances of this gateway that started, less those that ended, since the host reported.
    since_report: i64,
}

impl Member {
    fn taken(&self) -> u32 {
        let taken = i64::from(self.host.taken) + i64::from(self.starting) + self.since_report;
        u32::try_from(taken.max(0)).unwrap_or(u32::MAX)
    }
}

/// All hosts.
#[derive(Default)]
pub struct Fleet(BTreeMap<String, Member>);

impl Fleet {
    /// These are all that there are.
    pub fn replace(&mut self, hosts: &BTreeMap<String, FleetHost>) {
        self.0.retain(|name, _| hosts.contains_key(name));
        for host in hosts.values() {
            self.report(host.clone());
        }
    }

    /// A host reported.
    pub fn report(&mut self, host: FleetHost) {
        let starting = self.0.get(&host.name).map_or(0, |member| member.starting);
        self.0.insert(host.name.clone(), Member { host, starting, since_report: 0 });
    }

    /// A host is no more.
    pub fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// A host for an instance, none of those that `refused`. Its start is under way until [`Self::settled`].
    pub fn choose(
        &mut self,
        version: &Version,
        refused: &BTreeSet<String>,
    ) -> Result<Chosen, NoHost> {
        let candidates: Vec<_> = self
            .0
            .values()
            .filter(|member| {
                let host = &member.host;
                !host.relay.is_empty()
                    && host.vpcs.iter().any(|vpc| **vpc == *version.vpc)
                    && !refused.contains(&host.name)
            })
            .map(|member| Candidate {
                name: &member.host.name,
                alive: member.host.alive,
                slots: member.host.slots,
                taken: member.taken(),
                templates: member.host.templates.iter().map(String::as_str).collect(),
            })
            .collect();
        let template = (!version.template.is_empty()).then_some(version.template.as_str());
        let none = || NoHost::Vpc(version.vpc.to_string());
        let name = match place(&candidates, None, template) {
            Err(PlacementError::NoHost) => return Err(none()),
            name => name?.to_owned(),
        };
        let member = self.0.get_mut(&name).ok_or_else(none)?;
        member.starting += 1;
        let (endpoint, relay) = (member.host.endpoint.clone(), member.host.relay.clone());
        Ok(Chosen { name, endpoint, relay })
    }

    /// A start that was under way succeeded, or not.
    pub fn settled(&mut self, name: &str, started: bool) {
        if let Some(member) = self.0.get_mut(name) {
            member.starting = member.starting.saturating_sub(1);
            member.since_report += i64::from(started);
        }
    }

    /// An instance on the host ended.
    pub fn ended(&mut self, name: &str) {
        if let Some(member) = self.0.get_mut(name) {
            member.since_report -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn host(name: &str, vpcs: &[&str], slots: u32, taken: u32) -> FleetHost {
        FleetHost {
            name: name.into(),
            endpoint: format!("http://{name}"),
            relay: format!("{name}:1"),
            alive: true,
            slots,
            taken,
            vpcs: vpcs.iter().map(|vpc| (*vpc).to_owned()).collect(),
            templates: vec!["small".into()],
        }
    }

    fn version(vpc: &str, template: &str) -> Version {
        Version {
            function: "f".into(),
            number: 1,
            vpc: vpc.into(),
            package: String::new(),
            template: template.into(),
            memory_bytes: 0,
            timeout: Duration::ZERO,
            concurrency: 0,
        }
    }

    fn fleet(hosts: Vec<FleetHost>) -> Fleet {
        let mut fleet = Fleet::default();
        for host in hosts {
            fleet.report(host);
        }
        fleet
    }

    #[test]
    fn hosts_of_the_vpc_with_a_relay_that_did_not_refuse() {
        let no_relay = FleetHost { relay: String::new(), ..host("c", &["blue"], 99, 0) };
        let hosts = vec![host("a", &["blue"], 4, 0), host("b", &["blue", "red"], 2, 0), no_relay];
        let mut fleet = fleet(hosts);
        let mut choose = |vpc, refused: &[&str]| {
            let refused = refused.iter().map(|name| (*name).to_owned()).collect();
            fleet.choose(&version(vpc, "small"), &refused).map(|chosen| chosen.name)
        };
        assert_eq!(choose("blue", &[]), Ok("a".into()));
        assert_eq!(choose("red", &[]), Ok("b".into()));
        assert_eq!(choose("blue", &["a"]), Ok("b".into()));
        assert_eq!(choose("blue", &["a", "b"]), Err(NoHost::Vpc("blue".into())));
        assert_eq!(choose("green", &[]), Err(NoHost::Vpc("green".into())));
        let full = PlacementError::Full { hosts: 1, slots: 2 };
        assert_eq!(choose("red", &[]), Err(NoHost::Placement(full)));
    }

    #[test]
    fn starts_count_from_when_they_begin_until_the_host_reports_them() {
        let mut fleet = fleet(vec![host("a", &["blue"], 3, 1)]);
        let (blue, none) = (version("blue", "small"), BTreeSet::new());
        assert!(fleet.choose(&blue, &none).is_ok());
        assert!(fleet.choose(&blue, &none).is_ok());
        assert!(fleet.choose(&blue, &none).is_err());
        fleet.settled("a", false);
        fleet.settled("a", true);
        assert!(fleet.choose(&blue, &none).is_ok());
        assert!(fleet.choose(&blue, &none).is_err());
        fleet.ended("a");
        assert!(fleet.choose(&blue, &none).is_ok());
        // Both are still under way: what the host says need not have them.
        fleet.report(host("a", &["blue"], 3, 1));
        assert!(fleet.choose(&blue, &none).is_err());
        fleet.replace(&BTreeMap::new());
        assert_eq!(fleet.choose(&blue, &none), Err(NoHost::Vpc("blue".into())));
    }

    #[test]
    fn a_template_that_no_host_has_is_named() {
        let error = fleet(vec![host("a", &["blue"], 3, 1)])
            .choose(&version("blue", "huge"), &BTreeSet::new())
            .unwrap_err();
        assert!(matches!(error, NoHost::Placement(PlacementError::NoTemplate { .. })), "{error}");
    }
}
