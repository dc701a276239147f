//! Limits in text, and security as a message.

use warren_proto::limits::Limits;
use warren_proto::security::{Defaults, Security};
use warren_proto::v1;

#[test]
fn limits_are_written_as_they_are_read() {
    let text = "packets=20k,bits=1G,new-flows=100,flows=2000,ports=500";
    let limits: Limits = text.parse().unwrap();
    assert_eq!((limits.packets(), limits.bits()), (20_000, 1_000_000_000));
    assert_eq!((limits.new_flows(), limits.flows(), limits.ports()), (100, 2000, 500));
    for text in ["packets=20000,bits=1000000000", "new-flows=1", "flows=7,ports=9", "none"] {
        let limits: Limits = text.parse().unwrap();
        assert_eq!(limits.to_string(), text);
        assert_eq!(Limits::try_from(&v1::Limits::from(limits)), Ok(limits));
        let json = serde_json::to_string(&limits).unwrap();
        assert_eq!(serde_json::from_str::<Limits>(&json).unwrap(), limits);
    }
    for (text, part) in [
        ("", "\"\" is not a limit"),
        ("packets", "write NAME=NUMBER"),
        ("pakets=1", "there is no limit \"pakets\""),
        ("packets=0", "\"0\" is not a number from 1"),
        ("packets=1T", "\"1T\""),
        ("packets=\u{fc}", "\"\u{fc}\""),
        ("packets=1,packets=2", "packets is there twice"),
        ("bits=999", "at least 1000"),
        ("packets=1001G", "more than"),
        ("flows=5G", "flows=5000000000 is more than 4294967295"),
        ("packets=18446744073709551615k", "not a number"),
    ] {
        let error = text.parse::<Limits>().unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
}

#[test]
fn security_survives_its_message_and_numbers_are_each_one_rule_s() {
    let rules = [(9, "1 deny tcp 25".parse().unwrap()), (2, "5 allow any".parse().unwrap())];
    let security = Security {
        groups: [("web".into(), rules.into()), ("none".into(), [].into())].into(),
        defaults: Defaults {
            groups: ["web".into()].into(),
            otherwise: warren_proto::policy::Action::Deny,
            limits: "flows=3".parse().unwrap(),
        },
    };
    let message = v1::VpcSecurity::from(&security);
    let ids: Vec<_> = message.groups[1].rules.iter().map(|rule| rule.id).collect();
    assert_eq!(ids, [9, 2], "in the order in which they are asked");
    assert_eq!(Security::try_from(&message).as_ref(), Ok(&security));
    let json = serde_json::to_string(&security).unwrap();
    assert_eq!(serde_json::from_str::<Security>(&json).unwrap(), security);
    assert_eq!(Security::try_from(&v1::VpcSecurity::default()), Ok(Security::default()));

    for id in [0, 2] {
        let mut wrong = message.clone();
        wrong.groups[1].rules[0].id = id;
        let error = Security::try_from(&wrong).unwrap_err().to_string();
        assert!(error.contains("needs a number of its own"), "{error}");
    }
    let mut wrong = message;
    wrong.defaults.as_mut().unwrap().otherwise = 7;
    assert!(Security::try_from(&wrong).is_err());
}
