//! Who holds which ports of a shared address: all that a proxy knows of the way back.

use warren_abi::maps::{BlockKey, ProxyVpc};
use warren_abi::nat::block_of;
use warren_abi::wire::{Be16, Ip};

use crate::cache;

/// The underlay address of the host that holds a port.
#[inline(always)]
pub fn holder(vpc: &ProxyVpc, port: Be16) -> Option<&'static Ip> {
    let ProxyVpc { vni, shared_address, .. } = *vpc;
    cache::holder(BlockKey { vni, shared_address, block: block_of(port.get()) })
}
