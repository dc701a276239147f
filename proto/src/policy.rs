//! Rules of security groups: what makes a valid one, and in which order they are asked.
//!
//! In text, a rule is written as `100 allow tcp 443 to 10.9.0.0/16`, `200 deny udp 5000-5999`,
//! `300 allow icmp` or `65535 deny any`.

use std::cmp::Reverse;
use std::fmt::{self, Display, Formatter};
use std::net::IpAddr;
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::route::{InvalidRoute, parse_prefix};
use crate::v1;

/// What becomes of flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// They may be.
    Allow,
    /// They may not be.
    Deny,
}

/// Of which protocol flows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Any.
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and `ICMPv6`.
    Icmp,
}

/// Which flows are meant, and what becomes of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rule {
    /// 1 to 65535: the lower, the sooner it is asked.
    priority: u16,
    action: Action,
    protocol: Protocol,
    ports: Option<(u16, u16)>,
    peers: Option<IpNetwork>,
}

/// A text or message that is no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidRule(String);

impl From<InvalidRoute> for InvalidRule {
    fn from(error: InvalidRoute) -> Self {
        Self(error.to_string())
    }
}

impl Rule {
    /// Checks what its parts promise.
    fn new(
        priority: u32,
        action: Action,
        protocol: Protocol,
        ports: Option<(u32, u32)>,
        peers: Option<IpNetwork>,
    ) -> Result<Self, InvalidRule> {
        let invalid = |problem| Err(InvalidRule(problem));
        let Ok(priority @ 1..) = u16::try_from(priority) else {
            return invalid(format!("the priority {priority} is not between 1 and 65535"));
        };
        let ports = match ports {
            None => None,
            Some(_) if !matches!(protocol, Protocol::Tcp | Protocol::Udp) => {
                return invalid(format!("{protocol} has no ports: give them to tcp or udp"));
            }
            Some((first, last)) => match (u16::try_from(first), u16::try_from(last)) {
                (Ok(first), Ok(last)) if 0 < first && first <= last => Some((first, last)),
                _ => return invalid(format!("{first}-{last} is no range within 1 to 65535")),
            },
        };
        Ok(Self { priority, action, protocol, ports, peers })
    }

    /// 1 to 65535: the lower, the sooner it is asked.
    pub fn priority(&self) -> u16 {
        self.priority
    }

    /// What becomes of the flows.
    pub fn action(&self) -> Action {
        self.action
    }

    /// Of which protocol they are.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// First and last port of the peer, of TCP and UDP only; none: any.
    pub fn ports(&self) -> Option<(u16, u16)> {
        self.ports
    }

    /// The peers, without bits behind the prefix; none: any, of either family.
    pub fn peers(&self) -> Option<IpNetwork> {
        self.peers
    }

    /// Where it stands among other rules: the lowest priority first, of two alike the one that
    /// denies.
    pub fn rank(&self) -> impl Ord + use<> {
        (self.priority, Reverse(self.action))
    }

    /// Whether it is about flows to this peer; the port is 0 for ICMP.
    pub fn is_about(&self, peer: IpAddr, port: u16, protocol: Protocol) -> bool {
        (self.protocol == Protocol::Any || self.protocol == protocol)
            && self.ports.is_none_or(|(first, last)| (first..=last).contains(&port))
            && self.peers.is_none_or(|peers| peers.contains(peer))
    }
}

impl Display for Action {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

impl FromStr for Action {
    type Err = InvalidRule;

    fn from_str(text: &str) -> Result<Self, InvalidRule> {
        match text {
            "allow" => Ok(Self::Allow),
            "deny" => Ok(Self::Deny),
            _ => Err(InvalidRule(format!("\"{text}\" is neither allow nor deny"))),
        }
    }
}

impl Display for Protocol {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Any => "any",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        })
    }
}

impl FromStr for Protocol {
    type Err = InvalidRule;

    fn from_str(text: &str) -> Result<Self, InvalidRule> {
        match text {
            "any" => Ok(Self::Any),
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "icmp" => Ok(Self::Icmp),
            _ => {
                Err(InvalidRule(format!("\"{text}\" is not a protocol: give any, tcp, udp, icmp")))
            }
        }
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { priority, action, protocol, ports, peers } = self;
        write!(f, "{priority} {action} {protocol}")?;
        match ports {
            None => {}
            Some((first, last)) if first == last => write!(f, " {first}")?,
            Some((first, last)) => write!(f, " {first}-{last}")?,
        }
        peers.map_or(Ok(()), |peers| write!(f, " to {peers}"))
    }
}

