//! How many proxies there are to be, by what they have to do: decided here, without any I/O; [`run`]
//! does it, by a command of the operator's.
//!
//! More at once, when there was too much to do for a moment; one less at a time, after a long while.
//! One that is to go is drained first, so that nothing is lost.

mod run;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use tokio::time::Instant;
use warren_proto::hook::Hook;
use warren_proto::v1::ProxyLoad;

pub use run::run;

/// Proxies are wanted that are used so much when the load is spread: in hundredths.
const TARGET: f64 = 70.0;
/// So long there must have been too much to do before there are more.
const UP_AFTER: Duration = Duration::from_secs(5);
/// So long there must have been too little before there is one less.
const DOWN_AFTER: Duration = Duration::from_mins(10);
/// So long, proxies that were asked for are waited for.
const PATIENCE: Duration = Duration::from_mins(5);

/// How proxies are scaled.
///
/// ```toml
/// [proxies]
/// command = ["/usr/lib/warren/proxy-pool"]
/// least = 2
/// most = 10
/// bits_per_second = 8_000_000_000
/// packets_per_second = 1_000_000
/// cpu_percent = 80
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Makes proxies, and removes them.
    pub command: Hook,
    /// So many proxies at least; 1 or more.
    pub least: u32,
    /// So many at most.
    pub most: u32,
    /// What one proxy can carry.
    #[serde(default = "bits_per_second")]
    pub bits_per_second: u64,
    /// What one proxy can carry.
    #[serde(default = "packets_per_second")]
    pub packets_per_second: u64,
    /// How busy a proxy's processors may be.
    #[serde(default = "cpu_percent")]
    pub cpu_percent: u32,
}

fn bits_per_second() -> u64 {
    10_000_000_000
}
fn packets_per_second() -> u64 {
    1_000_000
}
fn cpu_percent() -> u32 {
    80
}

impl Config {
    /// What is wrong with it: the key and the problem.
    pub fn problem(&self) -> Option<(&'static str, String)> {
        let Self { least, most, bits_per_second, packets_per_second, cpu_percent, .. } = *self;
        if least == 0 {
            return Some(("proxies.least", "is 0: one has to be there".into()));
        }
        if most < least {
            return Some(("proxies.most", format!("is {most}, less than proxies.least, {least}")));
        }
        for (key, value) in [
            ("proxies.bits_per_second", bits_per_second),
            ("proxies.packets_per_second", packets_per_second),
        ] {
            if value == 0 {
                return Some((key, "is 0: no proxy would be enough".into()));
            }
        }
        if !(1..=100).contains(&cpu_percent) {
            return Some(("proxies.cpu_percent", format!("{cpu_percent} is not from 1 to 100")));
        }
        None
    }

    /// How much of what a proxy can do this is, in hundredths: what it has most of counts.
    fn used(&self, load: &ProxyLoad) -> f64 {
        let part = |load: f64, most: f64| 100.0 * load / most;
        let cpu = part(f64::from(load.cpu_permille), f64::from(self.cpu_percent) * 10.0);
        part(load.bits_per_second as f64, self.bits_per_second as f64)
            .max(part(load.packets_per_second as f64, self.packets_per_second as f64))
            .max(cpu)
    }
}

/// A proxy.
#[derive(Clone, Debug, PartialEq)]
pub struct Proxy {
    /// Its heartbeats come.
    pub is_alive: bool,
    /// It is to own no addresses.
    pub is_drained: bool,
    /// Addresses that it owns.
    pub owned: u32,
    /// What it has to do.
    pub load: ProxyLoad,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Have the command make so many, for this reason.
    Add(u32, String),
    /// Have this one own nothing.
    Drain(String),
    /// Have it own addresses again.
    Undrain(String),
    /// Have the command remove it: it owns nothing.
    Remove(String),
    /// It is gone: forget it.
    Forget(String),
}

/// Decides how many proxies there are to be. What it remembers is only for how long something was so.
#[derive(Debug)]
pub struct Scaling {
    config: Config,
    over: Option<Instant>,
    under: Option<Instant>,
    /// So many are to be there, and since when they were asked for.
    asked: Option<(usize, Instant)>,
    /// The one that is to go, and whether it was given to the command.
    leaving: Option<(String, bool)>,
}

impl Scaling {
    /// Nothing happened yet, but this one was about to go.
    pub fn new(config: Config, leaving: Option<String>) -> Self {
        let leaving = leaving.map(|name| (name, false));
        Self { config, over: None, under: None, asked: None, leaving }
    }

