//! What the log of flows asks its host.

use super::Host;
use crate::flowlog::owners::{NamedVpc, Names, Owner};
use crate::flowlog::{FlowLog, Source};

impl Names for Host {
    fn owner(&self, ifindex: u32, generation: u32) -> Owner {
        let Some(slot) = self.datapath.slot_of(ifindex) else { return Owner::default() };
        let instance = self.state().owners.find(slot.number, generation);
        Owner { slot: Some(slot.number), address: Some(slot.address), instance }
    }

    fn vpc(&self, vni: u32) -> Option<NamedVpc> {
        self.state().names.get(&vni).cloned()
    }
}

impl Source for Host {
    fn lost(&self) -> Option<u64> {
        let totals = self.datapath.flow_totals();
        totals.inspect_err(|error| tracing::error!("{error}")).ok().map(|totals| totals.lost)
    }
}

impl Host {
    /// From now on, flows are logged.
    pub fn logs_flows(&self, log: FlowLog) {
        // Nobody sets a second one.
        drop(self.log.set(log));
    }
}
