//! Becoming who the VMM says this clone is.

use std::arch::x86_64::_rdtsc;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::sethostname;
use nix::{ioctl_none, ioctl_write_ptr_bad, request_code_write};
use warren_abi::microvm::Identity;

use crate::error::{AgentError, system};
use crate::network::Link;

const NANOSECONDS: u64 = 1_000_000_000;

const RANDOM: &str = "/dev/random";

/// Linux's `struct rand_pool_info` (<linux/random.h>) with room for an identity's entropy.
#[repr(C)]
struct Entropy {
    /// How much it is worth, in bits.
    bits: libc::c_int,
    /// How much follows, in bytes.
    length: libc::c_int,
    bytes: [u8; 64],
}

// RNDADDENTROPY is defined with the size of the two numbers only.
ioctl_write_ptr_bad!(
    add_entropy,
    request_code_write!(b'R', 3, 2 * size_of::<libc::c_int>()),
    Entropy
);
ioctl_none!(reseed, b'R', 7);

/// Applies all of it.
///
/// # Errors
/// The kernel refuses, or the identity is none.
pub fn apply(identity: &Identity, link: &Link) -> Result<(), AgentError> {
    // First: everything that draws random numbers does so afterwards.
    seed(identity)?;
    set_clock(identity)?;
    set_names(identity, Path::new("/etc"))?;
    link.apply(identity)
}

/// Sets the host name, and writes the machine's identifier into a folder, which is made.
///
/// # Errors
/// The kernel refuses.
pub fn set_names(identity: &Identity, etc: &Path) -> Result<(), AgentError> {
    sethostname(OsStr::from_bytes(hostname(identity))).map_err(system("host name"))?;
    fs::create_dir_all(etc).map_err(system(etc.display().to_string()))?;
    let path = etc.join("machine-id");
    fs::write(&path, machine_id(identity)).map_err(system(path.display().to_string()))
}

/// Gives the kernel's random generator the entropy, and has it forget the seed that all clones of a
/// template share.
///
/// # Errors
/// The kernel refuses.
pub fn seed(identity: &Identity) -> Result<(), AgentError> {
    let random = File::options().write(true).open(RANDOM).map_err(system(RANDOM))?;
    let entropy = Entropy {
        bits: (identity.entropy.len() * 8) as i32,
        length: identity.entropy.len() as i32,
        bytes: identity.entropy,
    };
    // SAFETY: the kernel reads as many bytes as the length says, which are there.
    unsafe { add_entropy(random.as_raw_fd(), &raw const entropy) }
        .map_err(system("entropy, by RNDADDENTROPY"))?;
    // SAFETY: takes no argument.
    unsafe { reseed(random.as_raw_fd()) }.map_err(system("new seed, by RNDRESEEDCRNG"))?;
    Ok(())
}

fn set_clock(identity: &Identity) -> Result<(), AgentError> {
    // SAFETY: reads a counter.
    let now = wall_clock_ns(identity, unsafe { _rdtsc() })?;
    let time = TimeSpec::new((now / NANOSECONDS) as i64, (now % NANOSECONDS) as i64);
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(system("wall clock"))
}

/// Nanoseconds since 1970 when the time stamp counter is at `tsc`.
///
/// # Errors
/// The identity does not say how fast the counter is.
pub fn wall_clock_ns(identity: &Identity, tsc: u64) -> Result<u64, AgentError> {
    let ticks = u128::from(tsc.saturating_sub(identity.tsc));
    let since = (ticks * u128::from(NANOSECONDS))
        .checked_div(identity.tsc_hz.into())
        .ok_or(AgentError::NoFrequency)?;
    Ok(identity.wall_clock_ns.saturating_add(u64::try_from(since).unwrap_or(u64::MAX)))
}

/// The host name without its padding.
pub fn hostname(identity: &Identity) -> &[u8] {
    identity.hostname.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// The contents of /etc/machine-id (`machine-id(5)`).
pub fn machine_id(identity: &Identity) -> String {
    format!("{:032x}\n", u128::from_be_bytes(identity.instance_id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let mut identity = Identity {
            wall_clock_ns: 1_700_000_000_000_000_000,
            tsc: 1000,
            tsc_hz: 3_000_000_000,
            entropy: [0; 64],
            instance_id: [0; 16],
            hostname: [0; 64],
            ipv4: [10, 0, 0, 2],
            gateway: [10, 0, 0, 1],
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1400,
        };
        identity.hostname[..2].copy_from_slice(b"f1");
        identity.instance_id[0] = 0x0f;
        identity.instance_id[15] = 0xa1;
        identity
    }

    #[test]
    fn the_wall_clock_goes_on_with_the_counter() {
        let mut identity = identity();
        let at = |identity: &Identity, tsc| wall_clock_ns(identity, tsc).unwrap();
        let start = identity.wall_clock_ns;
        assert_eq!(at(&identity, 1000), start);
        assert_eq!(at(&identity, 1003), start + 1);
        assert_eq!(at(&identity, 1000 + 3 * NANOSECONDS), start + NANOSECONDS);
        // Years of ticks overflow 64 bits when they become nanoseconds.
        let year = 365 * 86400;
        assert_eq!(at(&identity, 1000 + 3 * NANOSECONDS * year), start + NANOSECONDS * year);
        // A counter that is behind, by less than the clocks' error.
        assert_eq!(at(&identity, 999), start);
        identity.tsc_hz = 0;
        assert!(matches!(wall_clock_ns(&identity, 1), Err(AgentError::NoFrequency)));
    }

    #[test]
    fn host_name_and_machine_id() {
        let mut identity = identity();
        assert_eq!(hostname(&identity), b"f1");
        identity.hostname = [b'x'; 64];
        assert_eq!(hostname(&identity), [b'x'; 64]);
        assert_eq!(machine_id(&identity), "0f0000000000000000000000000000a1\n");
    }
}
