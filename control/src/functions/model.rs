//! What a function is, as it is stored: versions that never change, and aliases for them. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use warren_proto::v1;

use super::FunctionsError;
use crate::name::{self, InvalidName};

/// The alias that stands for the last version. It is nobody's to set.
pub const LATEST: &str = "$LATEST";

/// Versions that are kept, beside those that an alias or a trigger names: to go back to.
const MAX_VERSIONS: usize = 100;
/// The most aliases of a function.
const MAX_ALIASES: usize = 50;
/// The most versions that share an alias.
const MAX_SHARES: usize = 8;
/// The largest weight: finer than a thousandth is no share.
const MAX_WEIGHT: u32 = 10_000;

/// Versions, and their parts of an alias's calls.
pub type Weights = BTreeMap<u64, u32>;

/// A function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Name.
    pub name: String,
    /// Name of its VPC.
    pub vpc: String,
    /// By number. The last is always there, so that no number is used again.
    pub versions: BTreeMap<u64, Version>,
    /// By name.
    pub aliases: BTreeMap<String, Alias>,
}

/// What was published once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Digest of its package.
    pub package: String,
    /// Digest of its component.
    pub source: String,
    /// Name of the template that its instances are clones of.
    pub template: String,
    /// Memory of an instance, in bytes.
    pub memory_bytes: u64,
    /// The longest that a call may take, in milliseconds.
    pub timeout_ms: u32,
    /// Most calls at one time; 0: no limit of its own.
    pub concurrency: u32,
    /// When that was, in milliseconds since 1970.
    pub published_unix_ms: i64,
}

/// What an alias stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alias {
    /// Now.
    pub versions: Weights,
    /// Before; empty: it was never anything else.
    pub former: Weights,
}

impl Function {
    /// One without any version yet.
    pub fn new(name: &str, vpc: &str) -> Self {
        let (name, vpc) = (name.to_owned(), vpc.to_owned());
        Self { name, vpc, versions: BTreeMap::new(), aliases: BTreeMap::new() }
    }

