//! Network deployment: keeps what hosts and proxies know of each VPC at what is stored.
//!
//! One task follows the store and the fleet, plans with [`crate::plan`], pushes, and plans again
//! with each acknowledgement. A push that failed is made again a second later. [`Deployer::ensure`]
//! is what a start waits for.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tonic::Status;
use warren_proto::route::Route;
use warren_proto::security::Security;
use warren_proto::v1::{self, ApplyVpcRequest};

use crate::fleet::{Agent, Fleet, HostUse, Peer, Session};
use crate::leasing::{self, View};
use crate::plan::{self, Node, Plan, plan};
use crate::ports::{Demand, Exhausted, Leases, PortRange, needed, wanted};
use crate::routes::ROUTES_PREFIX;
use crate::security::{SECURITY_PREFIX, Stored};
use crate::store::{Event, Events, Precondition, Revision, Store, StoreError, Write, decode};
use crate::vpc::{self, VPC_PREFIX, Vpc};

/// Where a VPC's leases are stored: `ports/VPC`.
const LEASES_PREFIX: &str = "ports/";
/// An agent that did not answer a push by then is asked again.
const PUSH_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// A start waits so long for its network: a push to proxies, one to the host, and some air.
const ENSURE_TIMEOUT: Duration = Duration::from_secs(12);
/// A start waits so long for more ports.
const ROOM_TIMEOUT: Duration = Duration::from_millis(250);

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
    /// The shared address has no ports for one more host.
    #[error(
        "VPC {vpc}'s shared address has no ports for host {host}: {reason}; choose a host that has some, or create the VPC with fewer ports per host"
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

#[derive(Default)]
struct State {
    networks: BTreeMap<String, Network>,
    /// Networks to plan again.
    dirty: BTreeSet<String>,
}

/// One VPC: what is stored of it, and how far it is deployed.
#[derive(Default)]
struct Network {
    vpc: Option<Vpc>,
    routes: Vec<v1::Route>,
    security: Secured,
    leases: Leases,
    agents: HashMap<String, Told>,
    plan: Plan,
}

/// The security of a VPC.
#[derive(Default)]
struct Secured {
    security: Security,
    /// None was ever stored, if there is none.
    message: Option<v1::VpcSecurity>,
    /// When it was stored.
    revision: Revision,
}

/// What one agent was told of one VPC.
#[derive(Default)]
struct Told {
    acknowledged: Option<(Session, ApplyVpcRequest)>,
    /// A push is under way. One at a time: so they arrive in order.
    busy: bool,
    failure: Option<(Status, Instant)>,
}

