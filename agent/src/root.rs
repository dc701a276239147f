//! The root of a function's file system: its image, read-only, below a layer in memory.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use warren_abi::microvm::Identity;

use crate::error::{AgentError, system};
use crate::identity::{hostname, machine_id};

/// The function's image: an ext4 file system on the VMM's disk.
pub const DISK: &str = "/dev/vda";

/// Where the image is mounted.
const IMAGE: &str = "/image";

/// Where the layer over it is.
const LAYER: &str = "/layer";

/// Where both together are.
pub const ROOT: &str = "/function";

/// The resolver that every host answers for, link-local.
const RESOLVER: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 253);

/// A file system without a disk.
pub(crate) struct Mount {
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    options: &'static str,
}

impl Mount {
    pub(crate) const fn new(
        source: &'static str,
        target: &'static str,
        kind: &'static str,
        options: &'static str,
    ) -> Self {
        Self { source, target, kind, options }
    }
}

/// What a program expects to find beside its image, in the order in which it is mounted.
const MOUNTS: [Mount; 7] = [
    Mount::new("proc", "/proc", "proc", ""),
    Mount::new("sysfs", "/sys", "sysfs", ""),
    Mount::new("devtmpfs", "/dev", "devtmpfs", ""),
    Mount::new("devpts", "/dev/pts", "devpts", "mode=0620,ptmxmode=0666"),
    Mount::new("tmpfs", "/dev/shm", "tmpfs", "mode=1777"),
    Mount::new("tmpfs", "/run", "tmpfs", "mode=0755"),
    Mount::new("tmpfs", "/tmp", "tmpfs", "mode=1777"),
];

/// What a program expects in /dev, and devtmpfs does not have.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
];

/// Mounts the disk and builds the function's root over it, at [`ROOT`].
///
/// # Errors
/// The disk holds no ext4 file system, or the kernel refuses.
pub fn assemble(identity: &Identity) -> Result<(), AgentError> {
    let (image, layer, root) = (Path::new(IMAGE), Path::new(LAYER), Path::new(ROOT));
    make(image)?;
    let what = format!("{DISK}, the function's image, as ext4");
    mount(Some(DISK), image, Some("ext4"), MsFlags::MS_RDONLY, None::<&str>)
        .map_err(system(what))?;
    mount_all(Path::new("/"), &[Mount::new("tmpfs", LAYER, "tmpfs", "mode=0755")])?;
    overlay(image, layer, root, identity)?;
    mount_all(root, &MOUNTS)?;
    for (target, name) in LINKS {
        let path = root.join("dev").join(name);
        // The device file system is the agent's, too.
        if !path.is_symlink() {
            symlink(target, &path).map_err(system(path.display().to_string()))?;
        }
    }
    Ok(())
}

/// Lays a layer with the clone's own files over an image.
///
/// They are written into the layer before it lies there: what the image has in their place, a link to
/// anywhere for instance, is hidden and never followed.
///
/// # Errors
/// The kernel refuses.
pub fn overlay(
    image: &Path,
    layer: &Path,
    root: &Path,
    identity: &Identity,
) -> Result<(), AgentError> {
    let (upper, work) = (layer.join("upper"), layer.join("work"));
    for path in [root, &upper.join("etc"), &work] {
        make(path)?;
    }
    for mount in &MOUNTS {
        // Those below /dev are in the device file system.
        if mount.target.rfind('/') == Some(0) {
            make(&inside(&upper, mount.target))?;
        }
    }
    for (name, contents) in files(identity) {
        let path = upper.join("etc").join(name);
        fs::write(&path, contents).map_err(system(path.display().to_string()))?;
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        image.display(),
        upper.display(),
        work.display()
    );
    let what = format!("overlay over {}", image.display());
    mount(Some("overlay"), root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .map_err(system(what))
}

/// The clone's own files below /etc.
fn files(identity: &Identity) -> [(&'static str, Vec<u8>); 4] {
    let name = hostname(identity);
    let own = format!("127.0.0.1 localhost\n{} ", Ipv4Addr::from(identity.ipv4));
    [
        ("hostname", [name, b"\n"].concat()),
        ("hosts", [own.as_bytes(), name, b"\n"].concat()),
        ("resolv.conf", format!("nameserver {RESOLVER}\n").into()),
        ("machine-id", machine_id(identity).into()),
    ]
}

/// Mounts all of them below a root, in folders that are made.
pub(crate) fn mount_all(root: &Path, mounts: &[Mount]) -> Result<(), AgentError> {
    for Mount { source, target, kind, options } in mounts {
        let path = inside(root, target);
        make(&path)?;
        mount(Some(*source), &path, Some(*kind), MsFlags::empty(), Some(*options))
            .map_err(system(format!("{kind} at {}", path.display())))?;
    }
    Ok(())
}

fn inside(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn make(path: &Path) -> Result<(), AgentError> {
    fs::create_dir_all(path).map_err(system(path.display().to_string()))
}
