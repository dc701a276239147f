//! A host: the instances that run, the VPCs they are in.

mod adopt;
mod capture;
mod directory;
mod flows;
mod functions;
mod guards;
mod logs;
mod ports;
mod snapshots;
pub(crate) mod sockets;
mod traffic;
mod vpcs;

use std::collections::{HashMap, VecDeque};
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinHandle;
use tracing::Instrument;
use uuid::Uuid;
use warren_proto::security::Security;
use warren_proto::v1;
use warren_vmm::client::{self, ClientError, MicroVm, ZygoteConfig};
use warren_vmm::control::{EndReason, PublicIdentity, ReleaseRequest, Tier, Timeline, WATCHDOG};
use warren_vmm::jail::JailConfig;
use warren_vmm::rates::Rates;
use warren_vmm::snapshot::Sources;

use crate::boot::BootId;
use crate::capture::CaptureError;
use crate::clock::Clock;
use crate::datapath::{self, DropCount, HostDatapath, HostVpc, Slot};
use crate::flowlog::FlowLog;
use crate::flowlog::owners::{NamedVpc, Owners};
use crate::metrics::{Levels, Starts};
use crate::pool::{Level, Pool, PoolError, Taken};
use crate::pools::Pools;
use crate::refill::Policy;
use crate::services::{self, Naming};
use crate::slots::{Slots, stop};
use crate::trace;

use functions::Functions;
pub use functions::{Function, FunctionError, FunctionOptions};
pub use guards::Own;
pub use logs::Logs;
use snapshots::Snapshots;
use traffic::Accounts;

/// The longest an invocation may take.
const INVOCATION_LIMIT: Duration = Duration::from_mins(5);
/// Instances that ended by themselves are shown until so many newer ones did.
const FAILED_KEPT: usize = 256;

/// Why a host could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The VPC was never applied here.
    #[error("VPC \"{0}\" is not known on this host: apply it first")]
    UnknownVpc(String),
    /// The VPC that was applied here has no such group.
    #[error("VPC \"{vpc}\" has no security group \"{group}\" on this host: create it first")]
    UnknownGroup {
        /// VPC.
        vpc: String,
        /// Group.
        group: String,
    },
    /// It has instances.
    #[error("VPC {vni} has {instances} instances on this host: end them first")]
    VpcInUse {
        /// Network identifier.
        vni: u32,
        /// How many.
        instances: usize,
    },
    /// No such instance.
    #[error("no instance \"{0}\" on this host")]
    NoInstance(String),
    /// A name that cannot be a host name.
    #[error("hostname \"{0}\" is not valid: up to 63 letters, digits and hyphens (RFC 1123)")]
    Hostname(String),
    /// It ended while it was used.
    #[error("instance {id} ended: {reason}")]
    Ended {
        /// Which.
        id: Uuid,
        /// Why.
        reason: String,
    },
    /// There is no microVM to be had.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The data path failed.
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// The VMM failed.
    #[error(transparent)]
    Vmm(#[from] ClientError),
    /// What was asked about flows makes no sense.
    #[error("{0}")]
    Query(String),
    /// The log of flows cannot be read.
    #[error("cannot read the log of flows: {0}")]
    Log(#[from] std::io::Error),
    /// A capture cannot begin.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// A function cannot be had.
    #[error(transparent)]
    Function(#[from] FunctionError),
    /// A name that cannot be a snapshot's.
    #[error("\"{0}\" is no name of a snapshot: up to 63 letters, digits and hyphens (RFC 1123)")]
    SnapshotName(String),
    /// The name is taken.
    #[error("there is a snapshot \"{0}\": remove it first, or take another name")]
    SnapshotExists(String),
    /// No such snapshot.
    #[error("no snapshot \"{0}\" on this host")]
    NoSnapshot(String),
    /// Clones are in the VPC of their origin.
    #[error("snapshot \"{name}\" is of VPC \"{vpc}\": its clones cannot be in another one")]
    SnapshotVpc {
        /// Snapshot.
        name: String,
        /// Its VPC.
        vpc: String,
    },
    /// Clones are of the template of their origin.
    #[error(
        "snapshot \"{name}\" is of template \"{template}\": its clones cannot be of another one"
    )]
    SnapshotTemplate {
        /// Snapshot.
        name: String,
        /// Its template.
        template: String,
    },
    /// A snapshot cannot be read or kept.
    #[error("snapshots: {}: {source}", path.display())]
    Snapshots {
        /// File or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A directory cannot be made.
    #[error("cannot make {}: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Too many go on.
    #[error("{0} captures go on: end one of them first")]
    Captures(usize),
    /// What a restart needs could not be kept.
    #[error("cannot keep {0}")]
    Record(String),
}

pub use self::capture::Captured;

/// What is to be started.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// Name of its VPC.
    pub vpc: String,
    /// Empty: derived from its id.
    pub hostname: String,
    /// What it is to have of its own; without that, of a snapshot, what the snapshot's origin had.
    pub own: Own,
    /// Name of the template that it is to be a clone of; empty: the default one, or the snapshot's.
    pub template: String,
    /// Name of a snapshot to clone.
    pub snapshot: Option<String>,
    /// The function that it is to be an instance of.
    pub function: Option<Function>,
    /// Call it with this.
    pub invocation: Option<Vec<u8>>,
}

