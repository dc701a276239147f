//! What a probe found, and when.

use std::net::Ipv4Addr;

use serde_json::{Value, json};
use uuid::Uuid;
use warren_abi::probe::{IdentityReport, Outcome, Reply, Timings};

use super::{pretty, table, us};
use crate::args::Output;

/// What a probe found, and when.
pub fn probe(output: Output, reply: &Reply) -> String {
    match output {
        Output::Json => pretty(&json!({
            "outcome": reply.outcome.as_ref().ok().map(outcome_json),
            "error": reply.outcome.as_ref().err(),
            "timings": reply.timings,
        })),
        Output::Table => {
            let times = times(&reply.timings);
            match &reply.outcome {
                Ok(outcome) => format!("{}\n{times}", outcome_text(outcome)),
                Err(_) => times,
            }
        }
    }
}

fn outcome_text(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Identity(identity) => {
            let rows = identity_fields(identity);
            let rows = rows.map(|(name, value)| vec![name.replace('_', " "), value]);
            table(&["IDENTITY", ""], rows)
        }
        Outcome::Done => "done".into(),
        Outcome::Http { status, body } => {
            let text = String::from_utf8_lossy(body);
            format!("HTTP {status}, {} bytes\n{}", body.len(), text.trim_end())
        }
        Outcome::Redis(replies) => {
            let replies: Vec<_> = replies.iter().map(|reply| redis_text(reply)).collect();
            replies.join("\n")
        }
        Outcome::Udp { sent, received, longest_gap_ns } => {
            format!("{received} of {sent} came back, longest gap {}", us(*longest_gap_ns))
        }
        Outcome::Dns(addresses) if addresses.is_empty() => "no addresses".into(),
        Outcome::Dns(addresses) => {
            addresses.iter().copied().map(ipv4).collect::<Vec<_>>().join("\n")
        }
        Outcome::Bulk { bytes, corrupt_at: None } => format!("{bytes} bytes"),
        Outcome::Bulk { bytes, corrupt_at: Some(offset) } => {
            format!("{bytes} bytes, the first wrong one at offset {offset}")
        }
        Outcome::Recalled(bytes) => String::from_utf8_lossy(bytes).into_owned(),
    }
}

fn outcome_json(outcome: &Outcome) -> Value {
    match outcome {
        Outcome::Identity(identity) => {
            let fields = identity_fields(identity).map(|(name, value)| (name, Value::from(value)));
            let mut object: serde_json::Map<_, _> =
                fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            object.insert("wall_clock_ns".into(), identity.wall_clock_ns.into());
            json!({ "identity": object })
        }
        Outcome::Done => json!("done"),
        Outcome::Http { status, body } => {
            json!({ "http": { "status": status, "body": String::from_utf8_lossy(body) } })
        }
        Outcome::Redis(replies) => {
            let replies: Vec<_> =
                replies.iter().map(|reply| String::from_utf8_lossy(reply)).collect();
            json!({ "redis": replies })
        }
        Outcome::Udp { sent, received, longest_gap_ns } => json!({
            "udp": { "sent": sent, "received": received, "longest_gap_ns": longest_gap_ns }
        }),
        Outcome::Dns(addresses) => {
            json!({ "dns": addresses.iter().copied().map(ipv4).collect::<Vec<_>>() })
        }
        Outcome::Bulk { bytes, corrupt_at } => {
            json!({ "bulk": { "bytes": bytes, "corrupt_at": corrupt_at } })
        }
        Outcome::Recalled(bytes) => json!({ "recalled": String::from_utf8_lossy(bytes) }),
    }
}

fn identity_fields(identity: &IdentityReport) -> [(&'static str, String); 6] {
    let mac: Vec<_> = identity.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    [
        ("instance_id", Uuid::from_bytes(identity.instance_id).to_string()),
        ("hostname", identity.hostname.clone()),
        ("address", ipv4(identity.ipv4)),
        ("mac", mac.join(":")),
        ("random", hex(&identity.random)),
        ("wall_clock_ns", identity.wall_clock_ns.to_string()),
    ]
}

/// A RESP2 reply without its framing, as far as it is a simple one.
fn redis_text(reply: &[u8]) -> String {
    let text = String::from_utf8_lossy(reply);
    let (first, rest) = text.split_once("\r\n").unwrap_or((&text, ""));
    match first.split_at_checked(1) {
        Some(("+" | ":", value)) => value.to_owned(),
        Some(("-", message)) => format!("(error) {message}"),
        Some(("$", "-1")) => "(nil)".into(),
        Some(("$", _)) => rest.strip_suffix("\r\n").unwrap_or(rest).to_owned(),
        _ => text.escape_debug().to_string(),
    }
}

fn times(timings: &Timings) -> String {
    let since_start = |at: u64| us(at.saturating_sub(timings.start_ns));
    let mut parts = vec![format!("began {} after the guest's release", us(timings.start_ns))];
    if timings.connected_ns != 0 {
        parts.push(format!("connected after {}", since_start(timings.connected_ns)));
    }
    if timings.first_byte_ns != 0 {
        parts.push(format!("first byte after {}", since_start(timings.first_byte_ns)));
    }
    parts.push(format!("ended after {}", since_start(timings.end_ns)));
    parts.join(", ")
}

fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.filter_map(|digit| char::from_digit(digit.into(), 16)).collect()
}

