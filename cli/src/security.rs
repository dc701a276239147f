//! `warren security-group`, `warren vpc guard`.

use std::collections::BTreeMap;

use clap::{Args, Subcommand, ValueEnum};
use warren_proto::limits::Limits;
use warren_proto::policy::Rule;
use warren_proto::v1::{
    ChangeSecurityRulesRequest, CreateSecurityGroupRequest, DeleteSecurityGroupRequest,
    GetSecurityRequest, GroupNames, SecurityAction, SecurityGroup, SecurityRule,
    SetSecurityDefaultsRequest, SilentHost, VpcSecurity,
};

use crate::args::Output;
use crate::client::Client;
use crate::commands::{all_done, print};
use crate::error::Error;
use crate::render::{self, DeletedGroupRow, GuardRow, group_rows, rule_rows};

#[derive(Debug, Subcommand)]
pub enum SecurityGroupCommand {
    /// Make a security group in a VPC.
    Create {
        /// VPC.
        vpc: String,
        /// Name: lower-case letters, digits and inner hyphens.
        name: String,
        /// A rule: PRIORITY allow|deny PROTOCOL [PORTS] [to PREFIX], such as '100 allow tcp 443 to
        /// 10.0.0.0/8' or '200 deny any'. The lowest priority is asked first. May be repeated.
        #[arg(long = "rule", value_name = "RULE")]
        rules: Vec<Rule>,
    },
    /// List the security groups of a VPC.
    Ls {
        /// VPC.
        vpc: String,
    },
    /// Show the rules of a security group, and how often each decided.
    Show {
        /// VPC.
        vpc: String,
        /// Security group.
        name: String,
    },
    /// Add rules to a security group. Live flows are judged again.
    AddRule {
        /// VPC.
        vpc: String,
        /// Security group.
        name: String,
        /// Rules, each in quotes: see `create`.
        #[arg(required = true, value_name = "RULE")]
        rules: Vec<Rule>,
    },
    /// Remove rules from a security group. Live flows are judged again.
    RemoveRule {
        /// VPC.
        vpc: String,
        /// Security group.
        name: String,
        /// Their numbers.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<u32>,
    },
    /// Delete a security group that is neither a default nor a microVM's.
    Delete {
        /// VPC.
        vpc: String,
        /// Security group.
        name: String,
    },
}

#[derive(Debug, Args)]
pub struct GuardArguments {
    /// VPC.
    pub vpc: String,
    /// Security group of microVMs that have none of their own. May be repeated.
    #[arg(long = "security-group", value_name = "NAME")]
    pub groups: Vec<String>,
    /// No security group for them.
    #[arg(long, conflicts_with = "groups")]
    pub no_security_groups: bool,
    /// What becomes of the flows, of any microVM, that no rule is about.
    #[arg(long, value_enum)]
    pub default_egress: Option<Egress>,
    /// Limits of microVMs that have none of their own, such as
    /// packets=20k,bits=1G,new-flows=100,flows=2000,ports=500; none: no limits.
    #[arg(long = "limit", value_name = "LIMITS")]
    pub limits: Option<Limits>,
}

/// What becomes of flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Egress {
    /// They may be.
    Allow,
    /// They may not be.
    Deny,
}

/// Runs `warren security-group`.
pub async fn run(
    mut client: Client,
    output: Output,
    command: SecurityGroupCommand,
) -> Result<(), Error> {
    let group = match command {
        SecurityGroupCommand::Create { vpc, name, rules } => {
            let rules = messages(rules);
            client.create_group(CreateSecurityGroupRequest { vpc, name, rules }).await?
        }
        SecurityGroupCommand::AddRule { vpc, name: group, rules } => {
            let (add, remove) = (messages(rules), Vec::new());
            client.change_rules(ChangeSecurityRulesRequest { vpc, group, add, remove }).await?
        }
        SecurityGroupCommand::RemoveRule { vpc, name: group, ids: remove } => {
            let add = Vec::new();
            client.change_rules(ChangeSecurityRulesRequest { vpc, group, add, remove }).await?
        }
        SecurityGroupCommand::Delete { vpc, name } => {
            let request = DeleteSecurityGroupRequest { vpc, name: name.clone() };
            client.delete_group(request).await?;
            return print(&render::list(output, &[DeletedGroupRow { name }]));
        }
        SecurityGroupCommand::Ls { vpc } => {
            let (security, _, _) = security(&mut client, vpc, false).await?;
            return print(&render::list(output, &group_rows(security)));
        }
        SecurityGroupCommand::Show { vpc, name } => {
            return show(client, output, vpc, &name).await;
        }
    };
    print(&render::list(output, &rule_rows(group, None)))
}

async fn show(mut client: Client, output: Output, vpc: String, name: &str) -> Result<(), Error> {
    let (security, hits, silent) = security(&mut client, vpc.clone(), true).await?;
    let group: Option<SecurityGroup> = security.groups.into_iter().find(|group| group.name == name);
    let group = group.ok_or_else(|| Error::NoGroup { vpc, name: name.to_owned() })?;
    print(&render::list(output, &rule_rows(group, Some(&hits))))?;
    complete(silent)
}

/// Runs `warren vpc guard`.
pub async fn guard(
    mut client: Client,
    output: Output,
    arguments: GuardArguments,
) -> Result<(), Error> {
    let GuardArguments { vpc, groups, no_security_groups, default_egress, limits } = arguments;
    let changes = !groups.is_empty() || no_security_groups;
    let groups = changes.then_some(GroupNames { names: groups });
    if groups.is_none() && default_egress.is_none() && limits.is_none() {
        let (security, hits, silent) = security(&mut client, vpc, true).await?;
        let defaults = security.defaults.ok_or(Error::Incomplete("the defaults"))?;
        print(&render::one(
            output,
            &GuardRow::new(defaults, Some(hits.get(&0).copied().unwrap_or(0))),
        ))?;
        return complete(silent);
    }
    let otherwise = match default_egress {
        None => SecurityAction::Unspecified,
        Some(Egress::Allow) => SecurityAction::Allow,
        Some(Egress::Deny) => SecurityAction::Deny,
    };
    let request = SetSecurityDefaultsRequest {
        vpc,
        groups,
        otherwise: otherwise.into(),
        limits: limits.map(Into::into),
    };
    let defaults = client.set_defaults(request).await?;
    print(&render::one(output, &GuardRow::new(defaults, None)))
}

type Counted = (VpcSecurity, BTreeMap<u32, u64>, Vec<SilentHost>);

async fn security(client: &mut Client, vpc: String, with_hits: bool) -> Result<Counted, Error> {
    let answer = client.security(GetSecurityRequest { vpc, with_hits }).await?;
    let security = answer.security.ok_or(Error::Incomplete("the security groups"))?;
    let hits = answer.hits.into_iter().map(|hits| (hits.id, hits.hits)).collect();
    Ok((security, hits, answer.silent))
}

/// An error if counters are not of all hosts.
fn complete(silent: Vec<SilentHost>) -> Result<(), Error> {
    let all = silent.len();
    let unknown = |SilentHost { host, problem }| Error::HitsUnknown { host, problem };
    all_done(silent.into_iter().map(unknown).collect(), all)
}

fn messages(rules: Vec<Rule>) -> Vec<SecurityRule> {
    rules.into_iter().map(|rule| rule.message(0)).collect()
}
