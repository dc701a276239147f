//! The flows in the table, as they are now.

use std::collections::{BTreeMap, BTreeSet, HashMap as StdHashMap};
use std::os::fd::AsFd;

use aya::maps::{HashMap, MapData};
use warren_abi::flow::Timers;
use warren_abi::flowlog::What;
use warren_abi::maps::{Flow, InFlow, InKey, OutKey, Traffic};
use warren_abi::nat::block_of;
use warren_abi::wire::UDP;

use super::{Error, sweep};

/// A flow or a mapping in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveFlow {
    /// Whose, and with whom; see [`OutKey::mapping`].
    pub key: OutKey,
    /// What is known of it.
    pub flow: Flow,
}

impl LiveFlow {
    /// Its stage, as [`FlowState::stage`](warren_abi::flow::FlowState::stage) has it; `expired` if
    /// nothing gets in any more, and its port rests, or `denied` if a policy is why.
    pub fn stage(&self, timers: &Timers, now: u32) -> &'static str {
        let (protocol, state) = (self.key.protocol as u8, self.flow.state);
        if !state.is_expired(protocol, timers, now) {
            return state.stage(protocol);
        }
        match state.end(false, protocol) {
            What::Denied => What::Denied.name(),
            _ => "expired",
        }
    }
}

/// Looks up what flows received, which the table of claims knows.
pub(super) struct Claims {
    map: HashMap<MapData, InKey, InFlow>,
}

impl Claims {
    pub fn new(map: HashMap<MapData, InKey, InFlow>) -> Self {
        Self { map }
    }

    /// Who has a claim.
    pub fn get(&self, claim: &InKey) -> Option<InFlow> {
        self.map.get(claim, 0).ok()
    }

    /// What a flow received; nothing if it is gone meanwhile.
    pub fn received(&self, LiveFlow { key, flow }: &LiveFlow) -> Traffic {
        let claim = key.claim(flow.vni, flow.port);
        self.get(&claim).map_or(Traffic::NONE, |claim| claim.received)
    }
}

/// The flows and mappings that are wanted.
pub(super) fn find(
    map: &MapData,
    wanted: impl Fn(&OutKey, &Flow) -> bool,
) -> Result<Vec<LiveFlow>, Error> {
    let mut found = Vec::new();
    sweep::for_each(map.fd().as_fd(), |key, flow| {
        if !flow.state.is_ended() && wanted(key, flow) {
            found.push(LiveFlow { key: *key, flow: *flow });
        }
    })?;
    Ok(found)
}

/// Which ports of a VPC's shared address are in use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortUse {
    /// The VPC.
    pub vni: u32,
    /// IP protocol.
    pub protocol: u8,
    /// UDP: ports that are mapped. Others, whose ports serve several destinations at a time: flows
    /// towards the destination that most go to.
    pub ports: u32,
    /// The blocks in which there are any, by [`block_of`].
    pub blocks: BTreeSet<u32>,
}

/// The ports in use, by VPC and protocol.
pub(super) fn port_use(map: &MapData) -> Result<Vec<PortUse>, Error> {
    let mut by_destination = StdHashMap::<_, u32>::new();
    let mut uses = BTreeMap::<_, PortUse>::new();
    sweep::for_each(map.fd().as_fd(), |key, flow| {
        let (vni, protocol) = (flow.vni, key.protocol as u8);
        let one = uses.entry((vni, protocol)).or_default();
        one.blocks.insert(block_of(flow.port.get()));
        // A UDP flow has its mapping's port; all mappings are towards `::`.
        if protocol != UDP || key.is_mapping() {
            let destination = (vni, protocol, key.peer.0, key.peer_port.0);
            *by_destination.entry(destination).or_default() += 1;
        }
    })?;
    for ((vni, protocol, ..), ports) in by_destination {
        let one = uses.entry((vni, protocol)).or_default();
        one.ports = ports.max(one.ports);
    }
    let named = |((vni, protocol), one)| PortUse { vni, protocol, ..one };
    Ok(uses.into_iter().map(named).collect())
}