/// A push that ended.
struct Pushed {
    vpc: String,
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
        self.lease(vpc, host).await?;
        // What failed before is tried again now, for whoever waits has perhaps mended it.
        if let Some(network) = self.lock().networks.get_mut(vpc) {
            network.agents.values_mut().for_each(|told| told.failure = None);
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

    /// Gets the host ports for one more instance, if it has too few. An instance starts on what
    /// there is if more does not come at once.
    async fn make_room(&self, vpc: &str, host: &str) -> Result<(), DeployError> {
        let demand = Demand { in_use: 0, instances: self.fleet.instances_in(host, vpc) };
        let has_room = || {
            let state = self.lock();
            let held = state.networks.get(vpc).and_then(|network| network.ports_of(host));
            held.is_none_or(|held| held.count >= needed(demand.instances))
        };
        if has_room() {
            return Ok(());
        }
        let mut progress = self.progress.subscribe();
        let first = self
            .lock()
            .networks
            .get(vpc)
            .and_then(|network| network.vpc.as_ref())
            .map_or(0, |vpc| vpc.ports_per_host);
        let lease = |leases: &mut Leases| {
            let held = leases.of(host).map(|lease| lease.ports.count);
            let want = wanted(held, first, demand);
            if held.is_some_and(|held| want > held) {
                // What there is not is told of when it is next looked for.
                leases.lease(host, want).ok();
            }
            Ok::<_, StoreError>(())
        };
        self.change_leases(vpc, lease).await?;
        let roomy = async { while !has_room() && progress.changed().await.is_ok() {} };
        tokio::time::timeout(ROOM_TIMEOUT, roomy).await.ok();
        Ok(())
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

    /// Who holds which ports of each VPC's shared address, and what hosts use of them.
    pub fn leases(&self) -> Vec<View> {
        let uses = self.fleet.uses();
        let state = self.lock();
        let networks = state.networks.iter().filter_map(|(name, network)| {
            let vpc = network.vpc.as_ref()?;
            let of_vpc = |(host, used): (&String, &HostUse)| (host.clone(), used.of(name, vpc.vni));
            Some(View {
                vpc: name.clone(),
                first: vpc.ports_per_host,
                leases: network.leases.clone(),
                uses: uses.iter().map(of_vpc).collect(),
                dropped: network.plan.dropped.clone(),
            })
        });
        networks.collect()
    }

    /// Stores leases of a VPC, unless they are other than `known` by now.
    pub async fn replace_leases(
        &self,
        vpc: &str,
        known: &Leases,
        leases: &Leases,
    ) -> Result<(), StoreError> {
        let change = |stored: &mut Leases| {
            if stored == known {
                stored.clone_from(leases);
            }
            Ok::<_, StoreError>(())
        };
        self.change_leases(vpc, change).await
    }

    /// Takes from a host that is gone for good all ports of all VPCs: they are another's when each
    /// proxy has dropped them, and after a rest.
    pub async fn forget(&self, host: &str) -> Result<(), StoreError> {
        for entry in self.store.list(LEASES_PREFIX).await?.1 {
            let vpc = entry.key.trim_start_matches(LEASES_PREFIX);
            let forget = |leases: &mut Leases| {
                leases.forget(host);
                Ok::<_, StoreError>(())
            };
            self.change_leases(vpc, forget).await?;
        }
        Ok(())
    }

    /// Leases the host its ports of the VPC's shared address, if it has none.
    async fn lease(&self, vpc: &str, host: &str) -> Result<(), DeployError> {
        let definition = vpc::get(&*self.store, vpc)
            .await?
            .ok_or_else(|| DeployError::UnknownVpc(vpc.to_owned()))?;
        let lease = |leases: &mut Leases| {
            if leases.of(host).is_some() {
                return Ok(());
            }
            let count = wanted(None, definition.ports_per_host, Demand::default());
            let no_ports = |reason| DeployError::NoPorts {
                vpc: vpc.to_owned(),
                host: host.to_owned(),
                reason,
            };
            leases.lease(host, count).map(drop).map_err(no_ports)
        };
        self.change_leases(vpc, lease).await
    }

    /// Changes the leases of a VPC as they are stored.
    async fn change_leases<E: From<StoreError>>(
        &self,
        vpc: &str,
        change: impl Fn(&mut Leases) -> Result<(), E>,
    ) -> Result<(), E> {
        let key = format!("{LEASES_PREFIX}{vpc}");
        loop {
            let entry = self.store.get(&key).await?;
            let before: Leases = match &entry {
                Some(entry) => decode(&key, &entry.value)?,
                None => Leases::default(),
            };
            let mut leases = before.clone();
            change(&mut leases)?;
            if leases == before {
                return Ok(());
            }
            let precondition = Precondition::unchanged(&key, entry.as_ref());
            let write = Write::put(&key, &leases)?;
            match self.store.commit(vec![precondition], vec![write]).await {
                Ok(_) => return Ok(()),
                // They were changed meanwhile.
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(error.into()),
            }
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
        if settled && network.plan.proxies.is_empty() {
            return Some(Err(DeployError::NoProxy(vpc.to_owned())));
        }
        let needed = network.plan.proxies.iter().map(String::as_str).chain([host]);
        for agent in needed {
            if let Some((status, _)) =
                network.agents.get(agent).and_then(|told| told.failure.as_ref())
            {
                return Some(Err(DeployError::Refused {
                    agent: agent.to_owned(),
                    vpc: vpc.to_owned(),
                    status: status.clone(),
                }));
            }
        }
        None
    }

    fn late(&self, vpc: &str, host: &str) -> DeployError {
        let state = self.lock();
        let pending = state.networks.get(vpc).map(|network| {
            let pending = network.plan.pushes.keys().map(String::as_str);
            pending.collect::<Vec<_>>().join(", ")
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
            for (agent, told) in &mut network.agents {
                if !network.plan.pushes.contains_key(agent) {
                    told.failure = None;
                }
            }
            for (agent, request) in &network.plan.pushes {
                let told = network.agents.entry(agent.clone()).or_default();
                let Some((session, client)) = peers.get(agent).and_then(|peer| peer.open.clone())
                else {
                    continue;
                };
                let resting = matches!(told.failure, Some((_, until)) if until > Instant::now());
                if !told.busy && !resting {
                    told.busy = true;
                    told.failure = None;
                    pushes.spawn(push(
                        name.clone(),
                        agent.clone(),
                        session,
                        client,
                        request.clone(),
                    ));
                }
            }
        }
        drop(state);
        self.progress.send_replace(());
    }

    fn note(&self, pushed: Pushed) {
        let Pushed { vpc, agent, session, request, result } = pushed;
        let mut state = self.lock();
        let Some(network) = state.networks.get_mut(&vpc) else { return };
        let told = network.agents.entry(agent.clone()).or_default();
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
        let told = state.networks.values().flat_map(|network| network.agents.values());
        told.filter_map(|told| told.failure.as_ref()).map(|(_, until)| *until).min()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes in a key of the store.
    fn take_in(
        &mut self,
        key: &str,
        value: Option<&[u8]>,
        revision: Revision,
    ) -> Result<(), StoreError> {
        let name = if let Some(name) = key.strip_prefix(VPC_PREFIX) {
            self.network(name).vpc = value.map(|value| decode(key, value)).transpose()?;
            name
        } else if let Some(name) = key.strip_prefix(LEASES_PREFIX) {
            let leases = value.map(|value| decode(key, value)).transpose()?;
            self.network(name).leases = leases.unwrap_or_default();
            name
        } else if let Some(name) = key.strip_prefix(ROUTES_PREFIX) {
            let routes: Option<Vec<Route>> = value.map(|value| decode(key, value)).transpose()?;
            self.network(name).routes = routes.into_iter().flatten().map(Into::into).collect();
            name
        } else if let Some(name) = key.strip_prefix(SECURITY_PREFIX) {
            let stored: Option<Stored> = value.map(|value| decode(key, value)).transpose()?;
            let network = self.network(name);
            // It may have been taken in before the event came.
            if revision <= network.security.revision {
                return Ok(());
            }
            let security = stored.unwrap_or_default().security;
            let message = Some((&security).into());
            network.security = Secured { security, message, revision };
            network.plan.ready.clear();
            name
        } else {
            return Ok(());
        };
        self.dirty.insert(name.to_owned());
        Ok(())
    }

    fn network(&mut self, name: &str) -> &mut Network {
        self.networks.entry(name.to_owned()).or_default()
    }
}

impl Network {
    /// The ports that a host was told of.
    fn ports_of(&self, host: &str) -> Option<PortRange> {
        let (_, request) = self.agents.get(host)?.acknowledged.as_ref()?;
        plan::ports(request)
    }

    fn is_ready(&self, host: &str, session: Session) -> bool {
        self.plan.ready.get(host) == Some(&session)
    }

    fn plan(&mut self, peers: &BTreeMap<String, Peer>, settled: bool) {
        let Some(vpc) = &self.vpc else {
            self.plan = Plan::default();
            return;
        };
        let node = |(name, peer): (&String, &Peer)| {
            let session = peer.open.as_ref().map(|(session, _)| *session);
            let told = self.agents.get(name).and_then(|told| told.acknowledged.as_ref());
            let node = Node {
                role: peer.role,
                underlay_address: peer.underlay_address,
                session,
                drained: peer.drained,
                acknowledged: told
                    .filter(|(acknowledged_in, _)| Some(*acknowledged_in) == session)
                    .map(|(_, request)| request),
            };
            (name.clone(), node)
        };
        let nodes = peers.iter().map(node).collect();
        let mut plan =
            plan(vpc, &self.routes, self.security.message.as_ref(), &self.leases, &nodes);
        if !settled {
            // Proxies that serve may be about to register again: nothing moves from them.
            plan.pushes.clear();
            plan.ready.clear();
        }
        self.plan = plan;
    }
}

async fn push(
    vpc: String,
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
    Pushed { vpc, agent, session, request, result }
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
