//! Security groups of VPCs, and what holds for instances without their own: how they are kept,
//! changed and counted.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use warren_proto::limits::{InvalidLimits, Limits};
use warren_proto::policy::{Action, InvalidRule, Rule};
use warren_proto::security::{Defaults, Group, MAX_GROUPS, MAX_RULES, Security};
use warren_proto::v1;

use crate::ask::{Answer, Whom, ask};
use crate::fleet::{Fleet, Role};
use crate::name::{self, InvalidName};
use crate::store::{Precondition, Store, StoreError, Write, decode};
use crate::vpc;

/// Where a VPC's security is stored, whole, so that it changes whole: `security-groups/VPC`.
pub const SECURITY_PREFIX: &str = "security-groups/";

/// What is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Number of the rule that was made last: hosts count by numbers, so that none is used again.
    last_rule: u32,
    /// Groups and defaults.
    pub security: Security,
}

/// Why security was not read or changed.
#[derive(Debug, thiserror::Error)]
pub enum SecurityError {
    /// Never created.
    #[error("there is no VPC \"{0}\": `warren vpc ls` lists them")]
    UnknownVpc(String),
    /// No such group.
    #[error(
        "VPC \"{vpc}\" has no security group \"{group}\": `warren security-group ls {vpc}` lists \
         them"
    )]
    UnknownGroup {
        /// VPC.
        vpc: String,
        /// Group.
        group: String,
    },
    /// Nothing to remove.
    #[error(
        "security group \"{group}\" of VPC \"{vpc}\" has no rule {id}: `warren security-group show \
         {vpc} {group}` lists them"
    )]
    NoRule {
        /// VPC.
        vpc: String,
        /// Group.
        group: String,
        /// Number.
        id: u32,
    },
    /// The name is taken.
    #[error("VPC \"{vpc}\" has a security group \"{group}\" already: add rules to it")]
    Exists {
        /// VPC.
        vpc: String,
        /// Group.
        group: String,
    },
    /// Instances without their own have it.
    #[error(
        "security group \"{group}\" is a default of VPC \"{vpc}\": give it others with `warren vpc \
         guard {vpc}` first"
    )]
    IsDefault {
        /// VPC.
        vpc: String,
        /// Group.
        group: String,
    },
    /// An instance has it.
    #[error("security group \"{group}\" is instance {instance}'s: stop that first")]
    InUse {
        /// Group.
        group: String,
        /// Id.
        instance: String,
    },
    /// A name that none can have.
    #[error("name: {0}")]
    Name(String),
    /// A rule is none.
    #[error(transparent)]
    Rule(#[from] InvalidRule),
    /// Limits are none.
    #[error(transparent)]
    Limits(#[from] InvalidLimits),
    /// More than an instance can have.
    #[error("{rules} rules in {groups} are too many for an instance: at most {MAX_RULES}")]
    TooManyRules {
        /// How many.
        rules: usize,
        /// Of which groups.
        groups: String,
    },
    /// More than an instance can have.
    #[error("{0} security groups are too many for an instance: at most {MAX_GROUPS}")]
    TooManyGroups(usize),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The security of a VPC, and how often its rules decided.
#[derive(Default)]
pub struct Counted {
    /// Groups and defaults.
    pub security: Security,
    /// By number of the rule, 0 for none; the sums over the hosts.
    pub hits: BTreeMap<u32, u64>,
    /// Hosts that are not in the sums, and why.
    pub silent: Vec<v1::SilentHost>,
}

/// The security of a VPC.
pub async fn get(store: &dyn Store, vpc: &str) -> Result<Security, SecurityError> {
    known(store, vpc).await?;
    let key = key(vpc);
    let entry = store.get(&key).await?;
    let stored: Option<Stored> = entry.map(|entry| decode(&key, &entry.value)).transpose()?;
    Ok(stored.unwrap_or_default().security)
}

/// The security of a VPC, with counters, asked of all hosts at once.
pub async fn count(store: &dyn Store, fleet: &Fleet, vpc: &str) -> Result<Counted, SecurityError> {
    let vnis = known(store, vpc).await?.vnis();
    let mut counted = Counted { security: get(store, vpc).await?, ..Counted::default() };
    let question = move |mut agent: crate::fleet::Agent| {
        let vnis = vnis.clone();
        async move {
            let mut all = v1::ListRuleHitsResponse::default();
            for vni in vnis {
                let asked = v1::ListRuleHitsRequest { vni };
                all.hits.extend(agent.list_rule_hits(asked).await?.into_inner().hits);
            }
            Ok(tonic::Response::new(all))
        }
    };
    // Only a name can be unknown, and none is given.
    let answers = ask(fleet, Whom::new(Some(Role::Host), ""), question).await.unwrap_or_default();
    for Answer { host, answer, .. } in answers {
        match answer {
            Ok(v1::ListRuleHitsResponse { hits }) => {
                for v1::RuleHits { id, hits } in hits {
                    *counted.hits.entry(id).or_default() += hits;
                }
            }
            Err(problem) => counted.silent.push(v1::SilentHost { host, problem }),
        }
    }
    Ok(counted)
}

/// Makes a group.
pub async fn create(
    store: &dyn Store,
    vpc: &str,
    name: &str,
    rules: &[v1::SecurityRule],
) -> Result<Security, SecurityError> {
    name::label(name).map_err(|InvalidName(problem)| SecurityError::Name(problem))?;
    let rules = parse(rules)?;
    change(store, vpc, &[], |stored| {
        if stored.security.groups.contains_key(name) {
            let (vpc, group) = (vpc.to_owned(), name.to_owned());
            return Err(SecurityError::Exists { vpc, group });
        }
        let group = stored.number(&rules).collect();
        stored.security.groups.insert(name.to_owned(), group);
        check_rules(&stored.security, [name])
    })
    .await
}

/// Deletes a group that is neither a default nor an instance's.
pub async fn delete(
    store: &dyn Store,
    fleet: &Fleet,
    vpc: &str,
    name: &str,
) -> Result<(), SecurityError> {
    let instances = fleet.instances();
    let user = instances.iter().find(|instance| {
        instance.vpc == vpc
            && instance.state() != v1::InstanceState::Failed
            && instance.security_groups.iter().any(|group| group == name)
    });
    let removed = change(store, vpc, &[], |stored| {
        group(&mut stored.security, vpc, name)?;
        let group = name.to_owned();
        if stored.security.defaults.groups.contains(name) {
            return Err(SecurityError::IsDefault { vpc: vpc.to_owned(), group });
        }
        if let Some(instance) = user {
            return Err(SecurityError::InUse { group, instance: instance.id.clone() });
        }
        stored.security.groups.remove(name);
        Ok(())
    });
    removed.await.map(drop)
}

/// Adds and removes rules of a group, all or none.
pub async fn change_rules(
    store: &dyn Store,
    fleet: &Fleet,
    request: &v1::ChangeSecurityRulesRequest,
) -> Result<Security, SecurityError> {
    let v1::ChangeSecurityRulesRequest { vpc, group: name, add, remove } = request;
    let added = parse(add)?;
    change(store, vpc, &in_use(fleet, vpc), |stored| {
        let rules = stored.number(&added).collect::<Vec<_>>();
        let group = group(&mut stored.security, vpc, name)?;
        for &id in remove {
            if group.remove(&id).is_none() {
                return Err(SecurityError::NoRule { vpc: vpc.clone(), group: name.clone(), id });
            }
        }
        group.extend(rules);
        check_rules(&stored.security, [name.as_str()])
    })
    .await
}

/// Changes what holds for instances without their own.
pub async fn set_defaults(
    store: &dyn Store,
    request: &v1::SetSecurityDefaultsRequest,
) -> Result<Defaults, SecurityError> {
    let v1::SetSecurityDefaultsRequest { vpc, groups, otherwise, limits } = request;
    let otherwise = match otherwise {
        0 => None,
        &number => Some(Action::from_number(number)?),
    };
    let limits: Option<Limits> = limits.as_ref().map(TryInto::try_into).transpose()?;
    let security = change(store, vpc, &[], |stored| {
        let security = &mut stored.security;
        if let Some(v1::GroupNames { names }) = groups {
            check_groups(security, vpc, names)?;
            security.defaults.groups = names.iter().cloned().collect();
        }
        security.defaults.otherwise = otherwise.unwrap_or(security.defaults.otherwise);
        security.defaults.limits = limits.unwrap_or(security.defaults.limits);
        Ok(())
    });
    Ok(security.await?.defaults)
}

/// Whether an instance of the VPC can have these groups.
pub fn check_groups(security: &Security, vpc: &str, names: &[String]) -> Result<(), SecurityError> {
    if let Some(group) = security.missing(names) {
        return Err(SecurityError::UnknownGroup { vpc: vpc.to_owned(), group: group.clone() });
    }
    let names: BTreeSet<_> = names.iter().map(String::as_str).collect();
    if names.len() > MAX_GROUPS {
        return Err(SecurityError::TooManyGroups(names.len()));
    }
    check_rules(security, names)
}

fn check_rules<'a>(
    security: &Security,
    names: impl IntoIterator<Item = &'a str>,
) -> Result<(), SecurityError> {
    let names: BTreeSet<_> = names.into_iter().map(str::to_owned).collect();
    let rules = security.rules(&names).len();
    if rules > MAX_RULES {
        let groups = names.into_iter().collect::<Vec<_>>().join(", ");
        return Err(SecurityError::TooManyRules { rules, groups });
    }
    Ok(())
}

/// The sets of groups that instances of a VPC have of their own.
fn in_use(fleet: &Fleet, vpc: &str) -> Vec<BTreeSet<String>> {
    let instances = fleet.instances().into_iter().filter(|instance| instance.vpc == vpc);
    let sets = instances.map(|instance| instance.security_groups.into_iter().collect());
    sets.collect::<BTreeSet<_>>().into_iter().collect()
}

fn key(vpc: &str) -> String {
    format!("{SECURITY_PREFIX}{vpc}")
}

async fn known(store: &dyn Store, vpc: &str) -> Result<vpc::Vpc, SecurityError> {
    vpc::get(store, vpc).await?.ok_or_else(|| SecurityError::UnknownVpc(vpc.to_owned()))
}

fn parse(rules: &[v1::SecurityRule]) -> Result<Vec<Rule>, InvalidRule> {
    rules.iter().map(TryInto::try_into).collect()
}

fn group<'a>(
    security: &'a mut Security,
    vpc: &str,
    name: &str,
) -> Result<&'a mut Group, SecurityError> {
    security
        .groups
        .get_mut(name)
        .ok_or_else(|| SecurityError::UnknownGroup { vpc: vpc.to_owned(), group: name.to_owned() })
}

