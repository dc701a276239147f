//! Who lives in a jail: what a host that lost count finds its microVMs by.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::unistd::Pid;

use super::{JailConfig, cgroup};

/// A microVM's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inhabitant {
    /// Its slot.
    pub slot: u32,
    /// The process.
    pub pid: Pid,
}

/// All microVMs of a jail, whoever made them, and whether they can be reached or not: what is in
/// its control groups; where there are none mounted, what is found by [`by_user`].
pub fn inhabitants(config: &JailConfig) -> Vec<Inhabitant> {
    cgroup::inhabitants(&config.cgroup).unwrap_or_else(|| by_user(config))
}

/// Those that have a slot's user and have the name of the jail's control group on their command
/// line: other hosts on the same machine may have the same users.
pub fn by_user(config: &JailConfig) -> Vec<Inhabitant> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let inhabitant = |pid: i32| {
        // Not by the owner of the directory: that is root where a process changed its user.
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let slot = user(&status)?.checked_sub(config.first_uid)?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut words = line.split(|byte| *byte == 0).map(OsStr::from_bytes);
        words.find(|word| *word == "--cgroup")?;
        let is_here = Path::new(words.next()?).starts_with(&config.cgroup);
        is_here.then_some(Inhabitant { slot, pid: Pid::from_raw(pid) })
    };
    pids.filter_map(inhabitant).collect()
}

/// The real user, in the text of `/proc/PID/status`.
fn user(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().next()?.parse().ok()
}
