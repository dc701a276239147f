//! Which function a request is for: host name and path -> trigger -> alias -> version. Pure.
//!
//! A trigger for the very host name comes before one for any; among those, the one with the longest
//! prefix that fits in whole segments; of equals, the first by name.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use warren_proto::v1::trigger::Kind;
use warren_proto::v1::{EventTrigger, Function, Trigger};

use crate::path::NormalPath;
use crate::refusal::Refusal;

/// The alias that stands for the last version.
const LATEST: &str = "$LATEST";
/// How long a call may take whose version does not say.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// A version of a function: what an instance is of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Version {
    /// Name of the function.
    pub function: Arc<str>,
    /// Number of the version.
    pub number: u64,
    /// Name of its VPC, which is its tenant.
    pub vpc: Arc<str>,
    /// SHA-256 of its package, in hexadecimal.
    pub package: String,
    /// Name of the template that its instances are clones of.
    pub template: String,
    /// Memory of an instance, in bytes.
    pub memory_bytes: u64,
    /// The longest that a call may take.
    pub timeout: Duration,
    /// Most calls of the function at one time; 0: no limit of its own.
    pub concurrency: u32,
}

/// Versions that share the calls of an alias, by their weights.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shares(Vec<(Arc<Version>, u64)>);

impl Shares {
    /// The version for a call, of which `draw` is a random number. `None`: there is none.
    pub fn pick(&self, draw: u64) -> Option<&Arc<Version>> {
        let total: u64 = self.0.iter().map(|(_, weight)| weight).sum();
        let mut rest = draw.checked_rem(total)?;
        self.0.iter().find_map(|(version, weight)| {
            let hit = rest < *weight;
            rest = rest.saturating_sub(*weight);
            hit.then_some(version)
        })
    }
}

/// Where a trigger leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Name of the trigger.
    pub trigger: String,
    /// Name of the function.
    pub function: String,
    /// What the trigger names of it.
    pub alias: String,
    versions: Shares,
}

impl Target {
    /// The version for a call, of which `draw` is a random number.
    pub fn version(&self, draw: u64) -> Result<&Arc<Version>, Refusal> {
        self.versions.pick(draw).ok_or_else(|| Refusal::NoVersion {
            function: self.function.clone(),
            alias: self.alias.clone(),
        })
    }
}

/// An HTTP request's way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route<'a> {
    /// Where to.
    pub target: &'a Target,
    /// How many of the path's first segments the function does not see.
    pub strip: usize,
}

struct HttpRoute {
    target: Target,
    strip: usize,
}

/// The prefixes of one host name, each like "/a/b"; "" fits every path.
#[derive(Default)]
struct Prefixes {
    by_prefix: HashMap<String, HttpRoute>,
    deepest: usize,
}

impl Prefixes {
    fn find(&self, path: &NormalPath<'_>) -> Option<&HttpRoute> {
        path.prefixes(self.deepest).find_map(|prefix| self.by_prefix.get(prefix))
    }
}

/// All triggers, ready to be asked.
#[derive(Default)]
pub struct Routes {
    by_host: HashMap<String, Prefixes>,
    any_host: Prefixes,
    events: HashMap<String, (Target, EventTrigger)>,
    timers: BTreeMap<String, (Target, String)>,
}

