//! Network deployment: keeps what hosts and proxies know of each VPC at what is stored.
//!
//! One task follows the store and the fleet, plans with [`crate::plan`], pushes, and plans again
//! with each acknowledgement. A push that failed is made again a second later. [`Deployer::ensure`]
//! is what a start waits for.

mod leases;
mod network;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tonic::Status;
use warren_proto::security::Security;
use warren_proto::v1::ApplyVpcRequest;

use self::network::{Deployed, State};
use crate::fleet::{Agent, Fleet, Session};
use crate::leasing;
use crate::ports::Exhausted;
use crate::security::SECURITY_PREFIX;
use crate::store::{Event, Events, Revision, Store, StoreError};
use crate::vpc::{self, Vpc};

/// An agent that did not answer a push by then is asked again.
const PUSH_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// A start waits so long for its network: a push to proxies, one to the host, and some air.
const ENSURE_TIMEOUT: Duration = Duration::from_secs(12);

/// Why a host may not start instances in a VPC.
#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    /// Never created.
    #[error("there is no VPC \"{0}\": `warren vpc create` makes one")]
    UnknownVpc(String),
    /// Nobody stands in the VPC.
    #[error(
        "no proxy is alive, and VPC {0} cannot be reached without: start warrend in its proxy role on a node that stands in the VPC"
    )]
    NoProxy(String),
    /// Its ports are another VPC's.
    #[error(
        "VPC {of} leaves by the addresses of VPC {vpc}, which has no microVMs of its own: start it in {of}"
    )]
    IsPublic {
        /// VPC.
        vpc: String,
        /// The VPC whose public one it is.
        of: String,
    },
    /// No shared address has ports for one more host.
    #[error(
        "VPC {vpc}'s shared addresses have no ports for host {host}: {reason}; choose a host that has some, or give the VPC one more: `warren vpc add-address`"
    )]
    NoPorts {
        /// VPC.
        vpc: String,
        /// Host.
        host: String,
        /// How they are used.
        reason: Exhausted,
    },
    /// An agent answered with an error.
    #[error("{agent} did not take VPC {vpc}: {}", status.message())]
    Refused {
        /// Name of the host or proxy.
        agent: String,
        /// VPC.
        vpc: String,
        /// What it answered.
        status: Status,
    },
    /// The host died or registered anew meanwhile.
    #[error("host {host} went away while VPC {vpc} was made ready there: try again")]
    HostLost {
        /// VPC.
        vpc: String,
        /// Host.
        host: String,
    },
    /// Too slow.
    #[error("VPC {vpc} was not ready on host {host} within {} s: still waiting for {waiting_for}", ENSURE_TIMEOUT.as_secs())]
    Late {
        /// VPC.
        vpc: String,
        /// Host.
        host: String,
        /// The agents that did not answer yet.
        waiting_for: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Deploys VPCs on the fleet.
pub struct Deployer {
    store: Arc<dyn Store>,
    fleet: Arc<Fleet>,
    state: Mutex<State>,
    /// Told after each change of `state`'s plans or failures.
    progress: watch::Sender<()>,
    /// Asks the task to plan again.
    wake: watch::Sender<()>,
}

/// A push that ended.
struct Pushed {
    vpc: String,
    place: usize,
    agent: String,
    session: Session,
    request: ApplyVpcRequest,
    result: Result<(), Status>,
}

impl Deployer {
    /// Loads what is stored and begins to deploy it.
    pub async fn start(store: Arc<dyn Store>, fleet: Arc<Fleet>) -> Result<Arc<Self>, StoreError> {
        let (revision, entries) = store.list("").await?;
        let mut state = State::default();
        for entry in entries {
            state.take_in(&entry.key, Some(&entry.value), entry.revision)?;
        }
        let deployer = Arc::new(Self {
            store,
            fleet,
            state: Mutex::new(state),
            progress: watch::Sender::new(()),
            wake: watch::Sender::new(()),
        });
        let events = deployer.store.watch(revision);
        tokio::spawn(run(Arc::downgrade(&deployer), revision, events));
        tokio::spawn(leasing::run(Arc::downgrade(&deployer)));
        Ok(deployer)
    }

    /// Returns when the host may start instances in the VPC: at once if it already has some there,
    /// else after its ports are leased, stored, and known to all alive proxies and to itself.
    pub async fn ensure(&self, vpc: &str, host: &str, session: Session) -> Result<(), DeployError> {
        if self.lock().networks.get(vpc).is_some_and(|network| network.is_ready(host, session)) {
            return self.make_room(vpc, host).await;
        }
        let mut progress = self.progress.subscribe();
        self.lease(vpc, host, &BTreeSet::new()).await?;
        // What failed before is tried again now, for whoever waits has perhaps mended it.
        if let Some(network) = self.lock().networks.get_mut(vpc) {
            let agents = network.addresses.values_mut().flat_map(|it| it.agents.values_mut());
            agents.for_each(|told| told.failure = None);
        }
        self.plan_again(Some(vpc));
        let ready = async {
            loop {
                if let Some(result) = self.outcome(vpc, host, session) {
                    return result;
                }
                if progress.changed().await.is_err() {
                    return Err(self.late(vpc, host));
                }
            }
        };
        match tokio::time::timeout(ENSURE_TIMEOUT, ready).await {
            Ok(result) => result,
            Err(_) => Err(self.late(vpc, host)),
        }
    }

    /// The VPCs that a host may start instances in at once.
    pub fn ready_on(&self, host: &str, session: Session) -> Vec<String> {
        let state = self.lock();
        let ready = state.networks.iter().filter(|(_, network)| network.is_ready(host, session));
        ready.map(|(vpc, _)| vpc.clone()).collect()
    }

    /// Changes when what hosts have, or why they do not, may have changed.
    pub fn progress(&self) -> watch::Receiver<()> {
        self.progress.subscribe()
    }

    fn definition(&self, vpc: &str) -> Option<Vpc> {
        self.lock().networks.get(vpc)?.vpc.clone()
    }

    /// Whether the VPC exists.
    pub async fn knows(&self, vpc: &str) -> Result<bool, StoreError> {
        if self.lock().networks.get(vpc).is_some_and(|network| network.vpc.is_some()) {
            return Ok(true);
        }
        // It may have been stored a moment ago.
        Ok(vpc::get(&*self.store, vpc).await?.is_some())
    }

    /// Takes in the security of a VPC as it is stored now: whatever starts after this waits until
    /// its host has it.
    pub async fn take_in_security(&self, vpc: &str) -> Result<(), StoreError> {
        let key = format!("{SECURITY_PREFIX}{vpc}");
        if let Some(entry) = self.store.get(&key).await? {
            self.lock().take_in(&key, Some(&entry.value), entry.revision)?;
            self.wake.send_replace(());
        }
        Ok(())
    }

    /// The security of a VPC, as far as it is taken in.
    pub fn with_security<T>(&self, vpc: &str, look: impl FnOnce(&Security) -> T) -> T {
        let state = self.lock();
        match state.networks.get(vpc) {
            Some(network) => look(&network.security.security),
            None => look(&Security::default()),
        }
    }

    /// Ready, failed, or nothing yet.
    fn outcome(&self, vpc: &str, host: &str, session: Session) -> Option<Result<(), DeployError>> {
        if !self.fleet.is_open(host, session) {
            let (vpc, host) = (vpc.to_owned(), host.to_owned());
            return Some(Err(DeployError::HostLost { vpc, host }));
        }
        let settled = self.fleet.is_settled();
        let state = self.lock();
        let network = state.networks.get(vpc)?;
        if network.is_ready(host, session) {
            return Some(Ok(()));
        }
        if state.dirty.contains(vpc) {
            return None;
        }
        for Deployed { agents, plan, .. } in network.leased_to(host) {
            if settled && plan.proxies.is_empty() {
                return Some(Err(DeployError::NoProxy(vpc.to_owned())));
            }
            let needed = plan.proxies.iter().map(String::as_str).chain([host]);
            for agent in needed {
                if let Some((status, _)) = agents.get(agent).and_then(|told| told.failure.as_ref())
                {
                    return Some(Err(DeployError::Refused {
                        agent: agent.to_owned(),
                        vpc: vpc.to_owned(),
                        status: status.clone(),
                    }));
                }
            }
        }
        None
    }

    fn late(&self, vpc: &str, host: &str) -> DeployError {
        let state = self.lock();
        let pending = state.networks.get(vpc).map(|network| {
            let pending = network.addresses.values().flat_map(|it| it.plan.pushes.keys());
            let pending: BTreeSet<_> = pending.map(String::as_str).collect();
            pending.into_iter().collect::<Vec<_>>().join(", ")
        });
        DeployError::Late {
            vpc: vpc.to_owned(),
            host: host.to_owned(),
            waiting_for: pending
                .filter(|names| !names.is_empty())
                .unwrap_or_else(|| host.to_owned()),
        }
    }

    /// Asks the task to plan a VPC, or all of them, again.
    fn plan_again(&self, vpc: Option<&str>) {
        let mut state = self.lock();
        match vpc {
            Some(vpc) => state.dirty.extend([vpc.to_owned()]),
            None => state.dirty = state.networks.keys().cloned().collect(),
        }
        drop(state);
        self.wake.send_replace(());
    }

    /// Plans what is dirty and begins the pushes that can be made now.
    fn reconcile(&self, pushes: &mut JoinSet<Pushed>) {
        let peers = self.fleet.peers();
        let settled = self.fleet.is_settled();
        let mut state = self.lock();
        for name in std::mem::take(&mut state.dirty) {
            let Some(network) = state.networks.get_mut(&name) else { continue };
            network.plan(&peers, settled);
            for (place, deployed) in &mut network.addresses {
                let Deployed { agents, plan, .. } = deployed;
                for (agent, told) in &mut *agents {
                    if !plan.pushes.contains_key(agent) {
                        told.failure = None;
                    }
                }
                for (agent, request) in &plan.pushes {
                    let told = agents.entry(agent.clone()).or_default();
                    let open = peers.get(agent).and_then(|peer| peer.open.clone());
                    let Some((session, client)) = open else { continue };
                    let resting =
                        matches!(told.failure, Some((_, until)) if until > Instant::now());
                    if !told.busy && !resting {
                        told.busy = true;
                        told.failure = None;
                        let address = (name.clone(), *place);
                        let (agent, request) = (agent.clone(), request.clone());
                        pushes.spawn(push(address, agent, session, client, request));
                    }
                }
            }
        }
        drop(state);
        self.progress.send_replace(());
    }

    fn note(&self, pushed: Pushed) {
        let Pushed { vpc, place, agent, session, request, result } = pushed;
        let mut state = self.lock();
        let Some(network) = state.networks.get_mut(&vpc) else { return };
        let deployed = network.addresses.entry(place).or_default();
        let told = deployed.agents.entry(agent.clone()).or_default();
        told.busy = false;
        match result {
            Ok(()) => {
                told.acknowledged = Some((session, request));
                told.failure = None;
            }
            Err(status) => {
                tracing::warn!(agent, vpc, reason = status.message(), "a VPC was not taken");
                told.failure = Some((status, Instant::now() + RETRY_AFTER));
            }
        }
        state.dirty.insert(vpc);
    }

    /// When the next failed push is due.
    fn next_retry(&self) -> Option<Instant> {
        let state = self.lock();
        let deployed = state.networks.values().flat_map(|network| network.addresses.values());
        let told = deployed.flat_map(|deployed| deployed.agents.values());
        told.filter_map(|told| told.failure.as_ref()).map(|(_, until)| *until).min()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn push(
    (vpc, place): (String, usize),
    agent: String,
    session: Session,
    mut client: Agent,
    request: ApplyVpcRequest,
) -> Pushed {
    let call = client.apply_vpc(request.clone());
    let result = match tokio::time::timeout(PUSH_TIMEOUT, call).await {
        Ok(answer) => answer.map(drop),
        Err(_) => {
            Err(Status::deadline_exceeded(format!("no answer within {} s", PUSH_TIMEOUT.as_secs())))
        }
    };
    Pushed { vpc, place, agent, session, request, result }
}

/// The task: ends when the deployer is gone.
async fn run(deployer: std::sync::Weak<Deployer>, mut seen: Revision, mut events: Events) {
    let Some((mut fleet, mut wake, settled_at)) = deployer.upgrade().map(|deployer| {
        (deployer.fleet.changes(), deployer.wake.subscribe(), deployer.fleet.settled_at())
    }) else {
        return;
    };
    let mut settled = std::pin::pin!(tokio::time::sleep_until(settled_at));
    let mut is_settled = false;
    let mut pushes = JoinSet::new();
    loop {
        let Some(retry_at) = deployer.upgrade().map(|deployer| {
            deployer.reconcile(&mut pushes);
            deployer.next_retry()
        }) else {
            return;
        };
        tokio::select! {
            event = events.next() => {
                let Some(deployer) = deployer.upgrade() else { return };
                match event {
                    Some(Ok(Event { key, value, revision })) => {
                        seen = revision;
                        if let Err(error) = deployer.lock().take_in(&key, value.as_deref(), revision) {
                            tracing::error!(%error, "not deployed");
                        }
                    }
                    Some(Err(error)) => {
                        tracing::error!(%error, "following the state failed: trying again");
                        tokio::time::sleep(RETRY_AFTER).await;
                        // Perhaps not all keys of the last commit came; twice does no harm.
                        events = deployer.store.watch(seen.saturating_sub(1));
                    }
                    None => return,
                }
            }
            Some(Ok(done)) = pushes.join_next() => {
                let Some(deployer) = deployer.upgrade() else { return };
                deployer.note(done);
            }
            changed = fleet.changed() => {
                let Some(deployer) = deployer.upgrade() else { return };
                if changed.is_err() { return }
                deployer.plan_again(None);
            }
            () = &mut settled, if !is_settled => {
                is_settled = true;
                let Some(deployer) = deployer.upgrade() else { return };
                deployer.plan_again(None);
            }
            () = at(retry_at) => {
                let Some(deployer) = deployer.upgrade() else { return };
                deployer.plan_again(None);
            }
            changed = wake.changed() => if changed.is_err() { return },
        }
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}
