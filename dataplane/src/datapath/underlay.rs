//! The tunnel's end: the underlay's interface, and the VXLAN device.

use std::net::Ipv4Addr;

use rtnetlink::packet_route::link::InfoKind;
use warren_abi::maps::Underlay;
use warren_abi::wire::VXLAN_OVERHEAD;

use super::netlink::{Interface, Netlink};
use super::programs::Programs;
use super::{Error, sysctl};

/// Name of the VXLAN device's pinned link.
const LINK: &str = "tunnel";
/// Name of the underlay interface's pinned link.
pub(super) const SHORT_CUT: &str = "underlay";

/// Smallest MTU of an underlay, in bytes: that of IPv4 (RFC 791) and the tunnel's headers.
const MIN_MTU: u32 = 576 + VXLAN_OVERHEAD as u32;

/// Looks up the underlay's interface, which must have `address`.
pub(super) fn find(
    netlink: &mut Netlink,
    name: &str,
    address: Ipv4Addr,
) -> Result<Underlay, Error> {
    let interface = netlink.interface(name)?;
    if !netlink.addresses(&interface)?.contains(&address) {
        let remedy = "give an address that the underlay interface has";
        return Err(Error::invalid("underlay address", address, remedy));
    }
    if interface.mtu < MIN_MTU {
        let remedy = "raise the MTU of the underlay interface to at least 626";
        return Err(Error::invalid("underlay MTU", interface.mtu, remedy));
    }
    Ok(Underlay { ifindex: interface.index, address: address.into(), mtu: interface.mtu })
}

/// Largest IP packet that the tunnel carries, in bytes.
pub(super) fn inner_mtu(underlay: &Underlay) -> u16 {
    u16::try_from(underlay.mtu - u32::from(VXLAN_OVERHEAD)).unwrap_or(u16::MAX)
}

/// Name of the VXLAN device.
pub(super) fn device_name(prefix: &str) -> Result<String, Error> {
    let valid = (1..=8).contains(&prefix.len())
        && prefix.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if valid {
        Ok(format!("{prefix}-vxlan"))
    } else {
        Err(Error::invalid("interface prefix", prefix, "give 1 to 8 ASCII letters, digits or _"))
    }
}

/// Makes or adopts the VXLAN device, with `program` at its ingress before any packet can arrive.
pub(super) fn open_device(
    netlink: &mut Netlink,
    programs: &mut Programs,
    program: &'static str,
    name: &str,
    mtu: u16,
) -> Result<Interface, Error> {
    let device = match netlink.interface(name) {
        Ok(device) if device.kind == Some(InfoKind::Vxlan) => device,
        Ok(device) => {
            let remedy = "remove the interface, or choose another prefix";
            return Err(Error::invalid("kind of interface", device.name, remedy));
        }
        Err(Error::NoInterface { .. }) => {
            netlink.create_vxlan(name)?;
            netlink.interface(name)?
        }
        Err(error) => return Err(error),
    };
    sysctl::disable_ipv6(name)?;
    programs.attach(program, LINK, name)?;
    netlink.set_up(&[&device], u32::from(mtu))?;
    Ok(device)
}
