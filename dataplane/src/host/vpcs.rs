//! The VPCs that a host knows, kept in its run directory for a daemon that restarts.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use warren_proto::security::Security;

use super::HostError;
use crate::services::Naming;

/// What a host knows of a VPC beside what the data path does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Vpc {
    pub vni: u32,
    pub shared_address: Ipv4Addr,
    pub naming: Naming,
    #[serde(default)]
    pub security: Security,
}

/// VPCs by name.
pub(super) type Vpcs = HashMap<String, Vpc>;

fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("vpcs.json")
}

/// The VPCs, as they were saved; none if they never were.
pub(super) fn load(run_dir: &Path) -> Result<Vpcs, HostError> {
    let file = file(run_dir);
    match std::fs::read(&file) {
        Ok(text) => serde_json::from_slice(&text)
            .map_err(|e| HostError::Record(format!("{}: {e}: remove it", file.display()))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(HashMap::new()),
        Err(error) => Err(HostError::Record(format!("{}: {error}", file.display()))),
    }
}

/// Replaces what was saved, whole or not at all.
pub(super) fn save(run_dir: &Path, vpcs: &Vpcs) -> Result<(), HostError> {
    let file = file(run_dir);
    let new = file.with_extension("new");
    let text = serde_json::to_vec(vpcs).map_err(|e| HostError::Record(e.to_string()))?;
    std::fs::write(&new, text)
        .and_then(|()| std::fs::rename(&new, &file))
        .map_err(|e| HostError::Record(format!("{}: {e}", file.display())))
}
