//! The IPv6 of a VPC: none, or a CIDR and a shared address.

use std::net::Ipv6Addr;

use ipnetwork::Ipv6Network;
use serde::{Deserialize, Serialize};
use warren_proto::route::{Route, defaults};
use warren_proto::v1;

use super::InvalidVpc;

/// What no VPC's addresses may be from: the data path takes them for no destination.
const OTHERS: [(Ipv6Network, &str); 4] = [
    (network([0xfdc9, 0x7e4b, 0x52a6, 0], 64), "microVMs have their local addresses"),
    (network([0; 4], 64), "loopback and IPv4-mapped addresses are"),
    (network([0xfe80, 0, 0, 0], 10), "link-local addresses are"),
    (network([0xff00, 0, 0, 0], 8), "multicast addresses are"),
];

const fn network([a, b, c, d]: [u16; 4], prefix: u8) -> Ipv6Network {
    let address = Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0);
    Ipv6Network::new_checked(address, prefix).expect("it is at most 128")
}

/// The IPv6 of a VPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VpcV6 {
    /// Its addresses. The prefix is 1 to 126 bits long.
    pub cidr: Ipv6Network,
    /// The address that its microVMs are seen as. In `cidr`.
    pub shared_address: Ipv6Addr,
    /// Next hop for other addresses. In `cidr`, or link-local.
    pub gateway: Option<Ipv6Addr>,
}

impl VpcV6 {
    /// The IPv6 of a definition, if it has any.
    pub(super) fn parse(vpc: &v1::Vpc) -> Result<Option<Self>, InvalidVpc> {
        let invalid = |field| move |problem: String| InvalidVpc { field, problem };
        let v1::Vpc { cidr_v6, shared_address_v6, gateway_v6, .. } = vpc;
        if cidr_v6.is_empty() {
            let more =
                [("shared_address_v6", shared_address_v6), ("gateway_v6", gateway_v6)].into_iter();
            return match more.into_iter().find(|(_, text)| !text.is_empty()) {
                None => Ok(None),
                Some((field, _)) => {
                    let problem = "there is no cidr_v6: give the VPC's IPv6 addresses, too";
                    Err(invalid(field)(problem.to_owned()))
                }
            };
        }
        let cidr = parse_cidr(cidr_v6).map_err(invalid("cidr_v6"))?;
        if shared_address_v6.is_empty() {
            let problem = format!("a VPC with IPv6 needs one: give a free address of {cidr}");
            return Err(invalid("shared_address_v6")(problem));
        }
        let shared_address = parse_address(shared_address_v6)
            .and_then(|address| inside(address, cidr))
            .map_err(invalid("shared_address_v6"))?;
        let gateway = match gateway_v6.as_str() {
            "" => None,
            text => Some(
                parse_address(text)
                    .and_then(|address| {
                        let link_local = address.is_unicast_link_local();
                        if link_local { Ok(address) } else { inside(address, cidr) }
                    })
                    .map_err(invalid("gateway_v6"))?,
            ),
        };
        if gateway == Some(shared_address) {
            let problem =
                format!("{shared_address} is the shared address: the next hop is another");
            return Err(invalid("gateway_v6")(problem));
        }
        Ok(Some(Self { cidr, shared_address, gateway }))
    }

    /// An address that microVMs may be seen as.
    pub(super) fn parse_shared(&self, text: &str) -> Result<Ipv6Addr, String> {
        if text.is_empty() {
            let cidr = self.cidr;
            return Err(format!("a VPC with IPv6 needs one: give a free address of {cidr}"));
        }
        let address = parse_address(text).and_then(|address| inside(address, self.cidr))?;
        if self.gateway == Some(address) {
            return Err(format!("{address} is the gateway"));
        }
        Ok(address)
    }

    /// The routes that it has without a table.
    pub(super) fn defaults(&self) -> impl Iterator<Item = Route> + use<> {
        defaults(self.cidr.into(), self.gateway.map(Into::into))
    }

    /// CIDR, shared address and gateway, as messages have them: empty where there is none.
    pub(crate) fn texts(v6: Option<Self>) -> [String; 3] {
        let Some(Self { cidr, shared_address, gateway }) = v6 else { return Default::default() };
        let gateway = gateway.map(|gateway| gateway.to_string()).unwrap_or_default();
        [cidr.to_string(), shared_address.to_string(), gateway]
    }
}

