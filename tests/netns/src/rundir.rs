//! A directory for sockets, state and pins that goes away with its owner.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use warren_vmm::jail;

/// A temporary directory with a BPF file system mounted at `bpf` in it. Only a process that is killed
/// with SIGKILL leaves it behind.
#[derive(Debug)]
pub struct RunDir {
    dir: tempfile::TempDir,
}

impl RunDir {
    /// Makes the directory and mounts the BPF file system.
    pub fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("warren-").tempdir()?;
        let bpf = dir.path().join("bpf");
        std::fs::create_dir(&bpf)?;
        mount(Some("bpf"), &bpf, Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("cannot mount a BPF file system: this needs root and CONFIG_BPF_SYSCALL")?;
        Ok(Self { dir })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The mounted BPF file system.
    pub fn bpf(&self) -> PathBuf {
        self.dir.path().join("bpf")
    }

    /// A control group for microVMs that nobody else has.
    pub fn cgroup(&self) -> PathBuf {
        let name = self.dir.path().file_name().unwrap_or_default();
        Path::new("warren-test").join(name)
    }

    /// Everything that is pinned now, without what the kernel itself puts there
    /// (`CONFIG_BPF_PRELOAD`: `maps.debug` and `progs.debug`).
    pub fn pins(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut open = vec![self.bpf()];
        while let Some(dir) = open.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    open.push(path);
                } else if path.extension().is_none_or(|extension| extension != "debug") {
                    found.push(path);
                }
            }
        }
        found
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.bpf(), MntFlags::MNT_DETACH) {
            tracing::warn!("cannot unmount {}: {error}", self.bpf().display());
        }
        jail::remove_groups(&self.cgroup());
    }
}
