//! A control plane in the test's process, and agents that only remember what they are told.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod functions;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::IntervalStream;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use warren_control::Control;
use warren_control::functions::publish::{self, Publisher};
use warren_control::store::SqliteStore;
use warren_proto::endpoint::{Endpoint, connect};
use warren_proto::server::{Listeners, Services};
use warren_proto::v1::agent_service_server::{AgentService, AgentServiceServer};
use warren_proto::v1::control_service_client::ControlServiceClient;
use warren_proto::v1::fleet_service_client::FleetServiceClient;
use warren_proto::v1::*;

/// Long enough that a busy machine does not make an agent late.
pub const DEADLINE: Duration = Duration::from_secs(10);
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(20);

/// Waits until the condition holds; fails the test if it does not come to pass.
pub async fn eventually<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    for _ in 0..1500 {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never came to pass: {what}");
}

/// A gRPC server in a task.
pub struct Server {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Server {
    async fn start(endpoint: &Endpoint, services: Services) -> Self {
        let listeners = Listeners::bind(std::slice::from_ref(endpoint)).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            listeners.serve(services, stopped).await.unwrap();
        });
        Self { stop, task }
    }

    async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.unwrap();
    }
}

/// A directory with the control plane's state and everybody's sockets.
pub struct World {
    directory: TempDir,
    deadline: Duration,
    /// What the control plane has of functions, when it is started.
    pub functions: publish::Config,
    control: Option<(Control, Server)>,
    /// What all agents were told, in the order they were told it.
    pub log: Log,
}

impl World {
    pub async fn new() -> Self {
        Self::with_deadline(DEADLINE).await
    }

    pub async fn with_deadline(deadline: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let functions = publish::Config::default();
        let mut world = Self { directory, deadline, functions, control: None, log: Log::default() };
        world.start_control().await;
        world
    }

    pub async fn start_control(&mut self) {
        let state = self.file("control.db");
        let store = Arc::new(SqliteStore::open(&state).await.unwrap());
        let publisher = Publisher::open(&self.functions, &state, store.clone()).unwrap();
        let control = Control::start(store, publisher, self.deadline).await.unwrap();
        let server = Server::start(&self.endpoint(), control.services()).await;
        self.control = Some((control, server));
    }

    pub async fn stop_control(&mut self) {
        let (control, server) = self.control.take().unwrap();
        control.stop();
        server.stop().await;
    }

    /// A file of the test's own.
    pub fn file(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    /// Scales proxies by a configuration.
    pub fn scale(&self, config: warren_control::scaling::Config) {
        self.control.as_ref().unwrap().0.scale(config);
    }

    pub fn endpoint(&self) -> Endpoint {
        socket(self.directory.path(), "control")
    }

    pub async fn client(&self) -> ControlServiceClient<Channel> {
        ControlServiceClient::new(connect(&self.endpoint()).await.unwrap())
    }

    /// Makes an agent that is registered.
    pub async fn agent(&self, name: &str, role: Role, number: u8) -> FakeAgent {
        let mut agent = FakeAgent::new(self, name, role, number).await;
        agent.register(self).await;
        agent
    }

    pub async fn host(&self, name: &str, number: u8) -> FakeAgent {
        self.agent(name, Role::Host, number).await
    }

    pub async fn proxy(&self, name: &str, number: u8) -> FakeAgent {
        self.agent(name, Role::Proxy, number).await
    }

    pub async fn is_alive(&self, name: &str) -> bool {
        let hosts = self.client().await.list_hosts(ListHostsRequest {}).await.unwrap().into_inner();
        hosts.hosts.iter().any(|host| host.name == name && host.alive)
    }

    pub async fn create_vpc(&self, name: &str) -> Vpc {
        let request = CreateVpcRequest { vpc: Some(vpc(name)) };
        self.client().await.create_vpc(request).await.unwrap().into_inner().vpc.unwrap()
    }

    pub async fn run(&self, vpc: &str, host: &str) -> Result<Instance, Status> {
        let request =
            RunInstanceRequest { vpc: vpc.into(), host: host.into(), ..Default::default() };
        let response = self.client().await.run_instance(request).await?.into_inner();
        Ok(response.instance.unwrap())
    }

    pub async fn instances(&self) -> Vec<Instance> {
        let request = ListInstancesRequest {};
        self.client().await.list_instances(request).await.unwrap().into_inner().instances
    }
}

fn socket(directory: &Path, name: &str) -> Endpoint {
    Endpoint::Unix(directory.join(format!("{name}.sock")))
}

/// A definition; its shared address is made of the name, so that several can be made.
pub fn vpc(name: &str) -> Vpc {
    let last = name.bytes().fold(7_u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte));
    Vpc {
        name: name.into(),
        cidr: "10.1.0.0/16".into(),
        shared_address: format!("10.1.1.{last}"),
        interface: "eth1".into(),
        ..Vpc::default()
    }
}

