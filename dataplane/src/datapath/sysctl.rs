//! Switches of the kernel.

use std::fs;
use std::io::ErrorKind;

use super::Error;

/// Keeps IPv6 off an interface, which must be done before it goes up: it would otherwise announce
/// itself. No error where the kernel has no IPv6.
pub(super) fn disable_ipv6(interface: &str) -> Result<(), Error> {
    match set(interface, "disable_ipv6", "1") {
        Err(Error::System { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Gives an interface IPv6 without any address, and without heeding routers. What it had of IPv6 is
/// gone.
pub(super) fn reset_ipv6(interface: &str) -> Result<(), Error> {
    set(interface, "disable_ipv6", "1")?;
    set(interface, "accept_ra", "0")?;
    // IN6_ADDR_GEN_MODE_NONE (linux/if_link.h).
    set(interface, "addr_gen_mode", "1")?;
    set(interface, "disable_ipv6", "0")
}

/// Has the kernel ask for neighbours on an interface again after 20 ms, not a second: one question that
/// is lost, while addresses move, would hold up all traffic with that neighbour for so long.
pub(super) fn hurry_neighbours(interface: &str) -> Result<(), Error> {
    for family in ["ipv4", "ipv6"] {
        let path = format!("/proc/sys/net/{family}/neigh/{interface}/retrans_time_ms");
        match fs::write(&path, "20") {
            // It has none of this family.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            result => result.map_err(|source| Error::system("write", path, source))?,
        }
    }
    Ok(())
}

fn set(interface: &str, name: &str, value: &str) -> Result<(), Error> {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/{name}");
    fs::write(&path, value).map_err(|source| Error::system("write", path, source))
}
