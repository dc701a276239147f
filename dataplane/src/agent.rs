//! The agent's gRPC service: `warren.v1.AgentService` over a host or a proxy.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use prometheus_client::registry::Registry;
use tonic::{Request, Response, Status};
use warren_proto::route::{InvalidRoute, Route};
use warren_proto::security::Security;
use warren_proto::v1;
use warren_proto::v1::agent_service_server::AgentService;
use warren_proto::v1::apply_vpc_request::Role as VpcRole;
use warren_vmm::client::ClientError;

use crate::capture::CaptureError;
use crate::datapath::{self, DropCount, HostVpc, PortRange, ProxyVpc, ProxyVpcV6};
use crate::host::{Captured, Host, HostError, Order, Own, Started};
use crate::metrics::flows::Flows;
use crate::metrics::{self, Snapshot};
use crate::pool::{Level, PoolError};
use crate::proxy::Proxy;
use crate::services::Naming;

/// What this agent is.
#[derive(Clone)]
pub enum Agent {
    /// It runs microVMs.
    Host(Arc<Host>),
    /// It stands between hosts and VPCs.
    Proxy(Arc<Proxy>),
}

/// What the heartbeat tells of an agent.
pub struct Report {
    /// Role.
    pub role: v1::Role,
    /// Slots in all; 0 on a proxy.
    pub slots: u32,
    /// How the pools stand; none on a proxy.
    pub templates: Vec<v1::TemplatePool>,
    /// Instances; none on a proxy.
    pub instances: Vec<v1::Instance>,
    /// What is used of VPCs' ports; none on a proxy.
    pub port_use: Vec<v1::PortUse>,
    /// Shared addresses that it owns; 0 on a host.
    pub owned: u32,
    /// What it had to do since the last report; none on a host.
    pub load: Option<v1::ProxyLoad>,
}

impl Agent {
    /// How things stand.
    pub fn report(&self) -> Report {
        match self {
            Self::Host(host) => Report {
                role: v1::Role::Host,
                slots: host.slots(),
                templates: host.pools().into_iter().map(Into::into).collect(),
                instances: host.instances(),
                port_use: host.port_use(),
                owned: 0,
                load: None,
            },
            Self::Proxy(proxy) => Report {
                role: v1::Role::Proxy,
                slots: 0,
                templates: Vec::new(),
                instances: Vec::new(),
                port_use: Vec::new(),
                owned: proxy.owned(),
                load: Some(proxy.load()),
            },
        }
    }

    /// The control plane wants so many microVMs of each template parked, at least, for now.
    pub fn want_parked(&self, wanted: &HashMap<String, u32>) {
        if let Self::Host(host) = self {
            host.want_parked(wanted);
        }
    }

    /// What was dropped, per slot (on a proxy: per VNI) and reason.
    pub fn drops(&self) -> Result<Vec<DropCount>, datapath::Error> {
        match self {
            Self::Host(host) => host.drops(),
            Self::Proxy(proxy) => proxy.drops(),
        }
    }

    /// What is to be scraped of it.
    pub fn metrics(&self) -> Registry {
        let agent = self.clone();
        let snapshot = move || Snapshot {
            levels: match &agent {
                Self::Host(host) => Some(host.levels()),
                Self::Proxy(_) => None,
            },
            drops: agent
                .drops()
                .inspect_err(|error| tracing::error!("metrics lack the drops: {error}"))
                .ok(),
        };
        match self {
            Self::Host(host) => {
                let mut registry = metrics::registry("host", snapshot);
                host.starts().register(&mut registry);
                let help = "MicroVMs that no daemon knew any more, and were ended";
                registry.register("orphans_reaped", help, host.orphans_reaped().clone());
                let host = host.clone();
                registry.register_collector(Box::new(Flows(move || host.flow_metrics())));
                registry
            }
            Self::Proxy(_) => metrics::registry("proxy", snapshot),
        }
    }

    fn host(&self) -> Result<&Arc<Host>, Status> {
        match self {
            Self::Host(host) => Ok(host),
            Self::Proxy(_) => Err(Status::failed_precondition(
                "this agent is a proxy and runs no instances: ask an agent with --role host",
            )),
        }
    }
}

fn address(field: &str, text: &str) -> Result<Ipv4Addr, Status> {
    text.parse()
        .map_err(|_| Status::invalid_argument(format!("{field} \"{text}\" is not an IPv4 address")))
}

/// An IPv6 address, or none.
fn address_v6(field: &str, text: &str) -> Result<Option<Ipv6Addr>, Status> {
    let invalid =
        |_| Status::invalid_argument(format!("{field} \"{text}\" is not an IPv6 address"));
    if text.is_empty() { Ok(None) } else { text.parse().map(Some).map_err(invalid) }
}

