//! The flows of a host: those in the table, those in the log, and whose they are.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;
use warren_abi::flow::{TICK_NS, tick};
use warren_abi::flowlog::{FlowEvent, What};
use warren_abi::maps::Traffic;
use warren_abi::wire::{ICMP, TCP, UDP};
use warren_proto::v1;

use super::{Host, HostError};
use crate::clock::monotonic_ns;
use crate::datapath::{self, FlowTotals, LiveFlow};
use crate::flowlog::owners::{NamedVpc, Names, Owner};
use crate::flowlog::record::{End, Record, WallClock, protocol_name};
use crate::flowlog::search::{self, Found, Query};
use crate::flowlog::{FlowLog, Source};
use crate::metrics::flows::Snapshot;

/// What is told at most, if nobody says.
const LIMIT: usize = 1000;

impl Names for Host {
    fn owner(&self, ifindex: u32, generation: u32) -> Owner {
        let Some(slot) = self.datapath.slot_of(ifindex) else { return Owner::default() };
        let instance = self.state().owners.find(slot.number, generation);
        let (address, address_v6) = (Some(slot.address), Some(slot.address_v6));
        Owner { slot: Some(slot.number), address, address_v6, instance }
    }

    fn vpc(&self, vni: u32) -> Option<NamedVpc> {
        self.state().names.get(&vni).cloned()
    }
}

impl Source for Host {
    fn lost(&self) -> Option<u64> {
        self.flow_totals().map(|totals| totals.lost)
    }
}

impl Host {
    /// From now on, flows are logged.
    pub fn logs_flows(&self, log: FlowLog) {
        // Nobody sets a second one.
        drop(self.log.set(log));
    }

    /// How many flows began and ended; none if that cannot be read.
    pub fn flow_totals(&self) -> Option<FlowTotals> {
        self.datapath.flow_totals().inspect_err(|error| tracing::error!("{error}")).ok()
    }

    /// What is told of flows when metrics are scraped.
    pub fn flow_metrics(&self) -> Snapshot {
        let told = |error: &datapath::Error| tracing::error!("metrics lack ports: {error}");
        let vpcs = self.datapath.vpcs().inspect_err(told).unwrap_or_default();
        let counts = self.log.get().map(FlowLog::counts);
        let not_told = |error: &datapath::Error| tracing::error!("metrics lack traffic: {error}");
        Snapshot {
            totals: self.flow_totals(),
            logged: counts.map(|counts| (counts.written(), counts.unwritten())),
            ports: vpcs.into_iter().map(|vpc| (vpc.vni, vpc.ports.count)).collect(),
            traffic: self.vpc_traffic().inspect_err(not_told).unwrap_or_default(),
            used: self.datapath.port_use().inspect_err(told).unwrap_or_default(),
        }
    }

    /// The flows in the table, the least idle first: of a VPC, of an instance, or all.
    pub fn list_flows(
        &self,
        request: &v1::ListFlowsRequest,
    ) -> Result<v1::ListFlowsResponse, HostError> {
        let instance = match request.instance.as_str() {
            "" => None,
            id => Some(Uuid::parse_str(id).map_err(|_| HostError::NoInstance(id.to_owned()))?),
        };
        let vpc = Some(request.vpc.as_str()).filter(|name| !name.is_empty());
        // One that is not known here has none, and no flows.
        let vnis = vpc.map(|name| self.vnis_of(name));
        let mut flows = self.datapath.live_flows(|key, flow| {
            !key.is_mapping()
                && vnis.as_ref().is_none_or(|vnis| vnis.contains(&flow.vni))
                && instance
                    .is_none_or(|id| self.owner(key.ifindex, key.generation).instance == Some(id))
        })?;
        flows.sort_by_key(|LiveFlow { flow, .. }| std::cmp::Reverse(flow.state.last_tick()));
        let total = flows.len() as u64;
        flows.truncate(limit(request.limit));
        let now = monotonic_ns();
        let flows = flows.iter().map(|flow| self.describe_flow(flow, now)).collect();
        Ok(v1::ListFlowsResponse { flows, total })
    }

    fn describe_flow(&self, live: &LiveFlow, now_ns: u64) -> v1::Flow {
        let LiveFlow { key, flow } = live;
        let received = self.datapath.received(live);
        let owner = self.owner(key.ifindex, key.generation);
        let peer = IpAddr::from(key.peer);
        let vpc = Names::vpc(self, flow.vni);
        let age = |tick: u32| now_ns.saturating_sub(u64::from(tick) * TICK_NS) / 1_000_000;
        let text = |address: Option<IpAddr>| address.map_or_else(String::new, |a| a.to_string());
        v1::Flow {
            instance: owner.instance.map(|id| id.to_string()).unwrap_or_default(),
            vpc: vpc.as_ref().map(|vpc| vpc.name.clone()).unwrap_or_default(),
            vni: flow.vni,
            slot: owner.slot.unwrap_or_default(),
            protocol: protocol_name(key.protocol),
            guest_address: text(owner.address_towards(peer)),
            guest_port: u32::from(key.guest_port.get()),
            nat_address: text(vpc.and_then(|vpc| vpc.address_towards(peer))),
            nat_port: u32::from(flow.port.get()),
            peer_address: peer.to_string(),
            peer_port: u32::from(key.peer_port.get()),
            state: live.stage(self.datapath.timers(), tick(now_ns)).to_owned(),
            packets_out: flow.sent.packets,
            bytes_out: flow.sent.bytes,
            packets_in: received.packets,
            bytes_in: received.bytes,
            age_ms: age(flow.began),
            idle_ms: age(flow.state.last_tick()),
        }
    }