impl Stored {
    /// Rules with numbers of their own.
    fn number<'a>(&mut self, rules: &'a [Rule]) -> impl Iterator<Item = (u32, Rule)> + use<'a> {
        let first = self.last_rule + 1;
        self.last_rule += rules.len() as u32;
        (first..).zip(rules.iter().copied())
    }
}

/// Stores what becomes of a VPC's security, if its instances can have it: those with the default
/// groups, and those with these `sets`.
async fn change(
    store: &dyn Store,
    vpc: &str,
    sets: &[BTreeSet<String>],
    change: impl Fn(&mut Stored) -> Result<(), SecurityError>,
) -> Result<Security, SecurityError> {
    known(store, vpc).await?;
    let key = key(vpc);
    loop {
        let entry = store.get(&key).await?;
        let before: Stored = match &entry {
            Some(entry) => decode(&key, &entry.value)?,
            None => Stored::default(),
        };
        let mut after = before.clone();
        change(&mut after)?;
        for set in sets.iter().chain([&after.security.defaults.groups]) {
            check_rules(&after.security, set.iter().map(String::as_str))?;
        }
        if after == before {
            return Ok(after.security);
        }
        let precondition = Precondition::unchanged(&key, entry.as_ref());
        match store.commit(vec![precondition], vec![Write::put(&key, &after)?]).await {
            Ok(_) => return Ok(after.security),
            // Someone else changed it meanwhile.
            Err(StoreError::Conflict(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
