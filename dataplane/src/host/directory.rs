//! What link-local services ask a host.

use super::Host;
use crate::datapath::Attachment;
use crate::services::{Directory, Instance, Vpc};

impl Directory for Host {
    fn attachment(&self, slot: u32) -> Option<Attachment> {
        self.datapath.attachment(slot).ok().flatten()
    }

    fn instance(&self, slot: u32) -> Option<Instance> {
        let state = self.state();
        let is_here =
            |found: &&super::Instance| found.slot.number == slot && found.failed.is_none();
        let found = state.instances.values().find(is_here)?;
        let instance = self.describe(&state, found);
        let vpc = state.vpcs.find(&instance.vpc, found.record.vni)?;
        let search_domain = vpc.naming.search_domain.as_ref();
        Some(Instance {
            instance_id: instance.id,
            hostname: instance.hostname,
            local_ipv4: instance.address,
            mac: instance.mac,
            vpc: instance.vpc,
            vni: vpc.vni,
            shared_ipv4: instance.shared_address,
            search_domain: search_domain.map(ToString::to_string).unwrap_or_default(),
            host: instance.host,
        })
    }

    fn vpc(&self, vni: u32) -> Option<Vpc> {
        let state = self.state();
        let (_, vpc) = state.vpcs.iter().find(|(_, vpc)| vpc.vni == vni)?;
        Some(Vpc { naming: vpc.naming.clone() })
    }
}
