//! Who was attached where: flows end after their instance did, and are still told with its name.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use uuid::Uuid;

/// Instances that ended are remembered until so many others did: their last flows are collected
/// minutes later.
const FORMER_KEPT: usize = 1 << 16;

/// Who began a flow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The slot; none: the daemon itself, for its services.
    pub slot: Option<u32>,
    /// The slot's address.
    pub address: Option<Ipv4Addr>,
    /// The slot's IPv6 address.
    pub address_v6: Option<Ipv6Addr>,
    /// The instance, as far as it is known.
    pub instance: Option<Uuid>,
}

/// A VPC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedVpc {
    /// Name.
    pub name: String,
    /// The address that its guests appear as.
    pub shared_address: Ipv4Addr,
    /// The same of IPv6; none: it has no IPv6.
    pub shared_address_v6: Option<Ipv6Addr>,
}

impl Owner {
    /// The address in flows with this peer; towards all peers (`::`), that of IPv4.
    pub fn address_towards(&self, peer: IpAddr) -> Option<IpAddr> {
        if is_v4(peer) { self.address.map(Into::into) } else { self.address_v6.map(Into::into) }
    }
}

impl NamedVpc {
    /// As [`Owner::address_towards`].
    pub fn address_towards(&self, peer: IpAddr) -> Option<IpAddr> {
        if is_v4(peer) {
            Some(self.shared_address.into())
        } else {
            self.shared_address_v6.map(Into::into)
        }
    }
}

fn is_v4(peer: IpAddr) -> bool {
    peer.is_ipv4() || peer.is_unspecified()
}

/// Who stands behind the numbers of events.
pub trait Names {
    /// Who had an interface under an attachment.
    fn owner(&self, ifindex: u32, generation: u32) -> Owner;
    /// A VPC.
    fn vpc(&self, vni: u32) -> Option<NamedVpc>;
}

/// The instances by slot and attachment.
#[derive(Debug, Default)]
pub struct Owners {
    by_attachment: HashMap<(u32, u32), Uuid>,
    /// Attachments that ended, oldest first.
    former: VecDeque<(u32, u32)>,
}

impl Owners {
    /// An instance was attached.
    pub fn attached(&mut self, slot: u32, generation: u32, instance: Uuid) {
        self.by_attachment.insert((slot, generation), instance);
    }

    /// An instance ended.
    pub fn detached(&mut self, slot: u32, generation: u32) {
        self.former.push_back((slot, generation));
        if self.former.len() > FORMER_KEPT
            && let Some(oldest) = self.former.pop_front()
        {
            self.by_attachment.remove(&oldest);
        }
    }

    /// Who it was.
    pub fn find(&self, slot: u32, generation: u32) -> Option<Uuid> {
        self.by_attachment.get(&(slot, generation)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn former_instances_are_known_for_a_while() {
        let mut owners = Owners::default();
        let [first, second] = [1, 2].map(Uuid::from_u128);
        owners.attached(1, 7, first);
        owners.detached(1, 7);
        owners.attached(1, 8, second);
        assert_eq!(owners.find(1, 7), Some(first));
        assert_eq!(owners.find(1, 8), Some(second));
        assert_eq!(owners.find(2, 7), None);
        for generation in 0..FORMER_KEPT as u32 {
            owners.attached(2, generation, second);
            owners.detached(2, generation);
        }
        assert_eq!(owners.find(1, 7), None);
        assert_eq!(owners.find(1, 8), Some(second), "it runs");
    }
}