    /// Adds a version, unless the last one is the same; its number. Of the older ones that neither an
    /// alias nor one of these `triggers` names, the first go when there are too many.
    pub fn publish<'a>(
        &mut self,
        version: Version,
        triggers: impl IntoIterator<Item = &'a str>,
    ) -> u64 {
        let last = self.versions.last_key_value();
        if let Some((number, last)) = last
            && (Version { published_unix_ms: last.published_unix_ms, ..version.clone() }) == *last
        {
            return *number;
        }
        let number = last.map_or(1, |(number, _)| number + 1);
        self.versions.insert(number, version);
        let mut used: BTreeSet<u64> = [number].into();
        for alias in self.aliases.values() {
            used.extend(alias.versions.keys().chain(alias.former.keys()));
        }
        used.extend(triggers.into_iter().filter_map(|alias| alias.parse::<u64>().ok()));
        let mut excess = self.versions.len().saturating_sub(MAX_VERSIONS);
        self.versions.retain(|number, _| {
            let goes = excess > 0 && !used.contains(number);
            excess -= usize::from(goes);
            !goes
        });
        number
    }

    /// Has an alias stand for these versions.
    pub fn set_alias(
        &mut self,
        alias: &str,
        shares: &[v1::WeightedVersion],
    ) -> Result<(), FunctionsError> {
        let of_alias = |problem: String| FunctionsError::Alias { alias: alias.to_owned(), problem };
        if alias == LATEST {
            return Err(of_alias("always is the last version: take another name".into()));
        }
        name::label(alias).map_err(|InvalidName(problem)| of_alias(problem))?;
        if alias.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(of_alias("is a version's number: take a name with a letter".into()));
        }
        let mut versions = Weights::new();
        for share in shares {
            self.check_version(share.number)?;
            if !(1..=MAX_WEIGHT).contains(&share.weight) {
                let problem = format!("has a weight {}: give 1 to {MAX_WEIGHT}", share.weight);
                return Err(of_alias(problem));
            }
            if versions.insert(share.number, share.weight).is_some() {
                return Err(of_alias(format!("has version {} twice", share.number)));
            }
        }
        if !(1..=MAX_SHARES).contains(&versions.len()) {
            let problem = format!("has {} versions: give 1 to {MAX_SHARES}", versions.len());
            return Err(of_alias(problem));
        }
        if self.aliases.len() >= MAX_ALIASES && !self.aliases.contains_key(alias) {
            return Err(FunctionsError::TooManyAliases(self.name.clone()));
        }
        let alias = self.aliases.entry(alias.to_owned()).or_default();
        if alias.versions != versions {
            alias.former = std::mem::replace(&mut alias.versions, versions);
        }
        Ok(())
    }

    /// Has an alias stand for what it was before.
    pub fn roll_back(&mut self, alias: &str) -> Result<(), FunctionsError> {
        let function = self.name.clone();
        let found = self.aliases.get_mut(alias).ok_or_else(|| FunctionsError::UnknownAlias {
            function: function.clone(),
            alias: alias.to_owned(),
        })?;
        if found.former.is_empty() {
            return Err(FunctionsError::NothingBefore { function, alias: alias.to_owned() });
        }
        std::mem::swap(&mut found.versions, &mut found.former);
        Ok(())
    }

    /// Whether this is `$LATEST`, an alias of it, or a version's number.
    pub fn check_alias(&self, alias: &str) -> Result<(), FunctionsError> {
        if alias == LATEST || self.aliases.contains_key(alias) {
            return Ok(());
        }
        match alias.parse() {
            Ok(number) => self.check_version(number),
            Err(_) => Err(FunctionsError::UnknownAlias {
                function: self.name.clone(),
                alias: alias.to_owned(),
            }),
        }
    }

    fn check_version(&self, version: u64) -> Result<(), FunctionsError> {
        if self.versions.contains_key(&version) {
            return Ok(());
        }
        Err(FunctionsError::UnknownVersion { function: self.name.clone(), version })
    }

    /// An alias, as a message.
    pub fn alias_message(&self, alias: &str) -> Option<v1::FunctionAlias> {
        let Alias { versions, former } = self.aliases.get(alias)?;
        let shares = |weights: &Weights| {
            let share = |(&number, &weight)| v1::WeightedVersion { number, weight };
            weights.iter().map(share).collect()
        };
        let (versions, former) = (shares(versions), shares(former));
        Some(v1::FunctionAlias { name: alias.to_owned(), versions, former })
    }
}