impl Routes {
    /// Of these triggers to these functions. What leads nowhere is kept, to be refused with its reason.
    pub fn new<'a>(
        functions: &BTreeMap<String, Function>,
        triggers: impl IntoIterator<Item = &'a Trigger>,
    ) -> Self {
        let mut routes = Self::default();
        let mut sorted: Vec<_> = triggers.into_iter().collect();
        sorted.sort_by(|a, b| a.name.cmp(&b.name));
        let mut known = HashMap::new();
        for trigger in sorted {
            let target = Target {
                trigger: trigger.name.clone(),
                function: trigger.function.clone(),
                alias: trigger.alias.clone(),
                versions: functions
                    .get(&trigger.function)
                    .map(|function| shares(function, &trigger.alias, &mut known))
                    .unwrap_or_default(),
            };
            match &trigger.kind {
                Some(Kind::Http(http)) => {
                    // A prefix that is none fits nothing: what is published is checked elsewhere.
                    let Ok(prefix) = NormalPath::new(&http.prefix) else { continue };
                    let prefix = prefix.as_prefix();
                    let depth = prefix.matches('/').count();
                    let prefixes = match host_name(&http.host) {
                        Some(host) => routes.by_host.entry(host).or_default(),
                        None => &mut routes.any_host,
                    };
                    let strip = if http.strip { depth } else { 0 };
                    prefixes.deepest = prefixes.deepest.max(depth);
                    let route = HttpRoute { target, strip };
                    prefixes.by_prefix.entry(prefix.to_owned()).or_insert(route);
                }
                Some(Kind::Event(event)) => {
                    routes.events.insert(trigger.name.clone(), (target, event.clone()));
                }
                Some(Kind::Timer(timer)) => {
                    routes.timers.insert(trigger.name.clone(), (target, timer.cron.clone()));
                }
                None => {}
            }
        }
        routes
    }

    /// The way of a request for this host (with or without a port) and path (without a query).
    pub fn find(&self, host: &str, path: &str) -> Result<Route<'_>, Refusal> {
        let path = NormalPath::new(path).map_err(Refusal::BadPath)?;
        let of_host = host_name(host).and_then(|host| self.by_host.get(&host));
        of_host
            .and_then(|prefixes| prefixes.find(&path))
            .or_else(|| self.any_host.find(&path))
            .map(|route| Route { target: &route.target, strip: route.strip })
            .ok_or(Refusal::NoRoute)
    }

    /// The event trigger of this name.
    pub fn event(&self, name: &str) -> Option<(&Target, &EventTrigger)> {
        self.events.get(name).map(|(target, event)| (target, event))
    }

    /// The timer trigger of this name.
    pub fn timer(&self, name: &str) -> Option<&Target> {
        self.timers.get(name).map(|(target, _)| target)
    }

    /// All timer triggers: name and cron expression.
    pub fn timers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.timers.iter().map(|(name, (_, cron))| (name.as_str(), cron.as_str()))
    }
}

/// In lower case, without port and final dot; `None` if nothing is left.
fn host_name(host: &str) -> Option<String> {
    let name = match host.rfind(':') {
        // Not a colon inside of [IPv6].
        Some(colon) if !host[colon..].contains(']') => &host[..colon],
        _ => host,
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    (!name.is_empty()).then(|| name.to_ascii_lowercase())
}

/// The versions that an alias of a function stands for.
fn shares(
    function: &Function,
    alias: &str,
    known: &mut HashMap<(String, u64), Arc<Version>>,
) -> Shares {
    let mut version = |number: u64| {
        let found = function.versions.iter().find(|version| version.number == number)?;
        let key = (function.name.clone(), number);
        Some(known.entry(key).or_insert_with(|| Arc::new(of(function, found))).clone())
    };
    if alias.is_empty() || alias == LATEST {
        let last = function.versions.iter().map(|version| version.number).max();
        return Shares(last.and_then(version).map(|version| (version, 1)).into_iter().collect());
    }
    if let Some(alias) = function.aliases.iter().find(|known| known.name == alias) {
        let shares = alias
            .versions
            .iter()
            .filter_map(|share| Some((version(share.number)?, u64::from(share.weight))));
        return Shares(shares.collect());
    }
    let numbered = alias.parse().ok().and_then(version);
    Shares(numbered.map(|version| (version, 1)).into_iter().collect())
}

fn of(function: &Function, version: &warren_proto::v1::FunctionVersion) -> Version {
    Version {
        function: function.name.as_str().into(),
        number: version.number,
        vpc: function.vpc.as_str().into(),
        package: version.package.clone(),
        template: version.template.clone(),
        memory_bytes: version.memory_bytes,
        timeout: match version.timeout_ms {
            0 => DEFAULT_TIMEOUT,
            limit => Duration::from_millis(limit.into()),
        },
        concurrency: version.concurrency,
    }
}

#[cfg(test)]
mod tests;