/// What a start yielded.
pub struct Started {
    /// The instance.
    pub instance: v1::Instance,
    /// How long its stages took.
    pub timings: v1::StartTimings,
    /// The reply to its first invocation.
    pub reply: Option<Vec<u8>>,
}

/// What is kept of an instance inside its own VMM, for a daemon that restarts.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    id: Uuid,
    vpc: String,
    vni: u32,
    hostname: String,
    /// Records of former versions have nothing of it.
    #[serde(default)]
    own: Own,
    /// Name of its template; of former versions empty: the default one.
    #[serde(default)]
    template: String,
    /// What it is a clone of, if it is not the template.
    #[serde(default)]
    snapshot: Option<String>,
    /// What it is an instance of, if it is of a function.
    #[serde(default)]
    function: Option<Function>,
}

struct Instance {
    record: Record,
    slot: Slot,
    pid: i32,
    socket: PathBuf,
    /// Why it ended by itself, if it did.
    failed: Option<String>,
    /// Dropping it asks the watcher to stop the microVM.
    stop: oneshot::Sender<()>,
    /// Owns the connection to the microVM; done when the slot is free again.
    watcher: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    instances: HashMap<Uuid, Instance>,
    /// Those that ended by themselves, oldest first.
    failed: VecDeque<Uuid>,
    vpcs: vpcs::Vpcs,
    guards: guards::Guards,
    /// Names of VPCs, by their VNI: of those that were removed, too, since their flows end later.
    names: HashMap<u32, NamedVpc>,
    owners: Owners,
}

/// What a host is made from.
pub struct HostOptions {
    /// Name of the host.
    pub name: String,
    /// The microVM program.
    pub vmm: PathBuf,
    /// Directory of sockets, and of what a restart needs.
    pub run_dir: PathBuf,
    /// How microVMs are confined.
    pub jail: JailConfig,
    /// What each microVM's network and disk may do.
    pub rates: Rates,
    /// What microVMs are cloned from, the default first.
    pub templates: Vec<TemplateOptions>,
    /// Directory of snapshots; made when the first is taken.
    pub snapshots: PathBuf,
    /// How functions are kept; none: it takes none.
    pub functions: Option<FunctionOptions>,
}

/// A template of a host.
#[derive(Clone, Debug)]
pub struct TemplateOptions {
    /// Its name.
    pub name: String,
    /// What its microVMs are made from.
    pub sources: Sources,
    /// How its pool is filled.
    pub policy: Policy,
}

impl HostOptions {
    /// What the zygote of a template is started with. No two zygotes have the same groups, or the same
    /// directory of sockets.
    fn zygote(&self, template: &TemplateOptions) -> ZygoteConfig {
        let mut jail = self.jail.clone();
        jail.cgroup.push(format!("template-{}", template.name));
        ZygoteConfig {
            binary: self.vmm.clone(),
            sources: template.sources.clone(),
            run_dir: sockets::of_template(&self.run_dir, &template.name),
            jail,
            rates: self.rates,
            watchdog: WATCHDOG,
        }
    }
}