/// An address of either family.
fn ip(field: &str, text: &str) -> Result<IpAddr, Status> {
    text.parse()
        .map_err(|_| Status::invalid_argument(format!("{field} \"{text}\" is not an IP address")))
}

/// Addresses of either family.
fn ips(field: &str, texts: &[String]) -> Result<Vec<IpAddr>, Status> {
    texts.iter().map(|text| ip(field, text)).collect()
}

fn vni(value: u32) -> Result<u32, Status> {
    if (1..1 << 24).contains(&value) {
        Ok(value)
    } else {
        Err(Status::invalid_argument(format!("vni {value} is not between 1 and 16777215")))
    }
}

fn ports(field: &str, range: Option<v1::PortRange>) -> Result<PortRange, Status> {
    let range = range.ok_or_else(|| Status::invalid_argument(format!("{field} is missing")))?;
    let invalid = || {
        Status::invalid_argument(format!(
            "{field} [{}, +{}) is not a range of whole 64-port blocks below 65536",
            range.base, range.count
        ))
    };
    let whole = range.base % 64 == 0 && range.count % 64 == 0 && range.count > 0;
    let end = u64::from(range.base) + u64::from(range.count);
    if !whole || end > 65536 {
        return Err(invalid());
    }
    Ok(PortRange { base: range.base as u16, count: range.count })
}

fn routes(field: &str, routes: &[v1::Route]) -> Result<Vec<Route>, Status> {
    let error = |error: InvalidRoute| Status::invalid_argument(format!("{field}: {error}"));
    routes.iter().map(|route| route.try_into().map_err(error)).collect()
}

fn host_vpc(request: &v1::ApplyVpcRequest, vpc: &v1::HostVpc) -> Result<HostVpc, Status> {
    Ok(HostVpc {
        vni: vni(request.vni)?,
        shared_address: address("shared_address", &request.shared_address)?,
        shared_address_v6: address_v6("shared_address_v6", &request.shared_address_v6)?,
        ports: ports("host.ports", vpc.ports)?,
        proxy_address: ip("host.proxy_address", &vpc.proxy_address)?,
        proxies: ips("host.proxies", &vpc.proxies)?,
    })
}

fn naming(vpc: &v1::HostVpc) -> Result<Naming, Status> {
    let resolver = match vpc.resolver.as_str() {
        "" => None,
        text => Some(address("host.resolver", text)?),
    };
    let search_domain = Naming::parse_domain(&vpc.search_domain)
        .map_err(|problem| Status::invalid_argument(format!("host.search_domain: {problem}")))?;
    Ok(Naming { resolver, search_domain })
}

fn security(vpc: &v1::HostVpc) -> Result<Security, Status> {
    let security = vpc.security.as_ref().map(TryInto::try_into).transpose();
    let security = security
        .map_err(|problem| Status::invalid_argument(format!("host.security: {problem}")))?;
    Ok(security.unwrap_or_default())
}

fn own(request: &v1::StartInstanceRequest) -> Result<Own, Status> {
    let limits = request.limits.as_ref().map(TryInto::try_into).transpose();
    let limits =
        limits.map_err(|problem| Status::invalid_argument(format!("limits: {problem}")))?;
    Ok(Own { groups: request.security_groups.iter().cloned().collect(), limits })
}

fn proxy_vpc(request: &v1::ApplyVpcRequest, vpc: &v1::ProxyVpc) -> Result<ProxyVpc, Status> {
    let holders = vpc.holders.iter().map(|holder| {
        let range = ports("proxy.holders.ports", holder.ports)?;
        Ok((range, ip("proxy.holders.host_address", &holder.host_address)?))
    });
    Ok(ProxyVpc {
        vni: vni(request.vni)?,
        interface: vpc.interface.clone(),
        shared_address: address("shared_address", &request.shared_address)?,
        cidr: vpc.cidr.parse().map_err(|_| {
            Status::invalid_argument(format!("proxy.cidr \"{}\" is not an IPv4 CIDR", vpc.cidr))
        })?,
        gateway: match vpc.gateway.as_str() {
            "" => None,
            text => Some(address("proxy.gateway", text)?),
        },
        v6: proxy_vpc_v6(request, vpc)?,
        holders: holders.collect::<Result<_, Status>>()?,
        claim: None,
        routes: routes("proxy.routes", &vpc.routes)?,
        public: Some(vpc.public_vni).filter(|vni| *vni != 0),
    })
}

