//! Snapshots of instances, kept in a directory of the host's, and the zygotes of those that are
//! cloned.
//!
//! A snapshot is of its instance's VPC and template, and so are all clones of it. It is a diff against
//! the template and the record of what it is, of which the record is there last and goes first.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use uuid::Uuid;
use warren_proto::v1;
use warren_vmm::client::{ClientError, MicroVm, Zygote};

use super::{Host, HostError, Instance, Own, Record, is_hostname, sockets};
use crate::pool::{PoolError, Taken};
use crate::pools::Pools;

/// How long an instance may take to save itself: a guest that is busy does so when it waits next.
const PATIENCE: Duration = Duration::from_secs(30);
/// A zygote that was not asked for a clone in this time ends.
const IDLE: Duration = Duration::from_mins(1);
/// How often idle ones are looked for.
const LOOK: Duration = Duration::from_secs(10);

/// What is kept of a snapshot beside its diff.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Kept {
    name: String,
    vpc: String,
    instance: Uuid,
    taken_unix_ms: i64,
    bytes: u64,
    /// What its instance had of its own.
    own: Own,
    /// Name of its template; in those of former versions empty: the default one.
    #[serde(default)]
    template: String,
}

impl Kept {
    /// What a clone in this VPC has of its own, and its template, if it can be there and of that.
    pub(super) fn of_clone(self, vpc: &str, template: &str) -> Result<(Own, String), HostError> {
        let Self { name, template: theirs, .. } = self;
        if self.vpc != vpc {
            return Err(HostError::SnapshotVpc { name, vpc: self.vpc });
        }
        if !template.is_empty() && template != theirs {
            return Err(HostError::SnapshotTemplate { name, template: theirs });
        }
        Ok((self.own, theirs))
    }
}

/// A zygote of a snapshot.
struct Running {
    zygote: Arc<Zygote>,
    used: Instant,
}

/// The snapshots of a host.
pub(super) struct Snapshots {
    directory: PathBuf,
    /// Where their clones' sockets are.
    run_dir: PathBuf,
    /// Those of their templates.
    pools: Arc<Pools>,
    /// Held while one is taken or removed: a name is one snapshot's.
    changing: Mutex<()>,
    /// By name. Locked while one is removed or its zygote is started: none is a former one's.
    running: Mutex<HashMap<String, Running>>,
}

impl Snapshots {
    /// Those in a directory, which need not be there yet.
    pub(super) fn new(directory: PathBuf, run_dir: PathBuf, pools: Arc<Pools>) -> Self {
        Self { directory, run_dir, pools, changing: Mutex::default(), running: Mutex::default() }
    }

    fn diff(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.diff"))
    }

    fn record(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }

    /// The snapshot of this name.
    pub(super) fn find(&self, name: &str) -> Result<Kept, HostError> {
        let unknown = || HostError::NoSnapshot(name.to_owned());
        if !is_hostname(name) {
            return Err(unknown());
        }
        match self.read(&self.record(name)) {
            Err(HostError::Snapshots { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Err(unknown())
            }
            found => found,
        }
    }

    fn read(&self, path: &Path) -> Result<Kept, HostError> {
        let failed = |source| HostError::Snapshots { path: path.to_owned(), source };
        let text = std::fs::read(path).map_err(failed)?;
        let kept = serde_json::from_slice(&text);
        let mut kept: Kept = kept.map_err(|error| failed(io::Error::other(error)))?;
        kept.template = self.pools.named(kept.template);
        Ok(kept)
    }

    /// All of them, by name.
    fn list(&self) -> Result<Vec<Kept>, HostError> {
        let failed = |source| HostError::Snapshots { path: self.directory.clone(), source };
        let entries = match std::fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut kept = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                kept.push(self.read(&path)?);
            }
        }
        kept.sort_by(|one: &Kept, other| one.name.cmp(&other.name));
        Ok(kept)
    }

    /// Saves a microVM under a name that is free.
    async fn take(
        &self,
        mut microvm: MicroVm,
        name: &str,
        record: Record,
    ) -> Result<Kept, HostError> {
        let _changing = self.changing.lock().await;
        match self.find(name) {
            Err(HostError::NoSnapshot(_)) => {}
            Ok(_) => return Err(HostError::SnapshotExists(name.to_owned())),
            Err(error) => return Err(error),
        }
        sockets::make(&self.directory)?;
        let Record { id: instance, vpc, own, template, .. } = record;
        let key = self.pools.get(&template)?.config().sources.key.as_deref();
        let diff = self.diff(name);
        let saved = tokio::time::timeout(PATIENCE, microvm.snapshot(&diff, key)).await;
        let bytes = saved.unwrap_or(Err(ClientError::Timeout(PATIENCE)))?;
        let taken = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let (name, taken_unix_ms) = (name.to_owned(), taken.as_millis() as i64);
        let kept = Kept { name, vpc, instance, taken_unix_ms, bytes, own, template };
        let text = serde_json::to_vec(&kept).map_err(|e| HostError::Record(e.to_string()))?;
        let path = self.record(&kept.name);
        let new = path.with_extension("new");
        std::fs::write(&new, text)
            .and_then(|()| std::fs::rename(&new, &path))
            .map_err(|source| HostError::Snapshots { path, source })?;
        Ok(kept)
    }

    /// Forgets one, and ends its zygote.
    async fn remove(&self, name: &str) -> Result<(), HostError> {
        let _changing = self.changing.lock().await;
        let mut running = self.running.lock().await;
        self.find(name)?;
        for path in [self.record(name), self.diff(name)] {
            std::fs::remove_file(&path).map_err(|source| HostError::Snapshots { path, source })?;
        }
        running.remove(name);
        Ok(())
    }

    /// The zygote of a snapshot; if it does not run it is started.
    async fn zygote(&self, name: &str) -> Result<Arc<Zygote>, HostError> {
        let mut running = self.running.lock().await;
        let Kept { template, .. } = self.find(name)?;
        if let Some(found) = running.get_mut(name) {
            found.used = Instant::now();
            return Ok(found.zygote.clone());
        }
        let pool = self.pools.get(&template)?;
        let mut config = pool.config().clone();
        config.sources.diff = Some(self.diff(name));
        config.run_dir = sockets::of_snapshot(&self.run_dir, name);
        // No two zygotes have the same groups.
        config.jail.cgroup.push(format!("of-{name}"));
        sockets::make(&config.run_dir)?;
        let memory = pool.memory().await;
        let zygote = Arc::new(Zygote::spawn_sharing(&config, &memory).await?);
        tracing::info!(snapshot = name, "zygote started");
        let started = Running { zygote: zygote.clone(), used: Instant::now() };
        running.insert(name.to_owned(), started);
        Ok(zygote)
    }

    /// Forgets a zygote that has ended.
    async fn ended(&self, name: &str, zygote: &Arc<Zygote>) {
        let mut running = self.running.lock().await;
        if running.get(name).is_some_and(|found| Arc::ptr_eq(&found.zygote, zygote)) {
            running.remove(name);
        }
    }

    /// Ends zygotes that are idle, for ever. Their microVMs live on.
    pub(super) async fn end_idle(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            self.running.lock().await.retain(|name, found| {
                let stays = found.used.elapsed() < IDLE;
                if !stays {
                    tracing::info!(snapshot = name, "zygote ended: no clones were wanted of it");
                }
                stays
            });
        }
    }
}

