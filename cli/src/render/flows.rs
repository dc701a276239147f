//! The rows of flows, and of who had a port.

use jiff::Timestamp;
use serde::Serialize;
use warren_proto::v1;

use super::{Row, dash, some};

/// A flow.
#[derive(Serialize)]
pub struct FlowRow {
    host: String,
    instance: Option<String>,
    vpc: Option<String>,
    vni: u32,
    slot: Option<u32>,
    protocol: String,
    guest_address: String,
    guest_port: u32,
    nat_address: String,
    nat_port: u32,
    peer_address: String,
    peer_port: u32,
    state: String,
    packets_out: u64,
    bytes_out: u64,
    packets_in: u64,
    bytes_in: u64,
    age_ms: u64,
    idle_ms: u64,
}

impl FlowRow {
    /// A flow of a host's.
    pub fn new(host: String, flow: v1::Flow) -> Self {
        Self {
            host,
            instance: some(flow.instance),
            vpc: some(flow.vpc),
            vni: flow.vni,
            slot: (flow.slot != 0).then_some(flow.slot),
            protocol: flow.protocol,
            guest_address: flow.guest_address,
            guest_port: flow.guest_port,
            nat_address: flow.nat_address,
            nat_port: flow.nat_port,
            peer_address: flow.peer_address,
            peer_port: flow.peer_port,
            state: flow.state,
            packets_out: flow.packets_out,
            bytes_out: flow.bytes_out,
            packets_in: flow.packets_in,
            bytes_in: flow.bytes_in,
            age_ms: flow.age_ms,
            idle_ms: flow.idle_ms,
        }
    }
}

impl Row for FlowRow {
    const HEADER: &'static [&'static str] = &[
        "HOST", "INSTANCE", "VPC", "PROTOCOL", "GUEST", "NAT", "PEER", "STATE", "OUT", "IN", "AGE",
        "IDLE",
    ];

    fn cells(&self) -> Vec<String> {
        vec![
            self.host.clone(),
            self.instance.as_deref().map_or_else(|| "-".to_owned(), short),
            dash(self.vpc.as_deref()),
            self.protocol.clone(),
            place(&self.guest_address, self.guest_port),
            place(&self.nat_address, self.nat_port),
            place(&self.peer_address, self.peer_port),
            self.state.clone(),
            traffic(self.packets_out, self.bytes_out),
            traffic(self.packets_in, self.bytes_in),
            age(self.age_ms),
            age(self.idle_ms),
        ]
    }
}

/// Who had a port, and when.
#[derive(Serialize)]
pub struct MappingRow {
    host: String,
    instance: Option<String>,
    vpc: Option<String>,
    slot: Option<u32>,
    protocol: String,
    guest_address: String,
    guest_port: u32,
    nat_address: String,
    nat_port: u32,
    /// Missing where it is anybody.
    peer_address: Option<String>,
    peer_port: Option<u32>,
    start: Option<Timestamp>,
    /// Missing if it goes on, or is not known.
    end: Option<Timestamp>,
    live: bool,
    reason: Option<String>,
}

impl MappingRow {
    /// One that a host told of.
    pub fn new(host: String, mapping: v1::Mapping) -> Self {
        let peer_address = some(mapping.peer_address);
        let time = |ms| Timestamp::from_millisecond(ms).ok();
        Self {
            host,
            instance: some(mapping.instance),
            vpc: some(mapping.vpc),
            slot: (mapping.slot != 0).then_some(mapping.slot),
            protocol: mapping.protocol,
            guest_address: mapping.guest_address,
            guest_port: mapping.guest_port,
            nat_address: mapping.nat_address,
            nat_port: mapping.nat_port,
            peer_port: peer_address.is_some().then_some(mapping.peer_port),
            peer_address,
            start: time(mapping.start_unix_ms),
            end: mapping.end_unix_ms.and_then(time),
            live: mapping.live,
            reason: some(mapping.reason),
        }
    }
}

