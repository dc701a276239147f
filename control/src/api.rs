//! `warren.v1.ControlService`: what people and programs ask for.

use std::pin::Pin;
use std::sync::Arc;

use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use warren_proto::limits::Limits;
use warren_proto::v1::control_service_server::ControlService;
use warren_proto::v1::{
    AddRoutesRequest, AddRoutesResponse, AddSharedAddressRequest, AddSharedAddressResponse,
    CallInstanceRequest, CallInstanceResponse, CapturePacketsRequest, CapturePacketsResponse,
    ChangeSecurityRulesRequest, ChangeSecurityRulesResponse, CreateSecurityGroupRequest,
    CreateSecurityGroupResponse, CreateVpcRequest, CreateVpcResponse, DeleteRoutesRequest,
    DeleteRoutesResponse, DeleteSecurityGroupRequest, DeleteSecurityGroupResponse,
    DeleteSnapshotRequest, DeleteSnapshotResponse, DrainProxyRequest, DrainProxyResponse,
    EndInstanceRequest, FindFleetMappingsRequest, FindFleetMappingsResponse, ForgetHostRequest,
    ForgetHostResponse, GetSecurityRequest, GetSecurityResponse, InvokeInstanceRequest,
    ListFleetDropsRequest, ListFleetDropsResponse, ListFleetFlowsRequest, ListFleetFlowsResponse,
    ListFleetSnapshotsRequest, ListFleetSnapshotsResponse, ListHostsRequest, ListHostsResponse,
    ListInstancesRequest, ListInstancesResponse, ListRoutesRequest, ListRoutesResponse,
    ListVpcsRequest, ListVpcsResponse, RemoveSnapshotRequest, ReplaceRoutesRequest,
    ReplaceRoutesResponse, RuleHits, RunInstanceRequest, RunInstanceResponse,
    SetSecurityDefaultsRequest, SetSecurityDefaultsResponse, SnapshotInstanceRequest,
    StartInstanceRequest, StopInstanceRequest, StopInstanceResponse, TakeSnapshotRequest,
    TakeSnapshotResponse,
};

