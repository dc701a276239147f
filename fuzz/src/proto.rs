//! What people and programs ask for.

use std::collections::BTreeMap;

use prost::Message;
use warren_proto::endpoint::Endpoint;
use warren_proto::limits::Limits;
use warren_proto::policy::Rule;
use warren_proto::route::{Route, Table, defaults, parse_prefix};
use warren_proto::security::Security;
use warren_proto::v1::apply_vpc_request::Role;
use warren_proto::v1::{self, ApplyVpcRequest, VpcSecurity};

/// Text: an endpoint is refused, or reads back.
pub fn endpoint(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(endpoint) = text.parse::<Endpoint>() {
        assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
    }
}

/// Lines of routes: each is refused, or canonical and reads back; together they are refused, or a
/// table in which each prefix's own address is found.
pub fn route(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let routes: Vec<Route> = text.lines().filter_map(|line| line.parse().ok()).collect();
    for route in &routes {
        assert_eq!(route.prefix.ip(), route.prefix.network());
        assert_eq!(parse_prefix(&route.prefix.to_string()), Ok(route.prefix));
        assert_eq!(route.to_string().parse().as_ref(), Ok(route));
    }
    let cidr = "10.1.0.0/16".parse().expect("it is a CIDR");
    let defaults: Vec<_> = defaults(cidr, Some([10, 1, 0, 1].into())).collect();
    if let Ok(table) = Table::new(&routes, &defaults, &[[10, 1, 0, 9].into()]) {
        for route in &routes {
            assert!(table.look_up(route.prefix.ip()).is_some());
        }
    }
}

/// Lines of rules: each is refused, or reads back, as text and as a message.
pub fn rule(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for rule in text.lines().filter_map(|line| line.parse::<Rule>().ok()) {
        assert_eq!(rule.to_string().parse().as_ref(), Ok(&rule));
        assert_eq!(Rule::try_from(&rule.message(1)).as_ref(), Ok(&rule));
    }
}

/// Lines of limits: each is refused, or reads back, as text and as a message.
pub fn limits(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for limits in text.lines().filter_map(|line| line.parse::<Limits>().ok()) {
        assert_eq!(limits.to_string().parse(), Ok(limits));
        assert_eq!(Limits::try_from(&v1::Limits::from(limits)), Ok(limits));
    }
}

/// The message of a VPC's security: refused, or each rule has a number of its own, and all of it
/// reads back.
pub fn security(data: &[u8]) {
    let Ok(message) = VpcSecurity::decode(data) else { return };
    let Ok(security) = Security::try_from(&message) else { return };
    let told: usize = message.groups.iter().map(|group| group.rules.len()).sum();
    let held: usize = security.groups.values().map(BTreeMap::len).sum();
    assert_eq!(held, told, "no rule stands for another");
    assert!(security.groups.values().all(|rules| !rules.contains_key(&0)));
    assert_eq!(Security::try_from(&VpcSecurity::from(&security)).as_ref(), Ok(&security));
}

/// The message of a VPC: refused, or its routes are refused, or read back.
pub fn messages(data: &[u8]) {
    let Ok(request) = ApplyVpcRequest::decode(data) else { return };
    let Some(Role::Proxy(proxy)) = &request.role else { return };
    for message in &proxy.routes {
        if let Ok(route) = Route::try_from(message) {
            assert_eq!(Route::try_from(&v1::Route::from(route)), Ok(route));
        }
    }
}