/// A host.
pub struct Host {
    options: HostOptions,
    datapath: Arc<HostDatapath>,
    slots: Arc<Slots>,
    pools: Arc<Pools>,
    snapshots: Snapshots,
    functions: Functions,
    logs: Logs,
    state: Mutex<State>,
    starts: Starts,
    log: OnceLock<FlowLog>,
    /// Locked before the state, if both are.
    accounts: Mutex<Accounts>,
    /// Flows that the last sweep left in the table.
    flows: AtomicU32,
    ports: ports::Counted,
    /// Captures that may begin.
    captures: Arc<Semaphore>,
}

impl Host {
    /// A host over an open data path. Takes over the microVMs that an earlier daemon left running, ends
    /// those that do not fit ([`crate::recovery`]), and starts to fill the pools.
    pub async fn new(
        mut options: HostOptions,
        datapath: HostDatapath,
    ) -> Result<Arc<Self>, HostError> {
        let datapath = Arc::new(datapath);
        let slots = Arc::new(Slots::new(datapath.clone(), options.jail.clone()));
        let mut pools: Vec<Arc<Pool>> = Vec::new();
        for template in &options.templates {
            let (name, zygote) = (template.name.clone(), options.zygote(template));
            sockets::make(&zygote.run_dir)?;
            // Images of one template share its memory.
            let same =
                pools.iter().find(|pool| pool.config().sources.template == zygote.sources.template);
            let memory = match same {
                Some(pool) => Some(pool.memory().await),
                None => None,
            };
            let (slots, policy) = (slots.clone(), template.policy);
            let pool = Pool::new(name, slots, zygote, memory.as_ref(), policy).await?;
            pools.push(Arc::new(pool));
        }
        let pools = Arc::new(Pools::new(slots.clone(), pools));
        let (directory, run_dir) = (options.snapshots.clone(), options.run_dir.clone());
        let snapshots = Snapshots::new(directory, run_dir, pools.clone());
        let (vmm, run_dir) = (options.vmm.clone(), options.run_dir.clone());
        let functions = options.functions.take();
        let functions = Functions::new(functions, vmm, run_dir, slots.clone(), pools.clone());
        sockets::make(&options.run_dir.join(sockets::BY_ID))?;
        let vpcs = vpcs::load(&options.run_dir)?;
        let known = datapath.vpcs()?;
        let of_v6 = |vni| known.iter().find(|vpc| vpc.vni == vni)?.shared_address_v6;
        let names = vpcs.iter().map(|(name, vpc)| (vpc.vni, named(name, vpc, of_v6(vpc.vni))));
        let names = names.collect();
        let accounts = Mutex::new(Accounts::new(datapath.all_carried()?));
        let state = Mutex::new(State { vpcs, names, ..State::default() });
        let (starts, log, flows) = (Starts::default(), OnceLock::new(), AtomicU32::new(0));
        let captures = Arc::new(Semaphore::new(capture::CAPTURES));
        let ports = ports::Counted::default();
        let host = Arc::new(Self {
            options,
            datapath,
            slots,
            pools,
            snapshots,
            functions,
            logs: Logs::default(),
            state,
            starts,
            log,
            accounts,
            flows,
            ports,
            captures,
        });
        host.recover().await?;
        host.tidy_policies()?;
        host.pools.fill();
        let idle = host.clone();
        tokio::spawn(async move { idle.snapshots.end_idle().await });
        let idle = host.clone();
        tokio::spawn(async move { idle.functions.end_idle().await });
        Ok(host)
    }

    /// What link-local services for this host are made from.
    pub fn services(&self, boot: BootId) -> services::Options {
        services::Options {
            device: self.datapath.services_device().to_owned(),
            mtu: self.datapath.mtu(),
            run_dir: self.options.run_dir.clone(),
            host: self.options.name.clone(),
            boot,
        }
    }

    /// Slots in all.
    pub fn slots(&self) -> u32 {
        self.slots.count()
    }