use crate::deploy::{DeployError, Deployer};
use crate::drops;
use crate::fleet::{Fleet, Template};
use crate::name::{self, InvalidName};
use crate::snapshots::{self, SnapshotsError};
use crate::status::{of_agent, of_placement};
use crate::store::Store;
use crate::{flows, routes, security, vpc};

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

    async fn add_shared_address(
        &self,
        request: Request<AddSharedAddressRequest>,
    ) -> Result<Response<AddSharedAddressResponse>, Status> {
        let AddSharedAddressRequest { vpc, address } = request.into_inner();
        let address = address.ok_or_else(|| Status::invalid_argument("address: is missing"))?;
        let vpc = vpc::add_address(&*self.store, &vpc, address).await?;
        Ok(Response::new(AddSharedAddressResponse { vpc: Some(vpc.into()) }))
    }

    async fn list_hosts(
        &self,
        _: Request<ListHostsRequest>,
    ) -> Result<Response<ListHostsResponse>, Status> {
        Ok(Response::new(ListHostsResponse { hosts: self.fleet.hosts() }))
    }

    async fn forget_host(
        &self,
        request: Request<ForgetHostRequest>,
    ) -> Result<Response<ForgetHostResponse>, Status> {
        let ForgetHostRequest { name } = request.into_inner();
        self.fleet.check_dead(&name)?;
        self.deployer.forget(&name).await?;
        self.fleet.forget(&name).await?;
        Ok(Response::new(ForgetHostResponse {}))
    }

    async fn drain_proxy(
        &self,
        request: Request<DrainProxyRequest>,
    ) -> Result<Response<DrainProxyResponse>, Status> {
        let DrainProxyRequest { name, drained } = request.into_inner();
        self.fleet.drain(&name, drained).await?;
        Ok(Response::new(DrainProxyResponse {}))
    }

    async fn run_instance(
        &self,
        request: Request<RunInstanceRequest>,
    ) -> Result<Response<RunInstanceResponse>, Status> {
        let RunInstanceRequest {
            mut vpc,
            hostname,
            mut host,
            invocation,
            security_groups,
            limits,
            snapshot,
            template,
        } = request.into_inner();
        let mut wanted_template = match template.as_str() {
            "" => Template::Default,
            name => Template::Named(name),
        };
        if !snapshot.is_empty() {
            (vpc, host) =
                snapshots::of_clone(&self.fleet, &snapshot, &vpc, &host, &template).await?;
            wanted_template = Template::OfSnapshot;
        }
        if !hostname.is_empty() {
            name::label(&hostname).map_err(|InvalidName(problem)| {
                Status::invalid_argument(format!("hostname: {problem}"))
            })?;
        }
        if !self.deployer.knows(&vpc).await? {
            return Err(DeployError::UnknownVpc(vpc).into());
        }
        self.deployer
            .with_security(&vpc, |known| security::check_groups(known, &vpc, &security_groups))?;
        if let Some(limits) = &limits {
            Limits::try_from(limits)
                .map_err(|problem| Status::invalid_argument(format!("limits: {problem}")))?;
        }
        let wanted = (!host.is_empty()).then_some(host.as_str());
        let mut place =
            self.fleet.reserve(wanted, wanted_template).map_err(|error| of_placement(&error))?;
        self.deployer.ensure(&vpc, &place.host, place.session).await?;
        let start = StartInstanceRequest {
            vpc,
            hostname,
            invocation,
            security_groups,
            limits,
            snapshot,
            template,
            function: None,
        };
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

    async fn take_snapshot(
        &self,
        request: Request<TakeSnapshotRequest>,
    ) -> Result<Response<TakeSnapshotResponse>, Status> {
        let TakeSnapshotRequest { id, name } = request.into_inner();
        let (host, mut agent) = snapshots::place(&self.fleet, &id, &name).await?;
        let snapshot = agent
            .snapshot_instance(SnapshotInstanceRequest { id, name })
            .await
            .map_err(|error| of_agent(&host, &error))?
            .into_inner()
            .snapshot;
        Ok(Response::new(TakeSnapshotResponse { snapshot }))
    }

    async fn list_fleet_snapshots(
        &self,
        request: Request<ListFleetSnapshotsRequest>,
    ) -> Result<Response<ListFleetSnapshotsResponse>, Status> {
        let hosts = snapshots::list(&self.fleet, &request.into_inner().host).await;
        let hosts = hosts.map_err(SnapshotsError::from)?;
        Ok(Response::new(ListFleetSnapshotsResponse { hosts }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        let DeleteSnapshotRequest { name } = request.into_inner();
        let (host, mut agent) = snapshots::keeper(&self.fleet, &name).await?;
        agent
            .remove_snapshot(RemoveSnapshotRequest { name })
            .await
            .map_err(|error| of_agent(&host, &error))?;
        Ok(Response::new(DeleteSnapshotResponse {}))
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

    type CapturePacketsStream =
        Pin<Box<dyn Stream<Item = Result<CapturePacketsResponse, Status>> + Send>>;

    async fn capture_packets(
        &self,
        request: Request<CapturePacketsRequest>,
    ) -> Result<Response<Self::CapturePacketsStream>, Status> {
        let request = request.into_inner();
        let (host, mut agent) = self.fleet.host_of(&request.instance)?;
        let captured =
            agent.capture_packets(request).await.map_err(|error| of_agent(&host, &error))?;
        // What nobody takes from here is not taken from the agent either.
        let passed_on = captured
            .into_inner()
            .map(move |message| message.map_err(|error| of_agent(&host, &error)));
        Ok(Response::new(Box::pin(passed_on)))
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
    async fn create_security_group(
        &self,
        request: Request<CreateSecurityGroupRequest>,
    ) -> Result<Response<CreateSecurityGroupResponse>, Status> {
        let CreateSecurityGroupRequest { vpc, name, rules } = request.into_inner();
        let security = security::create(&*self.store, &vpc, &name, &rules).await?;
        self.deployer.take_in_security(&vpc).await?;
        let group = security.group_message(&name);
        Ok(Response::new(CreateSecurityGroupResponse { group }))
    }

    async fn delete_security_group(
        &self,
        request: Request<DeleteSecurityGroupRequest>,
    ) -> Result<Response<DeleteSecurityGroupResponse>, Status> {
        let DeleteSecurityGroupRequest { vpc, name } = request.into_inner();
        security::delete(&*self.store, &self.fleet, &vpc, &name).await?;
        self.deployer.take_in_security(&vpc).await?;
        Ok(Response::new(DeleteSecurityGroupResponse {}))
    }

    async fn change_security_rules(
        &self,
        request: Request<ChangeSecurityRulesRequest>,
    ) -> Result<Response<ChangeSecurityRulesResponse>, Status> {
        let request = request.into_inner();
        let security = security::change_rules(&*self.store, &self.fleet, &request).await?;
        self.deployer.take_in_security(&request.vpc).await?;
        let group = security.group_message(&request.group);
        Ok(Response::new(ChangeSecurityRulesResponse { group }))
    }

    async fn set_security_defaults(
        &self,
        request: Request<SetSecurityDefaultsRequest>,
    ) -> Result<Response<SetSecurityDefaultsResponse>, Status> {
        let request = request.into_inner();
        let defaults = security::set_defaults(&*self.store, &request).await?;
        self.deployer.take_in_security(&request.vpc).await?;
        let defaults = Some((&defaults).into());
        Ok(Response::new(SetSecurityDefaultsResponse { defaults }))
    }

    async fn get_security(
        &self,
        request: Request<GetSecurityRequest>,
    ) -> Result<Response<GetSecurityResponse>, Status> {
        let GetSecurityRequest { vpc, with_hits } = request.into_inner();
        let counted = if with_hits {
            security::count(&*self.store, &self.fleet, &vpc).await?
        } else {
            let security = security::get(&*self.store, &vpc).await?;
            security::Counted { security, ..security::Counted::default() }
        };
        let security::Counted { security, hits, silent } = counted;
        let hits = hits.into_iter().map(|(id, hits)| RuleHits { id, hits }).collect();
        Ok(Response::new(GetSecurityResponse { security: Some((&security).into()), hits, silent }))
    }
}
