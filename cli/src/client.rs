//! Calls to the control plane.

use tokio_stream::Stream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};
use warren_proto::endpoint::{Endpoint, connect};
use warren_proto::v1::control_service_client::ControlServiceClient;
use warren_proto::v1::function_service_client::FunctionServiceClient;
use warren_proto::v1::log_service_client::LogServiceClient;
use warren_proto::v1::{
    AddRoutesRequest, AddSharedAddressRequest, CallInstanceRequest, CapturePacketsRequest,
    CapturePacketsResponse, ChangeSecurityRulesRequest, CreateSecurityGroupRequest,
    CreateTriggerRequest, CreateVpcRequest, DeleteAliasRequest, DeleteFunctionRequest,
    DeleteRoutesRequest, DeleteSecurityGroupRequest, DeleteSnapshotRequest, DeleteTriggerRequest,
    DeployFunctionRequest, DeployFunctionResponse, DrainProxyRequest, FindFleetMappingsRequest,
    ForgetHostRequest, Function, FunctionAlias, GetFunctionRequest, GetSecurityRequest,
    GetSecurityResponse, Host, HostDrops, HostFlows, HostMappings, HostSnapshots, Instance,
    ListFleetDropsRequest, ListFleetFlowsRequest, ListFleetSnapshotsRequest, ListFunctionsRequest,
    ListHostsRequest, ListInstancesRequest, ListRoutesRequest, ListRoutesResponse,
    ListTriggersRequest, ListVpcsRequest, ReplaceRoutesRequest, RollBackAliasRequest, Route,
    RunInstanceRequest, RunInstanceResponse, SecurityDefaults, SecurityGroup, SetAliasRequest,
    SetSecurityDefaultsRequest, SharedAddress, Snapshot, StopInstanceRequest, TailLogsRequest,
    TailLogsResponse, TakeSnapshotRequest, Trigger, Vpc,
};

use crate::error::Error;

/// A fleet of functions has many versions.
const LONGEST_ANSWER: usize = 64 << 20;

/// A connection to the control plane.
#[derive(Clone)]
pub struct Client {
    endpoint: Endpoint,
    service: ControlServiceClient<Channel>,
    functions: FunctionServiceClient<Channel>,
    logs: LogServiceClient<Channel>,
}

impl Client {
    pub async fn connect(endpoint: Endpoint) -> Result<Self, Error> {
        let channel = connect(&endpoint).await?;
        let service = ControlServiceClient::new(channel.clone());
        let functions = FunctionServiceClient::new(channel.clone());
        let functions = functions.max_decoding_message_size(LONGEST_ANSWER);
        let logs = LogServiceClient::new(channel);
        Ok(Self { endpoint, service, functions, logs })
    }

    pub async fn create_vpc(&mut self, vpc: Vpc) -> Result<Vpc, Error> {
        let answer = self.service.create_vpc(CreateVpcRequest { vpc: Some(vpc) }).await;
        self.unwrap(answer)?.vpc.ok_or(Error::Incomplete("the VPC"))
    }

    pub async fn add_shared_address(
        &mut self,
        vpc: String,
        address: SharedAddress,
    ) -> Result<Vpc, Error> {
        let request = AddSharedAddressRequest { vpc, address: Some(address) };
        let answer = self.service.add_shared_address(request).await;
        self.unwrap(answer)?.vpc.ok_or(Error::Incomplete("the VPC"))
    }

    pub async fn vpcs(&mut self) -> Result<Vec<Vpc>, Error> {
        let answer = self.service.list_vpcs(ListVpcsRequest {}).await;
        Ok(self.unwrap(answer)?.vpcs)
    }

    pub async fn hosts(&mut self) -> Result<Vec<Host>, Error> {
        let answer = self.service.list_hosts(ListHostsRequest {}).await;
        Ok(self.unwrap(answer)?.hosts)
    }

    pub async fn drain_proxy(&mut self, name: String, drained: bool) -> Result<(), Error> {
        let answer = self.service.drain_proxy(DrainProxyRequest { name, drained }).await;
        self.unwrap(answer).map(drop)
    }

    pub async fn forget_host(&mut self, name: String) -> Result<(), Error> {
        let answer = self.service.forget_host(ForgetHostRequest { name }).await;
        self.unwrap(answer).map(drop)
    }

