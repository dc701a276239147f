//! `warren.v1.DataFlowService`: what gateways keep a copy of.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use warren_proto::v1::data_flow_service_server::DataFlowService;
use warren_proto::v1::watch_data_flow_response::Change;
use warren_proto::v1::{FleetHost, WatchDataFlowRequest, WatchDataFlowResponse};

use super::model::Function;
use super::networks::Networks;
use super::timers::Duty;
use super::triggers::Trigger;
use super::{FUNCTION_PREFIX, TRIGGER_PREFIX};
use crate::deploy::Deployer;
use crate::fleet::Fleet;
use crate::store::{Entry, Event, Revision, Store, StoreError, Write, decode};

/// How full hosts are is told about this often.
const INTERVAL: Duration = Duration::from_millis(250);
/// Which gateway was told last to fire the timers.
const TIMER_GATEWAY: &str = "timer-gateway";
/// Changes that a gateway did not read yet.
const QUEUE: usize = 64;

/// The service.
pub struct DataFlow {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<dyn Store>,
    fleet: Arc<Fleet>,
    deployer: Arc<Deployer>,
    networks: Arc<Networks>,
    duty: Mutex<Duty>,
    streams: AtomicU64,
}

impl DataFlow {
    /// The service over these parts.
    pub async fn load(
        store: Arc<dyn Store>,
        fleet: Arc<Fleet>,
        deployer: Arc<Deployer>,
        networks: Arc<Networks>,
    ) -> Result<Self, StoreError> {
        let last = match store.get(TIMER_GATEWAY).await? {
            Some(entry) => Some(decode(TIMER_GATEWAY, &entry.value)?),
            None => None,
        };
        let duty = Mutex::new(Duty::new(last, Instant::now()));
        let streams = AtomicU64::new(0);
        let shared = Shared { store, fleet, deployer, networks, duty, streams };
        Ok(Self { shared: Arc::new(shared) })
    }
}

impl Clone for DataFlow {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

#[tonic::async_trait]
impl DataFlowService for DataFlow {
    type WatchDataFlowStream = ReceiverStream<Result<WatchDataFlowResponse, Status>>;

    async fn watch_data_flow(
        &self,
        request: Request<WatchDataFlowRequest>,
    ) -> Result<Response<Self::WatchDataFlowStream>, Status> {
        let WatchDataFlowRequest { gateway } = request.into_inner();
        let (messages, stream) = mpsc::channel(QUEUE);
        let watcher = Watcher {
            number: self.shared.streams.fetch_add(1, Ordering::Relaxed),
            shared: self.shared.clone(),
            gateway,
            messages,
            hosts: BTreeMap::new(),
            fires: false,
        };
        tokio::spawn(async move {
            tracing::info!(gateway = watcher.gateway, "a gateway watches");
            let mut closing = watcher.shared.fleet.closing();
            let (gateway, messages) = (watcher.gateway.clone(), watcher.messages.clone());
            let end = tokio::select! {
                end = watcher.run() => end,
                _ = closing.wait_for(|closing| *closing) => {
                    Some(Status::unavailable("the control plane is stopping: watch again later"))
                }
            };
            tracing::info!(gateway, "a gateway watches no more");
            if let Some(status) = end {
                let _ = messages.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// One stream.
struct Watcher {
    number: u64,
    shared: Arc<Shared>,
    gateway: String,
    messages: mpsc::Sender<Result<WatchDataFlowResponse, Status>>,
    /// As they were told last.
    hosts: BTreeMap<String, FleetHost>,
    fires: bool,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let mut duty = self.shared.duty.lock().unwrap_or_else(PoisonError::into_inner);
        duty.leave(self.number, Instant::now());
    }
}

/// Why a stream ends.
enum End {
    /// Nobody reads it.
    Gone,
    Failed(StoreError),
}

impl From<StoreError> for End {
    fn from(error: StoreError) -> Self {
        Self::Failed(error)
    }
}

impl Watcher {
    /// Tells everything and what changes. The error that the gateway is to know of, if it is still
    /// there.
    async fn run(mut self) -> Option<Status> {
        match self.tell().await {
            Err(End::Failed(error)) => Some(error.into()),
            Ok(()) | Err(End::Gone) => None,
        }
    }

    async fn tell(&mut self) -> Result<(), End> {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let shared = self.shared.clone();
        let revision = self.everything(&mut ticks).await?;
        let mut events = shared.store.watch(revision);
        let (mut fleet, mut progress) = (shared.fleet.changes(), shared.deployer.progress());
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(event) => {
                        let Event { key, value, .. } = event?;
                        if let Some(change) = change(&key, value.as_deref())? {
                            self.send(change).await?;
                        }
                    }
                    None => return Ok(()),
                },
                changed = fleet.changed() => match changed {
                    Ok(()) => self.tell_hosts().await?,
                    Err(_) => return Ok(()),
                },
                changed = progress.changed() => match changed {
                    Ok(()) => self.tell_hosts().await?,
                    Err(_) => return Ok(()),
                },
                _ = ticks.tick() => {
                    self.tell_hosts().await?;
                    self.tell_duty().await?;
                }
                () = self.messages.closed() => return Err(End::Gone),
            }
        }
    }

    /// All that there is, as soon as the fleet is settled: a gateway goes on with its copy until then.
    async fn everything(&mut self, ticks: &mut Interval) -> Result<Revision, End> {
        while !self.shared.networks.is_settled() {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.messages.closed() => return Err(End::Gone),
            }
        }
        let (revision, functions) = self.shared.store.list(FUNCTION_PREFIX).await?;
        // Read a moment later: what changes in between is told twice.
        let (_, triggers) = self.shared.store.list(TRIGGER_PREFIX).await?;
        for Entry { key, value, .. } in functions.into_iter().chain(triggers) {
            if let Some(change) = change(&key, Some(&value))? {
                self.send(change).await?;
            }
        }
        self.tell_hosts().await?;
        self.tell_duty().await?;
        self.send(Change::Complete(true)).await?;
        Ok(revision)
    }