fn parse_cidr(text: &str) -> Result<Ipv6Network, String> {
    if !text.contains('/') {
        return Err(format!("\"{text}\" is not a CIDR: write it like 2001:db8:1::/64"));
    }
    let cidr: Ipv6Network = text
        .parse()
        .map_err(|_| format!("\"{text}\" is not an IPv6 CIDR such as 2001:db8:1::/64"))?;
    let prefix = cidr.prefix();
    if !(1..=126).contains(&prefix) {
        return Err(format!("/{prefix} is not a prefix length from 1 to 126"));
    }
    if cidr.ip() != cidr.network() {
        let network = cidr.network();
        return Err(format!("{text} has bits set behind its prefix: write {network}/{prefix}"));
    }
    for (other, what) in OTHERS {
        if cidr.contains(other.ip()) || other.contains(cidr.ip()) {
            return Err(format!("{text} overlaps {other}, where {what}"));
        }
    }
    Ok(cidr)
}

fn parse_address(text: &str) -> Result<Ipv6Addr, String> {
    text.parse().map_err(|_| format!("\"{text}\" is not an IPv6 address"))
}

fn inside(address: Ipv6Addr, cidr: Ipv6Network) -> Result<Ipv6Addr, String> {
    if !cidr.contains(address) {
        return Err(format!("{address} is not inside {cidr}"));
    }
    // RFC 4291, section 2.6.1.
    if address == cidr.network() {
        return Err(format!("{address} is the anycast address of the routers of {cidr}"));
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(cidr: &str, shared: &str, gateway: &str) -> Result<Option<VpcV6>, InvalidVpc> {
        VpcV6::parse(&v1::Vpc {
            cidr_v6: cidr.into(),
            shared_address_v6: shared.into(),
            gateway_v6: gateway.into(),
            ..v1::Vpc::default()
        })
    }

    #[test]
    fn gateways_are_inside_or_link_local() {
        assert_eq!(parse("", "", ""), Ok(None));
        for gateway in ["", "fd00:1::1", "fe80::1"] {
            let v6 = parse("fd00:1::/64", "fd00:1::9", gateway).unwrap();
            assert_eq!(VpcV6::texts(v6), ["fd00:1::/64", "fd00:1::9", gateway]);
        }
        assert_eq!(VpcV6::texts(None), ["", "", ""]);
    }

    #[test]
    fn errors_name_the_field_and_the_value() {
        for (field, part, [cidr, shared, gateway]) in [
            ("shared_address_v6", "no cidr_v6", ["", "fd00::9", "fd00::1"]),
            ("gateway_v6", "no cidr_v6", ["", "", "fd00::1"]),
            ("cidr_v6", "write it like", ["fd00::", "fd00::9", ""]),
            ("cidr_v6", "10.1.0.0/16", ["10.1.0.0/16", "fd00::9", ""]),
            ("cidr_v6", "/127", ["fd00::/127", "fd00::1", ""]),
            ("cidr_v6", "/0", ["::/0", "fd00::9", ""]),
            ("cidr_v6", "write fd00::/64", ["fd00::1/64", "fd00::9", ""]),
            ("cidr_v6", "where microVMs", ["fdc9:7e4b:52a6::/80", "fd00::9", ""]),
            ("cidr_v6", "where microVMs", ["fd00::/8", "fd00::9", ""]),
            ("cidr_v6", "IPv4-mapped", ["::ffff:0:0/96", "::ffff:0:9", ""]),
            ("cidr_v6", "link-local", ["fe80::/64", "fe80::9", ""]),
            ("cidr_v6", "multicast", ["ff02::/64", "ff02::9", ""]),
            ("shared_address_v6", "free address of fd00::/64", ["fd00::/64", "", ""]),
            ("shared_address_v6", "\"10.1.0.9\"", ["fd00::/64", "10.1.0.9", ""]),
            ("shared_address_v6", "inside", ["fd00::/64", "fd01::9", ""]),
            ("shared_address_v6", "inside", ["fd00::/64", "fe80::9", ""]),
            ("shared_address_v6", "anycast", ["fd00::/64", "fd00::", ""]),
            ("gateway_v6", "\"x\"", ["fd00::/64", "fd00::9", "x"]),
            ("gateway_v6", "inside", ["fd00::/64", "fd00::9", "fd01::1"]),
            ("gateway_v6", "shared", ["fd00::/64", "fd00::9", "fd00::9"]),
        ] {
            let error = parse(cidr, shared, gateway).expect_err(part);
            assert_eq!(error.field, field, "{error}");
            assert!(error.to_string().contains(part), "{error} should contain {part}");
        }
    }
}
