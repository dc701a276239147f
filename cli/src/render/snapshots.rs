//! The rows of snapshots.

use jiff::Timestamp;
use serde::Serialize;
use warren_proto::v1;

use super::Row;

/// A snapshot.
#[derive(Serialize)]
pub struct SnapshotRow {
    name: String,
    vpc: String,
    host: String,
    template: String,
    /// Id of the microVM that it was taken of.
    instance: String,
    taken: Timestamp,
    bytes: u64,
}

impl From<v1::Snapshot> for SnapshotRow {
    fn from(snapshot: v1::Snapshot) -> Self {
        let v1::Snapshot { name, vpc, host, instance, taken_unix_ms, bytes, template } = snapshot;
        let taken = Timestamp::from_millisecond(taken_unix_ms).unwrap_or_default();
        Self { name, vpc, host, template, instance, taken, bytes }
    }
}

impl Row for SnapshotRow {
    const HEADER: &'static [&'static str] =
        &["NAME", "VPC", "HOST", "TEMPLATE", "OF", "TAKEN", "KIB"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.vpc.clone(),
            self.host.clone(),
            self.template.clone(),
            self.instance.clone(),
            format!("{:.0}", self.taken),
            self.bytes.div_ceil(1024).to_string(),
        ]
    }
}

/// A snapshot that was just removed.
#[derive(Serialize)]
pub struct RemovedSnapshotRow {
    /// Name.
    pub name: String,
}

impl Row for RemovedSnapshotRow {
    const HEADER: &'static [&'static str] = &["REMOVED"];

    fn cells(&self) -> Vec<String> {
        vec![self.name.clone()]
    }
}
