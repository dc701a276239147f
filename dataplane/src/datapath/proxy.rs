//! A proxy's data path.
use super::{DropCount, Error, ProxyOptions, ProxyVpc};

/// The data path of a proxy, open. All methods may be called from any thread.
#[derive(Debug)]
pub struct ProxyDatapath {}

impl ProxyDatapath {
    /// Makes the data path, or adopts the one that is there and replaces its programs.
    pub fn open(options: &ProxyOptions) -> Result<Self, Error> { unimplemented!("{options:?}") }
    /// Makes a VPC known, or replaces what was known; blocks not listed any more are removed.
    pub fn apply_vpc(&self, vpc: &ProxyVpc) -> Result<(), Error> { unimplemented!("{vpc:?}") }
    /// Forgets a VPC; nothing if unknown.
    pub fn remove_vpc(&self, vni: u32) -> Result<(), Error> { unimplemented!("{vni}") }
    /// The VPCs that the programs know, in the order of their VNIs.
    pub fn vpcs(&self) -> Result<Vec<ProxyVpc>, Error> { unimplemented!() }
    /// The counters that are not zero.
    pub fn drops(&self) -> Result<Vec<DropCount>, Error> { unimplemented!() }
    /// Removes everything that `open` and `apply_vpc` made, open here or not.
    pub fn uninstall(options: &ProxyOptions) -> Result<(), Error> { unimplemented!("{options:?}") }
}