impl Row for MappingRow {
    const HEADER: &'static [&'static str] =
        &["HOST", "INSTANCE", "PROTOCOL", "GUEST", "NAT", "PEER", "START", "END", "REASON"];

    fn cells(&self) -> Vec<String> {
        let time = |time: Option<Timestamp>| time.map(|time| format!("{time:.0}"));
        let end = match (self.end, self.live) {
            (_, true) => "live".to_owned(),
            (None, false) => "not known".to_owned(),
            (end, false) => dash(time(end).as_deref()),
        };
        vec![
            self.host.clone(),
            dash(self.instance.as_deref()),
            self.protocol.clone(),
            place(&self.guest_address, self.guest_port),
            place(&self.nat_address, self.nat_port),
            self.peer_address.as_deref().map_or_else(
                || "any".to_owned(),
                |address| place(address, self.peer_port.unwrap_or_default()),
            ),
            dash(time(self.start).as_deref()),
            end,
            dash(self.reason.as_deref()),
        ]
    }
}

/// The beginning of an id: enough to go on with.
fn short(id: &str) -> String {
    id.chars().take(8).collect()
}

/// An address and a port, which ICMP's peers do not have.
fn place(address: &str, port: u32) -> String {
    match (address, port) {
        ("", port) => format!("-:{port}"),
        (address, 0) => address.to_owned(),
        (address, port) if address.contains(':') => format!("[{address}]:{port}"),
        (address, port) => format!("{address}:{port}"),
    }
}

fn traffic(packets: u64, bytes: u64) -> String {
    let bytes = match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..10_000_000 => format!("{} kB", bytes / 1000),
        10_000_000..10_000_000_000 => format!("{} MB", bytes / 1_000_000),
        _ => format!("{} GB", bytes / 1_000_000_000),
    };
    format!("{packets} / {bytes}")
}

fn age(ms: u64) -> String {
    match ms / 1000 {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Output;
    use crate::render::list;

    #[test]
    fn flows_have_both_sides_of_the_nat() {
        let flow = v1::Flow {
            instance: "11111111-2222-3333-4444-555555555555".into(),
            vpc: "blue".into(),
            vni: 100,
            slot: 3,
            protocol: "tcp".into(),
            guest_address: "169.254.0.3".into(),
            guest_port: 40_000,
            nat_address: "10.0.0.100".into(),
            nat_port: 4097,
            peer_address: "2001:db8::1".into(),
            peer_port: 6379,
            state: "established".into(),
            packets_out: 3,
            bytes_out: 180,
            packets_in: 90_000,
            bytes_in: 130_000_000,
            age_ms: 240_000,
            idle_ms: 1500,
        };
        let rows = [FlowRow::new("h1".into(), flow)];
        assert_eq!(
            list(Output::Table, &rows).lines().nth(1).unwrap(),
            "h1    11111111  blue  tcp       169.254.0.3:40000  10.0.0.100:4097  \
             [2001:db8::1]:6379  established  3 / 180 B  90000 / 130 MB  4 min  1 s"
        );
        let json: serde_json::Value = serde_json::from_str(&list(Output::Json, &rows)).unwrap();
        assert_eq!((&json[0]["nat_port"], &json[0]["slot"]), (&4097.into(), &3.into()));
    }

    #[test]
    fn mappings_go_on_or_end_or_nobody_knows() {
        let mapping = |peer: &str, end_unix_ms, live| v1::Mapping {
            protocol: "udp".into(),
            guest_address: "169.254.0.3".into(),
            guest_port: 1000,
            nat_address: "10.0.0.100".into(),
            nat_port: 4097,
            peer_address: peer.into(),
            peer_port: 53,
            start_unix_ms: 1_000,
            end_unix_ms,
            live,
            ..v1::Mapping::default()
        };
        let mappings = [
            mapping("", None, true),
            mapping("10.0.0.9", Some(2999), false),
            mapping("", None, false),
        ];
        let rows = mappings.map(|mapping| MappingRow::new("h1".into(), mapping));
        let table = list(Output::Table, &rows);
        let ends: Vec<_> = table
            .lines()
            .skip(1)
            .map(|line| {
                let cells: Vec<_> = line.split("  ").filter(|cell| !cell.is_empty()).collect();
                [cells[5].trim().to_owned(), cells[7].trim().to_owned()]
            })
            .collect();
        let ends: Vec<_> = ends.iter().map(|[peer, end]| (peer.as_str(), end.as_str())).collect();
        let expected =
            [("any", "live"), ("10.0.0.9:53", "1970-01-01T00:00:02Z"), ("any", "not known")];
        assert_eq!(ends, expected, "{table}");
        let json: serde_json::Value = serde_json::from_str(&list(Output::Json, &rows)).unwrap();
        assert!(json[0]["peer_port"].is_null() && json[1]["end"] == "1970-01-01T00:00:02.999Z");
    }
}
