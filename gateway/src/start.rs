//! Cold starts: a host is chosen, its agent starts an instance, its relay leads there. And the end.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use uuid::Uuid;
use warren_placement::PlacementError;
use warren_proto::endpoint::{ConnectError, Endpoint, InvalidEndpoint, connect};
use warren_proto::v1::agent_service_client::AgentServiceClient;
use warren_proto::v1::{EndInstanceRequest, FunctionPackage, StartInstanceRequest};

use crate::body::CallBody;
use crate::fleet::{Chosen, Fleet, NoHost};
use crate::instances::StartFailure;
use crate::ledger::Ledger;
use crate::routes::Version;
use crate::tunnel::{self, TunnelError};

/// An agent that does not start an instance within this time is given up.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// An agent that is away is told of the end of an instance this often, this much apart.
const END_ATTEMPTS: u32 = 60;
const END_AGAIN: Duration = Duration::from_secs(1);

/// An instance, with the connection to its HTTP server.
pub struct Instance {
    /// Its id.
    pub id: String,
    /// Its host.
    pub host: Chosen,
    /// The connection: one call at a time.
    pub sender: SendRequest<CallBody>,
}

/// Why a host did not start an instance.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("host {host} has a wrong agent endpoint: {source}")]
    Endpoint { host: String, source: InvalidEndpoint },
    #[error("the agent of host {host} cannot be reached: {source}")]
    Connect { host: String, source: ConnectError },
    #[error("host {host} started no instance: {}", .status.message())]
    Agent { host: String, status: Status },
    #[error("host {host} answered without an instance, or with the id \"{id}\", which is none")]
    NoInstance { host: String, id: String },
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
    #[error("the instance on host {host} speaks no HTTP: {source}")]
    Http { host: String, source: hyper::Error },
    #[error(
        "the start of an instance cannot be noted: {0}; is there room for the gateway's state?"
    )]
    Ledger(std::io::Error),
}

impl StartError {
    /// Whether another host might do better.
    fn is_of_the_host(&self) -> bool {
        match self {
            Self::Agent { status, .. } => matches!(
                status.code(),
                Code::ResourceExhausted
                    | Code::Unavailable
                    | Code::DeadlineExceeded
                    | Code::Cancelled
                    | Code::NotFound
            ),
            Self::Ledger(_) => false,
            _ => true,
        }
    }
}

/// Starts and ends instances.
pub struct Starter {
    fleet: Arc<Mutex<Fleet>>,
    agents: Mutex<HashMap<String, Channel>>,
    ledger: Ledger,
}

impl Starter {
    /// On these hosts.
    pub fn new(fleet: Arc<Mutex<Fleet>>, ledger: Ledger) -> Self {
        Self { fleet, agents: Mutex::default(), ledger }
    }

    /// Starts an instance on the best host that takes it. `closed` is called when its connection
    /// has ended, with its id.
    pub async fn start(
        &self,
        version: &Version,
        closed: impl FnOnce(String) + Clone + Send + 'static,
    ) -> Result<Instance, StartFailure> {
        let mut refused = BTreeSet::new();
        loop {
            let chosen = lock(&self.fleet).choose(version, &refused);
            let host = chosen.map_err(|error| {
                tracing::debug!(function = %version.function, "no host for an instance: {error}");
                match error {
                    NoHost::Placement(PlacementError::NoTemplate { .. }) => {
                        StartFailure::Broken(error.to_string())
                    }
                    _ => StartFailure::NoCapacity,
                }
            })?;
            let settle = Settle { fleet: &self.fleet, host: &host.name, started: false };
            match self.start_on(&host, version, settle, closed.clone()).await {
                Ok(instance) => return Ok(instance),
                Err(error) if error.is_of_the_host() => {
                    tracing::info!(function = %version.function, "{error}; trying another host");
                    refused.insert(host.name);
                }
                Err(error) => return Err(StartFailure::Broken(error.to_string())),
            }
        }
    }