    /// How the pools stand, that of the default template first.
    pub fn pools(&self) -> Vec<Level> {
        self.pools.levels()
    }

    /// Has so many microVMs of each template parked, at least, as far as the configuration lets it, until
    /// it is told otherwise or nothing for a while.
    pub fn want_parked(&self, wanted: &HashMap<String, u32>) {
        self.pools.want_parked(wanted);
    }

    /// The instances, those that ended by themselves among them.
    pub fn instances(&self) -> Vec<v1::Instance> {
        let state = self.state();
        state.instances.values().map(|instance| self.describe(&state, instance)).collect()
    }

    /// Makes a VPC known with one of its shared addresses, or replaces what was known. Instances get
    /// the address with the lowest rank that has ports left.
    pub fn apply_vpc(
        &self,
        name: &str,
        vpc: &HostVpc,
        rank: u32,
        naming: Naming,
        security: Security,
    ) -> Result<(), HostError> {
        self.datapath.apply_vpc(vpc)?;
        let HostVpc { vni, shared_address, shared_address_v6, .. } = *vpc;
        let mut state = self.state();
        if state.vpcs.find(name, vni).is_none_or(|known| known.security != security) {
            state.secure(&self.datapath, vni, &security)?;
        }
        let vpc = vpcs::Vpc { vni, shared_address, rank, naming, security };
        state.names.insert(vni, named(name, &vpc, shared_address_v6));
        state.vpcs.insert(name, vpc);
        vpcs::save(&self.options.run_dir, &state.vpcs)
    }

    /// Forgets a VPC's shared address that no instance has.
    pub fn remove_vpc(&self, vni: u32) -> Result<(), HostError> {
        let mut state = self.state();
        let instances =
            state.instances.values().filter(|i| i.record.vni == vni && i.failed.is_none()).count();
        if instances > 0 {
            return Err(HostError::VpcInUse { vni, instances });
        }
        self.datapath.remove_vpc(vni)?;
        state.forget_policies(&self.datapath, vni)?;
        state.vpcs.remove(vni);
        vpcs::save(&self.options.run_dir, &state.vpcs)?;
        drop(state);
        self.accounts().close(vni);
        Ok(())
    }

    /// What was dropped, per slot and reason.
    pub fn drops(&self) -> Result<Vec<DropCount>, datapath::Error> {
        self.datapath.drops()
    }

    /// Collects ended flows; call it every second.
    pub fn sweep(&self) -> Result<(), datapath::Error> {
        let report = self.datapath.sweep()?;
        self.flows.store(report.live, Ordering::Relaxed);
        Ok(())
    }

    /// How things stand, in numbers.
    pub fn levels(&self) -> Levels {
        let instances = self.state().instances.values().filter(|i| i.failed.is_none()).count();
        Levels {
            slots: self.slots(),
            free: self.slots.count_free(),
            pools: self.pools(),
            instances: instances as u32,
            flows: self.flows.load(Ordering::Relaxed),
        }
    }

    /// MicroVMs that were ended because nobody knew them.
    pub fn orphans_reaped(&self) -> &Counter {
        self.slots.orphans_reaped()
    }

    /// What its functions write.
    pub fn logs(&self) -> &Logs {
        &self.logs
    }

    /// How starts went.
    pub fn starts(&self) -> &Starts {
        &self.starts
    }

    /// Starts an instance, and invokes it if there is an invocation.
    ///
    /// It is carried out to its end even if the caller goes away.
    pub async fn start(self: &Arc<Self>, order: Order) -> Result<Started, HostError> {
        let Order { vpc, hostname, own, template, snapshot, function, invocation } = order;
        let clock = Clock::start();
        let id = Uuid::new_v4();
        let hostname = match hostname.as_str() {
            "" => format!("vm-{}", &id.simple().to_string()[..12]),
            name if is_hostname(name) => hostname,
            _ => return Err(HostError::Hostname(hostname)),
        };
        let (own, template) = match &snapshot {
            None => (own, self.pools.get(&template)?.template().to_owned()),
            Some(name) => {
                let (theirs, template) = self.snapshots.find(name)?.of_clone(&vpc, &template)?;
                (own.or(theirs), template)
            }
        };
        let vni = self.state().vni_for(&vpc, &own, |vni| self.has_ports(vni))?;
        let record = Record { id, vpc, vni, hostname, own, template, snapshot, function };
        let host = self.clone();
        let work = tokio::spawn(async move { host.start_to_end(clock, record, invocation).await });
        work.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }

