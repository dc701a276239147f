//! When hosts get more ports, when they give some back, and when those are another's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};

use crate::deploy::Deployer;
use crate::ports::{
    Demand, Exhausted, LEAST, Leases, MOST, PortRange, REST, SHRINK_AFTER, needed, wanted,
};

/// How often hosts' use of their ports is looked at: they report it about as often.
const INTERVAL: Duration = Duration::from_secs(1);

/// What an alive host uses of a shared address's ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// What it needs ports for.
    pub demand: Demand,
    /// The range in which flows began when that was counted; none: it was not yet.
    pub ports: Option<PortRange>,
    /// Blocks of 64 ports outside of that range in which there are flows.
    pub former: BTreeSet<u32>,
}

/// What is known of one shared address.
#[derive(Clone, Debug)]
pub struct View {
    /// Name of its VPC.
    pub vpc: String,
    /// Its place among the VPC's.
    pub place: usize,
    /// Ports that a host holds at least.
    pub first: u32,
    /// Who holds what.
    pub leases: Leases,
    /// What hosts use, by their names.
    pub uses: BTreeMap<String, Use>,
    /// The hosts with instances of the VPC whose first address this is: instances that are to come
    /// need ports of it.
    pub firsts: BTreeSet<String>,
    /// The fenced ranges that no proxy takes packets from any more.
    pub dropped: BTreeSet<PortRange>,
}

/// Decides what becomes of leases. What it remembers is only for how long something was so: who
/// begins anew waits anew.
#[derive(Debug, Default)]
pub struct Leasing {
    /// Since when a host needs less of an address than it has.
    quiet: HashMap<(String, usize, String), Instant>,
    /// Since when fenced ranges of an address rest.
    resting: HashMap<(String, usize, PortRange), Instant>,
}

/// What is to be done about the leases of a shared address.
#[derive(Debug, Default, PartialEq)]
pub struct Decision {
    /// What they become; none: they stay.
    pub leases: Option<Leases>,
    /// The hosts that need more ports than there are.
    pub short: Vec<(String, Exhausted)>,
}

impl Leasing {
    /// What is to be done now.
    pub fn decide(&mut self, view: &View, now: Instant) -> Decision {
        let mut leases = view.leases.clone();
        let mut short = Vec::new();
        for (host, used) in &view.uses {
            let held = view.leases.of(host).map(|lease| lease.ports.count);
            if held.is_none() && used.demand.instances == 0 && !view.firsts.contains(host) {
                continue;
            }
            let key = (view.vpc.clone(), view.place, host.clone());
            let want = wanted(held, view.first, used.demand);
            let held = held.unwrap_or_default();
            if want >= held {
                self.quiet.remove(&key);
            }
            if want > held {
                short
                    .extend(grow(&mut leases, host, held, want).map(|error| (host.clone(), error)));
            } else if used.demand.in_use > MOST / 2 {
                short.push((host.clone(), Exhausted { hosts: leases.hosts(), wanted: 2 * MOST }));
            } else if want < held {
                let since = *self.quiet.entry(key.clone()).or_insert(now);
                if now.duration_since(since) >= SHRINK_AFTER && leases.lease(host, want).is_ok() {
                    self.quiet.remove(&key);
                }
            }
            // What was counted before the host knew of its range says nothing of the former ones.
            if used.ports == view.leases.of(host).map(|lease| lease.ports) {
                let is_used = |range: PortRange| range.blocks().any(|b| used.former.contains(&b));
                leases.settle(host, is_used);
            }
        }
        for range in view.leases.fenced() {
            let key = (view.vpc.clone(), view.place, *range);
            if !view.dropped.contains(range) {
                continue;
            }
            let since = *self.resting.entry(key.clone()).or_insert(now);
            if now.duration_since(since) >= REST {
                self.resting.remove(&key);
                leases.free(*range);
            }
        }
        let changed = leases != view.leases;
        Decision { leases: changed.then_some(leases), short }
    }
}

/// Gives a host as much of what it wants as there is; the error, if that is not all.
fn grow(leases: &mut Leases, host: &str, held: u32, want: u32) -> Option<Exhausted> {
    let sizes = std::iter::successors(Some(want), |size| Some(size / 2));
    let mut error = None;
    for size in sizes.take_while(|size| *size > held && *size >= LEAST) {
        match leases.lease(host, size) {
            Ok(_) => break,
            Err(exhausted) => error = error.or(Some(exhausted)),
        }
    }
    error
}

/// Decides again and again, until the deployer is gone.
pub async fn run(deployer: Weak<Deployer>) {
    let mut leasing = Leasing::default();
    let mut short = BTreeSet::new();
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(deployer) = deployer.upgrade() else { return };
        turn(&deployer, &mut leasing, &mut short).await;
    }
}

/// Decides for each VPC. `short` are the hosts that were told of as such.
async fn turn(
    deployer: &Arc<Deployer>,
    leasing: &mut Leasing,
    short: &mut BTreeSet<(String, String)>,
) {
    let mut still_short = BTreeSet::new();
    let views = deployer.leases();
    for view in &views {
        let decision = leasing.decide(view, Instant::now());
        for (host, reason) in decision.short {
            let key = (view.vpc.clone(), host);
            // What one of the VPC's addresses lacks, another may have.
            if is_roomy(&views, &key.0, &key.1) {
                continue;
            }
            let (vpc, host) = (&key.0, &key.1);
            if !short.contains(&key) {
                tracing::warn!(vpc, host, %reason, "a host needs more ports than it gets");
            }
            if let Err(error) = deployer.spill(vpc, host).await {
                tracing::error!(vpc, host, %error, "a host gets ports of no other address");
            }
            still_short.insert(key);
        }
        let Some(leases) = decision.leases else { continue };
        let (vpc, place) = (view.vpc.as_str(), view.place);
        match deployer.replace_leases((vpc, place), &view.leases, &leases).await {
            Ok(()) => tracing::info!(vpc, place, "hosts' ports changed"),
            Err(error) => {
                tracing::error!(vpc, place, %error, "hosts' ports stay as they are");
            }
        }
    }
    *short = still_short;
}