    async fn start_on(
        &self,
        host: &Chosen,
        version: &Version,
        mut settle: Settle<'_>,
        closed: impl FnOnce(String) + Send + 'static,
    ) -> Result<Instance, StartError> {
        let mut agent = self.agent(host).await?;
        let mut request = Request::new(StartInstanceRequest {
            vpc: version.vpc.to_string(),
            template: version.template.clone(),
            function: Some(FunctionPackage {
                name: version.function.to_string(),
                version: version.number,
                package: version.package.clone(),
                memory_bytes: version.memory_bytes,
            }),
            ..StartInstanceRequest::default()
        });
        request.set_timeout(START_TIMEOUT);
        let start = tokio::time::timeout(START_TIMEOUT, agent.start_instance(request));
        // The way is made while the instance starts.
        let (answer, stream) = tokio::join!(start, tunnel::dial(&host.relay));
        let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("it took too long")));
        let answer = answer.map_err(|status| StartError::Agent { host: host.name.clone(), status });
        let id = answer?.into_inner().instance.map(|instance| instance.id).unwrap_or_default();
        if Uuid::try_parse(&id).is_err() {
            return Err(StartError::NoInstance { host: host.name.clone(), id });
        }
        settle.started = true;
        drop(settle);
        let connected = async {
            self.ledger.add(&id, &host.endpoint).map_err(StartError::Ledger)?;
            let stream = tunnel::enter(stream?, &host.relay, &id).await?;
            let handshake = http1::handshake(TokioIo::new(stream)).await;
            handshake.map_err(|source| StartError::Http { host: host.name.clone(), source })
        };
        match connected.await {
            Ok((sender, connection)) => {
                let of = id.clone();
                tokio::spawn(async move {
                    if let Err(error) = connection.await {
                        tracing::debug!(instance = of, "its connection broke: {error}");
                    }
                    closed(of);
                });
                Ok(Instance { id, host: host.clone(), sender })
            }
            Err(error) => {
                self.end(&host.name, host.endpoint.clone(), id).await;
                Err(error)
            }
        }
    }

    /// Ends an instance, however often the agent must be asked. Its connection is to be closed before.
    pub async fn end(&self, host: &str, endpoint: String, id: String) {
        for _ in 0..END_ATTEMPTS {
            match self.try_end(&endpoint, &id).await {
                Ok(()) => {
                    lock(&self.fleet).ended(host);
                    return self.ledger.remove(&id);
                }
                Err(error) => tracing::info!(instance = id, "cannot be ended yet: {error}"),
            }
            tokio::time::sleep(END_AGAIN).await;
        }
        tracing::warn!(instance = id, "was not ended: its agent at {endpoint} is away");
    }

    async fn try_end(&self, endpoint: &str, id: &str) -> Result<(), String> {
        let mut agent = self.agent_at(endpoint).await?;
        let mut request = Request::new(EndInstanceRequest { id: id.to_owned() });
        request.set_timeout(START_TIMEOUT);
        match agent.end_instance(request).await {
            Err(status) if status.code() != Code::NotFound => Err(status.message().to_owned()),
            _ => Ok(()),
        }
    }

    /// Ends what a former gateway left.
    pub fn end_leftovers(self: &Arc<Self>) {
        let left = self.ledger.all().unwrap_or_else(|error| {
            tracing::error!("cannot read which instances a former gateway left: {error}");
            Vec::new()
        });
        for (id, endpoint) in left {
            tracing::info!(instance = id, "of a gateway before this one: it is ended");
            let starter = self.clone();
            tokio::spawn(async move { starter.end("", endpoint, id).await });
        }
    }

    /// Connects to a host's agent ahead of the first cold start there.
    pub fn prepare(self: &Arc<Self>, endpoint: &str) {
        if lock(&self.agents).contains_key(endpoint) {
            return;
        }
        let (starter, endpoint) = (self.clone(), endpoint.to_owned());
        tokio::spawn(async move {
            if let Err(error) = starter.agent_at(&endpoint).await {
                tracing::debug!("{error}");
            }
        });
    }

    /// A host is no more, nor is its agent.
    pub fn forget(&self, endpoint: &str) {
        lock(&self.agents).remove(endpoint);
    }

    async fn agent(&self, host: &Chosen) -> Result<AgentServiceClient<Channel>, StartError> {
        if let Some(channel) = lock(&self.agents).get(&host.endpoint) {
            return Ok(AgentServiceClient::new(channel.clone()));
        }
        let endpoint: Endpoint = host
            .endpoint
            .parse()
            .map_err(|source| StartError::Endpoint { host: host.name.clone(), source })?;
        let channel = connect(&endpoint).await;
        let channel =
            channel.map_err(|source| StartError::Connect { host: host.name.clone(), source })?;
        lock(&self.agents).insert(host.endpoint.clone(), channel.clone());
        Ok(AgentServiceClient::new(channel))
    }

    async fn agent_at(&self, endpoint: &str) -> Result<AgentServiceClient<Channel>, String> {
        let (name, relay) = (endpoint.to_owned(), String::new());
        let host = Chosen { name, endpoint: endpoint.to_owned(), relay };
        self.agent(&host).await.map_err(|error| error.to_string())
    }
}

/// Tells the fleet what became of a start, whatever does.
struct Settle<'a> {
    fleet: &'a Mutex<Fleet>,
    host: &'a str,
    started: bool,
}

impl Drop for Settle<'_> {
    fn drop(&mut self) {
        lock(self.fleet).settled(self.host, self.started);
    }
}

/// Each change is whole in itself: what a panic left behind is as good as before.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
