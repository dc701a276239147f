//! `warren vm snapshot`, `snapshots` and `snapshot-rm`.

use warren_proto::v1::HostSnapshots;

use crate::args::Output;
use crate::client::Client;
use crate::commands::{all_done, print, resolve};
use crate::error::Error;
use crate::render::{self, RemovedSnapshotRow, SnapshotRow};

/// Takes one, and prints it.
pub async fn take(mut client: Client, output: Output, id: &str, name: String) -> Result<(), Error> {
    let id = resolve(&client.instances().await?, id)?;
    let taken = client.take_snapshot(id, name).await?;
    print(&render::one(output, &SnapshotRow::from(taken)))
}

/// Prints all. Hosts that do not answer are an error after the others are printed.
pub async fn list(mut client: Client, output: Output, host: Option<String>) -> Result<(), Error> {
    let hosts = client.snapshots(host.unwrap_or_default()).await?;
    let (all, mut rows, mut errors) = (hosts.len(), vec![], vec![]);
    for HostSnapshots { host, snapshots, problem } in hosts {
        if problem.is_empty() {
            rows.extend(snapshots.into_iter().map(SnapshotRow::from));
        } else {
            errors.push(Error::SnapshotsUnknown { host, problem });
        }
    }
    if errors.len() < all || all == 0 {
        print(&render::list(output, &rows))?;
    }
    all_done(errors, all)
}

/// Removes some, and prints which.
pub async fn remove(mut client: Client, output: Output, names: Vec<String>) -> Result<(), Error> {
    let mut rows = Vec::new();
    for name in names {
        client.delete_snapshot(name.clone()).await?;
        rows.push(RemovedSnapshotRow { name });
    }
    print(&render::list(output, &rows))
}
