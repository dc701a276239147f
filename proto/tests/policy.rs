//! Rules of security groups, as text and as messages.

use proptest::prelude::*;
use warren_proto::policy::{Action, Protocol, Rule};
use warren_proto::v1;

fn rule(text: &str) -> Rule {
    text.parse().expect("it is a rule")
}

#[test]
fn what_is_no_rule_is_told_with_a_remedy() {
    for (text, part) in [
        ("", "write PRIORITY allow|deny"),
        ("allow tcp", "write PRIORITY allow|deny"),
        ("1 allow tcp 1 2 to 10.0.0.0/8", "write PRIORITY allow|deny"),
        ("0 allow tcp", "between 1 and 65535"),
        ("65536 allow tcp", "between 1 and 65535"),
        ("first allow tcp", "\"first\" is not a number"),
        ("1 permit tcp", "neither allow nor deny"),
        ("1 allow sctp", "not a protocol"),
        ("1 allow any 80", "any has no ports"),
        ("1 allow icmp 8", "icmp has no ports"),
        ("1 allow tcp 0", "no range"),
        ("1 allow tcp 90-80", "no range"),
        ("1 allow tcp 80-65536", "no range"),
        ("1 allow tcp http", "\"http\" is not a port"),
        ("1 allow tcp to here", "is not a prefix"),
        ("1 allow tcp to 10.9.0.1/16", "write 10.9.0.0/16"),
        ("1 allow tcp to 10.9.0.1", "write 10.9.0.1/32"),
        ("1 allow tcp to ::ffff:10.0.0.0/104", "write it as such"),
    ] {
        let error = text.parse::<Rule>().expect_err(text).to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
    let message = rule("1 allow tcp 80").message(1);
    for wrong in [
        v1::SecurityRule { action: 0, ..message.clone() },
        v1::SecurityRule { action: 9, ..message.clone() },
        v1::SecurityRule { protocol: 9, ..message.clone() },
        v1::SecurityRule { first_port: 0, ..message.clone() },
        v1::SecurityRule { last_port: 1 << 20, ..message.clone() },
        v1::SecurityRule { priority: 1 << 20, ..message.clone() },
        v1::SecurityRule { prefix: "10.0.0.0".into(), ..message },
    ] {
        assert!(Rule::try_from(&wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn the_lowest_priority_comes_first_and_of_two_alike_what_denies() {
    let mut rules = ["20 deny any", "10 allow any", "10 deny tcp", "5 allow icmp"].map(rule);
    rules.sort_by_key(Rule::rank);
    let sorted = rules.map(|rule| rule.to_string());
    assert_eq!(sorted, ["5 allow icmp", "10 deny tcp", "10 allow any", "20 deny any"]);
}

#[test]
fn a_rule_is_about_what_it_says() {
    let peer = |text: &str| text.parse().expect("it is an address");
    let web = rule("1 allow tcp 80-443 to 10.0.0.0/8");
    assert!(web.is_about(peer("10.1.2.3"), 443, Protocol::Tcp));
    assert!(!web.is_about(peer("10.1.2.3"), 444, Protocol::Tcp));
    assert!(!web.is_about(peer("10.1.2.3"), 443, Protocol::Udp));
    assert!(!web.is_about(peer("11.1.2.3"), 443, Protocol::Tcp));
    assert!(!rule("1 deny any to ::/0").is_about(peer("10.1.2.3"), 0, Protocol::Icmp));
    assert!(rule("1 deny any").is_about(peer("fd00::1"), 0, Protocol::Icmp));
}

proptest! {
    #[test]
    fn text_and_messages_read_back(
        priority in 1u16..,
        deny in any::<bool>(),
        protocol in 0usize..4,
        ports in prop::option::of((1u16.., 1u16..)),
        bits in any::<u128>(),
        length in prop::option::of(0u8..=128),
        is_v4 in any::<bool>(),
    ) {
        use std::fmt::Write;
        let name = ["any", "tcp", "udp", "icmp"][protocol];
        let action = if deny { Action::Deny } else { Action::Allow };
        let mut text = format!("{priority} {action} {name}");
        if let Some((a, b)) = ports.filter(|_| (1..3).contains(&protocol)) {
            write!(text, " {}-{}", a.min(b), a.max(b)).unwrap();
        }
        if let Some(length) = length {
            let address: std::net::IpAddr = if is_v4 {
                std::net::Ipv4Addr::from_bits(bits as u32).into()
            } else {
                std::net::Ipv6Addr::from_bits(bits | 1 << 127).into()
            };
            let length = if is_v4 { length % 33 } else { length };
            let network = ipnetwork::IpNetwork::new(address, length).unwrap().network();
            write!(text, " to {network}/{length}").unwrap();
        }
        let rule: Rule = text.parse().unwrap();
        prop_assert_eq!(rule.to_string().parse::<Rule>().unwrap(), rule);
        prop_assert_eq!(Rule::try_from(&rule.message(7)).unwrap(), rule);
        let json = serde_json::to_string(&rule).unwrap();
        prop_assert_eq!(serde_json::from_str::<Rule>(&json).unwrap(), rule);
    }
}
