//! The hosts and proxies: who they are is stored, how they do is known from their heartbeats.
//!
//! A member is alive as long as the stream of its heartbeats is open ([`crate::heartbeat`] ends it
//! when one is late). Each stream is a session with a number of its own, so that what was true of
//! an agent before it restarted is not mistaken for what is true of it now.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::transport::Channel;
use warren_placement::{Candidate, PlacementError, place};
use warren_proto::endpoint::{self, ConnectError, Endpoint};
use warren_proto::v1;
use warren_proto::v1::agent_service_client::AgentServiceClient;

use crate::instances::Instances;
use crate::leasing::Use;
use crate::name::{self, InvalidName};
use crate::pooling;
use crate::ports::Demand;
use crate::store::{Store, StoreError, Write, decode};
use crate::vpc::SharedAddress;

/// Where members are stored: `member/NAME`.
const MEMBER_PREFIX: &str = "member/";
/// Which proxies are drained: `drained/NAME`.
const DRAINED_PREFIX: &str = "drained/";

/// The number of a heartbeat stream.
pub type Session = u64;
/// A client of one agent.
pub type Agent = AgentServiceClient<Channel>;

/// What a member does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs microVMs.
    Host,
    /// Stands in VPCs.
    Proxy,
}

impl From<Role> for v1::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Host => Self::Host,
            Role::Proxy => Self::Proxy,
        }
    }
}

/// What is stored of a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Registration {
    role: Role,
    endpoint: Endpoint,
    underlay_address: IpAddr,
}

struct Member {
    registration: Registration,
    open: Option<OpenSession>,
    last_heartbeat: Option<Instant>,
    version: String,
    slots: u32,
    /// The pools of a host, that of its default template first.
    templates: Vec<v1::TemplatePool>,
    instances: Instances,
    /// By VNI.
    port_use: BTreeMap<u32, v1::PortUse>,
    /// Starts under way.
    starting: u32,
    /// Starts that were placed here.
    demand: pooling::Demand,
    /// Shared addresses that a proxy owns.
    owned: u32,
    /// Whether it is to own none.
    drained: bool,
    /// What a proxy has to do.
    load: Option<v1::ProxyLoad>,
    /// Where gateways reach a host's relay; empty: it has none.
    relay: String,
}

struct OpenSession {
    number: Session,
    agent: Agent,
}

impl Member {
    fn new(registration: Registration) -> Self {
        Self {
            registration,
            open: None,
            last_heartbeat: None,
            version: String::new(),
            slots: 0,
            templates: Vec::new(),
            instances: Instances::default(),
            port_use: BTreeMap::new(),
            starting: 0,
            demand: pooling::Demand::default(),
            owned: 0,
            drained: false,
            load: None,
            relay: String::new(),
        }
    }
}

