//! The rows of each table.

use serde::Serialize;
use warren_proto::v1;

use super::security::LimitsObject;
use super::{Row, dash, some, us};
use crate::error::Error;

/// A VPC.
#[derive(Serialize)]
pub struct VpcRow {
    name: String,
    vni: u32,
    cidr: String,
    shared_address: String,
    interface: String,
    gateway: Option<String>,
    cidr_v6: Option<String>,
    shared_address_v6: Option<String>,
    gateway_v6: Option<String>,
    ports_per_host: u32,
    resolver: Option<String>,
    search_domain: Option<String>,
    more_addresses: Vec<SharedAddressObject>,
    /// The VPC that it leaves by, and the one that leaves by it.
    public: Option<String>,
    public_of: Option<String>,
}

/// A further shared address.
#[derive(Serialize)]
struct SharedAddressObject {
    vni: u32,
    address: String,
    address_v6: Option<String>,
}

impl From<v1::SharedAddress> for SharedAddressObject {
    fn from(v1::SharedAddress { address, address_v6, vni }: v1::SharedAddress) -> Self {
        Self { vni, address, address_v6: some(address_v6) }
    }
}

impl From<v1::Vpc> for VpcRow {
    fn from(vpc: v1::Vpc) -> Self {
        Self {
            more_addresses: vpc.more_addresses.into_iter().map(Into::into).collect(),
            name: vpc.name,
            vni: vpc.vni,
            cidr: vpc.cidr,
            shared_address: vpc.shared_address,
            interface: vpc.interface,
            gateway: some(vpc.gateway),
            cidr_v6: some(vpc.cidr_v6),
            shared_address_v6: some(vpc.shared_address_v6),
            gateway_v6: some(vpc.gateway_v6),
            ports_per_host: vpc.ports_per_host,
            resolver: some(vpc.resolver),
            search_domain: some(vpc.search_domain),
            public: some(vpc.public),
            public_of: some(vpc.public_of),
        }
    }
}

impl Row for VpcRow {
    const HEADER: &'static [&'static str] = &[
        "NAME",
        "VNI",
        "CIDR",
        "SHARED ADDRESS",
        "INTERFACE",
        "GATEWAY",
        "CIDR V6",
        "SHARED ADDRESS V6",
        "GATEWAY V6",
        "PORTS PER HOST",
        "RESOLVER",
        "SEARCH DOMAIN",
        "PUBLIC",
    ];

    fn cells(&self) -> Vec<String> {
        let more = &self.more_addresses;
        let v4 = [&self.shared_address].into_iter().chain(more.iter().map(|more| &more.address));
        let v6 = self.shared_address_v6.iter().chain(more.iter().flat_map(|more| &more.address_v6));
        let listed = |all: Vec<&str>| all.join(", ");
        let v4 = listed(v4.map(String::as_str).collect());
        let v6 = some(listed(v6.map(String::as_str).collect()));
        vec![
            self.name.clone(),
            self.vni.to_string(),
            self.cidr.clone(),
            v4,
            self.interface.clone(),
            dash(self.gateway.as_deref()),
            dash(self.cidr_v6.as_deref()),
            dash(v6.as_deref()),
            dash(self.gateway_v6.as_deref()),
            self.ports_per_host.to_string(),
            dash(self.resolver.as_deref()),
            dash(self.search_domain.as_deref()),
            dash(self.public.as_deref()),
        ]
    }
}

/// A host or proxy.
#[derive(Serialize)]
pub struct HostRow {
    name: String,
    role: &'static str,
    alive: bool,
    /// Missing when it was not heard of since the control plane started.
    heartbeat_age_ms: Option<u64>,
    slots: u32,
    instances: u32,
    parked: u32,
    /// How many are to be parked now.
    parked_target: u32,
    /// Shared addresses that a proxy owns.
    owned: u32,
    drained: bool,
    /// What a proxy has to do; null: it is a host, or not alive.
    load: Option<LoadObject>,
    underlay_address: String,
    endpoint: String,
    /// Where gateways reach functions on it; null: it takes none.
    relay: Option<String>,
    version: String,
}

/// Since the last heartbeat: on interfaces in VPCs in both directions, and of all processors.
#[derive(Serialize)]
struct LoadObject {
    bits_per_second: u64,
    packets_per_second: u64,
    cpu_percent: f64,
}

