//! The rows of functions, their versions and aliases, and of triggers.

use jiff::Timestamp;
use serde::Serialize;
use warren_proto::v1::{self, trigger::Kind};

use super::{Row, dash, some};
use crate::error::Error;

/// A function.
#[derive(Serialize)]
pub struct FunctionRow {
    name: String,
    vpc: String,
    /// Number of the last version; none: there is none.
    latest: Option<u64>,
    versions: usize,
    aliases: Vec<AliasRow>,
    published: Timestamp,
}

impl From<v1::Function> for FunctionRow {
    fn from(function: v1::Function) -> Self {
        let last = function.versions.last();
        Self {
            latest: last.map(|version| version.number),
            published: timestamp(last.map_or(0, |version| version.published_unix_ms)),
            versions: function.versions.len(),
            aliases: function.aliases.into_iter().map(Into::into).collect(),
            name: function.name,
            vpc: function.vpc,
        }
    }
}

impl Row for FunctionRow {
    const HEADER: &'static [&'static str] =
        &["NAME", "VPC", "LATEST", "VERSIONS", "ALIASES", "PUBLISHED"];

    fn cells(&self) -> Vec<String> {
        let aliases: Vec<_> = self.aliases.iter().map(|alias| alias.name.as_str()).collect();
        vec![
            self.name.clone(),
            self.vpc.clone(),
            dash(self.latest.map(|number| number.to_string()).as_deref()),
            self.versions.to_string(),
            dash(some(aliases.join(", ")).as_deref()),
            format!("{:.0}", self.published),
        ]
    }
}

/// A version of a function.
#[derive(Serialize)]
pub struct VersionRow {
    version: u64,
    /// Those that stand for it, alone or with others.
    aliases: Vec<String>,
    template: String,
    memory_bytes: u64,
    timeout_ms: u32,
    /// Most calls at one time; none: no limit of its own.
    concurrency: Option<u32>,
    published: Timestamp,
    /// SHA-256 of the component.
    source: String,
    /// SHA-256 of the package.
    package: String,
}

/// The versions of a function, the last one first.
pub fn version_rows(function: v1::Function) -> Vec<VersionRow> {
    let aliases = function.aliases;
    let row = |version: v1::FunctionVersion| {
        let has = |alias: &&v1::FunctionAlias| {
            alias.versions.iter().any(|share| share.number == version.number)
        };
        VersionRow {
            version: version.number,
            aliases: aliases.iter().filter(has).map(|alias| alias.name.clone()).collect(),
            template: version.template,
            memory_bytes: version.memory_bytes,
            timeout_ms: version.timeout_ms,
            concurrency: Some(version.concurrency).filter(|limit| *limit > 0),
            published: timestamp(version.published_unix_ms),
            source: version.source,
            package: version.package,
        }
    };
    function.versions.into_iter().rev().map(row).collect()
}

impl Row for VersionRow {
    const HEADER: &'static [&'static str] = &[
        "VERSION",
        "ALIASES",
        "TEMPLATE",
        "MEMORY MIB",
        "TIMEOUT MS",
        "CONCURRENCY",
        "PUBLISHED",
        "PACKAGE",
    ];

    fn cells(&self) -> Vec<String> {
        vec![
            self.version.to_string(),
            dash(some(self.aliases.join(", ")).as_deref()),
            self.template.clone(),
            (self.memory_bytes >> 20).to_string(),
            self.timeout_ms.to_string(),
            dash(self.concurrency.map(|limit| limit.to_string()).as_deref()),
            format!("{:.0}", self.published),
            self.package.clone(),
        ]
    }
}

/// A version that was just deployed.
#[derive(Serialize)]
pub struct DeployedRow {
    function: String,
    version: u64,
    compiled_before: bool,
    package: String,
}

impl DeployedRow {
    /// The row of an answer.
    pub fn new(deployed: v1::DeployFunctionResponse) -> Result<Self, Error> {
        let function = deployed.function.ok_or(Error::Incomplete("the function"))?;
        let is_it = |version: &&v1::FunctionVersion| version.number == deployed.version;
        let version =
            function.versions.iter().find(is_it).ok_or(Error::Incomplete("the version"))?;
        Ok(Self {
            version: deployed.version,
            compiled_before: deployed.compiled_before,
            package: version.package.clone(),
            function: function.name,
        })
    }
}

impl Row for DeployedRow {
    const HEADER: &'static [&'static str] = &["FUNCTION", "VERSION", "PACKAGE"];

    fn cells(&self) -> Vec<String> {
        vec![self.function.clone(), self.version.to_string(), self.package.clone()]
    }
}