    pub async fn instances(&mut self) -> Result<Vec<Instance>, Error> {
        let answer = self.service.list_instances(ListInstancesRequest {}).await;
        Ok(self.unwrap(answer)?.instances)
    }

    pub async fn run(&mut self, request: RunInstanceRequest) -> Result<RunInstanceResponse, Error> {
        let answer = self.service.run_instance(request).await;
        self.unwrap(answer)
    }

    pub async fn stop(&mut self, id: String) -> Result<(), Error> {
        let answer = self.service.stop_instance(StopInstanceRequest { id }).await;
        self.unwrap(answer).map(drop)
    }

    pub async fn take_snapshot(&mut self, id: String, name: String) -> Result<Snapshot, Error> {
        let answer = self.service.take_snapshot(TakeSnapshotRequest { id, name }).await;
        self.unwrap(answer)?.snapshot.ok_or(Error::Incomplete("the snapshot"))
    }

    /// Of all hosts, or of the one with this name.
    pub async fn snapshots(&mut self, host: String) -> Result<Vec<HostSnapshots>, Error> {
        let answer = self.service.list_fleet_snapshots(ListFleetSnapshotsRequest { host }).await;
        Ok(self.unwrap(answer)?.hosts)
    }

    pub async fn delete_snapshot(&mut self, name: String) -> Result<(), Error> {
        let answer = self.service.delete_snapshot(DeleteSnapshotRequest { name }).await;
        self.unwrap(answer).map(drop)
    }

    pub async fn call(&mut self, id: String, invocation: Vec<u8>) -> Result<Vec<u8>, Error> {
        let answer = self.service.call_instance(CallInstanceRequest { id, invocation }).await;
        Ok(self.unwrap(answer)?.reply)
    }

    /// Of all hosts and proxies, or of the one with this name.
    pub async fn drops(&mut self, host: Option<&str>) -> Result<Vec<HostDrops>, Error> {
        let host = host.unwrap_or_default().to_owned();
        let answer = self.service.list_fleet_drops(ListFleetDropsRequest { host }).await;
        Ok(self.unwrap(answer)?.hosts)
    }

    pub async fn flows(&mut self, request: ListFleetFlowsRequest) -> Result<Vec<HostFlows>, Error> {
        let answer = self.service.list_fleet_flows(request).await;
        Ok(self.unwrap(answer)?.hosts)
    }

    pub async fn mappings(
        &mut self,
        request: FindFleetMappingsRequest,
    ) -> Result<Vec<HostMappings>, Error> {
        let answer = self.service.find_fleet_mappings(request).await;
        Ok(self.unwrap(answer)?.hosts)
    }

    pub async fn add_route(&mut self, vpc: String, route: Route) -> Result<(), Error> {
        let request = AddRoutesRequest { vpc, routes: vec![route] };
        let answer = self.service.add_routes(request).await;
        self.unwrap(answer).map(drop)
    }

    pub async fn delete_routes(&mut self, vpc: String, prefixes: Vec<String>) -> Result<(), Error> {
        let answer = self.service.delete_routes(DeleteRoutesRequest { vpc, prefixes }).await;
        self.unwrap(answer).map(drop)
    }

    pub async fn replace_routes(&mut self, vpc: String, routes: Vec<Route>) -> Result<(), Error> {
        let answer = self.service.replace_routes(ReplaceRoutesRequest { vpc, routes }).await;
        self.unwrap(answer).map(drop)
    }

    pub async fn routes(&mut self, vpc: String) -> Result<ListRoutesResponse, Error> {
        let answer = self.service.list_routes(ListRoutesRequest { vpc }).await;
        self.unwrap(answer)
    }

    pub async fn create_group(
        &mut self,
        request: CreateSecurityGroupRequest,
    ) -> Result<SecurityGroup, Error> {
        let answer = self.service.create_security_group(request).await;
        self.unwrap(answer)?.group.ok_or(Error::Incomplete("the security group"))
    }

    pub async fn change_rules(
        &mut self,
        request: ChangeSecurityRulesRequest,
    ) -> Result<SecurityGroup, Error> {
        let answer = self.service.change_security_rules(request).await;
        self.unwrap(answer)?.group.ok_or(Error::Incomplete("the security group"))
    }

    pub async fn delete_group(&mut self, request: DeleteSecurityGroupRequest) -> Result<(), Error> {
        let answer = self.service.delete_security_group(request).await;
        self.unwrap(answer).map(drop)
    }