fn ipv4(address: [u8; 4]) -> String {
    Ipv4Addr::from(address).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMINGS: Timings = Timings {
        start_ns: 1_000_000,
        connected_ns: 1_200_000,
        first_byte_ns: 0,
        end_ns: 1_300_500,
    };

    fn text(outcome: Outcome) -> String {
        let text = probe(Output::Table, &Reply { outcome: Ok(outcome), timings: TIMINGS });
        let (outcome, times) = text.rsplit_once('\n').unwrap();
        let expected = "began 1000.0 µs after the guest's release, \
                        connected after 200.0 µs, ended after 300.5 µs";
        assert_eq!(times, expected);
        outcome.to_owned()
    }

    fn json(outcome: Result<Outcome, String>) -> Value {
        let text = probe(Output::Json, &Reply { outcome, timings: TIMINGS });
        serde_json::from_str(&text).unwrap()
    }

    fn identity() -> IdentityReport {
        IdentityReport {
            mac: [2, 0, 0, 0, 0, 1],
            ipv4: [169, 254, 1, 2],
            hostname: "web".into(),
            instance_id: [0xab; 16],
            random: [7; 32],
            wall_clock_ns: 1_700_000_000_000_000_000,
        }
    }

    #[test]
    fn outcomes_for_people() {
        assert_eq!(text(Outcome::Done), "done");
        let http = Outcome::Http { status: 200, body: b"hello\n".to_vec() };
        assert_eq!(text(http), "HTTP 200, 6 bytes\nhello");
        let replies =
            ["+OK\r\n", "$3\r\none\r\n", "$-1\r\n", "-ERR no\r\n", ":5\r\n", "*0\r\n", ""];
        let redis = Outcome::Redis(replies.map(|reply| reply.as_bytes().to_vec()).to_vec());
        assert_eq!(text(redis), "OK\none\n(nil)\n(error) ERR no\n5\n*0\\r\\n\n");
        let udp = Outcome::Udp { sent: 5, received: 4, longest_gap_ns: 1500 };
        assert_eq!(text(udp), "4 of 5 came back, longest gap 1.5 µs");
        assert_eq!(text(Outcome::Dns(vec![[10, 1, 0, 2], [10, 1, 0, 3]])), "10.1.0.2\n10.1.0.3");
        let bulk = Outcome::Bulk { bytes: 9, corrupt_at: Some(4) };
        assert_eq!(text(bulk), "9 bytes, the first wrong one at offset 4");
        let identity = text(Outcome::Identity(identity()));
        assert!(identity.contains("mac            02:00:00:00:00:01"), "{identity}");
    }

    #[test]
    fn outcomes_for_programs() {
        let value = json(Ok(Outcome::Http { status: 404, body: vec![] }));
        assert_eq!(value["outcome"]["http"]["status"], 404);
        assert_eq!(value["timings"]["connected_ns"], 1_200_000);
        assert!(value["error"].is_null());
        let value = json(Ok(Outcome::Identity(identity())));
        assert_eq!(value["outcome"]["identity"]["wall_clock_ns"], 1_700_000_000_000_000_000_u64);
        assert_eq!(
            value["outcome"]["identity"]["instance_id"],
            "abababab-abab-abab-abab-abababababab"
        );
        let value = json(Ok(Outcome::Dns(vec![[10, 1, 0, 2]])));
        assert_eq!(value["outcome"]["dns"][0], "10.1.0.2");
    }

    #[test]
    fn a_failure_still_has_its_timings() {
        let value = json(Err("connection refused".into()));
        assert_eq!(value["error"], "connection refused");
        assert!(value["outcome"].is_null());
        assert_eq!(value["timings"]["end_ns"], 1_300_500);
    }
}