impl From<v1::ProxyLoad> for LoadObject {
    fn from(load: v1::ProxyLoad) -> Self {
        let v1::ProxyLoad { bits_per_second, packets_per_second, cpu_permille } = load;
        Self { bits_per_second, packets_per_second, cpu_percent: f64::from(cpu_permille) / 10.0 }
    }
}

impl From<v1::Host> for HostRow {
    fn from(host: v1::Host) -> Self {
        let role = match host.role() {
            v1::Role::Host => "host",
            v1::Role::Proxy => "proxy",
            v1::Role::Unspecified => "unknown",
        };
        // Every agent reports its version with its first heartbeat.
        let heard_of = host.alive || !host.version.is_empty();
        Self {
            name: host.name,
            role,
            alive: host.alive,
            heartbeat_age_ms: heard_of.then_some(host.heartbeat_age_ms),
            slots: host.slots,
            instances: host.instances,
            parked: host.parked,
            parked_target: host.parked_target,
            owned: host.owned,
            drained: host.drained,
            load: host.load.map(Into::into),
            underlay_address: host.underlay_address,
            endpoint: host.endpoint,
            relay: some(host.relay),
            version: host.version,
        }
    }
}

impl Row for HostRow {
    const HEADER: &'static [&'static str] = &[
        "NAME",
        "ROLE",
        "ALIVE",
        "LAST HEARD",
        "SLOTS",
        "INSTANCES",
        "PARKED",
        "OWNS",
        "LOAD",
        "UNDERLAY",
        "ENDPOINT",
        "RELAY",
        "VERSION",
    ];

    fn cells(&self) -> Vec<String> {
        let of_host =
            |number: u32| if self.role == "host" { number.to_string() } else { "-".into() };
        let parked = match self.role {
            "host" => format!("{} of {}", self.parked, self.parked_target),
            _ => "-".to_owned(),
        };
        let owns = match (self.role, self.drained) {
            ("proxy", false) => self.owned.to_string(),
            ("proxy", true) => format!("{} (drained)", self.owned),
            _ => "-".into(),
        };
        let load = self.load.as_ref().map(|load| {
            let (mbits, packets) = (load.bits_per_second as f64 / 1e6, load.packets_per_second);
            format!("{mbits:.1} Mbit/s, {packets} packets/s, {:.0} % CPU", load.cpu_percent)
        });
        let heard = self.heartbeat_age_ms.map(|age| format!("{:.1} s", age as f64 / 1000.0));
        vec![
            self.name.clone(),
            self.role.to_owned(),
            if self.alive { "yes" } else { "no" }.to_owned(),
            dash(heard.as_deref()),
            of_host(self.slots),
            of_host(self.instances),
            parked,
            owns,
            dash(load.as_deref()),
            self.underlay_address.clone(),
            self.endpoint.clone(),
            dash(self.relay.as_deref()),
            dash(some(self.version.clone()).as_deref()),
        ]
    }
}

/// A microVM.
#[derive(Serialize)]
pub struct InstanceRow {
    id: String,
    #[serde(skip)]
    short_id: String,
    hostname: String,
    vpc: String,
    host: String,
    template: String,
    address: String,
    /// Null: not known.
    shared_address: Option<String>,
    mac: String,
    slot: u32,
    pid: u32,
    state: &'static str,
    reason: Option<String>,
    /// None: the default ones of its VPC.
    security_groups: Vec<String>,
    /// Null: not known, or it does not run. So is the usage.
    limits: Option<LimitsObject>,
    usage: Option<UsageObject>,
}

/// What a microVM holds of what it may be limited in.
#[derive(Serialize)]
struct UsageObject {
    flows: u32,
    ports: u32,
}

