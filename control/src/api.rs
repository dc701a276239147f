//! `warren.v1.ControlService`: what people and programs ask for.

use std::sync::Arc;

use tonic::{Request, Response, Status};
use warren_proto::v1::control_service_server::ControlService;
use warren_proto::v1::{
    AddRoutesRequest, AddRoutesResponse, CallInstanceRequest, CallInstanceResponse,
    CreateVpcRequest, CreateVpcResponse, DeleteRoutesRequest, DeleteRoutesResponse,
    EndInstanceRequest, FindFleetMappingsRequest, FindFleetMappingsResponse, InvokeInstanceRequest,
    ListFleetDropsRequest, ListFleetDropsResponse, ListFleetFlowsRequest, ListFleetFlowsResponse,
    ListHostsRequest, ListHostsResponse, ListInstancesRequest, ListInstancesResponse,
    ListRoutesRequest, ListRoutesResponse, ListVpcsRequest, ListVpcsResponse, ReplaceRoutesRequest,
    ReplaceRoutesResponse, RunInstanceRequest, RunInstanceResponse, StartInstanceRequest,
    StopInstanceRequest, StopInstanceResponse,
};

use crate::deploy::{DeployError, Deployer};
use crate::drops;
use crate::fleet::Fleet;
use crate::name::{self, InvalidName};
use crate::status::of_agent;
use crate::store::Store;
use crate::{flows, routes, vpc};

/// The service.
pub struct Api {
    store: Arc<dyn Store>,
    fleet: Arc<Fleet>,
    deployer: Arc<Deployer>,
}

impl Api {
    /// The API over these parts.
    pub fn new(store: Arc<dyn Store>, fleet: Arc<Fleet>, deployer: Arc<Deployer>) -> Self {
        Self { store, fleet, deployer }
    }
}

#[tonic::async_trait]
impl ControlService for Api {
    async fn create_vpc(
        &self,
        request: Request<CreateVpcRequest>,
    ) -> Result<Response<CreateVpcResponse>, Status> {
        let definition =
            request.into_inner().vpc.ok_or_else(|| Status::invalid_argument("vpc: is missing"))?;
        let vpc = vpc::create(&*self.store, definition).await?;
        Ok(Response::new(CreateVpcResponse { vpc: Some(vpc.into()) }))
    }

    async fn list_vpcs(
        &self,
        _: Request<ListVpcsRequest>,
    ) -> Result<Response<ListVpcsResponse>, Status> {
        let vpcs = vpc::list(&*self.store).await?;
        Ok(Response::new(ListVpcsResponse { vpcs: vpcs.into_iter().map(Into::into).collect() }))
    }

    async fn list_hosts(
        &self,
        _: Request<ListHostsRequest>,
    ) -> Result<Response<ListHostsResponse>, Status> {
        Ok(Response::new(ListHostsResponse { hosts: self.fleet.hosts() }))
    }

    async fn run_instance(
        &self,
        request: Request<RunInstanceRequest>,
    ) -> Result<Response<RunInstanceResponse>, Status> {
        let RunInstanceRequest { vpc, hostname, host, invocation } = request.into_inner();
        if !hostname.is_empty() {
            name::label(&hostname).map_err(|InvalidName(problem)| {
                Status::invalid_argument(format!("hostname: {problem}"))
            })?;
        }
        if !self.deployer.knows(&vpc).await? {
            return Err(DeployError::UnknownVpc(vpc).into());
        }
        let wanted = (!host.is_empty()).then_some(host.as_str());
        let mut place = self.fleet.reserve(wanted)?;
        self.deployer.ensure(&vpc, &place.host, place.session).await?;
        let start = StartInstanceRequest { vpc, hostname, invocation };
        let started = place
            .agent
            .start_instance(start)
            .await
            .map_err(|error| of_agent(&place.host, &error))?
            .into_inner();
        let Some(mut instance) = started.instance else {
            let host = &place.host;
            return Err(Status::internal(format!("host {host} started no instance, and no error")));
        };
        place.started(&mut instance);
        Ok(Response::new(RunInstanceResponse {
            instance: Some(instance),
            timings: started.timings,
            reply: started.reply,
        }))
    }

