//! What VPCs' instances sent and received, by the kernel's own statistics of their TAPs: no program
//! counts for it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{MutexGuard, PoisonError};

use crate::datapath::{self, Carried};

/// Counts that never fall while a VPC is known.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    /// What slots' TAPs had carried when they were last looked at.
    seen: HashMap<u32, Carried>,
    /// What VPCs' instances had carried by then, by VNI.
    vpcs: BTreeMap<u32, Carried>,
}

impl Accounts {
    /// What TAPs carried so far is nobody's.
    pub fn new(seen: HashMap<u32, Carried>) -> Self {
        Self { seen, vpcs: BTreeMap::new() }
    }

    /// What a slot's TAP carried since it was last looked at is this VPC's.
    pub fn settle(&mut self, slot: u32, vni: u32, carried: Carried) {
        let seen = self.seen.insert(slot, carried).unwrap_or_default();
        let account = self.vpcs.entry(vni).or_default();
        *account = account.plus(carried.since(seen));
    }

    /// The VPC is not known any more.
    pub fn close(&mut self, vni: u32) {
        self.vpcs.remove(&vni);
    }
}

impl super::Host {
    /// A microVM is gone: what its slot carries from now on is another's.
    pub(super) fn settle(&self, slot: u32, vni: u32) {
        // Read under the lock, as in the other place: none settles what is older than another.
        let mut accounts = self.accounts();
        match self.datapath.carried(slot) {
            Ok(carried) => accounts.settle(slot, vni, carried),
            Err(error) => tracing::error!(slot, vni, "traffic not accounted: {error}"),
        }
    }

    /// What the instances of each VPC sent and received since this daemon started.
    pub(super) fn vpc_traffic(&self) -> Result<Vec<(u32, Carried)>, datapath::Error> {
        let mut accounts = self.accounts();
        let carried = self.datapath.all_carried()?;
        // The state is locked no sooner: reading takes long, and starts need it. A slot whose
        // microVM ended meanwhile waits for the accounts, and is no other instance's yet.
        let state = self.state();
        let running = state.instances.values().filter(|instance| instance.failed.is_none());
        for instance in running {
            if let Some(carried) = carried.get(&instance.slot.number) {
                accounts.settle(instance.slot.number, instance.record.vni, *carried);
            }
        }
        drop(state);
        Ok(accounts.vpcs.iter().map(|(vni, carried)| (*vni, *carried)).collect())
    }

    pub(super) fn accounts(&self) -> MutexGuard<'_, Accounts> {
        // No code panics while it holds the lock; if some did, the counts are still whole.
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(bytes: u64) -> Carried {
        let mut carried = Carried::default();
        (carried.sent.packets, carried.sent.bytes) = (bytes / 100, bytes);
        carried
    }

    #[test]
    fn a_slot_s_traffic_is_its_tenants_in_turn() {
        let mut accounts = Accounts::new([(1, sent(1000))].into());
        accounts.settle(1, 100, sent(1500));
        accounts.settle(1, 100, sent(1700));
        accounts.settle(1, 200, sent(1900));
        accounts.settle(2, 200, sent(300));
        assert_eq!(accounts.vpcs, [(100, sent(700)), (200, sent(500))].into());
        // A TAP that was made anew begins at 0.
        accounts.settle(2, 200, sent(100));
        assert_eq!(accounts.vpcs[&200], sent(600));
        accounts.close(100);
        assert_eq!(accounts.vpcs, [(200, sent(600))].into());
    }
}