impl InstanceRow {
    fn new(instance: v1::Instance, id_length: usize) -> Self {
        let state = match instance.state() {
            v1::InstanceState::Running => "running",
            v1::InstanceState::Failed => "failed",
            v1::InstanceState::Unspecified => "unknown",
        };
        Self {
            short_id: instance.id.chars().take(id_length).collect(),
            id: instance.id,
            hostname: instance.hostname,
            vpc: instance.vpc,
            host: instance.host,
            template: instance.template,
            address: instance.address,
            shared_address: some(instance.shared_address),
            mac: instance.mac,
            slot: instance.slot,
            pid: instance.pid,
            state,
            reason: some(instance.reason),
            security_groups: instance.security_groups,
            limits: instance.limits.map(Into::into),
            usage: instance.usage.map(|v1::Usage { flows, ports }| UsageObject { flows, ports }),
        }
    }
}

/// The rows of these microVMs. Ids are shortened to 8 characters, or as many as tell them apart.
pub fn instance_rows(instances: Vec<v1::Instance>) -> Vec<InstanceRow> {
    let length = id_length(instances.iter().map(|instance| instance.id.as_str()).collect());
    instances.into_iter().map(|instance| InstanceRow::new(instance, length)).collect()
}

fn id_length(mut ids: Vec<&str>) -> usize {
    ids.sort_unstable();
    let common =
        |pair: &[&str]| pair[0].chars().zip(pair[1].chars()).take_while(|(a, b)| a == b).count();
    ids.windows(2).map(|pair| common(pair) + 1).max().unwrap_or(0).max(8)
}

impl Row for InstanceRow {
    const HEADER: &'static [&'static str] = &[
        "ID", "HOSTNAME", "VPC", "HOST", "TEMPLATE", "SLOT", "ADDRESS", "SEEN AS", "PID", "STATE",
        "FLOWS", "PORTS", "REASON",
    ];

    fn cells(&self) -> Vec<String> {
        let (usage, limits) = (self.usage.as_ref(), self.limits.as_ref());
        let flows = usage.map(|usage| held(usage.flows, limits.and_then(|it| it.flows)));
        let ports = usage.map(|usage| held(usage.ports, limits.and_then(|it| it.ports)));
        vec![
            self.short_id.clone(),
            self.hostname.clone(),
            self.vpc.clone(),
            self.host.clone(),
            self.template.clone(),
            self.slot.to_string(),
            self.address.clone(),
            dash(self.shared_address.as_deref()),
            self.pid.to_string(),
            self.state.to_owned(),
            dash(flows.as_deref()),
            dash(ports.as_deref()),
            dash(self.reason.as_deref()),
        ]
    }
}

/// What is held, with its limit if there is one, such as `7/50`.
fn held(number: u32, limit: Option<u32>) -> String {
    limit.map_or_else(|| number.to_string(), |limit| format!("{number}/{limit}"))
}

/// A microVM that was just started, and how long that took on its host.
#[derive(Serialize)]
pub struct StartedRow {
    #[serde(flatten)]
    instance: InstanceRow,
    timings: Option<StartTimings>,
}

/// Nanoseconds from the moment the host's agent had the request.
#[derive(Serialize)]
struct StartTimings {
    requested_unix_ns: u64,
    cloned_ns: u64,
    attach_start_ns: u64,
    attach_end_ns: u64,
    released_ns: u64,
    ready_ns: u64,
    cold: bool,
}

/// The rows of these started microVMs.
pub fn started_rows(started: Vec<v1::RunInstanceResponse>) -> Result<Vec<StartedRow>, Error> {
    let mut instances = Vec::with_capacity(started.len());
    let mut timings = Vec::with_capacity(started.len());
    for response in started {
        instances.push(response.instance.ok_or(Error::Incomplete("the instance"))?);
        timings.push(response.timings.map(|timings| StartTimings {
            requested_unix_ns: timings.requested_unix_ns,
            cloned_ns: timings.cloned_ns,
            attach_start_ns: timings.attach_start_ns,
            attach_end_ns: timings.attach_end_ns,
            released_ns: timings.released_ns,
            ready_ns: timings.ready_ns,
            cold: timings.cold,
        }));
    }
    let rows = instance_rows(instances).into_iter().zip(timings);
    Ok(rows.map(|(instance, timings)| StartedRow { instance, timings }).collect())
}