    async fn list_instances(
        &self,
        _: Request<ListInstancesRequest>,
    ) -> Result<Response<ListInstancesResponse>, Status> {
        Ok(Response::new(ListInstancesResponse { instances: self.fleet.instances() }))
    }

    async fn stop_instance(
        &self,
        request: Request<StopInstanceRequest>,
    ) -> Result<Response<StopInstanceResponse>, Status> {
        let StopInstanceRequest { id } = request.into_inner();
        let (host, mut agent) = self.fleet.host_of(&id)?;
        agent
            .end_instance(EndInstanceRequest { id: id.clone() })
            .await
            .map_err(|error| of_agent(&host, &error))?;
        self.fleet.stopped(&host, &id);
        Ok(Response::new(StopInstanceResponse {}))
    }

    async fn call_instance(
        &self,
        request: Request<CallInstanceRequest>,
    ) -> Result<Response<CallInstanceResponse>, Status> {
        let CallInstanceRequest { id, invocation } = request.into_inner();
        let (host, mut agent) = self.fleet.host_of(&id)?;
        let reply = agent
            .invoke_instance(InvokeInstanceRequest { id, invocation })
            .await
            .map_err(|error| of_agent(&host, &error))?
            .into_inner()
            .reply;
        Ok(Response::new(CallInstanceResponse { reply }))
    }

    async fn list_fleet_drops(
        &self,
        request: Request<ListFleetDropsRequest>,
    ) -> Result<Response<ListFleetDropsResponse>, Status> {
        let ListFleetDropsRequest { host } = request.into_inner();
        let hosts = drops::list(&*self.store, &self.fleet, &host).await?;
        Ok(Response::new(ListFleetDropsResponse { hosts }))
    }

    async fn list_fleet_flows(
        &self,
        request: Request<ListFleetFlowsRequest>,
    ) -> Result<Response<ListFleetFlowsResponse>, Status> {
        let hosts = flows::list(&*self.store, &self.fleet, request.into_inner()).await?;
        Ok(Response::new(ListFleetFlowsResponse { hosts }))
    }

    async fn find_fleet_mappings(
        &self,
        request: Request<FindFleetMappingsRequest>,
    ) -> Result<Response<FindFleetMappingsResponse>, Status> {
        let FindFleetMappingsRequest { host, query } = request.into_inner();
        let query = query.ok_or_else(|| Status::invalid_argument("query: is missing"))?;
        let hosts = flows::find_mappings(&*self.store, &self.fleet, &host, query).await?;
        Ok(Response::new(FindFleetMappingsResponse { hosts }))
    }

    async fn add_routes(
        &self,
        request: Request<AddRoutesRequest>,
    ) -> Result<Response<AddRoutesResponse>, Status> {
        let AddRoutesRequest { vpc, routes } = request.into_inner();
        routes::add(&*self.store, &vpc, &routes).await?;
        Ok(Response::new(AddRoutesResponse {}))
    }

    async fn delete_routes(
        &self,
        request: Request<DeleteRoutesRequest>,
    ) -> Result<Response<DeleteRoutesResponse>, Status> {
        let DeleteRoutesRequest { vpc, prefixes } = request.into_inner();
        routes::delete(&*self.store, &vpc, &prefixes).await?;
        Ok(Response::new(DeleteRoutesResponse {}))
    }

    async fn replace_routes(
        &self,
        request: Request<ReplaceRoutesRequest>,
    ) -> Result<Response<ReplaceRoutesResponse>, Status> {
        let ReplaceRoutesRequest { vpc, routes } = request.into_inner();
        routes::replace(&*self.store, &vpc, &routes).await?;
        Ok(Response::new(ReplaceRoutesResponse {}))
    }

    async fn list_routes(
        &self,
        request: Request<ListRoutesRequest>,
    ) -> Result<Response<ListRoutesResponse>, Status> {
        let routes::Listed { routes, defaults } =
            routes::list(&*self.store, &request.into_inner().vpc).await?;
        let messages = |routes: Vec<_>| routes.into_iter().map(Into::into).collect();
        let (routes, defaults) = (messages(routes), messages(defaults));
        Ok(Response::new(ListRoutesResponse { routes, defaults }))
    }
}
