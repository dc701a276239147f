//! The control plane: its API, its state, and what follows from them.
//!
//! [`store`] holds what must outlive the process: VPCs ([`vpc`]), the ports that hosts hold of
//! their shared addresses ([`ports`], changed by [`leasing`]), their route tables ([`routes`]) and security groups
//! ([`security`]), who the hosts and proxies are. [`fleet`] knows from
//! [`heartbeat`]s who is alive and which instances ([`instances`]) there are. [`deploy`] keeps hosts
//! and proxies at what is stored, by [`plan`]. [`functions`] publishes functions and tells gateways of them. [`api`] answers requests; `warren-placement` chooses the
//! host of an instance, [`pooling`] says how many are parked ahead, [`drops`] collects what was dropped, [`flows`] who talks to whom.
#![deny(missing_docs)]

pub mod api;
pub mod ask;
pub mod config;
pub mod deploy;
pub mod drops;
pub mod fleet;
pub mod flows;
pub mod functions;
pub mod heartbeat;
pub mod instances;
pub mod leasing;
pub mod name;
pub mod plan;
pub mod pooling;
pub mod ports;
pub mod routes;
pub mod scaling;
pub mod security;
mod snapshots;
pub mod spread;
pub mod status;
pub mod store;
pub mod vpc;

use std::sync::Arc;
use std::time::Duration;

use warren_proto::server::Services;
use warren_proto::v1::control_service_server::ControlServiceServer;
use warren_proto::v1::data_flow_service_server::DataFlowServiceServer;
use warren_proto::v1::fleet_service_server::FleetServiceServer;
use warren_proto::v1::function_service_server::FunctionServiceServer;
use warren_proto::v1::log_service_server::LogServiceServer;

use crate::api::Api;
use crate::deploy::Deployer;
use crate::fleet::Fleet;
use crate::functions::api::{FunctionApi, MAX_MESSAGE};
use crate::functions::data_flow::DataFlow;
use crate::functions::logs::LogApi;
use crate::functions::networks::Networks;
use crate::functions::publish::Publisher;
use crate::heartbeat::Heartbeats;
use crate::store::{Store, StoreError};

/// A control plane in this process.
pub struct Control {
    store: Arc<dyn Store>,
    fleet: Arc<Fleet>,
    deployer: Arc<Deployer>,
    publisher: Arc<Publisher>,
    data_flow: DataFlow,
}

impl Control {
    /// Starts from what is stored. A heartbeat is late after `heartbeat_deadline`.
    pub async fn start(
        store: Arc<dyn Store>,
        publisher: Publisher,
        heartbeat_deadline: Duration,
    ) -> Result<Self, StoreError> {
        let fleet = Arc::new(Fleet::load(store.clone(), heartbeat_deadline).await?);
        let deployer = Deployer::start(store.clone(), fleet.clone()).await?;
        let networks = Networks::start(store.clone(), fleet.clone(), deployer.clone()).await?;
        let data_flow =
            DataFlow::load(store.clone(), fleet.clone(), deployer.clone(), networks).await?;
        Ok(Self { store, fleet, deployer, publisher: Arc::new(publisher), data_flow })
    }

    /// Its gRPC services, to be served with [`warren_proto::server::Listeners`].
    pub fn services(&self) -> Services {
        let api = Api::new(self.store.clone(), self.fleet.clone(), self.deployer.clone());
        let functions = FunctionApi::new(self.store.clone(), self.publisher.clone());
        Services::default()
            .with(ControlServiceServer::new(api))
            .with(FleetServiceServer::new(Heartbeats::new(self.fleet.clone())))
            .with(FunctionServiceServer::new(functions).max_decoding_message_size(MAX_MESSAGE))
            .with(DataFlowServiceServer::new(self.data_flow.clone()))
            .with(LogServiceServer::new(LogApi::new(self.fleet.clone())))
    }

    /// Keeps as many proxies as are needed, from now on.
    pub fn scale(&self, config: scaling::Config) {
        tokio::spawn(scaling::run(config, self.fleet.clone(), self.store.clone()));
    }

    /// Ends the streams of hosts, proxies and gateways, which would never end by themselves: the process is stopping.
    pub fn stop(&self) {
        self.fleet.close();
    }
}
