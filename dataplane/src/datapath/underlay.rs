//! The tunnel's end: the underlay's interface, and the VXLAN device.

use std::net::IpAddr;

use rtnetlink::packet_route::link::InfoKind;
use warren_abi::maps::Underlay;
use warren_abi::wire::{VXLAN_OVERHEAD, VXLAN_OVERHEAD_V6};

use super::netlink::{Interface, Netlink};
use super::programs::Programs;
use super::{Error, check_address, sysctl};

/// Name of the VXLAN device's pinned link.
const LINK: &str = "tunnel";
/// Name of the underlay interface's pinned link.
pub(super) const SHORT_CUT: &str = "underlay";

/// Smallest MTU that IPv4 has (RFC 791), and IPv6 (RFC 8200, section 5).
const MIN_MTU: u32 = 576;
const MIN_MTU_V6: u16 = 1280;

/// Looks up the underlay's interface, which must have `address`.
pub(super) fn find(netlink: &mut Netlink, name: &str, address: IpAddr) -> Result<Underlay, Error> {
    let interface = netlink.interface(name)?;
    if !netlink.addresses(&interface)?.contains(&address) {
        let remedy = "give an address that the underlay interface has";
        return Err(Error::invalid("underlay address", address, remedy));
    }
    let overhead = match address {
        IpAddr::V4(_) => VXLAN_OVERHEAD,
        IpAddr::V6(_) => VXLAN_OVERHEAD_V6,
    };
    let inner_mtu = interface.mtu.saturating_sub(u32::from(overhead));
    if inner_mtu < MIN_MTU {
        let remedy = "raise the MTU of the underlay interface to at least 626, 646 with IPv6";
        return Err(Error::invalid("underlay MTU", interface.mtu, remedy));
    }
    let inner_mtu = inner_mtu.min(u32::from(u16::MAX));
    Ok(Underlay { ifindex: interface.index, address: address.into(), inner_mtu })
}

/// Largest IP packet that the tunnel carries, in bytes.
pub(super) fn inner_mtu(underlay: &Underlay) -> u16 {
    underlay.inner_mtu as u16
}

/// Checks the address of another end of the tunnel.
pub(super) fn check_remote(
    underlay: &Underlay,
    what: &'static str,
    address: IpAddr,
) -> Result<(), Error> {
    check_address(what, address)?;
    if IpAddr::from(underlay.address).is_ipv4() == address.is_ipv4() {
        return Ok(());
    }
    Err(Error::invalid(what, address, "give one of the underlay's family"))
}

/// Checks that the tunnel can carry IPv6.
pub(super) fn check_mtu_v6(underlay: &Underlay) -> Result<(), Error> {
    let mtu = inner_mtu(underlay);
    if mtu >= MIN_MTU_V6 {
        return Ok(());
    }
    let remedy = "IPv6 needs 1280: raise the MTU of the underlay interface to at least 1350";
    Err(Error::invalid("guests' MTU", mtu, remedy))
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