/// Something an agent was told.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    Apply(ApplyVpcRequest),
    Start(StartInstanceRequest),
    End(String),
    Invoke(InvokeInstanceRequest),
    ListDrops,
}

/// What all agents were told, with the name of each.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<(String, Told)>>>);

impl Log {
    fn add(&self, name: &str, told: Told) {
        self.0.lock().unwrap().push((name.into(), told));
    }

    pub fn all(&self) -> Vec<(String, Told)> {
        self.0.lock().unwrap().clone()
    }

    pub fn clear(&self) {
        self.0.lock().unwrap().clear();
    }

    /// The definitions that an agent was given.
    pub fn applied(&self, name: &str) -> Vec<ApplyVpcRequest> {
        let of_agent = self.all().into_iter().filter(|(agent, _)| agent == name);
        of_agent
            .filter_map(|(_, told)| if let Told::Apply(apply) = told { Some(apply) } else { None })
            .collect()
    }

    /// The proxy's address in the last definition that a host was given.
    pub fn proxy_of(&self, host: &str) -> Option<String> {
        match self.applied(host).pop()?.role? {
            apply_vpc_request::Role::Host(host) => Some(host.proxy_address),
            apply_vpc_request::Role::Proxy(_) => None,
        }
    }

    /// The ports in the last definition that a host was given.
    pub fn ports_of(&self, host: &str) -> Option<PortRange> {
        match self.applied(host).pop()?.role? {
            apply_vpc_request::Role::Host(host) => host.ports,
            apply_vpc_request::Role::Proxy(_) => None,
        }
    }

    /// The ports that a proxy was told last, with the underlay address of each one's holder.
    pub fn ports_at(&self, proxy: &str) -> Vec<(PortRange, String)> {
        match self.applied(proxy).pop().and_then(|apply| apply.role) {
            Some(apply_vpc_request::Role::Proxy(proxy)) => {
                let holders = proxy.holders.into_iter();
                holders.map(|holder| (holder.ports.unwrap(), holder.host_address)).collect()
            }
            _ => vec![],
        }
    }

    /// The proxies that may own a VPC's addresses, as a proxy was told last.
    pub fn succession_at(&self, proxy: &str) -> Vec<String> {
        match self.applied(proxy).pop().and_then(|apply| apply.role) {
            Some(apply_vpc_request::Role::Proxy(proxy)) => proxy.proxies,
            _ => vec![],
        }
    }

    /// The underlay addresses of the holders that a proxy was told last.
    pub fn holders_at(&self, proxy: &str) -> Vec<String> {
        self.ports_at(proxy).into_iter().map(|(_, holder)| holder).collect()
    }

    /// Where in the log this first happened.
    pub fn position(&self, what: impl Fn(&str, &Told) -> bool) -> Option<usize> {
        self.all().iter().position(|(name, told)| what(name, told))
    }
}

/// How an agent behaves, and what it runs.
pub struct Behaviour {
    name: String,
    log: Log,
    /// Answers to `ApplyVpc`, `StartInstance` and `ListDrops` wait until this is true.
    pub open: watch::Sender<bool>,
    pub refuse_apply: Mutex<Option<Status>>,
    pub refuse_start: Mutex<Option<Status>>,
    pub instances: Mutex<BTreeMap<String, Instance>>,
    pub snapshots: Mutex<BTreeMap<String, Snapshot>>,
    pub port_use: Mutex<Vec<PortUse>>,
    /// What an invocation is answered with; by default with itself.
    pub reply: Mutex<Option<Vec<u8>>>,
    pub drops: Mutex<Vec<DropCount>>,
    pub flows: Mutex<Vec<Flow>>,
    pub hits: Mutex<Vec<RuleHits>>,
    /// How many of each template it was told last to hold parked.
    pub wanted: Mutex<HashMap<String, u32>>,
}