    async fn start_to_end(
        self: Arc<Self>,
        clock: Clock,
        record: Record,
        invocation: Option<Vec<u8>>,
    ) -> Result<Started, HostError> {
        let mut timings =
            v1::StartTimings { requested_unix_ns: clock.unix_ns, ..v1::StartTimings::default() };
        let span = trace::start(record.id, &record.vpc);
        let ready = self.make_ready(clock, &mut timings, &record).instrument(span.clone()).await;
        match &ready {
            Ok((_, _, timeline)) => self.starts.ready(&timings, timeline),
            Err(_) => self.starts.failed(),
        }
        let (microvm, slot, timeline) = ready?;
        timings.prepared = stages(&timeline);
        trace::ready(&span, record.id, slot.number, clock, &timings, &timeline);
        tracing::info!(
            id = %record.id,
            slot = slot.number,
            tier = timings.tier,
            ready_ns = timings.ready_ns,
            attach_ns = timings.attach_end_ns - timings.attach_start_ns,
            ?timeline,
            "instance started"
        );
        let path = microvm.path().to_owned();
        let described = self.enlist(record, slot, microvm);

        let reply = match invocation {
            None => None,
            Some(invocation) => {
                let reply = client::invoke(&path, &invocation, INVOCATION_LIMIT).await;
                timings.replied_ns = clock.elapsed();
                Some(reply?)
            }
        };
        Ok(Started { instance: described, timings, reply })
    }

