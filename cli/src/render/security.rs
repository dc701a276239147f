//! Security groups, their rules, and what guards a VPC.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use warren_proto::limits::Limits;
use warren_proto::v1::{self, SecurityAction, SecurityProtocol};

use super::{Row, dash, some};

/// A security group of a VPC.
#[derive(Serialize)]
pub struct GroupRow {
    name: String,
    rules: usize,
    /// MicroVMs without groups of their own have it.
    default: bool,
}

/// The groups of a VPC.
pub fn group_rows(security: v1::VpcSecurity) -> Vec<GroupRow> {
    let defaults: BTreeSet<_> = security.defaults.into_iter().flat_map(|it| it.groups).collect();
    let row = |group: v1::SecurityGroup| GroupRow {
        default: defaults.contains(&group.name),
        rules: group.rules.len(),
        name: group.name,
    };
    security.groups.into_iter().map(row).collect()
}

impl Row for GroupRow {
    const HEADER: &'static [&'static str] = &["NAME", "RULES", "DEFAULT"];

    fn cells(&self) -> Vec<String> {
        let default = if self.default { "yes" } else { "no" };
        vec![self.name.clone(), self.rules.to_string(), default.to_owned()]
    }
}

/// A rule of a security group.
#[derive(Serialize)]
pub struct RuleRow {
    id: u32,
    priority: u32,
    action: &'static str,
    protocol: &'static str,
    /// Such as 443 or 5000-5999.
    ports: Option<String>,
    peers: Option<String>,
    /// How often it decided, on all hosts; none: that was not asked for.
    hits: Option<u64>,
}

/// The rules of a group, in the order in which they are asked. Without any `hits`, they were not
/// asked for.
pub fn rule_rows(group: v1::SecurityGroup, hits: Option<&BTreeMap<u32, u64>>) -> Vec<RuleRow> {
    let row = |rule: v1::SecurityRule| RuleRow {
        id: rule.id,
        priority: rule.priority,
        action: action(rule.action()),
        protocol: match rule.protocol() {
            SecurityProtocol::Unspecified => "any",
            SecurityProtocol::Tcp => "tcp",
            SecurityProtocol::Udp => "udp",
            SecurityProtocol::Icmp => "icmp",
        },
        ports: match (rule.first_port, rule.last_port) {
            (0, 0) => None,
            (first, last) if first == last => Some(first.to_string()),
            (first, last) => Some(format!("{first}-{last}")),
        },
        hits: hits.map(|hits| hits.get(&rule.id).copied().unwrap_or(0)),
        peers: some(rule.prefix),
    };
    group.rules.into_iter().map(row).collect()
}

fn action(action: SecurityAction) -> &'static str {
    match action {
        SecurityAction::Allow => "allow",
        SecurityAction::Deny => "deny",
        SecurityAction::Unspecified => "unknown",
    }
}

impl Row for RuleRow {
    const HEADER: &'static [&'static str] =
        &["ID", "PRIORITY", "ACTION", "PROTOCOL", "PORTS", "PEERS", "HITS"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.id.to_string(),
            self.priority.to_string(),
            self.action.to_owned(),
            self.protocol.to_owned(),
            dash(self.ports.as_deref()),
            dash(self.peers.as_deref()),
            dash(self.hits.map(|hits| hits.to_string()).as_deref()),
        ]
    }
}

/// A security group that was just deleted.
#[derive(Serialize)]
pub struct DeletedGroupRow {
    /// Its name.
    pub name: String,
}

impl Row for DeletedGroupRow {
    const HEADER: &'static [&'static str] = &["DELETED"];

    fn cells(&self) -> Vec<String> {
        vec![self.name.clone()]
    }
}

/// What holds for a VPC's microVMs that have nothing of their own.
#[derive(Serialize)]
pub struct GuardRow {
    security_groups: Vec<String>,
    default_egress: &'static str,
    limits: LimitsObject,
    /// How often no rule was about a flow, on all hosts; none: that was not asked for.
    hits: Option<u64>,
}

/// Limits; those that are not there are null.
#[derive(Serialize)]
pub struct LimitsObject {
    packets: Option<u64>,
    bits: Option<u64>,
    new_flows: Option<u64>,
    /// Flows at one time.
    pub flows: Option<u32>,
    /// Ports at one time.
    pub ports: Option<u32>,
    #[serde(skip)]
    text: String,
}

impl From<v1::Limits> for LimitsObject {
    fn from(limits: v1::Limits) -> Self {
        Self {
            packets: Some(limits.packets).filter(|limit| *limit > 0),
            bits: Some(limits.bits).filter(|limit| *limit > 0),
            new_flows: Some(limits.new_flows).filter(|limit| *limit > 0),
            flows: Some(limits.flows).filter(|limit| *limit > 0),
            ports: Some(limits.ports).filter(|limit| *limit > 0),
            text: Limits::try_from(&limits)
                .map_or_else(|_| "unknown".to_owned(), |limits| limits.to_string()),
        }
    }
}

impl GuardRow {
    /// The row of these defaults.
    pub fn new(defaults: v1::SecurityDefaults, hits: Option<u64>) -> Self {
        let otherwise = defaults.otherwise();
        Self {
            security_groups: defaults.groups,
            default_egress: action(otherwise),
            limits: defaults.limits.unwrap_or_default().into(),
            hits,
        }
    }
}

impl Row for GuardRow {
    const HEADER: &'static [&'static str] =
        &["SECURITY GROUPS", "LIMITS", "DEFAULT EGRESS", "HITS"];

    fn cells(&self) -> Vec<String> {
        vec![
            dash(some(self.security_groups.join(",")).as_deref()),
            self.limits.text.clone(),
            self.default_egress.to_owned(),
            dash(self.hits.map(|hits| hits.to_string()).as_deref()),
        ]
    }
}
