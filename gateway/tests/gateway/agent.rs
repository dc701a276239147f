//! An agent whose instances are [`Guest`]s, which live on when it is gone, as microVMs do.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::{Code, Request, Response, Status};
use uuid::Uuid;
use warren_proto::endpoint::Endpoint;
use warren_proto::server::{Listeners, Services};
use warren_proto::v1::agent_service_server::{AgentService, AgentServiceServer};
use warren_proto::v1::{
    ApplyVpcRequest, ApplyVpcResponse, CapturePacketsRequest, CapturePacketsResponse,
    EndInstanceRequest, EndInstanceResponse, FindMappingsRequest, FindMappingsResponse, Instance,
    InvokeInstanceRequest, InvokeInstanceResponse, ListDropsRequest, ListDropsResponse,
    ListFlowsRequest, ListFlowsResponse, ListRuleHitsRequest, ListRuleHitsResponse,
    ListSnapshotsRequest, ListSnapshotsResponse, LocalInstancesRequest, LocalInstancesResponse,
    RemoveSnapshotRequest, RemoveSnapshotResponse, RemoveVpcRequest, RemoveVpcResponse,
    SnapshotInstanceRequest, SnapshotInstanceResponse, StartInstanceRequest, StartInstanceResponse,
};

use crate::guest::{Guest, Shared};

/// What outlives an agent.
pub struct Machine {
    pub run_dir: PathBuf,
    pub shared: Arc<Shared>,
    pub running: Mutex<HashMap<String, Guest>>,
    /// Of all starts.
    pub started: Mutex<Vec<StartInstanceRequest>>,
    /// Starts are refused so.
    pub refusal: Mutex<Option<Code>>,
    pub slots: usize,
}

impl Machine {
    pub fn new(run_dir: PathBuf, slots: usize, shared: Arc<Shared>) -> Arc<Self> {
        std::fs::create_dir_all(run_dir.join("by-id")).unwrap();
        Arc::new(Self {
            run_dir,
            shared,
            running: Mutex::default(),
            started: Mutex::default(),
            refusal: Mutex::default(),
            slots,
        })
    }

    pub fn starts(&self) -> usize {
        self.started.lock().unwrap().len()
    }

    pub fn instances(&self) -> usize {
        self.running.lock().unwrap().len()
    }
}

/// A gRPC server in this process.
pub struct Server {
    pub endpoint: Endpoint,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Server {
    pub async fn start(endpoint: &Endpoint, services: Services) -> Self {
        let listeners = Listeners::bind(std::slice::from_ref(endpoint)).await.unwrap();
        let endpoint = listeners.endpoints().remove(0);
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            listeners.serve(services, stopped).await.unwrap();
        });
        Self { endpoint, stop, task }
    }

    /// As killed.
    pub async fn stop(self) {
        self.task.abort();
        let _ = self.task.await;
        drop(self.stop);
    }
}

pub fn any_port() -> Endpoint {
    "http://127.0.0.1:0".parse().unwrap()
}

pub fn services(machine: Arc<Machine>) -> Services {
    Services::default().with(AgentServiceServer::new(Agent(machine)))
}

struct Agent(Arc<Machine>);

macro_rules! not_here {
    ($($name:ident($request:ty) -> $response:ty;)*) => {
        #[tonic::async_trait]
        impl AgentService for Agent {
            type CapturePacketsStream = tokio_stream::Empty<Result<CapturePacketsResponse, Status>>;

            async fn capture_packets(
                &self,
                _: Request<CapturePacketsRequest>,
            ) -> Result<Response<Self::CapturePacketsStream>, Status> {
                Err(Status::unimplemented("not here"))
            }

            async fn start_instance(
                &self,
                request: Request<StartInstanceRequest>,
            ) -> Result<Response<StartInstanceResponse>, Status> {
                self.start(request.into_inner())
            }

            async fn end_instance(
                &self,
                request: Request<EndInstanceRequest>,
            ) -> Result<Response<EndInstanceResponse>, Status> {
                self.0.running.lock().unwrap().remove(&request.into_inner().id);
                Ok(Response::new(EndInstanceResponse {}))
            }

            $(async fn $name(&self, _: Request<$request>) -> Result<Response<$response>, Status> {
                Err(Status::unimplemented("not here"))
            })*
        }
    };
}

not_here! {
    apply_vpc(ApplyVpcRequest) -> ApplyVpcResponse;
    remove_vpc(RemoveVpcRequest) -> RemoveVpcResponse;
    invoke_instance(InvokeInstanceRequest) -> InvokeInstanceResponse;
    snapshot_instance(SnapshotInstanceRequest) -> SnapshotInstanceResponse;
    list_snapshots(ListSnapshotsRequest) -> ListSnapshotsResponse;
    remove_snapshot(RemoveSnapshotRequest) -> RemoveSnapshotResponse;
    local_instances(LocalInstancesRequest) -> LocalInstancesResponse;
    list_drops(ListDropsRequest) -> ListDropsResponse;
    list_flows(ListFlowsRequest) -> ListFlowsResponse;
    find_mappings(FindMappingsRequest) -> FindMappingsResponse;
    list_rule_hits(ListRuleHitsRequest) -> ListRuleHitsResponse;
}

impl Agent {
    fn start(
        &self,
        request: StartInstanceRequest,
    ) -> Result<Response<StartInstanceResponse>, Status> {
        let machine = &self.0;
        let slot = machine.starts();
        machine.started.lock().unwrap().push(request.clone());
        if let Some(code) = *machine.refusal.lock().unwrap() {
            return Err(Status::new(code, "refused by the test"));
        }
        let mut running = machine.running.lock().unwrap();
        if running.len() >= machine.slots {
            return Err(Status::resource_exhausted("all slots are taken"));
        }
        let id = Uuid::new_v4().to_string();
        let function = request.function.unwrap_or_default();
        let name = format!("{}@{}", function.name, function.version);
        let guest = Guest::start(&machine.run_dir, &id, slot, &name, machine.shared.clone());
        running.insert(id.clone(), guest);
        let instance = Some(Instance { id, vpc: request.vpc, ..Instance::default() });
        Ok(Response::new(StartInstanceResponse { instance, ..Default::default() }))
    }
}
