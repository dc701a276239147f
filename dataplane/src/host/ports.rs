//! What this host uses of VPCs' ports, for the control plane: it gives more ahead of need.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use warren_abi::nat::{BLOCK_PORTS, block_of};
use warren_proto::v1;

use crate::datapath::{self, HostVpc, PortRange, PortUse};

/// Counting takes a pass through the table of flows: at most this part of the time is spent in it.
const SHARE: u32 = 20;

/// The last count.
#[derive(Debug, Default)]
pub(super) struct Counted(Mutex<Last>);

#[derive(Debug, Default)]
struct Last {
    due: Option<Instant>,
    uses: Vec<v1::PortUse>,
}

impl super::Host {
    /// Counts the ports in use, if it is time to; call it every second.
    pub fn count_ports(&self) -> Result<(), datapath::Error> {
        let start = Instant::now();
        if self.counted().due.is_some_and(|due| due > start) {
            return Ok(());
        }
        // First: what is counted then includes all flows that began in former ranges.
        let vpcs = self.datapath.vpcs()?;
        let uses = self.datapath.port_use()?;
        let uses = vpcs.iter().map(|vpc| total(vpc, &uses)).collect();
        let due = Some(Instant::now() + start.elapsed() * SHARE);
        // Only now: heartbeats do not wait for the pass.
        *self.counted() = Last { due, uses };
        Ok(())
    }

    /// What was counted last.
    pub fn port_use(&self) -> Vec<v1::PortUse> {
        self.counted().uses.clone()
    }

    /// Whether at least half of this host's ports of a shared address were free when they were counted
    /// last.
    pub(super) fn has_ports(&self, vni: u32) -> bool {
        let counted = self.counted();
        let found = counted.uses.iter().find(|found| found.vni == vni);
        found.is_none_or(|found| 2 * found.in_use <= found.ports.map_or(0, |ports| ports.count))
    }

    fn counted(&self) -> MutexGuard<'_, Last> {
        self.ports.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is used of a VPC's ports by all protocols, each of which has all of them.
fn total(&HostVpc { vni, ports, .. }: &HostVpc, uses: &[PortUse]) -> v1::PortUse {
    let of_vpc: Vec<_> = uses.iter().filter(|one| one.vni == vni).collect();
    let blocks: BTreeSet<_> = of_vpc.iter().flat_map(|one| &one.blocks).copied().collect();
    let PortRange { base, count } = ports;
    let present = block_of(base)..block_of(base) + count / BLOCK_PORTS;
    v1::PortUse {
        vni,
        ports: Some(v1::PortRange { base: base.into(), count }),
        in_use: of_vpc.iter().map(|one| one.ports).max().unwrap_or_default(),
        former_blocks: blocks.into_iter().filter(|block| !present.contains(block)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use warren_abi::wire::{TCP, UDP};

    use super::*;

    #[test]
    fn protocols_share_ports_and_former_blocks_are_told_apart() {
        let vpc = HostVpc {
            vni: 7,
            shared_address: [10, 0, 0, 9].into(),
            shared_address_v6: None,
            ports: PortRange { base: 1024, count: 128 },
            proxy_address: std::net::IpAddr::from([192, 0, 2, 8]),
            proxies: Vec::new(),
        };
        let one = |vni, protocol, ports, blocks: &[u32]| PortUse {
            vni,
            protocol,
            ports,
            blocks: blocks.iter().copied().collect(),
        };
        let uses =
            [one(6, UDP, 500, &[1]), one(7, TCP, 40, &[16, 20]), one(7, UDP, 50, &[17, 18, 20])];
        let told = total(&vpc, &uses);
        assert_eq!((told.vni, told.in_use), (7, 50));
        assert_eq!(told.ports, Some(v1::PortRange { base: 1024, count: 128 }));
        assert_eq!(told.former_blocks, [18, 20]);
        assert_eq!(total(&HostVpc { vni: 8, ..vpc }, &uses).in_use, 0);
    }
}