/// Whether a host needs less than half of the ports that it has of all of a VPC's addresses.
fn is_roomy(views: &[View], vpc: &str, host: &str) -> bool {
    let of_vpc = views.iter().filter(|view| view.vpc == vpc);
    let (mut held, mut wanted) = (0, 0);
    for view in of_vpc {
        held += view.leases.of(host).map_or(0, |lease| lease.ports.count);
        let demand = view.uses.get(host).map(|used| used.demand).unwrap_or_default();
        wanted += demand.in_use.max(needed(demand.instances));
    }
    wanted < held / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn view(leases: &Leases, in_use: u32) -> View {
        let counted = leases.of("a").map(|lease| lease.ports);
        let demand = Demand { in_use, instances: 1 };
        let used = Use { demand, ports: counted, former: BTreeSet::new() };
        View {
            vpc: "blue".into(),
            place: 0,
            first: 64,
            leases: leases.clone(),
            uses: [("a".to_owned(), used)].into(),
            firsts: BTreeSet::new(),
            dropped: BTreeSet::new(),
        }
    }

    fn leased(count: u32) -> Leases {
        let mut leases = Leases::default();
        leases.lease("a", count).unwrap();
        leases
    }

    #[test]
    fn a_host_gets_more_at_once_and_gives_back_after_a_while() {
        let (mut leasing, mut now) = (Leasing::default(), Instant::now());
        let leases = leased(64);
        let mut count = |leases: &Leases, in_use, now| {
            let decided = leasing.decide(&view(leases, in_use), now).leases;
            decided.map(|leases| leases.of("a").unwrap().ports.count)
        };
        assert_eq!(count(&leases, 32, now), None);
        assert_eq!(count(&leases, 60, now), Some(128));
        let leases = leased(1024);
        assert_eq!(count(&leases, 10, now), None);
        now += SHRINK_AFTER / 2;
        assert_eq!(count(&leases, 300, now), None, "it needs them again");
        now += SHRINK_AFTER / 2;
        assert_eq!(count(&leases, 10, now), None, "the time begins anew");
        now += SHRINK_AFTER;
        assert_eq!(count(&leases, 10, now), Some(512));
    }

    #[test]
    fn what_a_host_has_left_is_fenced_when_its_last_flow_is_over() {
        let (mut leasing, now) = (Leasing::default(), Instant::now());
        let mut leases = leased(128);
        leases.lease("a", 64).unwrap();
        let [former] = leases.of("a").unwrap().former[..] else { panic!() };
        let mut seen = view(&leases, 30);
        let used = seen.uses.get_mut("a").unwrap();
        used.former = [former.blocks().start].into();
        assert_eq!(leasing.decide(&seen, now), Decision::default());
        let used = seen.uses.get_mut("a").unwrap();
        used.former.clear();
        used.ports = Some(former);
        assert_eq!(leasing.decide(&seen, now), Decision::default(), "of another time");
        seen.uses.clear();
        assert_eq!(leasing.decide(&seen, now), Decision::default(), "nobody says so");
        let decided = leasing.decide(&view(&leases, 30), now).leases.unwrap();
        assert_eq!(decided.fenced(), [former]);
    }

    #[test]
    fn what_is_fenced_rests_from_when_the_last_proxy_dropped_it() {
        let (mut leasing, mut now) = (Leasing::default(), Instant::now());
        let mut leases = leased(64);
        leases.forget("a");
        let mut seen = View { uses: BTreeMap::new(), ..view(&leases, 0) };
        now += REST;
        assert_eq!(leasing.decide(&seen, now).leases, None);
        seen.dropped = leases.fenced().iter().copied().collect();
        assert_eq!(leasing.decide(&seen, now).leases, None);
        now += REST.saturating_sub(SECOND);
        assert_eq!(leasing.decide(&seen, now).leases, None);
        now += SECOND;
        assert_eq!(leasing.decide(&seen, now).leases, Some(Leases::default()));
    }

    #[test]
    fn a_host_that_was_forgotten_and_comes_back_with_instances_gets_ports_anew() {
        let mut seen = view(&Leases::default(), 0);
        let decided = Leasing::default().decide(&seen, Instant::now()).leases;
        assert_eq!(decided.unwrap().of("a").unwrap().ports.count, 64);
        seen.uses.get_mut("a").unwrap().demand.instances = 0;
        assert_eq!(Leasing::default().decide(&seen, Instant::now()), Decision::default());
    }

    #[test]
    fn a_host_gets_what_there_is_and_is_told_of() {
        let mut leases = leased(64);
        for host in ["b", "c"] {
            leases.lease(host, 16384).unwrap();
        }
        let decision = Leasing::default().decide(&view(&leases, 20_000), Instant::now());
        assert_eq!(decision.leases.unwrap().of("a").unwrap().ports.count, 16384);
        assert_eq!(decision.short, [("a".into(), Exhausted { hosts: 3, wanted: 32768 })]);
    }
}
