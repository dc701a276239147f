//! The TUN device of the link-local services.

use aya::maps::{Array, MapData};
use warren_abi::maps::{ServiceSlot, names, programs};

use super::netlink::{Interface, Netlink};
use super::programs::Programs;
use super::tap::{self, Kind};
use super::{Error, Slot, underlay};

/// Name of the device's pinned link.
const LINK: &str = "services";

/// Name of the device.
pub(super) fn device_name(prefix: &str) -> Result<String, Error> {
    underlay::device_name(prefix).map(|_| format!("{prefix}-svc"))
}

/// Makes or adopts the device, which is down if it is new. It stays when this process ends: what
/// is sent to it is lost then, and nothing else changes.
pub(super) fn open_device(netlink: &mut Netlink, name: &str) -> Result<Interface, Error> {
    tap::adopt(netlink, name, Kind::Tun)
}

/// Tells the programs of the slots, and takes the device up, with the program at its ingress
/// before any packet can arrive.
pub(super) fn connect(
    netlink: &mut Netlink,
    programs: &mut Programs,
    device: &Interface,
    slots: &[Slot],
    mtu: u16,
) -> Result<(), Error> {
    let name = names::SERVICE_SLOTS;
    let mut entries: Array<MapData, ServiceSlot> = programs.map(name)?;
    for slot in slots {
        let entry = ServiceSlot { due_ns: 0, ifindex: slot.ifindex, reserved: 0 };
        entries.set(slot.number, entry, 0).map_err(|source| Error::map(name, source))?;
    }
    programs.attach(programs::SERVICES, LINK, &device.name)?;
    netlink.set_up(&[device], u32::from(mtu))
}
