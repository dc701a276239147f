//! A line of the log. `docs/observability.md` tells users what the fields mean.

use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use warren_abi::flow::TICK_NS;
use warren_abi::flowlog::{FlowEvent, What};
use warren_abi::wire::{ICMP, TCP, UDP};

use super::owners::{Names, Owner};
use crate::clock::monotonic_ns;

/// A line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// About a flow or a mapping.
    Flow(Box<Record>),
    /// Events that were lost.
    Lost {
        /// When it was noticed.
        time: Timestamp,
        /// Says `lost`.
        event: Lost,
        /// Name of the host.
        host: String,
        /// How many, since the last line that told so.
        events: u64,
    },
}

/// The name of a line about lost events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lost {
    /// The only one.
    Lost,
}

impl Line {
    /// That events were lost.
    pub fn lost(host: &str, events: u64, clock: WallClock) -> Self {
        Self::Lost { time: clock.now, event: Lost::Lost, host: host.to_owned(), events }
    }
}

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// A flow began.
    FlowStart,
    /// A flow ended.
    FlowEnd,
    /// A UDP port was mapped, for all peers.
    MappingStart,
    /// A UDP port is mapped no more.
    MappingEnd,
}

/// A flow, or a mapping, when it began or ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// When it was.
    pub time: Timestamp,
    /// What it was.
    pub event: Event,
    /// Name of the host.
    pub host: String,
    /// Name of the VPC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vpc: Option<String>,
    /// Its network identifier.
    pub vni: u32,
    /// The instance; none: the host itself, or it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<Uuid>,
    /// The slot; none: the host itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<u32>,
    /// Counts the slot's attachments: an instance each.
    pub generation: u32,
    /// `tcp`, `udp` or `icmp`.
    pub protocol: String,
    /// The guest's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub srcaddr: Option<IpAddr>,
    /// The guest's port, or ICMP echo identifier.
    pub srcport: u16,
    /// The VPC's shared address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nat_srcaddr: Option<IpAddr>,
    /// The port or identifier that stands for the guest's.
    pub nat_srcport: u16,
    /// The peer; none for mappings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dstaddr: Option<IpAddr>,
    /// The peer's port; none for mappings and ICMP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dstport: Option<u16>,
    /// When it began.
    pub start: Timestamp,
    /// How it ended, and what it was; none at its beginning.
    #[serde(flatten)]
    pub end: Option<End>,
}

/// How a flow ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// When it was removed, and its port free.
    pub end: Timestamp,
    /// When the last packet that kept it alive came.
    pub last: Timestamp,
    /// Why it ended.
    pub reason: String,
    /// What it carried; none for mappings.
    #[serde(flatten)]
    pub traffic: Option<Totals>,
}

/// What a flow carried: packets, and bytes with their IP headers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// From the guest.
    pub packets_out: u64,
    /// From the guest.
    pub bytes_out: u64,
    /// To the guest.
    pub packets_in: u64,
    /// To the guest.
    pub bytes_in: u64,
}

/// Both clocks at one moment.
#[derive(Clone, Copy, Debug)]
pub struct WallClock {
    now: Timestamp,
    unix_ns: i128,
    monotonic_ns: u64,
}

impl WallClock {
    /// Reads both.
    pub fn now() -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_ns = unix.as_nanos() as i128;
        Self { now: timestamp(unix_ns), unix_ns, monotonic_ns: monotonic_ns() }
    }

    /// When a moment of `CLOCK_MONOTONIC` was, to a millisecond.
    pub fn at(self, monotonic_ns: u64) -> Timestamp {
        timestamp(self.unix_ns - i128::from(self.monotonic_ns) + i128::from(monotonic_ns))
    }

    /// When a tick began. Ticks count up to 146 years.
    pub fn at_tick(self, tick: u32) -> Timestamp {
        self.at(u64::from(tick) * TICK_NS)
    }
}

