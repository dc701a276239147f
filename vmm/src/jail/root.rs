//! A root with nothing in it.

use std::io;
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, fchdir, pivot_root};

const NONE: Option<&str> = None;

/// Takes this process to namespaces of its own: no network, and its mounts are nobody else's.
pub fn separate() -> io::Result<()> {
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS,
    )?;
    // Nothing of what follows shall be seen in other namespaces.
    Ok(mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?)
}

/// Moves this process to an empty, read-only root, with `run_dir`, which is not below that root, as
/// its working directory.
pub fn leave(run_dir: &Path) -> io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let sockets = open(run_dir, flags, Mode::empty())?;
    let closed = MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID;
    mount(Some("none"), run_dir, Some("tmpfs"), closed, Some("size=4k,nr_inodes=1,mode=0555"))?;
    chdir(run_dir)?;
    // With both arguments the same, the old root lies on top of the new one, from where it is
    // taken away (pivot_root(2)).
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(NONE, "/", NONE, read_only | closed, NONE)?;
    Ok(fchdir(&sockets)?)
}
