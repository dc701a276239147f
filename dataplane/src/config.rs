//! The daemon's TOML file.

mod nat;

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use warren_function::cache::Source;
use warren_function::repository::{OpenError, Repository, Store};
use warren_proto::endpoint::Endpoint;
use warren_proto::hook::Hook;
use warren_vmm::jail::FIRST_UID;
use warren_vmm::rates::Rates;

pub use self::nat::{Nat, Timeouts};
use crate::datapath::MAX_SLOTS;
use crate::host::is_hostname;
use crate::refill::Tiers;

/// What `/etc/warren/warrend.toml` says. Unknown keys are errors.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this machine in the fleet.
    pub name: String,
    /// The control plane; without one the agent only serves its own endpoints.
    pub control: Option<Endpoint>,
    /// Where the agent's gRPC listens.
    #[serde(default = "default_listen")]
    pub listen: Vec<Endpoint>,
    /// Where the control plane reaches this agent; by default the first TCP endpoint of `listen`.
    pub advertise: Option<Endpoint>,
    /// Where gateways reach this host's relay; without it the host takes no functions' calls.
    pub relay: Option<SocketAddr>,
    /// How the log is written.
    #[serde(default)]
    pub log_format: LogFormat,
    /// Where Prometheus finds `/metrics`; without it nothing is served. Anybody who can connect may
    /// read them.
    pub metrics: Option<SocketAddr>,
    /// Directory of sockets and of what a restart needs; kept across restarts, not across reboots.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Directory on a BPF file system for pinned programs, links and maps.
    #[serde(default = "default_bpffs")]
    pub bpffs: PathBuf,
    /// The eBPF object file.
    #[serde(default = "default_programs")]
    pub programs: PathBuf,
    /// The network between hosts and proxies.
    pub underlay: Underlay,
    /// Needed for `--role host`.
    pub host: Option<HostConfig>,
    /// For `--role proxy`.
    #[serde(default)]
    pub proxy: ProxyConfig,
    /// The NAT, which is on hosts.
    #[serde(default)]
    pub nat: Nat,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// Lines of JSON for programs, with one for each span that closes.
    Json,
}

/// The underlay network.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Underlay {
    /// Interface.
    pub interface: String,
    /// This machine's address on it: the tunnel's end.
    pub address: IpAddr,
}

/// What only proxies have.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProxyConfig {
    /// Run when addresses are to come to this node, beside what Linux does: for a cloud, whose network
    /// learns by its API. A program's absolute path and its arguments.
    pub assign_command: Option<Hook>,
}

/// What only hosts have.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// TAP slots, and so microVMs at once: 1 to [`MAX_SLOTS`].
    #[serde(default = "default_slots")]
    pub slots: u32,
    /// What microVMs are cloned from, at least one: the first is the default.
    pub templates: Vec<Template>,
    /// How microVMs are confined.
    #[serde(default)]
    pub jail: Jail,
    /// What each microVM's devices may move, each rate at least 1; without one there is no limit.
    #[serde(default)]
    pub limits: Rates,
    /// The microVM program.
    #[serde(default = "default_vmm")]
    pub vmm: PathBuf,
    /// Directory of the snapshots of microVMs.
    #[serde(default = "default_snapshots")]
    pub snapshots: PathBuf,
    /// The log of flows; without it there is none.
    pub flow_log: Option<FlowLog>,
    /// How functions are kept; without it the host takes none.
    pub functions: Option<Functions>,
}

/// How functions are kept.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Functions {
    /// Where packages are published: a directory, or the URL of an object store.
    pub repository: String,
    /// The zone of this host, and where its copies are; without it there are none, and what the host does
    /// not have comes from the repository.
    pub zone: Option<Zone>,
    /// Directory of packages and images.
    #[serde(default = "default_functions")]
    pub directory: PathBuf,
    /// How much of packages is kept, in bytes.
    #[serde(default = "default_functions_bytes")]
    pub packages_bytes: u64,
    /// How much of images is kept, in bytes.
    #[serde(default = "default_functions_bytes")]
    pub images_bytes: u64,
    /// MicroVMs that are held ready of each function that was called of late.
    #[serde(default)]
    pub parked: u32,
}

