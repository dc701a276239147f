//! Traffic and rules: what guests and peers make of the NAT, and tenants of their policies.

use std::net::{IpAddr, Ipv6Addr};

use warren_abi::conntrack::Ports;
use warren_abi::flow::Timers;
use warren_abi::policy::{Decision, MAX_RULES, Policy, Rule};
use warren_abi::wire::{ICMP, ICMPV6, TCP, UDP};

use crate::model::acts::{Act, Model};

/// Limits and timers, and what happens, four bytes each: the NAT keeps to the model.
pub fn conntrack(data: &[u8]) {
    let Some((&[flows, ports, timers], rest)) = data.split_first_chunk() else { return };
    let ticks = u32::from(timers >> 1);
    let short = Timers {
        udp: ticks,
        icmp: ticks / 2,
        tcp_opening: ticks,
        tcp_established: 4 * ticks,
        tcp_closing: 2 * ticks,
        tcp_closed: ticks,
        rest: ticks / 3,
    };
    let timers = if timers & 1 == 0 { Timers::DEFAULT } else { short };
    let mut model = Model::new(timers, [flows.into(), ports.into()]);
    for &bytes in rest.as_chunks().0 {
        model.apply(act(bytes));
    }
    model.finish();
}

fn act([kind, a, b, flags]: [u8; 4]) -> Act {
    let acknowledges = kind & 16 == 0;
    let number = u16::from_le_bytes([a, b]);
    match kind & 15 {
        0..6 => Act::Send {
            guest: u32::from(a % 3) + 1,
            protocol: [UDP, TCP, ICMP, TCP][usize::from(a >> 2 & 3)],
            peer: u32::from(a >> 4 & 1) + 1,
            port: b.into(),
            flags,
            acknowledges,
        },
        6..11 => Act::Reply { of: number.into(), flags, acknowledges },
        11 => Act::Error { of: number.into() },
        12 => Act::Wait(number.into()),
        13 => Act::Deny((1..3).filter(|peer| a >> peer & 1 != 0).collect()),
        14 => Act::Ports(Ports {
            base: 4096 + u32::from(a),
            count: if b == 0 { 0 } else { 1 << (b % 7) },
        }),
        _ if a & 1 == 0 => Act::Sweep,
        _ => Act::Reattach,
    }
}

/// A flow, and rules of 12 bytes each: they decide as prefixes, protocols and ranges say when each
/// is read by itself.
pub fn policy(data: &[u8]) {
    let Some((&[kind, protocol, low, high, otherwise, a, b, c, d], rest)) =
        data.split_first_chunk()
    else {
        return;
    };
    let peer = address(kind & 1 == 0, [a, b, c, d]);
    let protocol = [TCP, UDP, ICMP, ICMPV6, protocol][usize::from(kind >> 1) % 5];
    let port = u16::from_le_bytes([low, high]);
    let otherwise = action(otherwise);

    let mut policy = Policy { otherwise: otherwise.into(), counter: u32::MAX, ..Policy::NONE };
    let mut decisive = None;
    for (index, &bytes) in rest.as_chunks().0.iter().take(MAX_RULES).enumerate() {
        let (rule, is_about) = rule(bytes, index as u32, peer, port, protocol);
        policy.rules[index] = rule;
        policy.count += 1;
        if is_about && decisive.is_none() {
            decisive = Some((rule.action, rule.counter));
        }
    }
    let (action, counter) = decisive.unwrap_or((otherwise, u32::MAX));
    let is_allowed = action == Rule::ALLOW;
    assert_eq!(policy.decide(&peer.into(), port, protocol), Decision { is_allowed, counter });
}

/// A rule, and whether it is about a flow.
fn rule(bytes: [u8; 12], counter: u32, peer: IpAddr, port: u16, of: u8) -> (Rule, bool) {
    let [kind, length, protocol, a, b, c, d, low, high, more, beyond, turn] = bytes;
    let network = address(kind & 1 == 0, [a, b, c, d]);
    let (first, others) = (u16::from_le_bytes([low, high]), u16::from_le_bytes([more, beyond]));
    let ports = first..=first.saturating_add(others);
    let protocol = [Rule::ANY, TCP, UDP, ICMP, protocol][usize::from(protocol) % 5];
    let length = if kind & 6 == 6 { None } else { Some(usize::from(length) % (bits(network) + 1)) };

    let is_peer = length.is_none_or(|length| {
        let is_same = |at| bit(network, at) == bit(peer, at);
        network.is_ipv4() == peer.is_ipv4() && (0..length).all(is_same)
    });
    let is_protocol = match protocol {
        Rule::ANY => true,
        ICMP => of == ICMP || of == ICMPV6,
        protocol => protocol == of,
    };
    let family = if network.is_ipv4() { 4 } else { 6 };
    let leading = length.map_or(0, |length| length + 128 - bits(network));
    let mask = Ipv6Addr::from_bits(u128::MAX.checked_shl(128 - leading as u32).unwrap_or(0));
    let rule = Rule {
        network: network.into(),
        mask: mask.into(),
        first_port: *ports.start(),
        last_port: *ports.end(),
        protocol,
        family: if length.is_some() { family } else { Rule::ANY },
        action: action(turn),
        id: counter,
        counter,
    };
    (rule, is_peer && is_protocol && ports.contains(&port))
}

fn action(byte: u8) -> u16 {
    if byte & 1 == 0 { Rule::ALLOW } else { Rule::DENY }
}

/// An address of either family; of IPv6, none that embeds one of IPv4.
fn address(is_v4: bool, octets: [u8; 4]) -> IpAddr {
    if is_v4 {
        return octets.into();
    }
    let bits = u128::from(u32::from_be_bytes(octets));
    Ipv6Addr::from_bits(1 << 125 | bits << 96 | bits << 48 | bits).into()
}

fn bits(address: IpAddr) -> usize {
    if address.is_ipv4() { 32 } else { 128 }
}

/// A bit of an address, from the left.
fn bit(address: IpAddr, at: usize) -> bool {
    let octet = match address {
        IpAddr::V4(address) => address.octets()[at / 8],
        IpAddr::V6(address) => address.octets()[at / 8],
    };
    octet >> (7 - at % 8) & 1 != 0
}
