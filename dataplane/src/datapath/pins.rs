//! What outlives the daemon: maps and links, pinned in a directory of a BPF file system.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{Error, hook};

/// The directory of pins.
pub(super) struct Pins {
    directory: PathBuf,
}

impl Pins {
    /// The pins under `directory`, which is made if it is missing.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let pins = Self { directory: directory.to_owned() };
        let io = |source| Error::system("make", directory.display(), source);
        // Looked at before anything is made, so that no directory is left on another file system.
        let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(directory);
        let found = statfs(existing).map_err(|error| io(error.into()))?;
        if found.filesystem_type() != BPF_FS_MAGIC {
            return Err(Error::NotBpffs { path: directory.to_owned() });
        }
        fs::create_dir_all(pins.maps()).map_err(io)?;
        fs::create_dir_all(pins.links()).map_err(io)?;
        Ok(pins)
    }

    /// Where maps are.
    pub fn maps(&self) -> PathBuf {
        self.directory.join("maps")
    }

    /// Where links are.
    pub fn links(&self) -> PathBuf {
        self.directory.join("links")
    }

    /// The names of the maps that are pinned.
    pub fn map_names(&self) -> Result<Vec<String>, Error> {
        entries(&self.maps())
    }

    /// The names of the links that are pinned.
    pub fn link_names(&self) -> Result<Vec<String>, Error> {
        entries(&self.links())
    }

    /// Unpins a link: its program is detached. No error if there is none.
    pub fn remove_link(&self, name: &str) -> Result<(), Error> {
        hook::remove(&self.links().join(name))
    }

    /// Gives a link another name, if there is such a link.
    pub fn rename_link(&self, from: &str, to: &str) -> Result<(), Error> {
        hook::rename(&self.links().join(from), &self.links().join(to))
    }

    /// Unpins everything under `directory` and removes it; no error if there is nothing.
    pub fn remove_all(directory: &Path) -> Result<(), Error> {
        let pins = Self { directory: directory.to_owned() };
        for path in [pins.links(), pins.maps()] {
            for name in entries(&path)? {
                hook::remove(&path.join(name))?;
            }
            remove_directory(&path)?;
        }
        remove_directory(directory)
    }
}

fn entries(path: &Path) -> Result<Vec<String>, Error> {
    let error = |source| Error::system("list", path.display(), source);
    let entries = match fs::read_dir(path) {
        Err(missing) if missing.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(error)?,
    };
    entries
        .map(|entry| Ok(entry.map_err(error)?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// A directory that holds something else, or is a mount point, stays.
fn remove_directory(path: &Path) -> Result<(), Error> {
    match fs::remove_dir(path) {
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ResourceBusy | ErrorKind::DirectoryNotEmpty
            ) =>
        {
            Ok(())
        }
        result => result.map_err(|source| Error::system("remove", path.display(), source)),
    }
}