impl Behaviour {
    /// Counts dropped packets.
    pub fn drop_packets(&self, scope: u32, reason: &str, packets: u64) {
        let mut drops = self.drops.lock().unwrap();
        let same = |count: &&mut DropCount| count.scope == scope && count.reason == reason;
        match drops.iter_mut().find(same) {
            Some(count) => count.packets += packets,
            None => drops.push(DropCount { scope, reason: reason.into(), packets }),
        }
    }

    async fn until_open(&self) {
        self.open.subscribe().wait_for(|open| *open).await.unwrap();
    }

    fn answer(&self, invocation: Vec<u8>) -> Vec<u8> {
        self.reply.lock().unwrap().clone().unwrap_or(invocation)
    }
}

/// An agent without a data path. It serves until it is dropped.
pub struct FakeAgent {
    pub behaviour: Arc<Behaviour>,
    pub report: HeartbeatRequest,
    server: Server,
    heartbeats: Option<Heartbeats>,
}

/// The task that sends heartbeats, ended when this is dropped.
struct Heartbeats {
    task: JoinHandle<()>,
    /// Ends the stream, too: the connection would go on with it for the task.
    ended: Arc<AtomicBool>,
}

impl Drop for Heartbeats {
    fn drop(&mut self) {
        self.task.abort();
        self.ended.store(true, Ordering::Relaxed);
    }
}

impl FakeAgent {
    /// An agent with 4 slots at 192.0.2.NUMBER that did not register yet.
    pub async fn new(world: &World, name: &str, role: Role, number: u8) -> Self {
        let endpoint = socket(world.directory.path(), name);
        let behaviour = Arc::new(Behaviour {
            name: name.into(),
            log: world.log.clone(),
            open: watch::Sender::new(true),
            refuse_apply: Mutex::default(),
            refuse_start: Mutex::default(),
            instances: Mutex::default(),
            snapshots: Mutex::default(),
            port_use: Mutex::default(),
            reply: Mutex::default(),
            drops: Mutex::default(),
            flows: Mutex::default(),
            hits: Mutex::default(),
            wanted: Mutex::default(),
        });
        let service = AgentServiceServer::new(Agent(behaviour.clone()));
        let server = Server::start(&endpoint, Services::default().with(service)).await;
        let report = HeartbeatRequest {
            name: name.into(),
            role: role.into(),
            endpoint: endpoint.to_string(),
            underlay_address: format!("192.0.2.{number}"),
            slots: 4,
            instances: vec![],
            version: "1.2.3".into(),
            port_use: vec![],
            owned: 0,
            load: None,
            relay: String::new(),
            templates: vec![TemplatePool { template: "small".into(), parked: 2, parked_target: 3 }],
        };
        Self { behaviour, report, server, heartbeats: None }
    }

    /// Sends heartbeats from now on, to whatever control plane there is, and waits until it is
    /// seen alive.
    pub async fn register(&mut self, world: &World) {
        let (report, behaviour) = (self.report.clone(), self.behaviour.clone());
        let control = world.endpoint();
        let ended = Arc::new(AtomicBool::new(false));
        let stream_ended = ended.clone();
        let task = tokio::spawn(async move {
            loop {
                if let Ok(channel) = connect(&control).await {
                    let (report, told) = (report.clone(), behaviour.clone());
                    let behaviour = behaviour.clone();
                    let ticks = IntervalStream::new(tokio::time::interval(HEARTBEAT_INTERVAL));
                    let ended = stream_ended.clone();
                    let ticks = ticks.take_while(move |_| !ended.load(Ordering::Relaxed));
                    let beats = ticks.map(move |_| HeartbeatRequest {
                        instances: behaviour.instances.lock().unwrap().values().cloned().collect(),
                        port_use: behaviour.port_use.lock().unwrap().clone(),
                        ..report.clone()
                    });
                    if let Ok(answers) = FleetServiceClient::new(channel).heartbeat(beats).await {
                        let mut answers = answers.into_inner();
                        while let Ok(Some(answer)) = answers.message().await {
                            *told.wanted.lock().unwrap() = answer.wanted;
                        }
                    }
                }
                tokio::time::sleep(HEARTBEAT_INTERVAL).await;
            }
        });
        self.heartbeats = Some(Heartbeats { task, ended });
        let name = &self.report.name;
        eventually("the agent is alive", || world.is_alive(name)).await;
    }

