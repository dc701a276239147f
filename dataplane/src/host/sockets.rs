//! Where the microVMs' sockets are, in the run directory: each zygote has a directory of its own.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;
use warren_vmm::client::{self, ClientError, MicroVm};
use warren_vmm::control::Status;

use super::HostError;

/// Those of templates' zygotes are in the first, those of snapshots' in the second, those of functions'
/// in the third.
pub(crate) const DIRECTORIES: [&str; 3] = ["templates", "clones", "functions"];

/// Links to the sockets of instances, by their ids: for those who know nothing else of one.
pub(crate) const BY_ID: &str = "by-id";

/// That of a template's zygote.
pub(super) fn of_template(run_dir: &Path, name: &str) -> PathBuf {
    run_dir.join(DIRECTORIES[0]).join(name)
}

/// That of a snapshot's zygote.
pub(super) fn of_snapshot(run_dir: &Path, name: &str) -> PathBuf {
    run_dir.join(DIRECTORIES[1]).join(name)
}

/// That of a function's zygote.
pub(super) fn of_function(run_dir: &Path, name: &str) -> PathBuf {
    run_dir.join(DIRECTORIES[2]).join(name)
}

/// Where the socket of an instance is found by its id.
pub(super) fn by_id(run_dir: &Path, id: Uuid) -> PathBuf {
    run_dir.join(BY_ID).join(format!("{id}.sock"))
}

/// Makes a directory that is root's alone.
pub(super) fn make(path: &Path) -> Result<(), HostError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| HostError::Directory { path: path.to_owned(), source })
}

/// The microVMs of a run directory, whatever zygote made them.
pub(super) async fn discover(run_dir: &Path) -> Result<Vec<(MicroVm, Status)>, ClientError> {
    // Former versions had them in the run directory itself.
    let mut found = client::discover(run_dir).await?;
    for directory in DIRECTORIES {
        let entries = std::fs::read_dir(run_dir.join(directory)).into_iter().flatten().flatten();
        for entry in entries {
            found.extend(client::discover(&entry.path()).await?);
        }
    }
    Ok(found)
}
