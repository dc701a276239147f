//! The data flow: calls come in over HTTP, an instance answers them.
//!
//! Pure policies: [`path`] and [`routes`] say which function a request is for, [`instances`] which
//! instance it gets, [`fleet`] where one starts, [`events::policy`] what becomes of an event. Around
//! them: [`server`] takes requests in, [`dispatch`] carries out what [`instances`] decides, [`start`]
//! has agents start and end instances ([`ledger`] remembers them), [`tunnel`] leads to them, [`call()`]
//! passes requests ([`headers`]) and bodies ([`mod@body`]) through. [`events`] keeps and delivers calls that
//! nobody waits for, [`timers`] makes them by the clock. [`watch`] follows the control plane into
//! [`metadata`] and [`shared`]; [`concurrency`] and [`metrics`] tell what goes on.
//!
//! [`relay`] is the other program: on each host, it leads to the instances' sockets.
#![deny(missing_docs)]

pub mod body;
pub mod call;
pub mod concurrency;
pub mod config;
pub mod dispatch;
pub mod events;
pub mod fleet;
pub mod headers;
pub mod instances;
pub mod ledger;
pub mod metadata;
pub mod metrics;
pub mod path;
pub mod refusal;
pub mod relay;
pub mod routes;
pub mod server;
pub mod shared;
pub mod start;
pub mod timers;
pub mod tunnel;
pub mod watch;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch as cell};
use tokio::task::JoinSet;

use crate::concurrency::Concurrency;
use crate::config::Config;
use crate::dispatch::Dispatcher;
use crate::events::Events;
use crate::events::store::{EventStore, StoreError};
use crate::fleet::Fleet;
use crate::ledger::Ledger;
use crate::metadata::{Effect, Metadata};
use crate::metrics::{BindError, Counts};
use crate::routes::Routes;
use crate::server::Service;
use crate::shared::SharedRoutes;
use crate::start::{Starter, lock};
use crate::timers::Timers;
use crate::watch::Watch;

/// Why a gateway could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its directory cannot be used.
    #[error("cannot use the state directory {path}: {source}; set `state` to another one")]
    State {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file of events cannot be used.
    #[error(transparent)]
    Events(#[from] StoreError),
    /// An address cannot be listened at.
    #[error("cannot listen at {address}: {source}; set `listen` to another address")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Metrics cannot be served.
    #[error(transparent)]
    Metrics(#[from] BindError),
}

/// A gateway in this process.
pub struct Gateway {
    service: Arc<Service>,
    listeners: Vec<TcpListener>,
    connections: Arc<Semaphore>,
    concurrency: Concurrency,
    drain: Duration,
}

impl Gateway {
    /// Listens, and begins to follow the control plane, with what the state directory has until it
    /// is there. Must be called in a runtime. Connections queue up until [`Self::serve`].
    pub async fn start(config: &Config) -> Result<Self, StartError> {
        let state = &config.state;
        let because = |source| StartError::State { path: state.clone(), source };
        let ledger = Ledger::open(&state.join("instances")).map_err(because)?;
        let store = EventStore::open(&state.join("events.db"), config.events)?;
        let file = state.join("metadata");
        let known = metadata::load(&file).unwrap_or_else(|error| {
            tracing::error!("{error}");
            Metadata::default()
        });
        let mut listeners = Vec::new();
        for &address in &config.listen {
            let listener = TcpListener::bind(address).await;
            listeners.push(listener.map_err(|source| StartError::Listen { address, source })?);
        }

        let (routes, counts) = (SharedRoutes::default(), Counts::default());
        let fleet = Arc::new(Mutex::new(Fleet::default()));
        let starter = Arc::new(Starter::new(fleet.clone(), ledger));
        starter.end_leftovers();
        let dispatcher = Dispatcher::start(config.limits(), starter.clone(), counts.clone());
        let concurrency = Concurrency::watch(&dispatcher);
        if let Some(address) = config.metrics {
            metrics::serve(address, metrics::gateway(&counts, concurrency.clone())).await?;
        }
        let events = Events::new(store, dispatcher.clone(), routes.clone(), counts.clone());
        let (fires, told) = cell::channel(known.fires_timers);
        let changed = {
            let routes = routes.clone();
            move |metadata: &Metadata, effect: Effect| match effect {
                Effect::None => {}
                Effect::All => {
                    lock(&fleet).replace(&metadata.hosts);
                    routes.set(Routes::new(&metadata.functions, metadata.triggers.values()));
                    fires.send_replace(metadata.fires_timers);
                    for host in metadata.hosts.values().filter(|host| host.alive) {
                        starter.prepare(&host.endpoint);
                    }
                }
                Effect::Routes => {
                    routes.set(Routes::new(&metadata.functions, metadata.triggers.values()));
                }
                Effect::Host(host) => {
                    if host.alive {
                        starter.prepare(&host.endpoint);
                    }
                    lock(&fleet).report(host);
                }
                Effect::HostRemoved(host) => {
                    starter.forget(&host.endpoint);
                    lock(&fleet).remove(&host.name);
                }
                Effect::Timers => {
                    fires.send_replace(metadata.fires_timers);
                }
            }
        };
        changed(&known, Effect::All);
        let (control, gateway) = (config.control.clone(), config.name.clone());
        tokio::spawn(Watch { control, gateway, file }.run(known, changed));
        tokio::spawn(events.clone().run());
        let timers = Timers { events: events.clone(), routes: routes.clone(), fires: told };
        tokio::spawn(timers.run());
        let service = Arc::new(Service {
            routes,
            dispatcher,
            events,
            counts,
            trust_forwarded: config.trust_forwarded,
            event_bytes: config.event_bytes,
        });
        let connections = Arc::new(Semaphore::new(config.connections));
        let drain = Duration::from_millis(config.drain_ms);
        Ok(Self { service, listeners, connections, concurrency, drain })
    }

    /// The addresses that it listens at, with the ports that were taken for 0.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.listeners.iter().map(TcpListener::local_addr).collect()
    }

    /// Calls that run and wait, each second.
    pub fn concurrency(&self) -> Concurrency {
        self.concurrency.clone()
    }

    /// Serves until `stop` completes and the calls that run have ended; idle instances are ended then.
    pub async fn serve(self, stop: impl Future<Output = ()>) {
        let (stopping, stopped) = cell::channel(());
        let mut servers = JoinSet::new();
        for listener in self.listeners {
            let mut stopped = stopped.clone();
            let stop = async move {
                // Either way it is over.
                let _ = stopped.changed().await;
            };
            let (service, connections) = (self.service.clone(), self.connections.clone());
            servers.spawn(server::serve(listener, service, connections, stop, self.drain));
        }
        stop.await;
        drop(stopping);
        servers.join_all().await;
        self.service.dispatcher.drain().await;
    }
}
