//! Route tables, against a naive model.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use proptest::prelude::*;
use warren_proto::route::{InvalidTable, MAX_ROUTES, Route, Table, Target, defaults, parse_prefix};
use warren_proto::v1;

const SHARED: [IpAddr; 2] = [
    IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 0, 9)),
    IpAddr::V6(std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 9)),
];

fn route(text: &str) -> Route {
    text.parse().expect("it is a route")
}

fn table(routes: &[&str]) -> Result<Table, InvalidTable> {
    let routes: Vec<_> = routes.iter().map(|text| route(text)).collect();
    let own: Vec<_> = defaults("10.1.0.0/16".parse().expect("it is a CIDR"), None).collect();
    Table::new(&routes, &own, &SHARED)
}

#[test]
fn what_is_no_route_is_told_with_a_remedy() {
    for (text, part) in [
        ("10.9.0.0/16", "write PREFIX via ADDRESS"),
        ("10.9.0.0/16 via", "write PREFIX via ADDRESS"),
        ("10.9.0.0/16 local now", "write PREFIX via ADDRESS"),
        ("10.9.0.0 local", "write 10.9.0.0/32 for one address"),
        ("10.9.0.1/16 local", "write 10.9.0.0/16"),
        ("10.9.0.0/33 local", "is not a prefix"),
        ("nowhere/8 local", "is not a prefix"),
        ("fd00::1/64 local", "write fd00::/64"),
        ("::ffff:10.0.0.0/104 local", "write it as such"),
        ("10.9.0.0/16 via fd00::1", "other IP version"),
        ("fd00::/16 via 10.1.0.2", "other IP version"),
        ("10.9.0.0/16 via 224.0.0.1", "no address of a machine"),
        ("fd00::/16 via ::", "no address of a machine"),
        ("fd00::/16 via ::ffff:10.1.0.2", "no address of a machine"),
        ("10.9.0.0/16 via here", "not an IP address"),
    ] {
        let error = text.parse::<Route>().expect_err(text).to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
}

#[test]
fn what_is_no_table_is_told_with_a_remedy() {
    assert!(table(&["10.9.0.0/16 via 10.1.0.2", "0.0.0.0/0 blackhole", "::/0 local"]).is_ok());
    for (routes, part) in [
        (&["10.9.0.0/16 local", "10.9.0.0/16 local"][..], "two routes to 10.9.0.0/16"),
        (&["10.9.0.0/16 via 10.2.0.1"], "10.2.0.1 of 10.9.0.0/16 is not on-link"),
        (&["10.9.0.0/16 via 10.1.0.2", "10.1.0.0/24 blackhole"], "not on-link"),
        (&["10.1.0.2/32 via 10.1.0.2"], "not on-link"),
        (&["2001:db8::/32 via fd00::1"], "not on-link"),
        (&["10.9.0.0/16 via 10.1.0.9"], "shared address"),
        (&["fd00::/64 local", "::/0 via fd00::9"], "fd00::9 of ::/0 is the VPC's shared address"),
    ] {
        let error = table(routes).expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    }
    assert!(table(&["2001:db8::/32 via fd00::1", "fd00::/64 local"]).is_ok());
    assert!(table(&["2001:db8::/32 via fe80::1"]).is_ok(), "on-link, always");

    let routes: Vec<_> = (0..=MAX_ROUTES as u32)
        .map(|n| Route {
            prefix: IpNetwork::from(IpAddr::from((100 << 24 | n).to_be_bytes())),
            target: Target::Blackhole,
        })
        .collect();
    assert!(Table::new(&routes[1..], &[], &SHARED).is_ok());
    assert_eq!(Table::new(&routes, &[], &SHARED), Err(InvalidTable::TooMany(10_001)));
}

#[test]
fn a_table_overrules_what_the_vpc_has_without() {
    let v4 = defaults("10.1.0.0/16".parse().unwrap(), Some([10, 1, 0, 1].into()));
    let v6 = defaults("fd00::/64".parse().unwrap(), Some("fe80::1".parse().unwrap()));
    let own: Vec<_> = v4.chain(v6).collect();
    let none = Table::new(&[], &own, &SHARED).unwrap();
    let all: Vec<_> = none.iter().map(|route| route.to_string()).collect();
    let wanted =
        ["0.0.0.0/0 via 10.1.0.1", "10.1.0.0/16 local", "::/0 via fe80::1", "fd00::/64 local"];
    assert_eq!(all, wanted);
    let closed = Table::new(&[route("0.0.0.0/0 blackhole")], &own, &SHARED).unwrap();
    let gateway = Target::Via("fe80::1".parse().unwrap());
    assert_eq!(closed.look_up("2001:db8::1".parse().unwrap()), Some(gateway));
    assert_eq!(closed.look_up([8, 8, 8, 8].into()), Some(Target::Blackhole));
    assert_eq!(closed.look_up([10, 1, 2, 3].into()), Some(Target::Local));
}

/// Addresses that share many of their bits.
fn address() -> impl Strategy<Value = IpAddr> {
    let octet = || prop::sample::select(vec![0_u8, 1, 128, 255]);
    prop_oneof![
        prop::array::uniform4(octet()).prop_map(IpAddr::from),
        prop::array::uniform16(octet()).prop_map(IpAddr::from),
    ]
}

fn prefix() -> impl Strategy<Value = IpNetwork> {
    (address(), 0..=128_u8).prop_map(|(address, length)| {
        let length = if address.is_ipv4() { length % 33 } else { length };
        let network = IpNetwork::new(address, length).expect("it is not too long").network();
        IpNetwork::new(network, length).expect("it is not too long")
    })
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![Just(Target::Local), Just(Target::Blackhole)]
}

/// Bit by bit.
fn holds(prefix: IpNetwork, address: IpAddr) -> bool {
    let bits = |address| match address {
        IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
        IpAddr::V6(address) => address.to_bits(),
    };
    let differ = bits(prefix.ip()) ^ bits(address);
    prefix.is_ipv4() == address.is_ipv4() && differ.leading_zeros() >= prefix.prefix().into()
}

proptest! {
    #[test]
    fn the_longest_prefix_wins(
        routes in prop::collection::btree_map(prefix(), target(), 0..50),
        addresses in prop::collection::vec(address(), 20),
    ) {
        let routes: Vec<_> =
            routes.into_iter().map(|(prefix, target)| Route { prefix, target }).collect();
        let table = Table::new(&routes, &[], &SHARED).unwrap();
        for address in addresses {
            let holding = routes.iter().filter(|route| holds(route.prefix, address));
            let longest = holding.max_by_key(|route| route.prefix.prefix());
            prop_assert_eq!(table.look_up(address), longest.map(|route| route.target));
        }
    }

    #[test]
    fn text_and_messages_hold_all_of_a_route(prefix in prefix(), target in target(), via: bool) {
        let hop: IpAddr =
            if prefix.is_ipv4() { [10, 1, 0, 2].into() } else { "fd00::1".parse().unwrap() };
        let route = Route { prefix, target: if via { Target::Via(hop) } else { target } };
        // Prefixes within ::ffff:0:0/96 are refused; the strategy makes none that long.
        prop_assert_eq!(route.to_string().parse(), Ok(route));
        prop_assert_eq!(Route::try_from(&v1::Route::from(route)), Ok(route));
    }

    #[test]
    fn any_text_is_a_canonical_prefix_or_refused(text in "[0-9a-f:./]{0,24}") {
        if let Ok(prefix) = parse_prefix(&text) {
            prop_assert_eq!(prefix.ip(), prefix.network());
            prop_assert_eq!(parse_prefix(&prefix.to_string()), Ok(prefix));
        }
    }
}