    /// Who had a port: by the table of flows, and by the log.
    pub async fn find_mappings(
        self: &Arc<Self>,
        request: v1::FindMappingsRequest,
    ) -> Result<v1::FindMappingsResponse, HostError> {
        let vnis = self.vnis_of(&request.vpc);
        if vnis.is_empty() {
            return Ok(v1::FindMappingsResponse::default());
        }
        let number = match request.protocol.as_str() {
            "" => None,
            "tcp" => Some(TCP),
            "udp" => Some(UDP),
            "icmp" => Some(ICMP),
            other => return Err(HostError::Query(format!("protocol: there is no \"{other}\""))),
        };
        let port = u16::try_from(request.port)
            .map_err(|_| HostError::Query(format!("port: {} is none", request.port)))?;
        let time = |field: &str, ms: i64| {
            Timestamp::from_millisecond(ms)
                .map_err(|error| HostError::Query(format!("{field}: {error}")))
        };
        let query = Query {
            vnis,
            port,
            protocol: number.map(|number| protocol_name(u32::from(number))),
            since: time("since_unix_ms", request.since_unix_ms)?,
            until: time("until_unix_ms", request.until_unix_ms)?,
        };
        let limit = limit(request.limit);
        let host = self.clone();
        // It reads files, and many of them.
        let work = tokio::task::spawn_blocking(move || host.search(&query, limit));
        work.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }

    fn search(&self, query: &Query, limit: usize) -> Result<v1::FindMappingsResponse, HostError> {
        let protocol =
            |number| query.protocol.as_ref().is_none_or(|name| *name == protocol_name(number));
        // Before the log: what ends in between is in both.
        let live = self.datapath.live_flows(|key, flow| {
            query.vnis.contains(&flow.vni)
                && flow.port.get() == query.port
                && protocol(key.protocol)
        })?;
        let clock = WallClock::now();
        let live = live.into_iter().filter_map(|LiveFlow { key, flow }| {
            let event = FlowEvent {
                at_ns: u64::from(flow.began) * TICK_NS,
                sent: flow.sent,
                received: Traffic::NONE,
                key,
                vni: flow.vni,
                began: flow.began,
                last: flow.state.last_tick(),
                port: flow.port,
                what: What::Begun as u8,
                reserved: 0,
            };
            Record::new(&event, &self.options.name, self, clock)
        });
        let files = self.log.get().map(FlowLog::files);
        let Found { mut mappings, log_since, lost } = search::search(files, live.collect(), query)?;
        let total = mappings.len() as u64;
        drop(mappings.drain(..mappings.len().saturating_sub(limit)));
        Ok(v1::FindMappingsResponse {
            mappings: mappings.into_iter().map(describe_mapping).collect(),
            total,
            log_since_unix_ms: log_since.map(Timestamp::as_millisecond),
            lost,
        })
    }

    /// The VNIs of a VPC's shared addresses.
    fn vnis_of(&self, vpc: &str) -> BTreeSet<u32> {
        self.state().vpcs.of(vpc).iter().map(|vpc| vpc.vni).collect()
    }
}

fn limit(limit: u32) -> usize {
    if limit == 0 { LIMIT } else { limit as usize }
}

fn describe_mapping(search::Mapping { record, live }: search::Mapping) -> v1::Mapping {
    let text = |address: Option<IpAddr>| address.map_or_else(String::new, |a| a.to_string());
    let (end, reason) = match record.end {
        Some(End { end, reason, .. }) => (Some(end.as_millisecond()), reason),
        None => (None, String::new()),
    };
    v1::Mapping {
        instance: record.instance.map(|id| id.to_string()).unwrap_or_default(),
        vpc: record.vpc.unwrap_or_default(),
        vni: record.vni,
        slot: record.slot.unwrap_or_default(),
        protocol: record.protocol,
        guest_address: text(record.srcaddr),
        guest_port: u32::from(record.srcport),
        nat_address: text(record.nat_srcaddr),
        nat_port: u32::from(record.nat_srcport),
        peer_address: text(record.dstaddr),
        peer_port: u32::from(record.dstport.unwrap_or_default()),
        start_unix_ms: record.start.as_millisecond(),
        end_unix_ms: end,
        live,
        reason,
    }
}