/// A zone's copies of packages.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Zone {
    /// Its name.
    pub name: String,
    /// A directory, or the URL of an object store.
    pub packages: String,
}

impl Functions {
    /// Where packages come from.
    ///
    /// # Errors
    /// One of the stores cannot be opened.
    pub fn source(&self) -> Result<Source, OpenError> {
        let region = Store::open("region", &self.repository)?;
        let (zone, copies) = match &self.zone {
            None => ("region".to_owned(), region.clone()),
            Some(Zone { name, packages }) => {
                (name.clone(), Store::open(&format!("zone {name}"), packages)?)
            }
        };
        let zones = BTreeMap::from([(zone.clone(), copies)]);
        Ok(Source { repository: Repository::new(region, zones), zone })
    }
}

/// A template, and how many of its clones wait for an instance. What all templates' together are at
/// least is at most [`HostConfig::slots`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// What starts call it: one label (RFC 1123), no other's.
    pub name: String,
    /// The file: `warren-vmm template` makes it.
    pub path: PathBuf,
    /// The image of a function in it, as `warren-vmm image` makes it: what is cloned is that.
    pub image: Option<PathBuf>,
    /// Key file of 32 bytes of template and image: nothing that is not encrypted with it is cloned.
    pub key: Option<PathBuf>,
    /// The function's image that a Linux guest's template was made with, if it was.
    pub disk: Option<PathBuf>,
    /// MicroVMs held ready at their barrier, at least.
    #[serde(default = "default_parked")]
    pub parked: u32,
    /// The most that the control plane may have held ready so, when many starts come; without it, as
    /// many as there are slots for. With less than `parked`, `parked` counts.
    pub parked_most: Option<u32>,
    /// MicroVMs held ready beside them that have the template's memory and state and did not run.
    #[serde(default)]
    pub loaded: u32,
    /// Jailed processes with KVM's objects held ready beside them.
    #[serde(default)]
    pub shells: u32,
}

impl Template {
    /// MicroVMs in each tier, at least.
    pub fn least(&self) -> Tiers {
        Tiers { shells: self.shells, loaded: self.loaded, parked: self.parked }
    }
}

/// How microVMs are confined.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Jail {
    /// User and group of the first slot's microVM, at least 1; each slot has one of its own after it.
    pub first_uid: u32,
    /// Control group of this host's microVMs, below the root of each hierarchy; without it `warren/`
    /// and the host's name.
    pub cgroup: Option<PathBuf>,
    /// Share of one processor that a microVM may use, in percent, 1 to 100.
    pub cpu_percent: u32,
}

impl Default for Jail {
    fn default() -> Self {
        Self { first_uid: FIRST_UID, cgroup: None, cpu_percent: 100 }
    }
}

/// The log of flows.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowLog {
    /// The file; its directory is made if it is missing.
    #[serde(default = "default_flow_log")]
    pub path: PathBuf,
    /// A file that would become larger is rotated: bytes, at least 4096.
    #[serde(default = "default_flow_log_bytes")]
    pub max_bytes: u64,
    /// How many rotated files are kept, 1 to 10,000.
    #[serde(default = "default_flow_log_keep")]
    pub keep: u32,
    /// Whether the beginnings of flows are logged, or only their ends.
    #[serde(default = "default_flow_log_starts")]
    pub starts: bool,
}

fn default_listen() -> Vec<Endpoint> {
    vec![Endpoint::Unix("/run/warren/agent.sock".into())]
}
fn default_run_dir() -> PathBuf {
    "/run/warren".into()
}
fn default_bpffs() -> PathBuf {
    "/sys/fs/bpf/warren".into()
}
fn default_programs() -> PathBuf {
    "/usr/lib/warren/warren-ebpf.o".into()
}
fn default_vmm() -> PathBuf {
    "/usr/lib/warren/warren-vmm".into()
}
fn default_slots() -> u32 {
    128
}
fn default_parked() -> u32 {
    64
}

