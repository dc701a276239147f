//! Limits of an instance.
//!
//! In text, they are written as `packets=10000,bits=1G,new-flows=100,flows=2000,ports=500`, those
//! that there are; `none` if there is none. Numbers may end with k, M or G, for thousands, millions
//! and billions.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::v1;

/// Least bits a second.
const MIN_BITS: u64 = 1000;
/// Most of anything, a second.
const MAX_RATE: u64 = 1_000_000_000_000;

/// How much an instance may send, receive and hold; 0: as much as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Limits {
    packets: u64,
    bits: u64,
    new_flows: u64,
    flows: u32,
    ports: u32,
}

/// A text or message that is no limits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidLimits(String);

impl Limits {
    /// Packets a second, in each direction.
    pub fn packets(&self) -> u64 {
        self.packets
    }

    /// Bits of IP packets a second, in each direction.
    pub fn bits(&self) -> u64 {
        self.bits
    }

    /// Flows that begin, a second.
    pub fn new_flows(&self) -> u64 {
        self.new_flows
    }

    /// Flows at one time.
    pub fn flows(&self) -> u32 {
        self.flows
    }

    /// Ports at one time.
    pub fn ports(&self) -> u32 {
        self.ports
    }

    fn check(self) -> Result<Self, InvalidLimits> {
        if (1..MIN_BITS).contains(&self.bits) {
            return Err(InvalidLimits(format!(
                "bits={} is too little: give at least {MIN_BITS}",
                self.bits
            )));
        }
        let rates = [("packets", self.packets), ("bits", self.bits), ("new-flows", self.new_flows)];
        match rates.iter().find(|(_, rate)| *rate > MAX_RATE) {
            Some((name, rate)) => {
                Err(InvalidLimits(format!("{name}={rate} is more than {MAX_RATE}: leave it out")))
            }
            None => Ok(self),
        }
    }
}

impl Display for Limits {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { packets, bits, new_flows, flows, ports } = *self;
        let all = [
            ("packets", packets),
            ("bits", bits),
            ("new-flows", new_flows),
            ("flows", flows.into()),
            ("ports", ports.into()),
        ];
        let mut present = all.iter().filter(|(_, number)| *number != 0);
        let Some((name, number)) = present.next() else { return f.write_str("none") };
        write!(f, "{name}={number}")?;
        present.try_for_each(|(name, number)| write!(f, ",{name}={number}"))
    }
}

impl FromStr for Limits {
    type Err = InvalidLimits;

    fn from_str(text: &str) -> Result<Self, InvalidLimits> {
        let mut limits = Self::default();
        if text == "none" {
            return Ok(limits);
        }
        let mut seen = Vec::new();
        for part in text.split(',') {
            let Some((name, number)) = part.trim().split_once('=') else {
                return Err(InvalidLimits(format!(
                    "\"{part}\" is not a limit: write NAME=NUMBER, of packets, bits, new-flows, \
                     flows, ports, or none"
                )));
            };
            if seen.contains(&name) {
                return Err(InvalidLimits(format!("{name} is there twice")));
            }
            seen.push(name);
            let number = parse_number(number)?;
            let few = || {
                u32::try_from(number).map_err(|_| {
                    InvalidLimits(format!("{name}={number} is more than {}", u32::MAX))
                })
            };
            match name {
                "packets" => limits.packets = number,
                "bits" => limits.bits = number,
                "new-flows" => limits.new_flows = number,
                "flows" => limits.flows = few()?,
                "ports" => limits.ports = few()?,
                _ => {
                    return Err(InvalidLimits(format!(
                        "there is no limit \"{name}\": give packets, bits, new-flows, flows, ports"
                    )));
                }
            }
        }
        limits.check()
    }
}

fn parse_number(text: &str) -> Result<u64, InvalidLimits> {
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'k') => (&text[..text.len() - 1], 1_000),
        Some(b'M') => (&text[..text.len() - 1], 1_000_000),
        Some(b'G') => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    let number = digits.parse().ok().and_then(|number: u64| number.checked_mul(unit));
    number.filter(|number| *number > 0).ok_or_else(|| {
        InvalidLimits(format!("\"{text}\" is not a number from 1, such as 500, 20k or 1G"))
    })
}

impl TryFrom<String> for Limits {
    type Error = InvalidLimits;

    fn try_from(text: String) -> Result<Self, InvalidLimits> {
        text.parse()
    }
}

impl From<Limits> for String {
    fn from(limits: Limits) -> Self {
        limits.to_string()
    }
}

impl TryFrom<&v1::Limits> for Limits {
    type Error = InvalidLimits;

    fn try_from(limits: &v1::Limits) -> Result<Self, InvalidLimits> {
        let v1::Limits { packets, bits, new_flows, flows, ports } = *limits;
        Self { packets, bits, new_flows, flows, ports }.check()
    }
}

impl From<Limits> for v1::Limits {
    fn from(limits: Limits) -> Self {
        let Limits { packets, bits, new_flows, flows, ports } = limits;
        Self { packets, bits, new_flows, flows, ports }
    }
}