impl FromStr for Rule {
    type Err = InvalidRule;

    fn from_str(text: &str) -> Result<Self, InvalidRule> {
        let words: Vec<_> = text.split_whitespace().collect();
        let (words, peers) = match words[..] {
            [ref words @ .., "to", prefix] => (words, Some(parse_prefix(prefix)?)),
            ref words => (words, None),
        };
        let (head, ports) = match *words {
            [priority, action, protocol] => ([priority, action, protocol], None),
            [priority, action, protocol, ports] => {
                ([priority, action, protocol], Some(parse_ports(ports)?))
            }
            _ => {
                return Err(InvalidRule(format!(
                    "\"{text}\" is not a rule: write PRIORITY allow|deny PROTOCOL [PORTS] \
                     [to PREFIX]"
                )));
            }
        };
        let [priority, action, protocol] = head;
        let priority = priority
            .parse()
            .map_err(|_| InvalidRule(format!("the priority \"{priority}\" is not a number")))?;
        Self::new(priority, action.parse()?, protocol.parse()?, ports, peers)
    }
}

fn parse_ports(text: &str) -> Result<(u32, u32), InvalidRule> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) => Ok((first, last)),
        _ => Err(InvalidRule(format!("\"{text}\" is not a port, or two with a hyphen"))),
    }
}

impl TryFrom<String> for Rule {
    type Error = InvalidRule;

    fn try_from(text: String) -> Result<Self, InvalidRule> {
        text.parse()
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> Self {
        rule.to_string()
    }
}

impl TryFrom<v1::SecurityAction> for Action {
    type Error = InvalidRule;

    fn try_from(action: v1::SecurityAction) -> Result<Self, InvalidRule> {
        match action {
            v1::SecurityAction::Allow => Ok(Self::Allow),
            v1::SecurityAction::Deny => Ok(Self::Deny),
            v1::SecurityAction::Unspecified => {
                Err(InvalidRule("the action is missing: give ALLOW or DENY".to_owned()))
            }
        }
    }
}

impl Action {
    /// That of the number of a [`v1::SecurityAction`].
    pub fn from_number(number: i32) -> Result<Self, InvalidRule> {
        v1::SecurityAction::try_from(number)
            .map_err(|_| InvalidRule(format!("{number} is no action that is known here")))?
            .try_into()
    }
}

impl From<Action> for v1::SecurityAction {
    fn from(action: Action) -> Self {
        match action {
            Action::Allow => Self::Allow,
            Action::Deny => Self::Deny,
        }
    }
}

impl TryFrom<&v1::SecurityRule> for Rule {
    type Error = InvalidRule;

    /// The rule without its number.
    fn try_from(rule: &v1::SecurityRule) -> Result<Self, InvalidRule> {
        let invalid = |what, value| InvalidRule(format!("{value} is no {what} that is known here"));
        let action = Action::from_number(rule.action)?;
        let protocol = match v1::SecurityProtocol::try_from(rule.protocol) {
            Ok(v1::SecurityProtocol::Unspecified) => Protocol::Any,
            Ok(v1::SecurityProtocol::Tcp) => Protocol::Tcp,
            Ok(v1::SecurityProtocol::Udp) => Protocol::Udp,
            Ok(v1::SecurityProtocol::Icmp) => Protocol::Icmp,
            // To take one for another would let pass what it should not.
            Err(_) => return Err(invalid("protocol", rule.protocol)),
        };
        let ports = match (rule.first_port, rule.last_port) {
            (0, 0) => None,
            ports => Some(ports),
        };
        let peers = match rule.prefix.as_str() {
            "" => None,
            text => Some(parse_prefix(text)?),
        };
        Self::new(rule.priority, action, protocol, ports, peers)
    }
}

impl Rule {
    /// The message of the rule with this number.
    pub fn message(self, id: u32) -> v1::SecurityRule {
        let protocol = match self.protocol {
            Protocol::Any => v1::SecurityProtocol::Unspecified,
            Protocol::Tcp => v1::SecurityProtocol::Tcp,
            Protocol::Udp => v1::SecurityProtocol::Udp,
            Protocol::Icmp => v1::SecurityProtocol::Icmp,
        };
        let (first, last) = self.ports.unwrap_or_default();
        v1::SecurityRule {
            id,
            priority: self.priority.into(),
            action: v1::SecurityAction::from(self.action).into(),
            protocol: protocol.into(),
            prefix: self.peers.map(|peers| peers.to_string()).unwrap_or_default(),
            first_port: first.into(),
            last_port: last.into(),
        }
    }
}
