//! Snapshots of instances. Each is kept by its instance's host, and the control plane keeps nothing
//! of them: it asks all hosts.

use warren_proto::v1;

use crate::ask::{Answer, Unknown, Whom, ask};
use crate::fleet::{Agent, Fleet, InstanceError, Role};

/// Why a snapshot cannot be taken, found or cloned.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotsError {
    /// No such host.
    #[error(transparent)]
    Host(#[from] Unknown),
    /// No such instance.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// No host that answers has it.
    #[error("there is no snapshot \"{0}\": `warren vm snapshots` lists them")]
    Unknown(String),
    /// The name is taken.
    #[error("host {host} has a snapshot \"{name}\": remove it first, or take another name")]
    Exists {
        /// Snapshot.
        name: String,
        /// Its host.
        host: String,
    },
    /// The name may be taken.
    #[error("host {host} does not say whether it has a snapshot of this name: {problem}")]
    Silent {
        /// Host.
        host: String,
        /// Why.
        problem: String,
    },
    /// A clone is where its origin was.
    #[error("snapshot \"{name}\" is {what} {theirs}'s: its clones cannot be in {wanted}")]
    Elsewhere {
        /// Snapshot.
        name: String,
        /// VPC, host or template.
        what: &'static str,
        /// The snapshot's.
        theirs: String,
        /// What was asked for.
        wanted: String,
    },
}

/// The snapshots of all hosts, or of the one that is `wanted`, unless that is empty. Hosts come in
/// the order of their names; one that does not answer within 10 s comes with its problem.
pub async fn list(fleet: &Fleet, wanted: &str) -> Result<Vec<v1::HostSnapshots>, Unknown> {
    let answers = ask(fleet, Whom::new(Some(Role::Host), wanted), |mut agent| async move {
        agent.list_snapshots(v1::ListSnapshotsRequest {}).await
    });
    let told = answers.await?.into_iter().map(|Answer { host, answer, .. }| match answer {
        Ok(v1::ListSnapshotsResponse { snapshots }) => {
            v1::HostSnapshots { host, snapshots, problem: String::new() }
        }
        Err(problem) => v1::HostSnapshots { host, snapshots: Vec::new(), problem },
    });
    Ok(told.collect())
}

/// The snapshot of this name.
pub async fn find(fleet: &Fleet, name: &str) -> Result<v1::Snapshot, SnapshotsError> {
    let mut snapshots = list(fleet, "").await?.into_iter().flat_map(|host| host.snapshots);
    let found = snapshots.find(|snapshot| snapshot.name == name);
    found.ok_or_else(|| SnapshotsError::Unknown(name.to_owned()))
}

/// The host that an instance's snapshot would be kept by, and its agent, if nobody has one of this
/// name.
pub async fn place(fleet: &Fleet, id: &str, name: &str) -> Result<(String, Agent), SnapshotsError> {
    let found = fleet.host_of(id)?;
    for v1::HostSnapshots { host, snapshots, problem } in list(fleet, "").await? {
        if !problem.is_empty() {
            return Err(SnapshotsError::Silent { host, problem });
        }
        if snapshots.iter().any(|snapshot| snapshot.name == name) {
            return Err(SnapshotsError::Exists { name: name.to_owned(), host });
        }
    }
    Ok(found)
}

/// The host that keeps the snapshot of this name, and its agent.
pub async fn keeper(fleet: &Fleet, name: &str) -> Result<(String, Agent), SnapshotsError> {
    let host = find(fleet, name).await?.host;
    // It answered just now.
    let open = fleet.peers().remove(&host).and_then(|peer| peer.open);
    let (_, agent) = open.ok_or_else(|| SnapshotsError::Unknown(name.to_owned()))?;
    Ok((host, agent))
}

/// Where clones of a snapshot are: its VPC and its host. Whoever wants them elsewhere, or of another
/// template, gets none.
pub async fn of_clone(
    fleet: &Fleet,
    name: &str,
    vpc: &str,
    host: &str,
    template: &str,
) -> Result<(String, String), SnapshotsError> {
    let found = find(fleet, name).await?;
    for (what, theirs, wanted) in [
        ("VPC", &found.vpc, vpc),
        ("host", &found.host, host),
        ("template", &found.template, template),
    ] {
        if !wanted.is_empty() && wanted != theirs {
            let (name, wanted, theirs) = (name.to_owned(), wanted.to_owned(), theirs.clone());
            return Err(SnapshotsError::Elsewhere { name, what, theirs, wanted });
        }
    }
    Ok((found.vpc, found.host))
}