/// An alias of a function.
#[derive(Serialize)]
pub struct AliasRow {
    name: String,
    versions: Vec<ShareObject>,
    /// What it was before.
    former: Vec<ShareObject>,
}

/// A version, and its part of an alias's calls.
#[derive(Serialize)]
struct ShareObject {
    version: u64,
    weight: u32,
}

/// The aliases of a function.
pub fn alias_rows(function: v1::Function) -> Vec<AliasRow> {
    function.aliases.into_iter().map(Into::into).collect()
}

impl From<v1::FunctionAlias> for AliasRow {
    fn from(v1::FunctionAlias { name, versions, former }: v1::FunctionAlias) -> Self {
        let shares = |shares: Vec<v1::WeightedVersion>| {
            let share = |share: v1::WeightedVersion| ShareObject {
                version: share.number,
                weight: share.weight,
            };
            shares.into_iter().map(share).collect()
        };
        Self { name, versions: shares(versions), former: shares(former) }
    }
}

impl Row for AliasRow {
    const HEADER: &'static [&'static str] = &["ALIAS", "VERSIONS", "BEFORE"];

    fn cells(&self) -> Vec<String> {
        let listed = |shares: &[ShareObject]| match shares {
            [only] => only.version.to_string(),
            shares => {
                let share = |share: &ShareObject| format!("{}={}", share.version, share.weight);
                dash(some(shares.iter().map(share).collect::<Vec<_>>().join(" ")).as_deref())
            }
        };
        vec![self.name.clone(), listed(&self.versions), listed(&self.former)]
    }
}

/// A trigger.
#[derive(Serialize)]
pub struct TriggerRow {
    name: String,
    function: String,
    alias: String,
    #[serde(flatten)]
    kind: KindObject,
}

/// Which calls.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum KindObject {
    Http { host: Option<String>, prefix: Option<String>, strip: bool },
    Event { retries: u32, backoff_ms: u32, dead_letter: Option<String> },
    Timer { cron: String },
    Unknown,
}

impl From<v1::Trigger> for TriggerRow {
    fn from(v1::Trigger { name, function, alias, kind }: v1::Trigger) -> Self {
        let kind = match kind {
            Some(Kind::Http(v1::HttpTrigger { host, prefix, strip })) => {
                KindObject::Http { host: some(host), prefix: some(prefix), strip }
            }
            Some(Kind::Event(v1::EventTrigger { retries, backoff_ms, dead_letter })) => {
                KindObject::Event { retries, backoff_ms, dead_letter: some(dead_letter) }
            }
            Some(Kind::Timer(v1::TimerTrigger { cron })) => KindObject::Timer { cron },
            None => KindObject::Unknown,
        };
        Self { name, function, alias, kind }
    }
}

impl Row for TriggerRow {
    const HEADER: &'static [&'static str] = &["NAME", "KIND", "CALLS", "FUNCTION", "ALIAS"];

    fn cells(&self) -> Vec<String> {
        let (kind, calls) = match &self.kind {
            KindObject::Http { host, prefix, strip } => {
                let (host, prefix) = (host.as_deref(), prefix.as_deref());
                let stripped = if *strip { ", stripped" } else { "" };
                let (host, prefix) = (host.unwrap_or("*"), prefix.unwrap_or("/"));
                ("http", format!("{host}{prefix}{stripped}"))
            }
            KindObject::Event { retries, backoff_ms, dead_letter } => {
                let then = dead_letter.as_ref().map(|name| format!(", then {name}"));
                let then = then.unwrap_or_default();
                ("event", format!("{retries} retries from {backoff_ms} ms on{then}"))
            }
            KindObject::Timer { cron } => ("timer", cron.clone()),
            KindObject::Unknown => ("unknown", "-".to_owned()),
        };
        let (name, function) = (self.name.clone(), self.function.clone());
        vec![name, kind.to_owned(), calls, function, self.alias.clone()]
    }
}

/// Something that was just deleted.
#[derive(Serialize)]
pub struct DeletedRow {
    /// Its name.
    pub name: String,
}

impl Row for DeletedRow {
    const HEADER: &'static [&'static str] = &["DELETED"];

    fn cells(&self) -> Vec<String> {
        vec![self.name.clone()]
    }
}

/// A file that was just made.
#[derive(Serialize)]
pub struct FileRow {
    /// Where.
    pub path: String,
}

impl Row for FileRow {
    const HEADER: &'static [&'static str] = &["FILE"];

    fn cells(&self) -> Vec<String> {
        vec![self.path.clone()]
    }
}

fn timestamp(unix_ms: i64) -> Timestamp {
    Timestamp::from_millisecond(unix_ms).unwrap_or_default()
}