    pub async fn set_defaults(
        &mut self,
        request: SetSecurityDefaultsRequest,
    ) -> Result<SecurityDefaults, Error> {
        let answer = self.service.set_security_defaults(request).await;
        self.unwrap(answer)?.defaults.ok_or(Error::Incomplete("the defaults"))
    }

    pub async fn security(
        &mut self,
        request: GetSecurityRequest,
    ) -> Result<GetSecurityResponse, Error> {
        let answer = self.service.get_security(request).await;
        self.unwrap(answer)
    }

    /// Packets of an instance, from now on.
    pub async fn capture(
        &mut self,
        request: CapturePacketsRequest,
    ) -> Result<Streaming<CapturePacketsResponse>, Error> {
        let answer = self.service.capture_packets(request).await;
        self.unwrap(answer)
    }

    /// The first message has the options, each other one a piece of the component.
    pub async fn deploy_function(
        &mut self,
        messages: impl Stream<Item = DeployFunctionRequest> + Send + 'static,
    ) -> Result<DeployFunctionResponse, Error> {
        let answer = self.functions.deploy_function(messages).await;
        self.unwrap(answer)
    }

    /// What a function's instances wrote.
    pub async fn tail_logs(
        &mut self,
        request: TailLogsRequest,
    ) -> Result<Streaming<TailLogsResponse>, Error> {
        let answer = self.logs.tail_logs(request).await;
        self.unwrap(answer)
    }

    /// Of a VPC, or all.
    pub async fn functions(&mut self, vpc: String) -> Result<Vec<Function>, Error> {
        let answer = self.functions.list_functions(ListFunctionsRequest { vpc }).await;
        Ok(self.unwrap(answer)?.functions)
    }

    pub async fn function(&mut self, name: String) -> Result<Function, Error> {
        let answer = self.functions.get_function(GetFunctionRequest { name }).await;
        self.unwrap(answer)?.function.ok_or(Error::Incomplete("the function"))
    }

    pub async fn delete_function(&mut self, name: String) -> Result<(), Error> {
        let answer = self.functions.delete_function(DeleteFunctionRequest { name }).await;
        self.unwrap(answer).map(drop)
    }

    pub async fn set_alias(
        &mut self,
        function: String,
        alias: FunctionAlias,
    ) -> Result<FunctionAlias, Error> {
        let request = SetAliasRequest { function, alias: Some(alias) };
        let answer = self.functions.set_alias(request).await;
        self.unwrap(answer)?.alias.ok_or(Error::Incomplete("the alias"))
    }

    pub async fn roll_back_alias(
        &mut self,
        function: String,
        alias: String,
    ) -> Result<FunctionAlias, Error> {
        let answer = self.functions.roll_back_alias(RollBackAliasRequest { function, alias }).await;
        self.unwrap(answer)?.alias.ok_or(Error::Incomplete("the alias"))
    }

    pub async fn delete_alias(&mut self, function: String, alias: String) -> Result<(), Error> {
        let answer = self.functions.delete_alias(DeleteAliasRequest { function, alias }).await;
        self.unwrap(answer).map(drop)
    }

    pub async fn create_trigger(&mut self, trigger: Trigger) -> Result<Trigger, Error> {
        let request = CreateTriggerRequest { trigger: Some(trigger) };
        let answer = self.functions.create_trigger(request).await;
        self.unwrap(answer)?.trigger.ok_or(Error::Incomplete("the trigger"))
    }

    /// Of a function, or all.
    pub async fn triggers(&mut self, function: String) -> Result<Vec<Trigger>, Error> {
        let answer = self.functions.list_triggers(ListTriggersRequest { function }).await;
        Ok(self.unwrap(answer)?.triggers)
    }

    pub async fn delete_trigger(&mut self, name: String) -> Result<(), Error> {
        let answer = self.functions.delete_trigger(DeleteTriggerRequest { name }).await;
        self.unwrap(answer).map(drop)
    }

    /// The control plane's error.
    pub fn refused(&self, status: Status) -> Error {
        Error::Refused { endpoint: self.endpoint.clone(), status }
    }

    fn unwrap<T>(&self, answer: Result<Response<T>, Status>) -> Result<T, Error> {
        match answer {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => Err(self.refused(status)),
        }
    }
}