    /// The command.
    pub fn hook(&self) -> &Hook {
        &self.config.command
    }

    /// What is to be done now, if anything.
    pub fn decide(&mut self, proxies: &BTreeMap<String, Proxy>, now: Instant) -> Option<Action> {
        let working = || proxies.iter().filter(|(_, it)| it.is_alive && !it.is_drained);
        let count = working().count();
        let used: f64 = working().map(|(_, proxy)| self.config.used(&proxy.load)).sum();
        let (least, most) = (self.config.least as usize, self.config.most as usize);
        let wanted = ((used / TARGET).ceil() as usize).clamp(least, most);
        let is_over = lasts(&mut self.over, wanted > count, now, UP_AFTER);
        let is_under = lasts(&mut self.under, wanted < count, now, DOWN_AFTER);
        if self.asked.is_some_and(|(there, at)| count >= there || now >= at + PATIENCE) {
            self.asked = None;
        }
        if let Some((name, is_given)) = self.leaving.clone() {
            return self.see_off(&name, is_given, is_over, proxies);
        }
        if is_over && self.asked.is_none() {
            self.asked = Some((wanted, now));
            let more = (wanted - count) as u32;
            let enough = used / 100.0;
            let are = if count == 1 { "is" } else { "are" };
            let reason =
                format!("there is enough to do for {enough:.1} proxies, and {count} {are} at work");
            return Some(Action::Add(more, reason));
        }
        if is_under {
            self.under = None;
            // The one with the least to move.
            let least = working().min_by_key(|(name, proxy)| (proxy.owned, *name))?.0.clone();
            self.leaving = Some((least.clone(), false));
            return Some(Action::Drain(least));
        }
        None
    }

    /// The next step of the one that is to go.
    fn see_off(
        &mut self,
        name: &str,
        is_given: bool,
        is_over: bool,
        proxies: &BTreeMap<String, Proxy>,
    ) -> Option<Action> {
        let Some(proxy) = proxies.get(name) else {
            self.leaving = None;
            return None;
        };
        if is_given {
            return (!proxy.is_alive).then(|| Action::Forget(name.to_owned()));
        }
        if is_over {
            self.leaving = None;
            return Some(Action::Undrain(name.to_owned()));
        }
        if !proxy.is_drained {
            return Some(Action::Drain(name.to_owned()));
        }
        (proxy.owned == 0).then(|| Action::Remove(name.to_owned()))
    }

    /// The command did what it was to, or failed: then it is asked again.
    pub fn done(&mut self, action: &Action, is_done: bool) {
        match action {
            Action::Add(..) if !is_done => self.asked = None,
            Action::Remove(name) if is_done => self.leaving = Some((name.clone(), true)),
            _ => {}
        }
    }

    /// The one that is to go.
    pub fn leaving(&self) -> Option<&str> {
        self.leaving.as_ref().map(|(name, _)| name.as_str())
    }
}