fn timestamp(unix_ns: i128) -> Timestamp {
    Timestamp::from_millisecond((unix_ns / 1_000_000) as i64).unwrap_or_default()
}

/// The name of a protocol.
pub fn protocol_name(protocol: u32) -> String {
    match u8::try_from(protocol) {
        Ok(TCP) => "tcp".to_owned(),
        Ok(UDP) => "udp".to_owned(),
        Ok(ICMP) => "icmp".to_owned(),
        _ => protocol.to_string(),
    }
}

impl Record {
    /// The line for an event; none if it is of a later version.
    pub fn new(
        event: &FlowEvent,
        host: &str,
        names: &(impl Names + ?Sized),
        clock: WallClock,
    ) -> Option<Self> {
        let FlowEvent { at_ns, sent, received, key, vni, began, last, port, .. } = *event;
        let what = What::from_index(event.what)?;
        let owner = names.owner(key.ifindex, key.generation);
        let peer = IpAddr::from(key.peer);
        let srcaddr = owner.address_towards(peer);
        let Owner { slot, instance, .. } = owner;
        let vpc = names.vpc(vni);
        let nat_srcaddr = vpc.as_ref().and_then(|vpc| vpc.address_towards(peer));
        let vpc = vpc.map(|vpc| vpc.name);
        let time = clock.at(at_ns);
        let (is_mapping, is_start) = (key.is_mapping(), what == What::Begun);
        let end = End {
            end: time,
            // One that rules forbade meanwhile is set back, to before it began perhaps.
            last: clock.at_tick(if (last.wrapping_sub(began) as i32) < 0 { began } else { last }),
            reason: what.name().to_owned(),
            traffic: (!is_mapping).then_some(Totals {
                packets_out: sent.packets,
                bytes_out: sent.bytes,
                packets_in: received.packets,
                bytes_in: received.bytes,
            }),
        };
        Some(Self {
            time,
            event: match (is_mapping, is_start) {
                (false, true) => Event::FlowStart,
                (false, false) => Event::FlowEnd,
                (true, true) => Event::MappingStart,
                (true, false) => Event::MappingEnd,
            },
            host: host.to_owned(),
            vpc,
            vni,
            instance,
            slot,
            generation: key.generation,
            protocol: protocol_name(key.protocol),
            srcaddr,
            srcport: key.guest_port.get(),
            nat_srcaddr,
            nat_srcport: port.get(),
            dstaddr: (!is_mapping).then_some(peer),
            dstport: (!is_mapping && key.protocol != u32::from(ICMP)).then(|| key.peer_port.get()),
            start: if is_start { time } else { clock.at_tick(began) },
            end: (!is_start).then_some(end),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use warren_abi::maps::{OutKey, Traffic};
    use warren_abi::wire::{Be16, Ip, Ipv4};

    use super::*;
    use crate::flowlog::owners::NamedVpc;

    struct Fixed;

    impl Names for Fixed {
        fn owner(&self, ifindex: u32, generation: u32) -> Owner {
            assert_eq!((ifindex, generation), (9, 4));
            let address = Some(Ipv4Addr::new(169, 254, 0, 3));
            let address_v6 = Some("fd00::3".parse().unwrap());
            Owner { slot: Some(3), address, address_v6, instance: Some(Uuid::from_u128(5)) }
        }
        fn vpc(&self, vni: u32) -> Option<NamedVpc> {
            let shared_address = Ipv4Addr::new(10, 0, 0, 100);
            (vni == 100).then(|| NamedVpc {
                name: "blue".to_owned(),
                shared_address,
                shared_address_v6: Some("2001:db8::100".parse().unwrap()),
            })
        }
    }

    fn event(peer: Ip, what: What) -> FlowEvent {
        FlowEvent {
            at_ns: 3 * TICK_NS + 5_000_000,
            sent: Traffic { packets: 2, bytes: 80 },
            received: Traffic { packets: 1, bytes: 40 },
            key: OutKey {
                ifindex: 9,
                generation: 4,
                peer,
                guest_port: Be16::new(1000),
                peer_port: Be16::new(80),
                protocol: u32::from(if peer.is_unspecified() { UDP } else { TCP }),
            },
            vni: 100,
            began: 1,
            last: 2,
            port: Be16::new(4097),
            what: what as u8,
            reserved: 0,
        }
    }

    /// `CLOCK_MONOTONIC` began a second after 1970.
    const CLOCK: WallClock = WallClock {
        now: Timestamp::UNIX_EPOCH,
        unix_ns: 2_000_000_000,
        monotonic_ns: 1_000_000_000,
    };

    fn line(event: &FlowEvent) -> serde_json::Value {
        let record = Record::new(event, "h1", &Fixed, CLOCK).expect("it is known");
        let text =
            serde_json::to_string(&Line::Flow(Box::new(record.clone()))).expect("it is JSON");
        let again: Line = serde_json::from_str(&text).expect("it can be read");
        assert_eq!(again, Line::Flow(Box::new(record)));
        serde_json::from_str(&text).expect("it is JSON")
    }

    #[test]
    fn lines_are_what_the_docs_say() {
        let peer = Ip::v4(Ipv4::new([10, 0, 0, 10]));
        let expected = serde_json::json!({
            "time": "1970-01-01T00:00:04.226Z", "event": "flow-end", "host": "h1", "vpc": "blue",
            "vni": 100, "instance": "00000000-0000-0000-0000-000000000005", "slot": 3,
            "generation": 4, "protocol": "tcp", "srcaddr": "169.254.0.3", "srcport": 1000,
            "nat_srcaddr": "10.0.0.100", "nat_srcport": 4097, "dstaddr": "10.0.0.10",
            "dstport": 80, "start": "1970-01-01T00:00:02.073Z", "end": "1970-01-01T00:00:04.226Z",
            "last": "1970-01-01T00:00:03.147Z", "reason": "closed", "packets_out": 2,
            "bytes_out": 80, "packets_in": 1, "bytes_in": 40,
        });
        assert_eq!(line(&event(peer, What::Closed)), expected);

        let begun = line(&event(peer, What::Begun));
        assert_eq!((&begun["event"], &begun["start"]), (&"flow-start".into(), &begun["time"]));
        assert!(begun.get("end").is_none() && begun.get("reason").is_none(), "{begun}");

        let mapping = line(&event(Ip::UNSPECIFIED, What::Expired));
        assert_eq!(mapping["event"], "mapping-end");
        assert!(mapping.get("dstaddr").is_none() && mapping.get("bytes_out").is_none());
    }

    #[test]
    fn addresses_are_of_the_peer_s_family() {
        let peer = IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xa]);
        let line = line(&event(peer.into(), What::Begun));
        assert_eq!(
            (&line["srcaddr"], &line["dstaddr"]),
            (&"fd00::3".into(), &"2001:db8::a".into())
        );
        assert_eq!(line["nat_srcaddr"], "2001:db8::100");
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let mut event = event(Ip::v4(Ipv4::new([10, 0, 0, 10])), What::Begun);
        event.vni = 7;
        let line = line(&event);
        assert!(line.get("vpc").is_none() && line.get("nat_srcaddr").is_none(), "{line}");
        event.what = 200;
        assert!(Record::new(&event, "h1", &Fixed, CLOCK).is_none(), "a later version's");
    }

    #[test]
    fn lost_events_are_a_line() {
        let text = serde_json::to_string(&Line::lost("h1", 5, CLOCK)).unwrap();
        assert_eq!(
            text,
            r#"{"time":"1970-01-01T00:00:00Z","event":"lost","host":"h1","events":5}"#
        );
        assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), Line::lost("h1", 5, CLOCK));
    }
}