impl Host {
    /// Keeps an instance as it is, under a name. It runs on.
    pub async fn snapshot(&self, id: &str, name: &str) -> Result<v1::Snapshot, HostError> {
        if !is_hostname(name) {
            return Err(HostError::SnapshotName(name.to_owned()));
        }
        let id = self.known(id)?;
        let (record, socket, slot) = match self.state().instances.get(&id) {
            Some(Instance { failed: Some(reason), .. }) => {
                return Err(HostError::Ended { id, reason: reason.clone() });
            }
            Some(instance) => {
                (instance.record.clone(), instance.socket.clone(), instance.slot.number)
            }
            None => return Err(HostError::NoInstance(id.to_string())),
        };
        let run_dir = socket.parent().unwrap_or(Path::new("/"));
        let (microvm, status) = MicroVm::connect(run_dir, slot).await?;
        // Another one may have the slot by now.
        if status.identity.is_none_or(|identity| identity.instance_id != *id.as_bytes()) {
            return Err(HostError::NoInstance(id.to_string()));
        }
        let kept = self.snapshots.take(microvm, name, record).await?;
        tracing::info!(%id, snapshot = name, bytes = kept.bytes, "snapshot taken");
        Ok(self.describe_snapshot(kept))
    }

    /// The snapshots, by name.
    pub fn list_snapshots(&self) -> Result<Vec<v1::Snapshot>, HostError> {
        let kept = self.snapshots.list()?.into_iter();
        Ok(kept.map(|kept| self.describe_snapshot(kept)).collect())
    }

    /// Forgets a snapshot. Its clones run on.
    pub async fn remove_snapshot(&self, name: &str) -> Result<(), HostError> {
        self.snapshots.remove(name).await?;
        tracing::info!(snapshot = name, "snapshot removed");
        Ok(())
    }

    fn describe_snapshot(&self, kept: Kept) -> v1::Snapshot {
        let Kept { name, vpc, instance, taken_unix_ms, bytes, template, .. } = kept;
        let (host, instance) = (self.options.name.clone(), instance.to_string());
        v1::Snapshot { name, vpc, host, instance, taken_unix_ms, bytes, template }
    }

    /// A clone of a snapshot, on a slot of this host.
    pub(super) async fn clone_of(&self, snapshot: &str) -> Result<Taken, HostError> {
        let zygote = self.snapshots.zygote(snapshot).await?;
        match self.pools.fork_of(&zygote).await {
            Err(PoolError::Vmm(ClientError::ZygoteEnded)) => {
                tracing::error!(snapshot, "the zygote ended: starting another one");
                self.snapshots.ended(snapshot, &zygote).await;
                Ok(self.pools.fork_of(&*self.snapshots.zygote(snapshot).await?).await?)
            }
            forked => Ok(forked?),
        }
    }
}