/// Why a heartbeat was refused.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// A field cannot be used.
    #[error("{field}: {problem}")]
    Invalid {
        /// Name of the field of `warren.v1.HeartbeatRequest`.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Hosts hold port ranges by their name: a name does not change its role.
    #[error("{0} is registered in the other role: give this node another name")]
    OtherRole(String),
    /// The agent cannot be called.
    #[error("{name} registered, but its agent cannot be called: {reason}")]
    Unreachable {
        /// Name.
        name: String,
        /// Why.
        reason: ConnectError,
    },
    /// A newer stream took the name over.
    #[error("another agent registered as {0}: if it is not this one restarted, rename one of them")]
    Replaced(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a member was not forgotten.
#[derive(Debug, thiserror::Error)]
pub enum ForgetError {
    /// Never registered, or forgotten.
    #[error("there is no host or proxy \"{0}\": `warren host ls` lists them")]
    Unknown(String),
    /// Its heartbeats come.
    #[error("{0} is alive: stop warrend there for good before")]
    Alive(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a proxy was not drained.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// Never registered, or forgotten.
    #[error("there is no proxy \"{0}\": `warren host ls` lists them")]
    Unknown(String),
    /// It owns nothing that others could take over.
    #[error("{0} is a host: only proxies are drained")]
    Host(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why an instance cannot be reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InstanceError {
    /// No host reports it.
    #[error("there is no instance \"{0}\": `warren vm ls` lists them")]
    Unknown(String),
    /// It ran on a host whose heartbeats stopped.
    #[error("host {host}, where instance {id} ran, is not alive: is warrend running there?")]
    DeadHost {
        /// Id.
        id: String,
        /// Name of the host.
        host: String,
    },
}

/// What an instance is to be a clone of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Template<'a> {
    /// The default template of its host.
    Default,
    /// This one.
    Named(&'a str),
    /// A snapshot, which has no pool.
    OfSnapshot,
}

impl<'a> Template<'a> {
    /// The one that its host must have.
    fn name(self) -> Option<&'a str> {
        match self {
            Self::Named(name) => Some(name),
            Self::Default | Self::OfSnapshot => None,
        }
    }
}

/// A member, as network deployment sees it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// What it does.
    pub role: Role,
    /// Its address in the underlay.
    pub underlay_address: IpAddr,
    /// Its session and its agent, if it is alive.
    pub open: Option<(Session, Agent)>,
    /// Whether it is to own no VPC's addresses.
    pub drained: bool,
}

/// A host, as gateways see it, but for the VPCs that it has.
#[derive(Clone, Debug)]
pub struct FlowHost {
    /// What they are told.
    pub host: v1::FleetHost,
    /// Its session, if it is alive.
    pub session: Option<Session>,
}

/// What an alive host uses of VPCs' ports.
#[derive(Debug, Default)]
pub struct HostUse {
    /// Instances that run, by VPC and shared address.
    instances: HashMap<String, HashMap<String, u32>>,
    /// Ports in use, by VNI.
    ports: BTreeMap<u32, v1::PortUse>,
}

impl HostUse {
    /// Instances of a VPC.
    pub fn instances_in(&self, vpc: &str) -> u32 {
        self.instances.get(vpc).map_or(0, |by_address| by_address.values().sum())
    }

    /// What it uses of one of a VPC's shared addresses.
    pub fn of(&self, vpc: &str, shared: &SharedAddress) -> Use {
        let with = self.instances.get(vpc).and_then(|all| all.get(&shared.address.to_string()));
        let instances = with.copied().unwrap_or_default();
        match self.ports.get(&shared.vni) {
            Some(used) => Use {
                demand: Demand { in_use: used.in_use, instances },
                ports: used.ports.map(Into::into),
                former: used.former_blocks.iter().copied().collect(),
            },
            None => Use { demand: Demand { in_use: 0, instances }, ..Use::default() },
        }
    }
}

/// All members.
pub struct Fleet {
    store: Arc<dyn Store>,
    deadline: Duration,
    /// Until then, members that are known from the store may still be about to come back.
    settled_at: Instant,
    /// Seconds of demand are counted from here.
    began: Instant,
    members: Mutex<Members>,
    changed: watch::Sender<()>,
    closing: watch::Sender<bool>,
}

#[derive(Default)]
struct Members {
    by_name: BTreeMap<String, Member>,
    last_session: Session,
}

impl Fleet {
    /// The fleet as it is stored; nobody is alive yet. A heartbeat is late after `deadline`.
    pub async fn load(store: Arc<dyn Store>, deadline: Duration) -> Result<Self, StoreError> {
        let mut by_name = BTreeMap::new();
        for entry in store.list(MEMBER_PREFIX).await?.1 {
            let name = entry.key.trim_start_matches(MEMBER_PREFIX).to_owned();
            by_name.insert(name, Member::new(decode(&entry.key, &entry.value)?));
        }
        for entry in store.list(DRAINED_PREFIX).await?.1 {
            if let Some(member) = by_name.get_mut(entry.key.trim_start_matches(DRAINED_PREFIX)) {
                member.drained = true;
            }
        }
        Ok(Self {
            store,
            deadline,
            settled_at: Instant::now() + deadline,
            began: Instant::now(),
            members: Mutex::new(Members { by_name, last_session: 0 }),
            changed: watch::Sender::new(()),
            closing: watch::Sender::new(false),
        })
    }

    /// A heartbeat is late after this time.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Changes when a member registers, dies, or changes its address.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Ends all sessions, because the process is about to stop.
    pub fn close(&self) {
        self.closing.send_replace(true);
    }

    /// Becomes true when sessions are to end.
    pub fn closing(&self) -> watch::Receiver<bool> {
        self.closing.subscribe()
    }

    /// Begins a session with an agent's first heartbeat: it is alive until the [`Registered`] is
    /// dropped.
    pub async fn register(
        self: &Arc<Self>,
        heartbeat: v1::HeartbeatRequest,
    ) -> Result<Registered, RegisterError> {
        let registration = check(&heartbeat)?;
        let name = heartbeat.name.clone();
        // A host that cannot be called is of no use: better its operator hears of it now.
        let channel = endpoint::connect(&registration.endpoint)
            .await
            .map_err(|reason| RegisterError::Unreachable { name: name.clone(), reason })?;
        let stored = self.lock().by_name.get(&name).map(|member| member.registration.clone());
        match stored {
            Some(stored) if stored.role != registration.role => {
                return Err(RegisterError::OtherRole(name));
            }
            Some(stored) if stored == registration => {}
            _ => {
                let write = Write::put(format!("{MEMBER_PREFIX}{name}"), &registration)?;
                self.store.commit(vec![], vec![write]).await?;
            }
        }
        let session = {
            let mut members = self.lock();
            members.last_session += 1;
            let number = members.last_session;
            let agent = AgentServiceClient::new(channel);
            let member = members
                .by_name
                .entry(name.clone())
                .or_insert_with(|| Member::new(registration.clone()));
            member.registration = registration;
            member.open = Some(OpenSession { number, agent });
            number
        };
        let registered = Registered { fleet: self.clone(), name, session };
        registered.heartbeat(heartbeat)?;
        self.changed.send_replace(());
        tracing::info!(name = %registered.name, "registered");
        Ok(registered)
    }

    /// Chooses a host for an instance of a template, and takes a slot of it until the start has an end.
    pub fn reserve(
        self: &Arc<Self>,
        wanted: Option<&str>,
        template: Template<'_>,
    ) -> Result<Reservation, PlacementError> {
        let mut members = self.lock();
        let candidates: Vec<_> = members
            .by_name
            .iter()
            .filter(|(_, member)| member.registration.role == Role::Host)
            .map(|(name, member)| Candidate {
                name,
                alive: member.open.is_some(),
                slots: member.slots,
                taken: member.taken(),
                templates: member.templates.iter().map(|pool| pool.template.as_str()).collect(),
            })
            .collect();
        let host = place(&candidates, wanted, template.name())?.to_owned();
        let dead = || PlacementError::DeadHost(host.clone());
        let member = members.by_name.get_mut(&host).ok_or_else(dead)?;
        let OpenSession { number, agent } = member.open.as_ref().ok_or_else(dead)?;
        let (session, agent) = (*number, agent.clone());
        member.starting += 1;
        if let Some(template) = member.pool_of(template) {
            member.demand.start(&template, self.began.elapsed().as_secs());
        }
        Ok(Reservation { fleet: self.clone(), host, session, agent })
    }

    /// The name of an instance's host, and its agent.
    pub fn host_of(&self, id: &str) -> Result<(String, Agent), InstanceError> {
        let members = self.lock();
        let (host, member) = members
            .by_name
            .iter()
            .find(|(_, member)| member.instances.contains(id))
            .ok_or_else(|| InstanceError::Unknown(id.to_owned()))?;
        match &member.open {
            Some(open) => Ok((host.clone(), open.agent.clone())),
            None => Err(InstanceError::DeadHost { id: id.to_owned(), host: host.clone() }),
        }
    }

    /// An instance was ended on its host.
    pub fn stopped(&self, host: &str, id: &str) {
        if let Some(member) = self.lock().by_name.get_mut(host) {
            member.instances.stopped(id);
        }
    }

    /// All instances. The state of those on dead hosts is unknown, as is what they hold.
    pub fn instances(&self) -> Vec<v1::Instance> {
        let members = self.lock();
        let mut instances = Vec::new();
        for (name, member) in &members.by_name {
            instances.extend(member.instances.iter().cloned().map(|mut instance| {
                if member.open.is_none() {
                    instance.set_state(v1::InstanceState::Unspecified);
                    instance.reason = format!("host {name} is not alive");
                    instance.usage = None;
                }
                instance
            }));
        }
        instances
    }

    /// All members, for people.
    pub fn hosts(&self) -> Vec<v1::Host> {
        let members = self.lock();
        let host = |(name, member): (&String, &Member)| v1::Host {
            name: name.clone(),
            role: v1::Role::from(member.registration.role).into(),
            endpoint: member.registration.endpoint.to_string(),
            underlay_address: member.registration.underlay_address.to_string(),
            slots: member.slots,
            parked: member.templates.iter().map(|pool| pool.parked).sum(),
            parked_target: member.templates.iter().map(|pool| pool.parked_target).sum(),
            templates: member.templates.clone(),
            instances: member.instances.running(),
            alive: member.open.is_some(),
            heartbeat_age_ms: member.last_heartbeat.map_or(0, |at| at.elapsed().as_millis() as u64),
            version: member.version.clone(),
            owned: member.owned,
            drained: member.drained,
            load: member.load.filter(|_| member.open.is_some()),
            relay: member.relay.clone(),
        };
        members.by_name.iter().map(host).collect()
    }

    /// All members, for network deployment.
    pub fn peers(&self) -> BTreeMap<String, Peer> {
        let members = self.lock();
        let peer = |member: &Member| Peer {
            role: member.registration.role,
            underlay_address: member.registration.underlay_address,
            open: member.open.as_ref().map(|open| (open.number, open.agent.clone())),
            drained: member.drained,
        };
        members.by_name.iter().map(|(name, member)| (name.clone(), peer(member))).collect()
    }

    /// All hosts, for gateways.
    pub fn flow_hosts(&self) -> Vec<FlowHost> {
        let members = self.lock();
        let hosts =
            members.by_name.iter().filter(|(_, member)| member.registration.role == Role::Host);
        let of_host = |(name, member): (&String, &Member)| FlowHost {
            host: v1::FleetHost {
                name: name.clone(),
                endpoint: member.registration.endpoint.to_string(),
                relay: member.relay.clone(),
                alive: member.open.is_some(),
                slots: member.slots,
                taken: member.taken(),
                vpcs: Vec::new(),
                templates: member.templates.iter().map(|pool| pool.template.clone()).collect(),
            },
            session: member.open.as_ref().map(|open| open.number),
        };
        hosts.map(of_host).collect()
    }

    /// What alive hosts use of VPCs' ports, by their names.
    pub fn uses(&self) -> BTreeMap<String, HostUse> {
        let members = self.lock();
        let alive = members.by_name.iter().filter(|(_, member)| member.open.is_some());
        let of_host = |(name, member): (&String, &Member)| {
            let mut used = HostUse { ports: member.port_use.clone(), ..HostUse::default() };
            for instance in member.instances.iter() {
                let by_address = used.instances.entry(instance.vpc.clone()).or_default();
                *by_address.entry(instance.shared_address.clone()).or_default() += 1;
            }
            (name.clone(), used)
        };
        alive.map(of_host).collect()
    }

    /// Instances of a VPC on a host, with all starts that are under way there.
    pub fn instances_in(&self, host: &str, vpc: &str) -> u32 {
        let members = self.lock();
        let Some(member) = members.by_name.get(host) else { return 0 };
        let in_vpc = member.instances.iter().filter(|instance| instance.vpc == vpc);
        in_vpc.count() as u32 + member.starting
    }

    /// Whether a member may be forgotten: it exists, and its heartbeats stopped.
    pub fn check_dead(&self, name: &str) -> Result<(), ForgetError> {
        match self.lock().by_name.get(name) {
            None => Err(ForgetError::Unknown(name.to_owned())),
            Some(member) if member.open.is_some() => Err(ForgetError::Alive(name.to_owned())),
            Some(_) => Ok(()),
        }
    }

    /// Forgets a member that is gone for good. If it comes back, it registers as a new one.
    pub async fn forget(&self, name: &str) -> Result<(), ForgetError> {
        self.check_dead(name)?;
        let gone = |prefix| Write { key: format!("{prefix}{name}"), value: None };
        let writes = [MEMBER_PREFIX, DRAINED_PREFIX].map(gone);
        self.store.commit(vec![], writes.into()).await?;
        self.lock().by_name.remove(name);
        self.changed.send_replace(());
        Ok(())
    }

    /// Has a proxy own nothing from now on, or undoes that.
    pub async fn drain(&self, name: &str, drained: bool) -> Result<(), DrainError> {
        match self.lock().by_name.get(name).map(|member| member.registration.role) {
            None => return Err(DrainError::Unknown(name.to_owned())),
            Some(Role::Host) => return Err(DrainError::Host(name.to_owned())),
            Some(Role::Proxy) => {}
        }
        let key = format!("{DRAINED_PREFIX}{name}");
        let write = if drained { Write::put(key, &drained)? } else { Write { key, value: None } };
        self.store.commit(vec![], vec![write]).await?;
        if let Some(member) = self.lock().by_name.get_mut(name) {
            member.drained = drained;
        }
        self.changed.send_replace(());
        Ok(())
    }

    /// Whether a member is alive and still in this session.
    pub fn is_open(&self, name: &str, session: Session) -> bool {
        self.lock().by_name.get(name).is_some_and(|member| member.is_in(session))
    }

    /// When [`Self::is_settled`] becomes true at the latest.
    pub fn settled_at(&self) -> Instant {
        self.settled_at
    }

    /// False as long as a proxy of the time before a restart did not register again and may be
    /// about to: its addresses are not to be moved for that.
    pub fn is_settled(&self) -> bool {
        self.have_been_heard(|member| member.registration.role == Role::Proxy)
    }

    /// The same for hosts and proxies.
    pub fn is_complete(&self) -> bool {
        self.have_been_heard(|_| true)
    }

    /// Whether all of these registered since the restart, or had their time to.
    fn have_been_heard(&self, of_these: impl Fn(&Member) -> bool) -> bool {
        let was_heard = |member: &Member| member.last_heartbeat.is_some();
        Instant::now() >= self.settled_at
            || self.lock().by_name.values().all(|member| !of_these(member) || was_heard(member))
    }

    fn lock(&self) -> MutexGuard<'_, Members> {
        // No critical section leaves a member half written when it panics.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(heartbeat: &v1::HeartbeatRequest) -> Result<Registration, RegisterError> {
    let invalid = |field, problem| RegisterError::Invalid { field, problem };
    name::host(&heartbeat.name).map_err(|InvalidName(problem)| invalid("name", problem))?;
    let role = match heartbeat.role() {
        v1::Role::Host => Role::Host,
        v1::Role::Proxy => Role::Proxy,
        v1::Role::Unspecified => {
            return Err(invalid("role", "neither host nor proxy".into()));
        }
    };
    let endpoint = heartbeat
        .endpoint
        .parse()
        .map_err(|error: endpoint::InvalidEndpoint| invalid("endpoint", error.to_string()))?;
    let underlay_address = heartbeat.underlay_address.parse().map_err(|_| {
        let text = &heartbeat.underlay_address;
        invalid("underlay_address", format!("\"{text}\" is not an IP address"))
    })?;
    if !heartbeat.relay.is_empty() && heartbeat.relay.parse::<SocketAddr>().is_err() {
        let problem = format!("\"{}\" is not ADDRESS:PORT", heartbeat.relay);
        return Err(invalid("relay", problem));
    }
    Ok(Registration { role, endpoint, underlay_address })
}

/// A member's open session; dropping it declares the member dead.
pub struct Registered {
    fleet: Arc<Fleet>,
    name: String,
    session: Session,
}

impl Registered {
    /// A further heartbeat of the session.
    pub fn heartbeat(&self, heartbeat: v1::HeartbeatRequest) -> Result<(), RegisterError> {
        if heartbeat.name != self.name {
            let problem = format!("it was \"{}\" when this stream began", self.name);
            return Err(RegisterError::Invalid { field: "name", problem });
        }
        let mut members = self.fleet.lock();
        let member = members
            .by_name
            .get_mut(&self.name)
            .filter(|member| member.is_in(self.session))
            .ok_or_else(|| RegisterError::Replaced(self.name.clone()))?;
        member.last_heartbeat = Some(Instant::now());
        member.slots = heartbeat.slots;
        member.templates = heartbeat.templates;
        let templates = &member.templates;
        member.demand.keep(|name| templates.iter().any(|pool| pool.template == name));
        member.version = heartbeat.version;
        member.relay = heartbeat.relay;
        member.owned = heartbeat.owned;
        member.load = heartbeat.load;
        member.port_use = heartbeat.port_use.into_iter().map(|used| (used.vni, used)).collect();
        let mut instances = heartbeat.instances;
        for instance in &mut instances {
            instance.host.clone_from(&self.name);
        }
        member.instances.report(instances);
        Ok(())
    }

    /// How many microVMs of each template it should hold parked.
    pub fn wanted(&self) -> HashMap<String, u32> {
        let second = self.fleet.began.elapsed().as_secs();
        let members = self.fleet.lock();
        let of = |member: &Member| {
            member.demand.parked(second, member.slots.saturating_sub(member.taken()))
        };
        members.by_name.get(&self.name).map(of).unwrap_or_default()
    }

    /// The member's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Member {
    /// The name of the template whose pool a start draws on.
    fn pool_of(&self, template: Template<'_>) -> Option<String> {
        match template {
            Template::Default => Some(self.templates.first()?.template.clone()),
            Template::Named(name) => Some(name.to_owned()),
            Template::OfSnapshot => None,
        }
    }

    /// Slots of instances, and of those that start.
    fn taken(&self) -> u32 {
        self.instances.running() + self.starting
    }

    fn is_in(&self, session: Session) -> bool {
        self.open.as_ref().is_some_and(|open| open.number == session)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut members = self.fleet.lock();
        if let Some(member) = members.by_name.get_mut(&self.name)
            && member.is_in(self.session)
        {
            member.open = None;
            drop(members);
            tracing::warn!(name = %self.name, "no longer alive");
            self.fleet.changed.send_replace(());
        }
    }
}

/// A slot of a host that is kept for a start.
pub struct Reservation {
    fleet: Arc<Fleet>,
    /// Name of the host.
    pub host: String,
    /// The session in which the host was chosen.
    pub session: Session,
    /// The host's agent.
    pub agent: Agent,
}

impl Reservation {
    /// The instance runs: it is listed from now on.
    pub fn started(self, instance: &mut v1::Instance) {
        instance.host.clone_from(&self.host);
        if let Some(member) = self.fleet.lock().by_name.get_mut(&self.host) {
            member.instances.started(instance.clone());
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(member) = self.fleet.lock().by_name.get_mut(&self.host) {
            member.starting -= 1;
        }
    }
}