    /// Its heartbeats end, as when its process is killed.
    pub async fn die(&mut self, world: &World) {
        self.heartbeats = None;
        let name = &self.report.name;
        eventually("the agent is dead", || async { !world.is_alive(name).await }).await;
    }

    pub fn report(&self) -> HeartbeatRequest {
        self.report.clone()
    }
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        self.server.task.abort();
    }
}

struct Agent(Arc<Behaviour>);

#[tonic::async_trait]
impl AgentService for Agent {
    async fn apply_vpc(
        &self,
        request: Request<ApplyVpcRequest>,
    ) -> Result<Response<ApplyVpcResponse>, Status> {
        let agent = &self.0;
        agent.log.add(&agent.name, Told::Apply(request.into_inner()));
        agent.until_open().await;
        match agent.refuse_apply.lock().unwrap().clone() {
            Some(status) => Err(status),
            None => Ok(Response::new(ApplyVpcResponse {})),
        }
    }

    async fn start_instance(
        &self,
        request: Request<StartInstanceRequest>,
    ) -> Result<Response<StartInstanceResponse>, Status> {
        let agent = &self.0;
        let request = request.into_inner();
        agent.log.add(&agent.name, Told::Start(request.clone()));
        agent.until_open().await;
        if let Some(status) = agent.refuse_start.lock().unwrap().clone() {
            return Err(status);
        }
        let known = agent.log.applied(&agent.name).into_iter().rfind(|it| it.vpc == request.vpc);
        let mut instances = agent.instances.lock().unwrap();
        let instance = Instance {
            shared_address: known.map(|vpc| vpc.shared_address).unwrap_or_default(),
            id: uuid::Uuid::new_v4().to_string(),
            vpc: request.vpc,
            hostname: request.hostname,
            slot: instances.len() as u32 + 1,
            state: InstanceState::Running.into(),
            security_groups: request.security_groups,
            template: request.template,
            ..Instance::default()
        };
        instances.insert(instance.id.clone(), instance.clone());
        Ok(Response::new(StartInstanceResponse {
            instance: Some(instance),
            timings: Some(StartTimings { ready_ns: 1_500_000, ..StartTimings::default() }),
            reply: request.invocation.map(|invocation| agent.answer(invocation)),
        }))
    }

    async fn end_instance(
        &self,
        request: Request<EndInstanceRequest>,
    ) -> Result<Response<EndInstanceResponse>, Status> {
        let id = request.into_inner().id;
        self.0.instances.lock().unwrap().remove(&id);
        self.0.log.add(&self.0.name, Told::End(id));
        Ok(Response::new(EndInstanceResponse {}))
    }

    async fn snapshot_instance(
        &self,
        request: Request<SnapshotInstanceRequest>,
    ) -> Result<Response<SnapshotInstanceResponse>, Status> {
        let SnapshotInstanceRequest { id, name } = request.into_inner();
        let Instance { vpc, template, .. } = self.0.instances.lock().unwrap()[&id].clone();
        let (instance, host) = (id, self.0.name.clone());
        let snapshot =
            Snapshot { name: name.clone(), vpc, host, instance, template, ..Default::default() };
        self.0.snapshots.lock().unwrap().insert(name, snapshot.clone());
        Ok(Response::new(SnapshotInstanceResponse { snapshot: Some(snapshot) }))
    }

    async fn list_snapshots(
        &self,
        _: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        let snapshots = self.0.snapshots.lock().unwrap().values().cloned().collect();
        Ok(Response::new(ListSnapshotsResponse { snapshots }))
    }

    async fn remove_snapshot(
        &self,
        request: Request<RemoveSnapshotRequest>,
    ) -> Result<Response<RemoveSnapshotResponse>, Status> {
        self.0.snapshots.lock().unwrap().remove(&request.into_inner().name);
        Ok(Response::new(RemoveSnapshotResponse {}))
    }

