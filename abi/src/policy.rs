//! Security groups: which flows a guest may have, as the maps hold it.
//!
//! A slot that is guarded by a policy carries the policy's place and its epoch. A flow is judged
//! when it begins, and again when it meets another epoch than the one under which it was last
//! judged: so a change of rules concerns what lives at its next packet, either way, and in between
//! a flow costs one comparison.

use crate::wire::{ICMP, ICMPV6, Ip};

/// Most rules of a policy: a flow is compared with each, in their order.
pub const MAX_RULES: usize = 128;

/// Which flows a rule is about, and what becomes of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Peers: address of the prefix, without bits behind it.
    pub network: Ip,
    /// Peers: which bits of the address count.
    pub mask: Ip,
    /// First port of the peer, in the order of the processor; 0 where the protocol has no ports.
    pub first_port: u16,
    /// Last port of the peer; 65535 where the protocol has no ports.
    pub last_port: u16,
    /// IP protocol, or [`Rule::ANY`]; [`ICMP`] stands for that of both families.
    pub protocol: u8,
    /// Family of the peers: 4, 6, or [`Rule::ANY`].
    pub family: u8,
    /// [`Rule::ALLOW`] or [`Rule::DENY`].
    pub action: u16,
    /// What the rule is known by outside.
    pub id: u32,
    /// Index of its counter.
    pub counter: u32,
}

impl Rule {
    /// Action: the flow may be.
    pub const ALLOW: u16 = 1;
    /// Action: the flow may not be.
    pub const DENY: u16 = 2;
    /// Every protocol, or either family.
    pub const ANY: u8 = 0;

    /// The first of many in a new policy.
    pub const NONE: Self = Self {
        network: Ip::UNSPECIFIED,
        mask: Ip::UNSPECIFIED,
        first_port: 0,
        last_port: 0,
        protocol: Self::ANY,
        family: Self::ANY,
        action: 0,
        id: 0,
        counter: 0,
    };

    /// Whether it is about flows to this peer. The port is in the order of the processor, 0 for
    /// ICMP.
    #[inline(always)]
    pub const fn is_about(&self, peer: &Ip, port: u16, protocol: u8) -> bool {
        let (a, b, mask) = (&self.network.0, &peer.0, &self.mask.0);
        // At once, since the compiler would compare word by word and branch.
        let differences = (a[0] ^ b[0]) & mask[0]
            | (a[1] ^ b[1]) & mask[1]
            | (a[2] ^ b[2]) & mask[2]
            | (a[3] ^ b[3]) & mask[3];
        let protocol = if protocol == ICMPV6 { ICMP } else { protocol };
        differences == 0
            && (self.protocol == Self::ANY || self.protocol == protocol)
            && (self.family == Self::ANY || self.family == peer.family())
            && self.first_port <= port
            && port <= self.last_port
    }
}

/// Rules in force for some slots, in the order in which they are asked. It never changes: what
/// takes its place has another epoch.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Differs from that of every other policy, before and after; 0: there is none here.
    pub epoch: u32,
    /// The VPC that the rules' numbers are of.
    pub vni: u32,
    /// How many of `rules` there are.
    pub count: u32,
    /// [`Rule::ALLOW`] or [`Rule::DENY`]: what becomes of flows that no rule is about.
    pub otherwise: u32,
    /// Index of the counter of those.
    pub counter: u32,
    /// The rules.
    pub rules: [Rule; MAX_RULES],
}

/// What a policy says of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether it may be.
    pub is_allowed: bool,
    /// Index of the counter of what decided.
    pub counter: u32,
}

impl Policy {
    /// None.
    pub const NONE: Self = Self {
        epoch: 0,
        vni: 0,
        count: 0,
        otherwise: 0,
        counter: 0,
        rules: [Rule::NONE; MAX_RULES],
    };

    /// Asks rule after rule: the first that is about the flow decides.
    #[inline(always)]
    pub fn decide(&self, peer: &Ip, port: u16, protocol: u8) -> Decision {
        let mut index = 0;
        while index < MAX_RULES {
            if index as u32 >= self.count {
                break;
            }
            let rule = &self.rules[index];
            if rule.is_about(peer, port, protocol) {
                let is_allowed = rule.action == Rule::ALLOW;
                return Decision { is_allowed, counter: rule.counter };
            }
            index += 1;
        }
        let is_allowed = self.otherwise == Rule::ALLOW as u32;
        Decision { is_allowed, counter: self.counter }
    }
}

/// What applies to a slot's flows: nothing, unless something is set.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guard(pub u16);

impl Guard {
    /// Most policies at one time, and the numbers of their places, from 1.
    pub const MAX_POLICIES: u32 = 1024;

    /// Nothing.
    pub const NONE: Self = Self(0);

    const LIMITED: u16 = 1 << 15;

    /// By the policy at a place, 0: by none; and by rates, in [`Limits`](crate::limit::Limits).
    #[inline]
    pub const fn new(place: u16, is_limited: bool) -> Self {
        Self(place | if is_limited { Self::LIMITED } else { 0 })
    }

    /// Place of the policy; 0: there is none.
    #[inline(always)]
    pub const fn place(self) -> u32 {
        (self.0 & !Self::LIMITED) as u32
    }

    /// Whether there are limits of packets or bits.
    #[inline(always)]
    pub const fn is_limited(self) -> bool {
        self.0 & Self::LIMITED != 0
    }
}
