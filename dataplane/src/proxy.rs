//! A proxy node: the data path, and nothing else to keep.

use crate::datapath::{DropCount, Error, ProxyDatapath, ProxyVpc};

/// A proxy node.
pub struct Proxy {
    datapath: ProxyDatapath,
}

impl Proxy {
    /// A proxy over an open data path.
    pub fn new(datapath: ProxyDatapath) -> Self {
        Self { datapath }
    }

    /// Makes a VPC known, or replaces what was known of it.
    pub fn apply_vpc(&self, vpc: &ProxyVpc) -> Result<(), Error> {
        self.datapath.apply_vpc(vpc)
    }

    /// Forgets a VPC.
    pub fn remove_vpc(&self, vni: u32) -> Result<(), Error> {
        self.datapath.remove_vpc(vni)
    }

    /// What was dropped, per VNI and reason.
    pub fn drops(&self) -> Result<Vec<DropCount>, Error> {
        self.datapath.drops()
    }
}