fn default_snapshots() -> PathBuf {
    "/var/lib/warren/snapshots".into()
}
fn default_functions() -> PathBuf {
    "/var/lib/warren/functions".into()
}
fn default_functions_bytes() -> u64 {
    10 << 30
}
fn default_flow_log() -> PathBuf {
    "/var/log/warren/flows.jsonl".into()
}
fn default_flow_log_bytes() -> u64 {
    64 << 20
}
fn default_flow_log_keep() -> u32 {
    16
}
fn default_flow_log_starts() -> bool {
    true
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}; name another one with --config")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML, or not of this form.
    #[error("the configuration {path} is not valid:\n{source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value is out of its range.
    #[error("the configuration {path} is not valid: {key} {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What it must be.
        problem: String,
    },
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(&text, path)
    }

    /// Checks the text of a file; `path` is for messages only.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)
            .map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })?;
        let wrong = |key, problem: &str| {
            Err(ConfigError::Value { path: path.into(), key, problem: problem.into() })
        };
        if config.name.is_empty() {
            return wrong("name", "must not be empty");
        }
        if config.listen.is_empty() {
            return wrong("listen", "must hold at least one endpoint");
        }
        if config.control.is_some() && config.advertised().is_none() {
            return wrong(
                "advertise",
                "is needed with `control` where `listen` has no TCP endpoint: \
                 the control plane must reach this agent",
            );
        }
        if let Some(host) = &config.host {
            if !(1..=MAX_SLOTS).contains(&host.slots) {
                return wrong("host.slots", &format!("must be between 1 and {MAX_SLOTS}"));
            }
            if let Some((key, problem)) = host.problem_of_templates() {
                return wrong(key, &problem);
            }
            let Jail { first_uid, cgroup, cpu_percent } = &host.jail;
            if *first_uid == 0 || first_uid.checked_add(MAX_SLOTS).is_none() {
                return wrong("host.jail.first_uid", "must leave room for all slots, without root");
            }
            if !(1..=100).contains(cpu_percent) {
                return wrong("host.jail.cpu_percent", "must be between 1 and 100");
            }
            let normal = |part| matches!(part, Component::Normal(_));
            if let Some(group) = cgroup
                && (group.as_os_str().is_empty() || !group.components().all(normal))
            {
                return wrong("host.jail.cgroup", "must be a path below the hierarchy's root");
            }
            if let Some(log) = &host.flow_log {
                if log.max_bytes < 4096 {
                    return wrong("host.flow_log.max_bytes", "must be at least 4096");
                }
                if !(1..=10_000).contains(&log.keep) {
                    return wrong("host.flow_log.keep", "must be between 1 and 10000");
                }
            }
        }
        if let Some((key, problem)) = config.nat.timeouts.problem() {
            return wrong(key, &problem);
        }
        Ok(config)
    }

    /// Where the control plane reaches this agent.
    pub fn advertised(&self) -> Option<&Endpoint> {
        let tcp = |endpoint: &&Endpoint| matches!(endpoint, Endpoint::Tcp(_));
        self.advertise.as_ref().or_else(|| self.listen.iter().find(tcp))
    }
}