    async fn invoke_instance(
        &self,
        request: Request<InvokeInstanceRequest>,
    ) -> Result<Response<InvokeInstanceResponse>, Status> {
        let request = request.into_inner();
        self.0.log.add(&self.0.name, Told::Invoke(request.clone()));
        Ok(Response::new(InvokeInstanceResponse { reply: self.0.answer(request.invocation) }))
    }

    async fn remove_vpc(
        &self,
        _: Request<RemoveVpcRequest>,
    ) -> Result<Response<RemoveVpcResponse>, Status> {
        Err(Status::unimplemented("not asked of it in these tests"))
    }

    async fn local_instances(
        &self,
        _: Request<LocalInstancesRequest>,
    ) -> Result<Response<LocalInstancesResponse>, Status> {
        Err(Status::unimplemented("not asked of it in these tests"))
    }

    async fn list_flows(
        &self,
        request: Request<ListFlowsRequest>,
    ) -> Result<Response<ListFlowsResponse>, Status> {
        let agent = &self.0;
        agent.until_open().await;
        let request = request.into_inner();
        let mut flows = agent.flows.lock().unwrap().clone();
        flows.retain(|flow| request.vpc.is_empty() || flow.vpc == request.vpc);
        flows.retain(|flow| request.instance.is_empty() || flow.instance == request.instance);
        let total = flows.len() as u64;
        flows.truncate(request.limit as usize);
        Ok(Response::new(ListFlowsResponse { flows, total }))
    }

    async fn find_mappings(
        &self,
        request: Request<FindMappingsRequest>,
    ) -> Result<Response<FindMappingsResponse>, Status> {
        let agent = &self.0;
        agent.until_open().await;
        let request = request.into_inner();
        if request.port > 65535 {
            return Err(Status::invalid_argument("port: it is none"));
        }
        let flows = agent.flows.lock().unwrap().clone();
        let mappings = flows.into_iter().filter(|flow| flow.nat_port == request.port);
        let mappings = mappings.map(|flow| Mapping {
            instance: flow.instance,
            vpc: flow.vpc,
            nat_port: flow.nat_port,
            live: true,
            ..Mapping::default()
        });
        let mappings: Vec<_> = mappings.collect();
        let total = mappings.len() as u64;
        Ok(Response::new(FindMappingsResponse { mappings, total, ..Default::default() }))
    }

    async fn list_rule_hits(
        &self,
        _: Request<ListRuleHitsRequest>,
    ) -> Result<Response<ListRuleHitsResponse>, Status> {
        let agent = &self.0;
        agent.until_open().await;
        Ok(Response::new(ListRuleHitsResponse { hits: agent.hits.lock().unwrap().clone() }))
    }

    type CapturePacketsStream =
        tokio_stream::Iter<std::vec::IntoIter<Result<CapturePacketsResponse, Status>>>;

    /// One packet of each side, of what the filter says; then the instance ends.
    async fn capture_packets(
        &self,
        request: Request<CapturePacketsRequest>,
    ) -> Result<Response<Self::CapturePacketsStream>, Status> {
        let request = request.into_inner();
        if request.filter == "wrong" {
            return Err(Status::invalid_argument("filter: syntax error"));
        }
        let packet = |(side, unix_ns): (CaptureSide, _)| CapturedPacket {
            side: side.into(),
            unix_ns,
            length: 100,
            frame: request.filter.clone().into_bytes(),
        };
        let packets = [(CaptureSide::Inside, 5), (CaptureSide::Outside, 6)].map(packet).to_vec();
        let lost = CapturePacketsResponse { outside_lost: 3, ..Default::default() };
        let messages = vec![
            Ok(CapturePacketsResponse { packets, ..lost.clone() }),
            Ok(CapturePacketsResponse { ended: "instance".into(), ..lost }),
        ];
        Ok(Response::new(tokio_stream::iter(messages)))
    }

    async fn list_drops(
        &self,
        _: Request<ListDropsRequest>,
    ) -> Result<Response<ListDropsResponse>, Status> {
        let agent = &self.0;
        agent.until_open().await;
        let drops = agent.drops.lock().unwrap().clone();
        // Logged when it is read: what changes after that is not in the answer.
        agent.log.add(&agent.name, Told::ListDrops);
        Ok(Response::new(ListDropsResponse { drops }))
    }
}
