//! Switches of the kernel.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

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

/// Makes the kernel's grace periods short for as long as it lives: attaching a program waits for
/// one, 7 ms otherwise.
pub(super) struct ExpeditedRcu {
    before: Option<String>,
}

impl ExpeditedRcu {
    const PATH: &str = "/sys/kernel/rcu_expedited";

    /// Switches it on. Where that is not permitted, all is slower, and no harm done.
    pub fn new() -> Self {
        let path = Path::new(Self::PATH);
        let before = fs::read_to_string(path).ok().map(|value| value.trim().to_owned());
        let before = before.filter(|value| value == "0" && fs::write(path, "1").is_ok());
        Self { before }
    }
}

impl Drop for ExpeditedRcu {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = fs::write(Self::PATH, before);
        }
    }
}
