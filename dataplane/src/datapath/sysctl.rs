//! Switches of the kernel.

use std::fs;
use std::io::ErrorKind;

use super::Error;

/// Keeps IPv6 off an interface, which must be done before it goes up: it would otherwise announce
/// itself. No error where the kernel has no IPv6.
pub(super) fn disable_ipv6(interface: &str) -> Result<(), Error> {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    match fs::write(&path, "1") {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| Error::system("write", path, source)),
    }
}
