//! A VPC that has functions is known on each host that may get their instances, before a gateway
//! places any there: gateways wait for nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::StreamExt;

use super::FUNCTION_PREFIX;
use super::model::Function;
use crate::deploy::{DeployError, Deployer};
use crate::fleet::{Fleet, FlowHost, Session};
use crate::store::{Event, Events, Revision, Store, StoreError, decode};

/// What failed is tried again, and what hosts have is looked at, this often.
const INTERVAL: Duration = Duration::from_secs(1);
/// After a restart, networks have this long to be as they were, once hosts have registered again.
const PATIENCE: Duration = Duration::from_secs(2);

/// Has VPCs with functions on hosts.
pub struct Networks {
    store: Arc<dyn Store>,
    fleet: Arc<Fleet>,
    deployer: Arc<Deployer>,
    functions: Mutex<BTreeMap<String, Needs>>,
}

/// What a function needs a host for.
struct Needs {
    vpc: String,
    templates: BTreeSet<String>,
}

/// A VPC that is to be on a host: VPC, host, its session.
type Wanted = (String, String, Session);

impl Networks {
    /// Begins with what is stored.
    pub async fn start(
        store: Arc<dyn Store>,
        fleet: Arc<Fleet>,
        deployer: Arc<Deployer>,
    ) -> Result<Arc<Self>, StoreError> {
        let (revision, entries) = store.list(FUNCTION_PREFIX).await?;
        let networks = Self { store, fleet, deployer, functions: Mutex::default() };
        for entry in entries {
            networks.take_in(&entry.key, Some(&entry.value))?;
        }
        let networks = Arc::new(networks);
        let events = networks.store.watch(revision);
        tokio::spawn(run(Arc::downgrade(&networks), revision, events));
        Ok(networks)
    }

    /// Hosts as gateways see them.
    pub fn hosts(&self) -> impl Iterator<Item = warren_proto::v1::FleetHost> {
        self.fleet.flow_hosts().into_iter().map(|FlowHost { mut host, session }| {
            if let Some(session) = session {
                host.vpcs = self.deployer.ready_on(&host.name, session);
            }
            host
        })
    }

    /// Whether the fleet is as it was before this process began, or had its time to become so.
    /// Before, a gateway knows better.
    pub fn is_settled(&self) -> bool {
        Instant::now() >= self.fleet.settled_at() + PATIENCE
            || self.fleet.is_complete() && self.missing().is_empty()
    }

    /// The VPCs that hosts do not have yet.
    fn missing(&self) -> BTreeSet<Wanted> {
        let hosts = self.fleet.flow_hosts();
        let functions = self.lock();
        let mut missing = BTreeSet::new();
        for FlowHost { host, session } in hosts {
            let Some(session) = session.filter(|_| !host.relay.is_empty()) else { continue };
            let fits =
                |needs: &&Needs| host.templates.iter().any(|it| needs.templates.contains(it));
            let vpcs = functions.values().filter(fits).map(|needs| &needs.vpc);
            let mut vpcs: BTreeSet<_> = vpcs.cloned().collect();
            for ready in self.deployer.ready_on(&host.name, session) {
                vpcs.remove(&ready);
            }
            missing.extend(vpcs.into_iter().map(|vpc| (vpc, host.name.clone(), session)));
        }
        missing
    }

    fn take_in(&self, key: &str, value: Option<&[u8]>) -> Result<(), StoreError> {
        let Some(name) = key.strip_prefix(FUNCTION_PREFIX) else { return Ok(()) };
        match value {
            None => drop(self.lock().remove(name)),
            Some(value) => {
                let Function { vpc, versions, .. } = decode(key, value)?;
                let templates = versions.into_values().map(|version| version.template).collect();
                self.lock().insert(name.to_owned(), Needs { vpc, templates });
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Needs>> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task: ends when the networks are gone.
async fn run(networks: Weak<Networks>, mut seen: Revision, mut events: Events) {
    let Some(mut fleet) = networks.upgrade().map(|networks| networks.fleet.changes()) else {
        return;
    };
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut under_way: JoinSet<(Wanted, Result<(), DeployError>)> = JoinSet::new();
    let mut busy = BTreeSet::new();
    // What failed, which is told once, and tried again with the next tick.
    let mut failed = BTreeSet::new();
    let mut told = BTreeSet::new();
    loop {
        let Some(present) = networks.upgrade() else { return };
        let missing = present.missing();
        told.retain(|wanted| missing.contains(wanted));
        for wanted in missing {
            if !failed.contains(&wanted) && busy.insert(wanted.clone()) {
                let deployer = present.deployer.clone();
                under_way.spawn(async move {
                    let (vpc, host, session) = &wanted;
                    let done = deployer.ensure(vpc, host, *session).await;
                    (wanted, done)
                });
            }
        }
        drop(present);
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(Event { key, value, revision })) => {
                    seen = revision;
                    let Some(networks) = networks.upgrade() else { return };
                    if let Err(error) = networks.take_in(&key, value.as_deref()) {
                        tracing::error!(%error, "a function's network is not made");
                    }
                }
                Some(Err(error)) => {
                    tracing::error!(%error, "following the state failed: trying again");
                    tokio::time::sleep(INTERVAL).await;
                    let Some(networks) = networks.upgrade() else { return };
                    events = networks.store.watch(seen.saturating_sub(1));
                }
                None => return,
            },
            Some(Ok((wanted, done))) = under_way.join_next() => {
                busy.remove(&wanted);
                if let Err(error) = done {
                    if told.insert(wanted.clone()) {
                        let (vpc, host, _) = &wanted;
                        tracing::warn!(vpc, host, %error, "a host cannot have functions of a VPC yet");
                    }
                    failed.insert(wanted);
                }
            }
            changed = fleet.changed() => if changed.is_err() { return },
            _ = ticks.tick() => failed.clear(),
        }
    }
}
