//! A host's data path.
use std::os::fd::OwnedFd;
use super::{Attachment, DropCount, Error, HostOptions, HostVpc, Slot, SweepReport};

/// The data path of a host, open. All methods may be called from any thread.
#[derive(Debug)]
pub struct HostDatapath {}

impl HostDatapath {
    /// Makes the data path, or adopts the one that is there and replaces its programs.
    pub fn open(options: &HostOptions) -> Result<Self, Error> { unimplemented!("{options:?}") }
    /// The slots, by number.
    pub fn slots(&self) -> &[Slot] { unimplemented!() }
    /// Opens a slot's TAP for a VMM: non-blocking, virtio-net header of 12 bytes, no offloads.
    /// EBUSY (`Error::System`) while another process has it open.
    pub fn open_tap(&self, slot: u32) -> Result<OwnedFd, Error> { unimplemented!("{slot}") }
    /// Largest IP packet of a guest, in bytes: the underlay's MTU less 50.
    pub fn mtu(&self) -> u16 { unimplemented!() }
    /// Makes a VPC known, or replaces what was known.
    pub fn apply_vpc(&self, vpc: &HostVpc) -> Result<(), Error> { unimplemented!("{vpc:?}") }
    /// Forgets a VPC; nothing if unknown. [`Error::VpcInUse`] while a slot is attached to it.
    pub fn remove_vpc(&self, vni: u32) -> Result<(), Error> { unimplemented!("{vni}") }
    /// The VPCs that the programs know, in the order of their VNIs.
    pub fn vpcs(&self) -> Result<Vec<HostVpc>, Error> { unimplemented!() }
    /// Connects a slot to a VPC: one map write. Returns the attachment's generation.
    pub fn attach(&self, slot: u32, vni: u32) -> Result<u32, Error> { unimplemented!("{slot}{vni}") }
    /// Disconnects a slot: one map write. Nothing if it is not attached.
    pub fn detach(&self, slot: u32) -> Result<(), Error> { unimplemented!("{slot}") }
    /// What a slot is attached to, read from the map.
    pub fn attachment(&self, slot: u32) -> Result<Option<Attachment>, Error> { unimplemented!("{slot}") }
    /// The counters that are not zero.
    pub fn drops(&self) -> Result<Vec<DropCount>, Error> { unimplemented!() }
    /// How many flows are in the table.
    pub fn flows(&self) -> Result<u32, Error> { unimplemented!() }
    /// Removes flows that ended. Call it every few seconds.
    pub fn sweep(&self) -> Result<SweepReport, Error> { unimplemented!() }
    /// Removes everything that `open` made, open here or not; no error if nothing is there.
    pub fn uninstall(options: &HostOptions) -> Result<(), Error> { unimplemented!("{options:?}") }
}