    /// Takes a microVM, from its template's pool if that has one and it is no clone of a snapshot, and
    /// makes it the instance.
    async fn make_ready(
        &self,
        clock: Clock,
        timings: &mut v1::StartTimings,
        record: &Record,
    ) -> Result<(MicroVm, Slot, Timeline), HostError> {
        loop {
            let Taken { microvm, from } = match (&record.snapshot, &record.function) {
                (Some(snapshot), _) => self.clone_of(snapshot).await?,
                (None, Some(function)) => {
                    self.of_function(&record.vpc, function, &record.template).await?
                }
                (None, None) => self.pools.take(&record.template).await?,
            };
            timings.cold = from.is_none();
            from.map_or("", Tier::name).clone_into(&mut timings.tier);
            timings.cloned_ns = clock.elapsed();
            let slot = self.slot(microvm.slot());
            match self.connect_and_release(clock, timings, record, &slot, microvm).await {
                Ok((microvm, timeline)) => {
                    timings.released_ns = clock.since(timeline.released_ns);
                    timings.ready_ns = clock.since(timeline.ready_ns);
                    return Ok((microvm, slot, timeline));
                }
                // One that died while it waited says nothing about the next one.
                Err(HostError::Vmm(ClientError::Ended(reason))) if from.is_some() => {
                    tracing::warn!(slot = slot.number, "a pooled microVM was dead: {reason}");
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Attaches a parked microVM's slot and gives the microVM its identity.
    async fn connect_and_release(
        &self,
        clock: Clock,
        timings: &mut v1::StartTimings,
        record: &Record,
        slot: &Slot,
        mut microvm: MicroVm,
    ) -> Result<(MicroVm, Timeline), HostError> {
        let released = async {
            timings.attach_start_ns = clock.elapsed();
            // Connected first: the guest may send as soon as it is released.
            self.attach(record, slot)?;
            timings.attach_end_ns = clock.elapsed();
            Ok(microvm.release(&self.release_request(record, slot)?).await?)
        };
        match released.await {
            Ok(ready) => Ok((microvm, ready)),
            Err(error) => {
                self.forget_owner(slot.number);
                self.slots.discard(microvm).await;
                Err(error)
            }
        }
    }

    fn release_request(&self, record: &Record, slot: &Slot) -> Result<ReleaseRequest, HostError> {
        let identity = PublicIdentity {
            instance_id: *record.id.as_bytes(),
            hostname: record.hostname.clone(),
            mac: slot.mac,
            ipv4: slot.address.octets(),
            gateway: warren_abi::wire::GATEWAY.octets(),
            mtu: self.datapath.mtu(),
        };
        let tag = serde_json::to_vec(record).map_err(|e| HostError::Record(e.to_string()))?;
        Ok(ReleaseRequest { identity, tag })
    }

    /// Calls a running instance.
    pub async fn invoke(&self, id: &str, invocation: &[u8]) -> Result<Vec<u8>, HostError> {
        let id = self.known(id)?;
        let path = match self.state().instances.get(&id) {
            Some(Instance { failed: Some(reason), .. }) => {
                return Err(HostError::Ended { id, reason: reason.clone() });
            }
            Some(instance) => instance.socket.clone(),
            None => return Err(HostError::NoInstance(id.to_string())),
        };
        Ok(client::invoke(&path, invocation, INVOCATION_LIMIT).await?)
    }

    /// Ends an instance. Ending one that is not there is no error.
    pub async fn end(&self, id: &str) -> Result<(), HostError> {
        let Ok(id) = self.known(id) else { return Ok(()) };
        let Some(instance) = self.state().instances.remove(&id) else { return Ok(()) };
        let Instance { slot, failed, stop, watcher, .. } = instance;
        if failed.is_none() {
            self.forget_owner(slot.number);
            // Disconnected first: from here on nothing leaves or reaches the slot.
            self.datapath.detach(slot.number)?;
            drop(stop);
            // It fails only if it panicked, which is in the log then.
            watcher.await.ok();
            tracing::info!(%id, slot = slot.number, "instance ended");
        }
        Ok(())
    }

    fn known(&self, id: &str) -> Result<Uuid, HostError> {
        let unknown = || HostError::NoInstance(id.to_owned());
        let uuid = Uuid::parse_str(id).map_err(|_| unknown())?;
        if self.state().instances.contains_key(&uuid) { Ok(uuid) } else { Err(unknown()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; if some did, the state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, number: u32) -> Slot {
        let slot = self.datapath.slots().iter().find(|slot| slot.number == number);
        slot.expect("microVMs are only forked for slots of this host").clone()
    }

    fn describe(&self, state: &State, instance: &Instance) -> v1::Instance {
        let Instance { record, slot, pid, failed, .. } = instance;
        let vpc = state.vpcs.find(&record.vpc, record.vni);
        let shared_address = vpc.map(|vpc| vpc.shared_address.to_string()).unwrap_or_default();
        // The slot of one that failed may be another's.
        let (state, limits, usage) = match failed {
            None => {
                let (limits, usage) = (state.limits(record), self.usage(slot.number));
                (v1::InstanceState::Running, limits.map(Into::into), usage)
            }
            Some(_) => (v1::InstanceState::Failed, None, None),
        };
        v1::Instance {
            id: record.id.to_string(),
            vpc: record.vpc.clone(),
            host: self.options.name.clone(),
            hostname: record.hostname.clone(),
            address: slot.address.to_string(),
            mac: slot.mac.map(|byte| format!("{byte:02x}")).join(":"),
            slot: slot.number,
            pid: *pid as u32,
            state: state.into(),
            reason: failed.clone().unwrap_or_default(),
            security_groups: record.own.groups.iter().cloned().collect(),
            limits,
            usage,
            shared_address,
            template: record.template.clone(),
            function: record.function.as_ref().map(|it| it.name.clone()).unwrap_or_default(),
            function_version: record.function.as_ref().map(|it| it.version).unwrap_or_default(),
        }
    }

    /// Puts an instance on the list and watches it.
    fn enlist(self: &Arc<Self>, record: Record, slot: Slot, microvm: MicroVm) -> v1::Instance {
        let (stop, stopped) = oneshot::channel();
        let (id, pid, socket) = (record.id, microvm.pid(), microvm.path().to_owned());
        // The lock is held until the instance is listed: its end must find it there.
        let mut state = self.state();
        let watcher = tokio::spawn(self.clone().watch(id, record.vni, microvm, stopped));
        if let Some(generation) = self.generation(slot.number) {
            state.owners.attached(slot.number, generation, id);
        }
        // Rules may have changed since it was attached.
        if let Err(error) = state.restrict(&self.datapath, &record, slot.number) {
            tracing::error!(%id, slot = slot.number, "security groups not in force: {error}");
        }
        let link = sockets::by_id(&self.options.run_dir, id);
        if let Err(error) = link_to(&socket, &link) {
            tracing::error!(%id, "cannot link {} to its socket: {error}", link.display());
        }
        if let Some(Function { name, version, .. }) = record.function.clone() {
            let listening = self.logs.clone().listen(socket.clone(), id.to_string(), name, version);
            tokio::spawn(listening);
        }
        let instance = Instance { record, slot, pid, socket, failed: None, stop, watcher };
        let described = self.describe(&state, &instance);
        state.instances.insert(id, instance);
        described
    }

    /// Owns a running microVM until it ends, by itself or because it is told to.
    async fn watch(
        self: Arc<Self>,
        id: Uuid,
        vni: u32,
        mut microvm: MicroVm,
        told: oneshot::Receiver<()>,
    ) {
        let slot = microvm.slot();
        tokio::select! {
            reason = microvm.ended() => self.failed(id, slot, &reason),
            _ = told => stop(microvm).await,
        }
        // Nobody finds it any more. If the link is not there it is as it should be.
        std::fs::remove_file(sockets::by_id(&self.options.run_dir, id)).ok();
        self.settle(slot, vni);
        self.slots.free(slot);
    }

    /// An instance ended by itself: it stays listed, as failed.
    fn failed(&self, id: Uuid, slot: u32, reason: &EndReason) {
        tracing::warn!(%id, slot, %reason, "instance ended by itself");
        let mut state = self.state();
        if let Some(instance) = state.instances.get_mut(&id) {
            instance.failed = Some(reason.to_string());
            state.failed.push_back(id);
            if state.failed.len() > FAILED_KEPT
                && let Some(oldest) = state.failed.pop_front()
            {
                state.instances.remove(&oldest);
            }
        }
        drop(state);
        self.forget_owner(slot);
    }

    /// The attachment of a slot.
    fn generation(&self, slot: u32) -> Option<u32> {
        self.datapath.attachment(slot).ok().flatten().map(|attachment| attachment.generation)
    }

    /// The instance of a slot that is attached still is about to go.
    fn forget_owner(&self, slot: u32) {
        if let Some(generation) = self.generation(slot) {
            self.state().owners.detached(slot, generation);
        }
    }
}

/// Makes a link, in place of one that is there.
fn link_to(target: &Path, link: &Path) -> std::io::Result<()> {
    match std::os::unix::fs::symlink(target, link) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            std::fs::remove_file(link)?;
            std::os::unix::fs::symlink(target, link)
        }
        linked => linked,
    }
}

/// The stages of a microVM's preparation, with the time that each took.
fn stages(timeline: &Timeline) -> Vec<v1::Stage> {
    let stage = |(name, duration_ns): (&str, u64)| v1::Stage { name: name.to_owned(), duration_ns };
    timeline.stages().map(stage).collect()
}

fn named(name: &str, vpc: &vpcs::Vpc, shared_address_v6: Option<Ipv6Addr>) -> NamedVpc {
    let (name, shared_address) = (name.to_owned(), vpc.shared_address);
    NamedVpc { name, shared_address, shared_address_v6 }
}

/// RFC 1123, 2.1, one label.
pub(crate) fn is_hostname(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostnames_are_rfc_1123_labels() {
        for name in ["a", "web-1", &"x".repeat(63)] {
            assert!(is_hostname(name), "{name}");
        }
        for name in ["", "-a", "a-", "a.b", "a b", "ä", &"x".repeat(64)] {
            assert!(!is_hostname(name), "{name}");
        }
    }
}
