//! Flows of a host, for Prometheus: how many begin and end, what of it is logged, and how near to
//! exhaustion the ports are.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use warren_abi::flowlog::What;
use warren_abi::maps::Traffic;

use crate::datapath::{Carried, FlowTotals, PortUse};
use crate::flowlog::record::protocol_name;

/// What is read at the moment of a scrape. What could not be read is left out.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Beginnings and ends.
    pub totals: Option<FlowTotals>,
    /// Lines that were written to the log, and events that could not be; none: flows are not logged.
    pub logged: Option<(u64, u64)>,
    /// Ports of this host, by VNI.
    pub ports: Vec<(u32, u32)>,
    /// Ports in use.
    pub used: Vec<PortUse>,
    /// What VPCs' instances sent and received, by VNI.
    pub traffic: Vec<(u32, Carried)>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Ended {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Logged {
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Vpc {
    vni: u32,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Used {
    vni: u32,
    protocol: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OneWay {
    vni: u32,
    direction: &'static str,
}

fn directions(traffic: &[(u32, Carried)]) -> impl Iterator<Item = (u32, &'static str, Traffic)> {
    let both = |&(vni, Carried { sent, received })| [(vni, "out", sent), (vni, "in", received)];
    traffic.iter().flat_map(both)
}

/// Reads a snapshot at each scrape.
pub struct Flows<F>(pub F);

impl<F> fmt::Debug for Flows<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Flows")
    }
}

impl<F: Fn() -> Snapshot + Send + Sync + 'static> Collector for Flows<F> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Snapshot { totals, logged, ports, used, traffic } = (self.0)();
        let (counter, gauge) = (ConstCounter::<u64>::TYPE, ConstGauge::<i64>::TYPE);
        if let Some(totals) = &totals {
            let begun = ConstCounter::new(totals.of(What::Begun));
            let help = "Flows that began";
            begun.encode(encoder.encode_descriptor("flows_begun", help, None, counter)?)?;
            let help = "Flows that ended, by reason";
            let mut family = encoder.encode_descriptor("flows_ended", help, None, counter)?;
            for (what, count) in &totals.counts {
                if *what != What::Begun {
                    let labels = Ended { reason: what.name() };
                    ConstCounter::new(*count).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        if let (Some((written, unwritten)), Some(FlowTotals { lost, .. })) = (logged, totals) {
            let help = "Events of flows: in the log (written), lost since the disk failed \
                        (unwritten), or since they were too many (lost)";
            let mut family = encoder.encode_descriptor("flow_log_events", help, None, counter)?;
            for (outcome, count) in [("written", written), ("unwritten", unwritten), ("lost", lost)]
            {
                let labels = Logged { outcome };
                ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "Ports of the VPC's shared address that this host has";
        let mut family = encoder.encode_descriptor("ports", help, None, gauge)?;
        for (vni, count) in ports {
            ConstGauge::new(i64::from(count)).encode(family.encode_family(&Vpc { vni })?)?;
        }
        let help = "Ports in use: of UDP; of TCP and ICMP, towards the destination that most \
                    flows go to, since others may use the same ports";
        let mut family = encoder.encode_descriptor("ports_used", help, None, gauge)?;
        for PortUse { vni, protocol, ports, .. } in used {
            let labels = Used { vni, protocol: protocol_name(u32::from(protocol)) };
            ConstGauge::new(i64::from(ports)).encode(family.encode_family(&labels)?)?;
        }
        let help = "Packets that cross the TAPs of the VPC's instances, from and to the guests";
        let mut family = encoder.encode_descriptor("vpc_packets", help, None, counter)?;
        for (vni, direction, one_way) in directions(&traffic) {
            let labels = OneWay { vni, direction };
            ConstCounter::new(one_way.packets).encode(family.encode_family(&labels)?)?;
        }
        let help = "Bytes of these packets, with Ethernet headers";
        let mut family = encoder.encode_descriptor("vpc", help, Some(&Unit::Bytes), counter)?;
        for (vni, direction, one_way) in directions(&traffic) {
            let labels = OneWay { vni, direction };
            ConstCounter::new(one_way.bytes).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;
    use warren_abi::wire::{TCP, UDP};

    use super::*;

    fn text(snapshot: Snapshot) -> String {
        let mut registry = Registry::with_prefix("warren");
        registry.register_collector(Box::new(Flows(move || snapshot.clone())));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn flows_events_and_ports_are_told() {
        let counts = vec![(What::Begun, 9), (What::Expired, 4), (What::TakenOver, 0)];
        let text = text(Snapshot {
            totals: Some(FlowTotals { counts, lost: 3 }),
            logged: Some((12, 1)),
            ports: vec![(100, 1024)],
            used: vec![
                PortUse { vni: 100, protocol: UDP, ports: 7, ..PortUse::default() },
                PortUse { vni: 100, protocol: TCP, ports: 1000, ..PortUse::default() },
            ],
            traffic: vec![(
                100,
                Carried {
                    sent: Traffic { packets: 5, bytes: 500 },
                    received: Traffic { packets: 6, bytes: 700 },
                },
            )],
        });
        for line in [
            "warren_flows_begun_total 9",
            r#"warren_flows_ended_total{reason="expired"} 4"#,
            r#"warren_flows_ended_total{reason="taken-over"} 0"#,
            r#"warren_flow_log_events_total{outcome="written"} 12"#,
            r#"warren_flow_log_events_total{outcome="unwritten"} 1"#,
            r#"warren_flow_log_events_total{outcome="lost"} 3"#,
            r#"warren_ports{vni="100"} 1024"#,
            r#"warren_ports_used{vni="100",protocol="udp"} 7"#,
            r#"warren_ports_used{vni="100",protocol="tcp"} 1000"#,
            r#"warren_vpc_packets_total{vni="100",direction="out"} 5"#,
            r#"warren_vpc_bytes_total{vni="100",direction="in"} 700"#,
            "# TYPE warren_vpc_bytes counter",
            "# TYPE warren_ports_used gauge",
        ] {
            assert!(text.lines().any(|other| other == line), "no `{line}` in\n{text}");
        }
        assert!(!text.contains(r#"reason="begun""#), "{text}");
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let text = text(Snapshot::default());
        assert!(!text.contains("begun") && !text.contains("flow_log"), "{text}");
    }
}