fn proxy_vpc_v6(
    request: &v1::ApplyVpcRequest,
    vpc: &v1::ProxyVpc,
) -> Result<Option<ProxyVpcV6>, Status> {
    let shared_address = address_v6("shared_address_v6", &request.shared_address_v6)?;
    let gateway = address_v6("proxy.gateway_v6", &vpc.gateway_v6)?;
    match shared_address {
        None if vpc.cidr_v6.is_empty() && gateway.is_none() => Ok(None),
        None => Err(Status::invalid_argument(
            "shared_address_v6 is missing: a VPC with cidr_v6 or gateway_v6 needs it",
        )),
        Some(shared_address) => {
            let cidr = vpc.cidr_v6.parse().map_err(|_| {
                let text = &vpc.cidr_v6;
                Status::invalid_argument(format!("proxy.cidr_v6 \"{text}\" is not an IPv6 CIDR"))
            })?;
            Ok(Some(ProxyVpcV6 { shared_address, cidr, gateway }))
        }
    }
}

impl From<Level> for v1::TemplatePool {
    fn from(Level { template, now, parked_target }: Level) -> Self {
        Self { template, parked: now.parked, parked_target }
    }
}

impl From<HostError> for Status {
    fn from(error: HostError) -> Self {
        let text = error.to_string();
        match error {
            HostError::UnknownVpc(_)
            | HostError::UnknownGroup { .. }
            | HostError::VpcInUse { .. }
            | HostError::SnapshotVpc { .. }
            | HostError::SnapshotTemplate { .. }
            | HostError::Function(_) => Self::failed_precondition(text),
            HostError::Pool(PoolError::NoSlot) | HostError::Captures(_) => {
                Self::resource_exhausted(text)
            }
            HostError::NoInstance(_)
            | HostError::NoSnapshot(_)
            | HostError::Pool(PoolError::UnknownTemplate { .. }) => Self::not_found(text),
            HostError::SnapshotExists(_) => Self::already_exists(text),
            HostError::Hostname(_)
            | HostError::SnapshotName(_)
            | HostError::Query(_)
            | HostError::Capture(CaptureError::Filter(_)) => Self::invalid_argument(text),
            HostError::Ended { .. } => Self::aborted(text),
            HostError::Datapath(error) | HostError::Capture(CaptureError::Datapath(error)) => {
                error.into()
            }
            HostError::Vmm(ClientError::Timeout(_)) => Self::deadline_exceeded(text),
            HostError::Pool(_)
            | HostError::Vmm(_)
            | HostError::Record(_)
            | HostError::Snapshots { .. }
            | HostError::Directory { .. }
            | HostError::Log(_)
            | HostError::Capture(CaptureError::Socket(_)) => Self::internal(text),
        }
    }
}

impl From<datapath::Error> for Status {
    fn from(error: datapath::Error) -> Self {
        let text = error.to_string();
        match error {
            datapath::Error::Invalid { .. } | datapath::Error::Routes(_) => {
                Self::invalid_argument(text)
            }
            datapath::Error::NoInterface { .. }
            | datapath::Error::UnknownVpc(_)
            | datapath::Error::VpcInUse { .. } => Self::failed_precondition(text),
            _ => Self::internal(text),
        }
    }
}

#[tonic::async_trait]
impl AgentService for Agent {
    async fn apply_vpc(
        &self,
        request: Request<v1::ApplyVpcRequest>,
    ) -> Result<Response<v1::ApplyVpcResponse>, Status> {
        let request = request.into_inner();
        match (self, &request.role) {
            (Self::Host(host), Some(VpcRole::Host(vpc))) => {
                let (naming, security) = (naming(vpc)?, security(vpc)?);
                let known = host_vpc(&request, vpc)?;
                host.apply_vpc(&request.vpc, &known, vpc.rank, naming, security)?;
            }
            (Self::Proxy(proxy), Some(VpcRole::Proxy(vpc))) => {
                let proxies = ips("proxy.proxies", &vpc.proxies)?;
                proxy.apply_vpc(&proxy_vpc(&request, vpc)?, &proxies)?;
            }
            (Self::Host(_), _) => {
                return Err(Status::invalid_argument("role: this agent is a host: set `host`"));
            }
            (Self::Proxy(_), _) => {
                return Err(Status::invalid_argument("role: this agent is a proxy: set `proxy`"));
            }
        }
        tracing::info!(vpc = request.vpc, vni = request.vni, "VPC applied");
        Ok(Response::new(v1::ApplyVpcResponse {}))
    }

