//! Security of a VPC: its groups of rules, and what holds for instances without their own.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::limits::{InvalidLimits, Limits};
use crate::policy::{Action, InvalidRule, Rule};
use crate::v1;

/// Most rules of a group, and of all groups of an instance together.
pub const MAX_RULES: usize = 128;

/// Most groups of an instance.
pub const MAX_GROUPS: usize = 16;

/// Rules by their numbers, from 1.
pub type Group = BTreeMap<u32, Rule>;

/// What a VPC's instances may do; by default, everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Security {
    /// Groups by name.
    pub groups: BTreeMap<String, Group>,
    /// What holds unless an instance has its own.
    pub defaults: Defaults,
}

/// What holds for a VPC's instances unless they have their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defaults {
    /// Names of their groups.
    pub groups: BTreeSet<String>,
    /// What becomes of flows that no rule is about, of each instance.
    pub otherwise: Action,
    /// Their limits.
    pub limits: Limits,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { groups: BTreeSet::new(), otherwise: Action::Allow, limits: Limits::default() }
    }
}

/// A message that is no security of a VPC.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSecurity {
    /// A rule is none.
    #[error(transparent)]
    Rule(#[from] InvalidRule),
    /// Limits are none.
    #[error(transparent)]
    Limits(#[from] InvalidLimits),
    /// A number twice, or 0.
    #[error("rule {0} of group \"{1}\" needs a number of its own")]
    Number(u32, String),
}

impl Security {
    /// The first of these names that no group has.
    pub fn missing<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> Option<&'a String> {
        names.into_iter().find(|name| !self.groups.contains_key(*name))
    }

    /// The rules of these groups together, of those that are there.
    pub fn rules<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> Vec<(u32, Rule)> {
        let groups = names.into_iter().filter_map(|name| self.groups.get(name));
        groups.flatten().map(|(id, rule)| (*id, *rule)).collect()
    }

    /// The message of a group; its rules in the order in which they are asked.
    pub fn group_message(&self, name: &str) -> Option<v1::SecurityGroup> {
        let mut rules: Vec<_> = self.groups.get(name)?.iter().collect();
        rules.sort_by_key(|(id, rule)| (rule.rank(), **id));
        let rules = rules.into_iter().map(|(id, rule)| rule.message(*id)).collect();
        Some(v1::SecurityGroup { name: name.to_owned(), rules })
    }
}

impl TryFrom<&v1::VpcSecurity> for Security {
    type Error = InvalidSecurity;

    fn try_from(security: &v1::VpcSecurity) -> Result<Self, InvalidSecurity> {
        let mut numbers = BTreeSet::from([0]);
        let mut groups = BTreeMap::new();
        for v1::SecurityGroup { name, rules } in &security.groups {
            let group: &mut Group = groups.entry(name.clone()).or_default();
            for rule in rules {
                if !numbers.insert(rule.id) {
                    return Err(InvalidSecurity::Number(rule.id, name.clone()));
                }
                group.insert(rule.id, rule.try_into()?);
            }
        }
        let defaults = match &security.defaults {
            None => Defaults::default(),
            Some(v1::SecurityDefaults { groups, otherwise, limits }) => Defaults {
                groups: groups.iter().cloned().collect(),
                otherwise: match otherwise {
                    0 => Action::Allow,
                    &number => Action::from_number(number)?,
                },
                limits: limits.as_ref().map(TryInto::try_into).transpose()?.unwrap_or_default(),
            },
        };
        Ok(Self { groups, defaults })
    }
}

impl From<&Security> for v1::VpcSecurity {
    fn from(security: &Security) -> Self {
        let groups = security.groups.keys().filter_map(|name| security.group_message(name));
        Self { groups: groups.collect(), defaults: Some((&security.defaults).into()) }
    }
}

impl From<&Defaults> for v1::SecurityDefaults {
    fn from(defaults: &Defaults) -> Self {
        Self {
            groups: defaults.groups.iter().cloned().collect(),
            otherwise: v1::SecurityAction::from(defaults.otherwise).into(),
            limits: Some(defaults.limits.into()),
        }
    }
}
