//! The device for fragments: see [`crate::fragments`].

use super::netlink::{Interface, Netlink};
use super::programs::Programs;
use super::tap::{self, Kind};
use super::{Error, underlay};

/// Names of the device's pinned links, of as many programs as there may be.
const LINKS: [&str; 2] = ["fragments", "fragments-2"];
/// Its MTU, in bytes: the largest that a TAP has. What it takes was received whole.
const MTU: u32 = 65_521;

/// Name of the device.
pub(super) fn device_name(prefix: &str) -> Result<String, Error> {
    underlay::device_name(prefix).map(|_| format!("{prefix}-frag"))
}

/// Makes or adopts the device, which is down if it is new. It stays when this process ends:
/// fragments that come in order pass, others are lost.
pub(super) fn open_device(netlink: &mut Netlink, name: &str) -> Result<Interface, Error> {
    tap::adopt(netlink, name, Kind::Tap)
}

/// Takes the device up, with `wanted` at its ingress, one behind the other, before any packet can
/// arrive.
pub(super) fn connect(
    netlink: &mut Netlink,
    programs: &mut Programs,
    wanted: &[&'static str],
    device: &Interface,
) -> Result<(), Error> {
    for (program, link) in wanted.iter().zip(LINKS) {
        programs.attach(program, link, &device.name)?;
    }
    netlink.set_up(&[device], MTU)
}
