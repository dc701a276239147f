//! What lies in the run directory and is true of one boot of the machine only.
//!
//! The directory is mostly on a tmpfs and goes with the machine. Where it is on a disk, what it says
//! of programs, maps and sockets that went with the kernel would mislead.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::{fmt, fs};

use warren_vmm::control::socket_slot;

use crate::host::sockets;

/// In the run directory: the boot that the rest is of.
const FILE: &str = "boot-id";
/// What a host knows of its VPCs, what a proxy knows of others, and how many events of flows the
/// former maps lost.
const BOUND: [&str; 3] = ["vpcs.json", "proxies.json", "flow-log-lost"];

/// A boot of this machine (random(4)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootId(String);

/// What cannot be read, written or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}: {source}")]
pub struct BootError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl BootId {
    /// The current one.
    pub fn current() -> Result<Self, BootError> {
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        let text = fs::read_to_string(path).map_err(error("read", path))?;
        Ok(Self::of(&text))
    }

    /// The boot with this id.
    pub fn of(id: &str) -> Self {
        Self(id.trim().to_owned())
    }

    /// As bytes, to derive keys from.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes the directory's state that of this boot: what is of another one is removed. State of
/// versions that did not say is taken for this boot's. Returns what was removed.
pub fn settle(run_dir: &Path, boot: &BootId) -> Result<Vec<PathBuf>, BootError> {
    let file = run_dir.join(FILE);
    let removed = match fs::read_to_string(&file) {
        Ok(text) if text.trim() == boot.0 => return Ok(Vec::new()),
        Ok(_) => discard(run_dir)?,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(source) => return Err(error("read", &file)(source)),
    };
    // Last: whoever is killed before that begins again.
    let new = run_dir.join("boot-id.new");
    fs::write(&new, &boot.0).map_err(error("write", &new))?;
    fs::rename(&new, &file).map_err(error("write", &file))?;
    Ok(removed)
}

/// Removes what is true only as long as the data path is there.
pub fn discard(run_dir: &Path) -> Result<Vec<PathBuf>, BootError> {
    let mut paths: Vec<PathBuf> = BOUND.iter().map(|name| run_dir.join(name)).collect();
    for entry in fs::read_dir(run_dir).map_err(error("read", run_dir))? {
        let path = entry.map_err(error("read", run_dir))?.path();
        if socket_slot(&path).is_some() {
            paths.push(path);
        }
    }
    let files = paths.into_iter().map(|path| (fs::remove_file(&path), path));
    let directories = sockets::DIRECTORIES.map(|name| run_dir.join(name));
    let directories = directories.into_iter().map(|path| (fs::remove_dir_all(&path), path));
    let mut removed = Vec::new();
    for (result, path) in files.chain(directories) {
        match result {
            Ok(()) => removed.push(path),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(source) => return Err(error("remove", &path)(source)),
        }
    }
    Ok(removed)
}

fn error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> BootError {
    let path = path.to_owned();
    move |source| BootError { action, path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_of_another_boot_is_removed_and_the_rest_stays() {
        let dir = tempfile::tempdir().unwrap();
        let [first, second] = ["one", "two"].map(BootId::of);
        let names = ["vpcs.json", "proxies.json", "flow-log-lost", "vm-3.sock"];
        let write = || {
            fs::create_dir_all(dir.path().join("templates/small")).unwrap();
            fs::write(dir.path().join("templates/small/vm-4.sock"), "").unwrap();
            for name in names.iter().chain(&["identity.key", "agent.sock", "vm-x.sock"]) {
                fs::write(dir.path().join(name), "{}").unwrap();
            }
        };
        let all = || fs::read_dir(dir.path()).unwrap().count();
        write();
        // A former version wrote it.
        assert_eq!(settle(dir.path(), &first).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(settle(dir.path(), &first).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(all(), 9);
        let removed = settle(dir.path(), &second).unwrap();
        let gone = names.iter().chain(&["templates"]).map(|name| dir.path().join(name));
        assert_eq!(removed, gone.collect::<Vec<_>>());
        assert_eq!(all(), 4);
        write();
        assert_eq!(settle(dir.path(), &second).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(all(), 9);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let none = Path::new("/nonexistent");
        let error = settle(none, &BootId::current().unwrap()).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/boot-id"), "{error}");
    }
}