/// Whether something is so for so long; `since` remembers since when.
fn lasts(since: &mut Option<Instant>, is_so: bool, now: Instant, time: Duration) -> bool {
    if !is_so {
        *since = None;
        return false;
    }
    now.duration_since(*since.get_or_insert(now)) >= time
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn config() -> Config {
        toml::from_str("command = ['/hook']\nleast = 2\nmost = 5\nbits_per_second = 1000").unwrap()
    }

    /// A pool whose command makes and removes what it is asked for.
    struct Pool {
        scaling: Scaling,
        proxies: BTreeMap<String, Proxy>,
        now: Instant,
        made: usize,
        /// What all have to do together.
        bits: u64,
    }

    impl Pool {
        fn new() -> Self {
            let scaling = Scaling::new(config(), None);
            let (proxies, now) = (BTreeMap::new(), Instant::now());
            let mut pool = Self { scaling, proxies, now, made: 0, bits: 0 };
            pool.make(2);
            pool
        }

        fn make(&mut self, count: u32) {
            for _ in 0..count {
                self.made += 1;
                let load = ProxyLoad::default();
                let proxy = Proxy { is_alive: true, is_drained: false, owned: 1, load };
                self.proxies.insert(format!("p{}", self.made), proxy);
            }
        }

        /// Turns for so long; what was done.
        fn run(&mut self, time: Duration) -> Vec<Action> {
            let (end, mut all) = (self.now + time, Vec::new());
            while self.now < end {
                self.now += SECOND;
                let working = self.proxies.values().filter(|it| !it.is_drained).count() as u64;
                for proxy in self.proxies.values_mut().filter(|it| it.is_alive) {
                    let bits_per_second = if proxy.is_drained { 0 } else { self.bits / working };
                    proxy.load = ProxyLoad { bits_per_second, ..ProxyLoad::default() };
                    proxy.owned = u32::from(!proxy.is_drained);
                }
                let Some(action) = self.scaling.decide(&self.proxies, self.now) else { continue };
                match &action {
                    Action::Add(count, _) => self.make(*count),
                    Action::Drain(name) => self.proxies.get_mut(name).unwrap().is_drained = true,
                    Action::Undrain(name) => self.proxies.get_mut(name).unwrap().is_drained = false,
                    Action::Remove(name) => self.proxies.get_mut(name).unwrap().is_alive = false,
                    Action::Forget(name) => drop(self.proxies.remove(name)),
                }
                self.scaling.done(&action, true);
                all.push(action);
            }
            all
        }
    }

    #[test]
    fn there_are_more_at_once_and_less_one_by_one_after_a_while() {
        let mut pool = Pool::new();
        assert_eq!(pool.run(60 * SECOND), []);
        pool.bits = 2500;
        let added = pool.run(20 * SECOND);
        assert!(matches!(&added[..], [Action::Add(2, _)]), "{added:?}");
        pool.bits = 1000;
        assert_eq!(pool.run(DOWN_AFTER.checked_sub(SECOND).unwrap()), []);
        let gone = |name: &str| {
            let name = || name.to_owned();
            [Action::Drain(name()), Action::Remove(name()), Action::Forget(name())]
        };
        assert_eq!(pool.run(10 * SECOND), gone("p1"));
        assert_eq!(pool.run(DOWN_AFTER), gone("p2"));
        assert_eq!(pool.run(3 * DOWN_AFTER), [], "never less than the least");
        pool.bits = 1 << 40;
        pool.run(DOWN_AFTER);
        assert_eq!(pool.proxies.len(), 5, "nor more than the most");
    }

    #[test]
    fn a_moment_changes_nothing_and_what_was_asked_for_is_waited_for() {
        let mut pool = Pool::new();
        for _ in 0..100 {
            pool.bits = 3000;
            assert_eq!(pool.run(4 * SECOND), []);
            pool.bits = 1000;
            assert_eq!(pool.run(SECOND), []);
        }
        let mut full = pool.proxies.clone();
        for proxy in full.values_mut() {
            proxy.load = ProxyLoad { packets_per_second: 2_000_000, ..ProxyLoad::default() };
        }
        let mut asked = Vec::new();
        for _ in 0..620 {
            pool.now += SECOND;
            asked.extend(pool.scaling.decide(&full, pool.now));
        }
        assert!(matches!(&asked[..], [Action::Add(3, _), Action::Add(3, _), Action::Add(3, _)]));
        pool.scaling.done(&asked[0], false);
        assert!(pool.scaling.decide(&full, pool.now).is_some(), "after a failure, at once");
    }

    #[test]
    fn one_that_is_to_go_stays_when_it_is_needed_again() {
        let mut pool = Pool::new();
        pool.make(1);
        pool.proxies.get_mut("p1").unwrap().is_drained = true;
        pool.scaling = Scaling::new(config(), Some("p1".into()));
        pool.bits = 3000;
        let held = Proxy { owned: 1, ..pool.proxies["p1"].clone() };
        let mut proxies = pool.proxies.clone();
        for proxy in proxies.values_mut() {
            proxy.load.cpu_permille = 800;
        }
        proxies.insert("p1".into(), held);
        let mut actions = Vec::new();
        for _ in 0..10 {
            pool.now += SECOND;
            actions.extend(pool.scaling.decide(&proxies, pool.now));
        }
        assert_eq!(actions[0], Action::Undrain("p1".into()));
    }

    #[test]
    fn what_cannot_be_meant_is_told() {
        for (key, text) in [
            ("least", "least = 0\nmost = 5"),
            ("most", "least = 3\nmost = 2"),
            ("bits_per_second", "least = 1\nmost = 2\nbits_per_second = 0"),
            ("cpu_percent", "least = 1\nmost = 2\ncpu_percent = 101"),
        ] {
            let config: Config = toml::from_str(&format!("command = ['/hook']\n{text}")).unwrap();
            let (found, problem) = config.problem().unwrap();
            assert!(found.ends_with(key) && !problem.is_empty(), "{found} {problem}");
        }
        assert_eq!(config().problem(), None);
    }
}