impl From<&Function> for v1::Function {
    fn from(function: &Function) -> Self {
        let version = |(&number, version): (&u64, &Version)| v1::FunctionVersion {
            number,
            package: version.package.clone(),
            template: version.template.clone(),
            memory_bytes: version.memory_bytes,
            timeout_ms: version.timeout_ms,
            concurrency: version.concurrency,
            published_unix_ms: version.published_unix_ms,
            source: version.source.clone(),
        };
        let aliases = function.aliases.keys();
        Self {
            name: function.name.clone(),
            vpc: function.vpc.clone(),
            versions: function.versions.iter().map(version).collect(),
            aliases: aliases.filter_map(|alias| function.alias_message(alias)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(package: &str) -> Version {
        Version {
            package: package.into(),
            source: "source".into(),
            template: "runtime".into(),
            memory_bytes: 1 << 27,
            timeout_ms: 3000,
            concurrency: 0,
            published_unix_ms: 5,
        }
    }

    fn function(versions: usize) -> Function {
        let mut function = Function::new("web", "blue");
        for number in 1..=versions {
            function.publish(version(&number.to_string()), []);
        }
        function
    }

    fn shares(weights: &[(u64, u32)]) -> Vec<v1::WeightedVersion> {
        let share = |&(number, weight)| v1::WeightedVersion { number, weight };
        weights.iter().map(share).collect()
    }

    #[test]
    fn versions_are_numbered_and_the_same_once_more_is_none() {
        let mut function = function(2);
        let again = Version { published_unix_ms: 6, ..version("2") };
        assert_eq!(function.publish(again, []), 2);
        assert_eq!(function.versions[&2].published_unix_ms, 5);
        assert_eq!(function.publish(Version { timeout_ms: 1, ..version("2") }, []), 3);
        assert_eq!(function.publish(version("2"), []), 4, "it is not the last one's any more");
    }

    #[test]
    fn old_versions_go_but_for_those_in_use() {
        let mut function = function(MAX_VERSIONS);
        function.set_alias("live", &shares(&[(1, 1)])).unwrap();
        function.set_alias("live", &shares(&[(3, 1)])).unwrap();
        for package in ["a", "b", "c"] {
            function.publish(version(package), ["$LATEST", "live", "4"]);
        }
        let numbers: Vec<_> = function.versions.keys().copied().collect();
        assert_eq!(numbers.len(), MAX_VERSIONS);
        assert_eq!(numbers[..4], [1, 3, 4, 7]);
        assert_eq!(numbers.last(), Some(&103));
    }

    #[test]
    fn an_alias_goes_back_and_forth() {
        let mut function = function(3);
        function.set_alias("live", &shares(&[(1, 1)])).unwrap();
        let error = function.roll_back("live").unwrap_err().to_string();
        assert!(error.contains("\"live\"") && error.contains("web"), "{error}");
        function.set_alias("live", &shares(&[(1, 9), (2, 1)])).unwrap();
        // The same once more does not forget what was before.
        function.set_alias("live", &shares(&[(2, 1), (1, 9)])).unwrap();
        let both = Weights::from([(1, 9), (2, 1)]);
        assert_eq!(function.aliases["live"].versions, both);
        function.roll_back("live").unwrap();
        assert_eq!(function.aliases["live"].versions, Weights::from([(1, 1)]));
        function.roll_back("live").unwrap();
        assert_eq!(function.aliases["live"].versions, both);
        assert!(function.roll_back("other").is_err());
    }

    #[test]
    fn what_cannot_be_an_alias_is_refused_with_its_reason() {
        type Case<'a> = (&'a str, &'a [(u64, u32)], &'a str);
        let mut function = function(2);
        let cases: [Case; 7] = [
            (LATEST, &[(1, 1)], "is the last version"),
            ("17", &[(1, 1)], "a name with a letter"),
            ("Live", &[(1, 1)], "lower-case"),
            ("live", &[(3, 1)], "no version 3"),
            ("live", &[(1, 0)], "weight 0"),
            ("live", &[(1, 1), (1, 2)], "version 1 twice"),
            ("live", &[], "0 versions"),
        ];
        for (alias, weights, reason) in cases {
            let error = function.set_alias(alias, &shares(weights)).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert!(function.aliases.is_empty());
        for number in 0..MAX_ALIASES {
            function.set_alias(&format!("a{number}"), &shares(&[(1, 1)])).unwrap();
        }
        let error = function.set_alias("more", &shares(&[(1, 1)])).unwrap_err();
        assert!(matches!(error, FunctionsError::TooManyAliases(_)), "{error}");
        function.set_alias("a7", &shares(&[(2, 1)])).unwrap();
    }

    #[test]
    fn what_a_trigger_may_name() {
        let mut function = function(2);
        function.set_alias("live", &shares(&[(1, 1)])).unwrap();
        for alias in [LATEST, "live", "2"] {
            assert!(function.check_alias(alias).is_ok(), "{alias}");
        }
        for alias in ["dead", "3", "", "-1"] {
            assert!(function.check_alias(alias).is_err(), "{alias}");
        }
    }
}