impl HostConfig {
    /// Which key is wrong, and what it must be.
    fn problem_of_templates(&self) -> Option<(&'static str, String)> {
        if self.templates.is_empty() {
            return Some(("host.templates", "must hold at least one template".to_owned()));
        }
        let mut names = HashSet::new();
        for Template { name, .. } in &self.templates {
            if !is_hostname(name) {
                let problem = "must be 1 to 63 letters, digits and inner hyphens (RFC 1123)";
                return Some(("host.templates.name", format!("{problem}, not \"{name}\"")));
            }
            if !names.insert(name) {
                return Some(("host.templates.name", format!("\"{name}\" is there twice")));
            }
        }
        let least = self.templates.iter().map(|template| template.least().sum());
        let least = least.fold(0, u32::saturating_add);
        (least > self.slots).then(|| {
            let slots = self.slots;
            let problem = format!(
                "must not have more of parked, loaded and shells together than host.slots: \
                 {least} of {slots}"
            );
            ("host.templates", problem)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "name = 'h'\nunderlay = { interface = 'eth0', address = '192.0.2.1' }\n";

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("warrend.toml"))
    }

    #[test]
    fn a_small_file_gets_defaults() {
        let config = parse(SMALL).unwrap();
        assert_eq!(config.run_dir, Path::new("/run/warren"));
        assert_eq!(config.listen, ["unix:/run/warren/agent.sock".parse().unwrap()]);
        assert_eq!(config.metrics, None);
        assert_eq!(config.log_format, LogFormat::Text);
        assert_eq!(config.nat.timeouts, Timeouts::default());
        let templates = "[[host.templates]]\nname = 'a'\npath = '/a'\n\
                         [[host.templates]]\nname = 'b'\npath = '/b'\nkey = '/k'\nparked = 2\n";
        let host = parse(&format!("{SMALL}{templates}")).unwrap().host.unwrap();
        let least: Vec<_> = host.templates.iter().map(|it| it.least().parked).collect();
        assert_eq!((host.slots, least), (128, vec![64, 2]));
        let config = parse(&format!("{SMALL}[nat.timeouts]\nudp = 600")).unwrap();
        assert_eq!(config.nat.timeouts, Timeouts { udp: 600, ..Timeouts::default() });
    }

    #[test]
    fn errors_name_the_file_and_the_key() {
        let template = "[host]\ntemplates = [{ name = 'a', path = '/t' }]\n";
        let host = |slots: u32, templates: &str| {
            format!("{SMALL}[host]\nslots = {slots}\ntemplates = [{templates}]")
        };
        let [a, b] =
            ["a", "b"].map(|name| format!("{{ name = '{name}', path = '/t', parked = 3 }}"));
        for (text, key) in [
            (format!("{SMALL}{template}slots = 0"), "host.slots"),
            (format!("{SMALL}{template}slots = 65278"), "host.slots"),
            (host(2, ""), "host.templates must hold"),
            (host(2, &a), "3 of 2"),
            (host(5, &format!("{a}, {b}")), "6 of 5"),
            (host(5, &a.replace("path", "shells = 3, path")), "6 of 5"),
            (host(6, &format!("{a}, {a}")), "\"a\" is there twice"),
            (host(6, &a.replace("'a'", "'a/b'")), "host.templates.name"),
            (format!("{SMALL}[host]"), "templates"),
            (format!("{SMALL}{template}[host.jail]\nfirst_uid = 0"), "first_uid"),
            (format!("{SMALL}{template}[host.jail]\nfirst_uid = 4294967295"), "first_uid"),
            (format!("{SMALL}{template}[host.jail]\ncpu_percent = 0"), "cpu_percent"),
            (format!("{SMALL}{template}[host.jail]\ncgroup = '/a'"), "jail.cgroup"),
            (format!("{SMALL}{template}[host.jail]\ncgroup = 'a/../..'"), "jail.cgroup"),
            (format!("{SMALL}{template}[host.limits]\ndisk_requests = 0"), "disk_requests"),
            (format!("{SMALL}{template}[host.limits]\nnet_bytes = 1"), "net_bytes"),
            (format!("{SMALL}{template}[host.flow_log]\nmax_bytes = 1"), "max_bytes"),
            (format!("{SMALL}{template}[host.flow_log]\nkeep = 0"), "flow_log.keep"),
            (format!("control = 'http://192.0.2.3:7700'\n{SMALL}"), "advertise"),
            (format!("listen = []\n{SMALL}"), "listen"),
            (format!("{SMALL}{template}slot = 3"), "slot"),
            (format!("{SMALL}{template}template = '/t'"), "templates"),
            ("name = 'h'".to_owned(), "underlay"),
            (SMALL.replace("192.0.2.1", "192.0.2"), "address"),
            (format!("metrics = '127.0.0.1'\n{SMALL}"), "metrics"),
            (format!("log_format = 'xml'\n{SMALL}"), "log_format"),
            (format!("{SMALL}[proxy]\nassign_command = ['eni']"), "assign_command"),
            (format!("{SMALL}[nat.timeouts]\nudp = 30"), "nat.timeouts.udp"),
            (format!("{SMALL}[nat.timeouts]\nsctp = 300"), "sctp"),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains("warrend.toml"), "{error}");
            assert!(error.contains(key), "{key}: {error}");
        }
    }
}