    async fn remove_vpc(
        &self,
        request: Request<v1::RemoveVpcRequest>,
    ) -> Result<Response<v1::RemoveVpcResponse>, Status> {
        let vni = vni(request.into_inner().vni)?;
        match self {
            Self::Host(host) => host.remove_vpc(vni)?,
            Self::Proxy(proxy) => proxy.remove_vpc(vni)?,
        }
        Ok(Response::new(v1::RemoveVpcResponse {}))
    }

    async fn start_instance(
        &self,
        request: Request<v1::StartInstanceRequest>,
    ) -> Result<Response<v1::StartInstanceResponse>, Status> {
        let request = request.into_inner();
        let own = own(&request)?;
        let v1::StartInstanceRequest { vpc, hostname, invocation, template, .. } = request;
        let snapshot = Some(request.snapshot).filter(|name| !name.is_empty());
        let function = request.function.map(Into::into);
        let order = Order { vpc, hostname, own, template, snapshot, function, invocation };
        let Started { instance, timings, reply } = self.host()?.start(order).await?;
        let (instance, timings) = (Some(instance), Some(timings));
        Ok(Response::new(v1::StartInstanceResponse { instance, timings, reply }))
    }

    async fn end_instance(
        &self,
        request: Request<v1::EndInstanceRequest>,
    ) -> Result<Response<v1::EndInstanceResponse>, Status> {
        self.host()?.end(&request.into_inner().id).await?;
        Ok(Response::new(v1::EndInstanceResponse {}))
    }

    async fn invoke_instance(
        &self,
        request: Request<v1::InvokeInstanceRequest>,
    ) -> Result<Response<v1::InvokeInstanceResponse>, Status> {
        let request = request.into_inner();
        let reply = self.host()?.invoke(&request.id, &request.invocation).await?;
        Ok(Response::new(v1::InvokeInstanceResponse { reply }))
    }

    async fn snapshot_instance(
        &self,
        request: Request<v1::SnapshotInstanceRequest>,
    ) -> Result<Response<v1::SnapshotInstanceResponse>, Status> {
        let v1::SnapshotInstanceRequest { id, name } = request.into_inner();
        let snapshot = Some(self.host()?.snapshot(&id, &name).await?);
        Ok(Response::new(v1::SnapshotInstanceResponse { snapshot }))
    }

    async fn list_snapshots(
        &self,
        _: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        let snapshots = self.host()?.list_snapshots()?;
        Ok(Response::new(v1::ListSnapshotsResponse { snapshots }))
    }

    async fn remove_snapshot(
        &self,
        request: Request<v1::RemoveSnapshotRequest>,
    ) -> Result<Response<v1::RemoveSnapshotResponse>, Status> {
        self.host()?.remove_snapshot(&request.into_inner().name).await?;
        Ok(Response::new(v1::RemoveSnapshotResponse {}))
    }

    async fn local_instances(
        &self,
        _: Request<v1::LocalInstancesRequest>,
    ) -> Result<Response<v1::LocalInstancesResponse>, Status> {
        let instances = self.host()?.instances();
        Ok(Response::new(v1::LocalInstancesResponse { instances }))
    }

    async fn list_flows(
        &self,
        request: Request<v1::ListFlowsRequest>,
    ) -> Result<Response<v1::ListFlowsResponse>, Status> {
        Ok(Response::new(self.host()?.list_flows(&request.into_inner())?))
    }

    async fn find_mappings(
        &self,
        request: Request<v1::FindMappingsRequest>,
    ) -> Result<Response<v1::FindMappingsResponse>, Status> {
        Ok(Response::new(self.host()?.find_mappings(request.into_inner()).await?))
    }

    async fn list_rule_hits(
        &self,
        request: Request<v1::ListRuleHitsRequest>,
    ) -> Result<Response<v1::ListRuleHitsResponse>, Status> {
        let vni = vni(request.into_inner().vni)?;
        Ok(Response::new(v1::ListRuleHitsResponse { hits: self.host()?.rule_hits(vni)? }))
    }

    type CapturePacketsStream = Captured;

    async fn capture_packets(
        &self,
        request: Request<v1::CapturePacketsRequest>,
    ) -> Result<Response<Captured>, Status> {
        Ok(Response::new(self.host()?.capture(request.into_inner()).await?))
    }

    async fn list_drops(
        &self,
        _: Request<v1::ListDropsRequest>,
    ) -> Result<Response<v1::ListDropsResponse>, Status> {
        let count = |DropCount { scope, reason, packets }| v1::DropCount {
            scope,
            reason: reason.name().to_owned(),
            packets,
        };
        let drops = self.drops()?.into_iter().map(count).collect();
        Ok(Response::new(v1::ListDropsResponse { drops }))
    }
}