impl Row for StartedRow {
    const HEADER: &'static [&'static str] = &[
        "ID",
        "HOSTNAME",
        "VPC",
        "HOST",
        "TEMPLATE",
        "SLOT",
        "ADDRESS",
        "SEEN AS",
        "PID",
        "READY AFTER",
        "POOL",
    ];

    fn cells(&self) -> Vec<String> {
        let mut cells = self.instance.cells();
        cells.truncate(9);
        let timings = self.timings.as_ref();
        let pool = |timings: &StartTimings| if timings.cold { "cold" } else { "parked" };
        cells.push(dash(timings.map(|timings| us(timings.ready_ns)).as_deref()));
        cells.push(dash(timings.map(pool)));
        cells
    }
}

/// A microVM that was just stopped.
#[derive(Serialize)]
pub struct StoppedRow {
    /// Id.
    pub id: String,
}

impl Row for StoppedRow {
    const HEADER: &'static [&'static str] = &["STOPPED"];

    fn cells(&self) -> Vec<String> {
        vec![self.id.clone()]
    }
}

/// A host or proxy that was just forgotten.
#[derive(Serialize)]
pub struct ForgottenRow {
    /// Name.
    pub name: String,
}

impl Row for ForgottenRow {
    const HEADER: &'static [&'static str] = &["FORGOTTEN"];

    fn cells(&self) -> Vec<String> {
        vec![self.name.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Output;
    use crate::render::{list, one};

    fn instance(id: &str) -> v1::Instance {
        v1::Instance {
            id: id.into(),
            vpc: "blue".into(),
            host: "h1".into(),
            hostname: "web".into(),
            address: "169.254.1.2".into(),
            shared_address: "10.1.0.9".into(),
            mac: "02:00:00:00:00:01".into(),
            slot: 1,
            pid: 4711,
            state: v1::InstanceState::Running.into(),
            reason: String::new(),
            security_groups: vec![],
            limits: Some(v1::Limits { flows: 50, ..v1::Limits::default() }),
            usage: Some(v1::Usage { flows: 7, ports: 3 }),
            template: "small".into(),
            ..v1::Instance::default()
        }
    }

    #[test]
    fn vpcs() {
        let row = VpcRow::from(v1::Vpc {
            name: "blue".into(),
            vni: 4096,
            cidr: "10.1.0.0/16".into(),
            shared_address: "10.1.0.9".into(),
            interface: "eth1".into(),
            gateway: String::new(),
            ports_per_host: 1024,
            resolver: "10.1.0.2".into(),
            search_domain: String::new(),
            cidr_v6: "fd00:1::/64".into(),
            shared_address_v6: "fd00:1::9".into(),
            gateway_v6: String::new(),
            more_addresses: vec![v1::SharedAddress {
                address: "10.1.0.10".into(),
                address_v6: "fd00:1::a".into(),
                vni: 4097,
            }],
            public: "blue-out".into(),
            public_of: String::new(),
        });
        assert_eq!(
            one(Output::Table, &row),
            "NAME  VNI   CIDR         SHARED ADDRESS       INTERFACE  GATEWAY  CIDR V6      \
             SHARED ADDRESS V6     GATEWAY V6  PORTS PER HOST  RESOLVER  SEARCH DOMAIN  PUBLIC\n\
             blue  4096  10.1.0.0/16  10.1.0.9, 10.1.0.10  eth1       -        fd00:1::/64  \
             fd00:1::9, fd00:1::a  -           1024            10.1.0.2  -              blue-out"
        );
        let json: serde_json::Value = serde_json::from_str(&one(Output::Json, &row)).unwrap();
        assert_eq!(json["vni"], 4096);
        assert!(json["gateway"].is_null() && json["gateway_v6"].is_null());
        assert_eq!(json["shared_address_v6"], "fd00:1::9");
        assert_eq!(json["more_addresses"][0]["vni"], 4097);
    }

    #[test]
    fn hosts() {
        let host = v1::Host {
            name: "h1".into(),
            role: v1::Role::Host.into(),
            endpoint: "http://192.0.2.1:7701".into(),
            underlay_address: "192.0.2.1".into(),
            slots: 64,
            parked: 8,
            parked_target: 12,
            instances: 3,
            alive: true,
            heartbeat_age_ms: 449,
            version: "0.1.0".into(),
            owned: 0,
            drained: false,
            load: None,
            templates: vec![],
            relay: "192.0.2.1:7800".into(),
        };
        let never_heard_of = v1::Host {
            name: "p1".into(),
            role: v1::Role::Proxy.into(),
            alive: false,
            version: String::new(),
            owned: 3,
            drained: true,
            relay: String::new(),
            load: Some(v1::ProxyLoad {
                bits_per_second: 12_345_678,
                packets_per_second: 1500,
                cpu_permille: 257,
            }),
            ..host.clone()
        };
        let rows = [HostRow::from(host), HostRow::from(never_heard_of)];
        assert_eq!(
            list(Output::Table, &rows),
            "NAME  ROLE   ALIVE  LAST HEARD  SLOTS  INSTANCES  PARKED   OWNS         LOAD                                   UNDERLAY   ENDPOINT               RELAY           VERSION\n\
             h1    host   yes    0.4 s       64     3          8 of 12  -            -                                      192.0.2.1  http://192.0.2.1:7701  192.0.2.1:7800  0.1.0\n\
             p1    proxy  no     -           -      -          -        3 (drained)  12.3 Mbit/s, 1500 packets/s, 26 % CPU  192.0.2.1  http://192.0.2.1:7701  -               -"
        );
        let json: serde_json::Value = serde_json::from_str(&list(Output::Json, &rows)).unwrap();
        assert_eq!(json[0]["heartbeat_age_ms"], 449);
        assert!(json[1]["heartbeat_age_ms"].is_null());
    }

    #[test]
    fn instances_have_short_ids_in_tables_and_whole_ones_in_json() {
        let failed = v1::Instance {
            state: v1::InstanceState::Failed.into(),
            reason: "killed by signal 9".into(),
            limits: None,
            usage: None,
            ..instance("22222222-bbbb")
        };
        let rows = instance_rows(vec![instance("11111111-aaaa"), failed]);
        assert_eq!(
            list(Output::Table, &rows),
            "ID        HOSTNAME  VPC   HOST  TEMPLATE  SLOT  ADDRESS      SEEN AS   PID   STATE    FLOWS  PORTS  REASON\n\
             11111111  web       blue  h1    small     1     169.254.1.2  10.1.0.9  4711  running  7/50   3      -\n\
             22222222  web       blue  h1    small     1     169.254.1.2  10.1.0.9  4711  failed   -      -      killed by signal 9"
        );
        let json: serde_json::Value = serde_json::from_str(&list(Output::Json, &rows)).unwrap();
        assert_eq!(json[0]["id"], "11111111-aaaa");
        assert_eq!(json[0]["usage"], serde_json::json!({ "flows": 7, "ports": 3 }));
        assert_eq!(json[0]["limits"]["flows"], 50);
        assert!(json[0]["limits"]["ports"].is_null(), "there is no such limit");
        assert_eq!(json[1]["state"], "failed");
        assert!(json[1]["limits"].is_null() && json[1]["usage"].is_null());
        assert!(json[0].get("short_id").is_none());
    }

    #[test]
    fn short_ids_are_as_long_as_it_takes() {
        assert_eq!(id_length(vec![]), 8);
        assert_eq!(id_length(vec!["abcdefghij-1", "b", "abcdefghij-2"]), 12);
    }

    #[test]
    fn nothing_is_a_header_or_an_empty_array() {
        let none: [StoppedRow; 0] = [];
        assert_eq!(list(Output::Table, &none), "STOPPED");
        assert_eq!(list(Output::Json, &none), "[]");
    }

    #[test]
    fn started_ones_tell_how_long_it_took() {
        let timings = v1::StartTimings { ready_ns: 1_234_567, ..v1::StartTimings::default() };
        let response = v1::RunInstanceResponse {
            instance: Some(instance("11111111-aaaa")),
            timings: Some(timings),
            reply: None,
        };
        let rows = started_rows(vec![response]).unwrap();
        let text = list(Output::Table, &rows);
        assert!(text.ends_with("10.1.0.9  4711  1234.6 µs    parked"), "{text}");
        let json: serde_json::Value = serde_json::from_str(&list(Output::Json, &rows)).unwrap();
        assert_eq!(json[0]["id"], "11111111-aaaa");
        assert_eq!(json[0]["timings"]["ready_ns"], 1_234_567);
        assert!(started_rows(vec![v1::RunInstanceResponse::default()]).is_err());
    }
}
