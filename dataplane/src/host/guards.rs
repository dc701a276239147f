//! What instances are held to: their security groups, as policies of the data path, and limits.

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};
use warren_proto::limits::Limits;
use warren_proto::policy::Action;
use warren_proto::security::Security;
use warren_proto::v1;

use super::{Host, HostError, Record, State};
use crate::datapath::{self, HostDatapath, Policy, PolicyId, Restrictions, Slot};

/// What an instance has of its own, instead of its VPC's defaults.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Own {
    /// Names of its groups; none: it has the default ones.
    pub groups: BTreeSet<String>,
    /// Its limits.
    pub limits: Option<Limits>,
}

impl Own {
    /// This, and of the other what this lacks.
    pub(super) fn or(self, other: Self) -> Self {
        let groups = if self.groups.is_empty() { other.groups } else { self.groups };
        Self { groups, limits: self.limits.or(other.limits) }
    }
}

/// The policies of this host, one for each VPC and set of groups that an instance had.
#[derive(Default)]
pub(super) struct Guards {
    policies: HashMap<(u32, BTreeSet<String>), PolicyId>,
}

impl Guards {
    /// What is to be in force for an instance.
    fn restrictions(
        &mut self,
        datapath: &HostDatapath,
        vni: u32,
        security: &Security,
        own: &Own,
    ) -> Result<Restrictions, datapath::Error> {
        let defaults = &security.defaults;
        let groups = if own.groups.is_empty() { &defaults.groups } else { &own.groups };
        let limits = own.limits.unwrap_or(defaults.limits);
        Ok(Restrictions {
            policy: self.policy(datapath, vni, security, groups)?,
            limits: datapath::Limits {
                packets_per_second: limits.packets(),
                bits_per_second: limits.bits(),
                new_flows_per_second: limits.new_flows(),
                flows: limits.flows(),
                ports: limits.ports(),
            },
        })
    }

    /// The policy of these groups: none, if it would allow everything.
    fn policy(
        &mut self,
        datapath: &HostDatapath,
        vni: u32,
        security: &Security,
        groups: &BTreeSet<String>,
    ) -> Result<Option<PolicyId>, datapath::Error> {
        let key = (vni, groups.clone());
        if let Some(&id) = self.policies.get(&key) {
            return Ok(Some(id));
        }
        let Some(policy) = policy(vni, security, groups) else { return Ok(None) };
        let id = if let Ok(id) = datapath.add_policy(&policy) {
            id
        } else {
            // There may be too many: those that no slot has can go.
            self.policies.clear();
            datapath.retain_policies(&[])?;
            datapath.add_policy(&policy)?
        };
        self.policies.insert(key, id);
        Ok(Some(id))
    }

    /// Makes policies of other rules for the sets of groups that had one, if they have all their
    /// groups: so their counters are kept.
    fn renew(
        &mut self,
        datapath: &HostDatapath,
        vni: u32,
        security: &Security,
    ) -> Result<(), datapath::Error> {
        let former = self.policies.keys().filter(|(of, _)| *of == vni);
        let former: Vec<_> = former.map(|(_, groups)| groups.clone()).collect();
        self.policies.retain(|(of, _), _| *of != vni);
        for groups in former.iter().filter(|groups| security.missing(*groups).is_none()) {
            self.policy(datapath, vni, security, groups)?;
        }
        Ok(())
    }

    /// Removes the policies that are neither of these nor a slot's.
    fn tidy(&self, datapath: &HostDatapath) -> Result<(), datapath::Error> {
        datapath.retain_policies(&self.policies.values().copied().collect::<Vec<_>>())
    }
}

/// The rules of all the groups.
fn policy(vni: u32, security: &Security, groups: &BTreeSet<String>) -> Option<Policy> {
    let rules = security.rules(groups);
    // What a group that is gone would say is not known: it may be that it denied.
    let otherwise = match security.missing(groups) {
        None => security.defaults.otherwise,
        Some(_) => Action::Deny,
    };
    let says_something = !rules.is_empty() || otherwise == Action::Deny;
    says_something.then_some(Policy { vni, rules, otherwise })
}

impl State {
    /// Puts in force for an attached slot what is to be for its instance. In a VPC that is not
    /// known, what is in force stays.
    pub(super) fn restrict(
        &mut self,
        datapath: &HostDatapath,
        record: &Record,
        slot: u32,
    ) -> Result<(), datapath::Error> {
        match self.restrictions(datapath, record)? {
            None => Ok(()),
            Some(restrictions) => datapath.restrict(slot, &restrictions),
        }
    }

    /// What is to be in force for an instance, if its VPC is known.
    fn restrictions(
        &mut self,
        datapath: &HostDatapath,
        record: &Record,
    ) -> Result<Option<Restrictions>, datapath::Error> {
        let Some(vpc) = self.vpcs.find(&record.vpc, record.vni) else { return Ok(None) };
        self.guards.restrictions(datapath, vpc.vni, &vpc.security, &record.own).map(Some)
    }