    async fn tell_hosts(&mut self) -> Result<(), End> {
        let hosts: BTreeMap<_, _> =
            self.shared.networks.hosts().map(|host| (host.name.clone(), host)).collect();
        let before = std::mem::replace(&mut self.hosts, hosts.clone());
        for name in before.keys().filter(|name| !hosts.contains_key(*name)) {
            self.send(Change::HostRemoved(name.clone())).await?;
        }
        for (name, host) in hosts {
            if before.get(&name) != Some(&host) {
                self.send(Change::Host(host)).await?;
            }
        }
        Ok(())
    }

    async fn tell_duty(&mut self) -> Result<(), End> {
        let fires = {
            let mut duty = self.shared.duty.lock().unwrap_or_else(PoisonError::into_inner);
            duty.take(self.number, &self.gateway, Instant::now())
        };
        if fires != self.fires {
            // Stored first: after a restart it is this one again.
            let write = Write::put(TIMER_GATEWAY, &self.gateway)?;
            self.shared.store.commit(Vec::new(), vec![write]).await?;
            self.fires = fires;
            self.send(Change::FiresTimers(fires)).await?;
        }
        Ok(())
    }

    async fn send(&self, change: Change) -> Result<(), End> {
        let message = WatchDataFlowResponse { change: Some(change) };
        self.messages.send(Ok(message)).await.map_err(|_| End::Gone)
    }
}

/// What a written key means to gateways; nothing, if it is something else's.
fn change(key: &str, value: Option<&[u8]>) -> Result<Option<Change>, StoreError> {
    let change = if let Some(name) = key.strip_prefix(FUNCTION_PREFIX) {
        match value {
            None => Change::FunctionRemoved(name.to_owned()),
            Some(value) => Change::Function((&decode::<Function>(key, value)?).into()),
        }
    } else if let Some(name) = key.strip_prefix(TRIGGER_PREFIX) {
        match value {
            None => Change::TriggerRemoved(name.to_owned()),
            Some(value) => Change::Trigger((&decode::<Trigger>(key, value)?).into()),
        }
    } else {
        return Ok(None);
    };
    Ok(Some(change))
}