    /// The limits of an instance; none if it has none of its own and its VPC is not known.
    pub(super) fn limits(&self, record: &Record) -> Option<Limits> {
        record.own.limits.or_else(|| {
            let vpc = self.vpcs.find(&record.vpc, record.vni)?;
            Some(vpc.security.defaults.limits)
        })
    }

    /// Puts other rules in force for the live instances of a VPC.
    pub(super) fn secure(
        &mut self,
        datapath: &HostDatapath,
        vni: u32,
        security: &Security,
    ) -> Result<(), datapath::Error> {
        let Self { guards, instances, .. } = self;
        guards.renew(datapath, vni, security)?;
        let live = instances.values().filter(|i| i.record.vni == vni && i.failed.is_none());
        for instance in live {
            let own = &instance.record.own;
            let restrictions = guards.restrictions(datapath, vni, security, own)?;
            datapath.restrict(instance.slot.number, &restrictions)?;
        }
        guards.tidy(datapath)
    }

    /// Forgets the policies of a VPC without instances.
    pub(super) fn forget_policies(
        &mut self,
        datapath: &HostDatapath,
        vni: u32,
    ) -> Result<(), datapath::Error> {
        self.guards.policies.retain(|(of, _), _| *of != vni);
        self.guards.tidy(datapath)
    }

    /// The VNI of the shared address that the next instance in a VPC gets, if one with these groups
    /// can be in it: the first that has ports left.
    pub(super) fn vni_for(
        &self,
        vpc: &str,
        own: &Own,
        has_ports: impl Fn(u32) -> bool,
    ) -> Result<u32, HostError> {
        let known = self.vpcs.of(vpc);
        let roomy = known.iter().find(|vpc| has_ports(vpc.vni)).or_else(|| known.first());
        let chosen = roomy.ok_or_else(|| HostError::UnknownVpc(vpc.to_owned()))?;
        match chosen.security.missing(&own.groups) {
            None => Ok(chosen.vni),
            Some(group) => {
                Err(HostError::UnknownGroup { vpc: vpc.to_owned(), group: group.clone() })
            }
        }
    }
}

impl Host {
    /// Connects a parked microVM's slot, with restrictions in force from its first packet on.
    pub(super) fn attach(&self, record: &Record, slot: &Slot) -> Result<(), datapath::Error> {
        // The lock is held so that no policy goes before the slot has it.
        let mut state = self.state();
        let restrictions = state.restrictions(&self.datapath, record)?.unwrap_or_default();
        let generation = self.datapath.attach_restricted(slot.number, record.vni, &restrictions)?;
        state.owners.attached(slot.number, generation, record.id);
        Ok(())
    }

    /// Removes the policies of a former daemon that no slot has any more.
    pub(super) fn tidy_policies(&self) -> Result<(), datapath::Error> {
        self.state().guards.tidy(&self.datapath)
    }

    /// What the instance of a slot holds of its limits; none if that cannot be read.
    pub(super) fn usage(&self, slot: u32) -> Option<v1::Usage> {
        let told = |error: &datapath::Error| tracing::error!(slot, "usage not known: {error}");
        let datapath::Usage { flows, ports } = self.datapath.usage(slot).inspect_err(told).ok()?;
        Some(v1::Usage { flows, ports })
    }

    /// How often rules of a VPC decided.
    pub fn rule_hits(&self, vni: u32) -> Result<Vec<v1::RuleHits>, HostError> {
        let hits = self.datapath.rule_hits(vni)?;
        Ok(hits.into_iter().map(|(id, hits)| v1::RuleHits { id, hits }).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_joined_and_one_that_is_gone_leaves_nothing_allowed_beside_the_others() {
        let rule = "100 allow tcp 443".parse().unwrap();
        let mut security = Security::default();
        security.groups.insert("web".into(), [(7, rule)].into());
        security.groups.insert("empty".into(), [].into());
        let with = |security: &Security, names: &[&str]| {
            policy(1, security, &names.iter().map(|name| (*name).to_owned()).collect())
        };
        assert_eq!(with(&security, &[]), None, "all is allowed");
        assert_eq!(with(&security, &["empty"]), None);
        let web = with(&security, &["empty", "web"]).unwrap();
        assert_eq!((web.rules, web.otherwise), (vec![(7, rule)], Action::Allow));
        let gone = with(&security, &["gone", "web"]).unwrap();
        assert_eq!((gone.rules.len(), gone.otherwise), (1, Action::Deny));
        security.defaults.otherwise = Action::Deny;
        assert_eq!(with(&security, &[]).unwrap().otherwise, Action::Deny);
    }
}
