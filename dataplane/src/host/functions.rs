//! Functions: their packages, the images that are made of them, and the pools of their microVMs.
//!
//! A package comes from the host's cache, or through it from the zone. Its image is made once on each
//! host, when it is first needed, and kept. Of each function that was called of late a zygote runs.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex as Lock, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::task::AbortHandle;
use warren_function::cache::{Cache, CacheError};
use warren_function::digest::Digest;
use warren_proto::v1;
use warren_vmm::client::ClientError;

use super::{Host, HostError, sockets};
use crate::pool::{Pool, PoolError, Taken};
use crate::pools::Pools;
use crate::refill::{Policy, Tiers};
use crate::slots::Slots;

/// The zygote of a function that was not started in this time ends.
const IDLE: Duration = Duration::from_mins(10);

/// How often idle ones are looked for.
const LOOK: Duration = Duration::from_secs(10);

/// Why a function cannot be had here.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// Nothing was said of where packages come from.
    #[error("this host takes no functions: set [host.functions] in its configuration")]
    None,
    /// What it is called is no digest.
    #[error("function {name}: its package is called \"{package}\", which is no SHA-256")]
    Package {
        /// Function.
        name: String,
        /// What was said.
        package: String,
    },
    /// The package cannot be had.
    #[error("function {name}: {source}")]
    Cache {
        /// Function.
        name: String,
        /// Why.
        source: Arc<CacheError>,
    },
    /// The image cannot be made.
    #[error("function {name}: no image can be made of its package: {reason}")]
    Image {
        /// Function.
        name: String,
        /// What the VMM says.
        reason: String,
    },
    /// A file or directory fails.
    #[error("functions: {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// How a host keeps functions.
pub struct FunctionOptions {
    /// Their packages.
    pub cache: Cache,
    /// Directory of their images; made if it is missing.
    pub images: PathBuf,
    /// How many bytes of images are kept: those that were not used for longest go first.
    pub images_bytes: u64,
    /// How many microVMs are held ready at the barrier of each function that was called of late.
    pub parked: u32,
}

/// What an instance is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// The version.
    pub version: u64,
    /// The package's digest, in hexadecimal.
    pub package: String,
    /// The longest that a call may take, in milliseconds.
    pub timeout_ms: u32,
}

impl From<v1::FunctionPackage> for Function {
    fn from(function: v1::FunctionPackage) -> Self {
        let v1::FunctionPackage { name, version, package, timeout_ms } = function;
        Self { name, version, package, timeout_ms }
    }
}

/// The functions of a host.
pub(super) struct Functions {
    options: Option<FunctionOptions>,
    vmm: PathBuf,
    run_dir: PathBuf,
    slots: Arc<Slots>,
    pools: Arc<Pools>,
    /// By package and template.
    known: Lock<HashMap<(Digest, String), Arc<Known>>>,
}

/// A function that was started here.
struct Known {
    used: Lock<Instant>,
    /// Locked while it is being made: who wants the same waits, who wants another does not.
    running: Arc<Mutex<Option<Running>>>,
}

struct Running {
    pool: Arc<Pool>,
    /// Keeps the pool full.
    fill: AbortHandle,
}

impl Functions {
    pub(super) fn new(
        options: Option<FunctionOptions>,
        vmm: PathBuf,
        run_dir: PathBuf,
        slots: Arc<Slots>,
        pools: Arc<Pools>,
    ) -> Self {
        Self { options, vmm, run_dir, slots, pools, known: Lock::default() }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<(Digest, String), Arc<Known>>> {
        // No code panics while it holds the lock; if some did, the map is still whole.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pool of a function, made if there is none.
    async fn pool(
        &self,
        vpc: &str,
        function: &Function,
        template: &str,
    ) -> Result<Arc<Pool>, HostError> {
        let options = self.options.as_ref().ok_or(FunctionError::None)?;
        let Function { name, package, .. } = function;
        let digest = package
            .parse::<Digest>()
            .map_err(|_| FunctionError::Package { name: name.clone(), package: package.clone() })?;
        let key = (digest, template.to_owned());
        let known = self.known().entry(key).or_insert_with(Known::new).clone();
        known.touch();
        let mut running = known.running.clone().lock_owned().await;
        if let Some(running) = &*running {
            return Ok(running.pool.clone());
        }
        let base = self.pools.get(template)?;
        let memory = base.memory().await;
        let of = u64::from_be_bytes(*memory.template().first_chunk().unwrap_or(&[0; 8]));
        let image = options.images.join(format!("{digest}-{of:016x}.image"));
        let mut config = base.config().clone();
        config.sources.diff = Some(image.clone());
        let short = &package[..package.len().min(16)];
        config.run_dir = sockets::of_function(&self.run_dir, &format!("{short}-{template}"));
        config.watchdog = Duration::from_millis(function.timeout_ms.max(1).into());
        // No two zygotes have the same groups.
        config.jail.cgroup.push(format!("function-{short}"));
        sockets::make(&config.run_dir)?;
        let is_new = !image.exists();
        if is_new {
            self.make_image(options, vpc, function, digest, base, &image).await?;
        }
        // It is used: the last to go.
        let touched = File::open(&image).and_then(|file| file.set_modified(SystemTime::now()));
        touched.map_err(|source| FunctionError::File { path: image.clone(), source })?;
        let policy = Policy::new(Tiers { parked: options.parked, ..Tiers::default() }, 0);
        let (slots, name) = (self.slots.clone(), format!("{name}:{}", function.version));
        let started = Pool::new(name.clone(), slots, config.clone(), Some(&memory), policy).await;
        let pool = match started {
            // What was kept may be damaged.
            Err(PoolError::Vmm(ClientError::Zygote(reason))) if !is_new => {
                tracing::warn!(function = name, "its image is made anew: {reason}");
                self.make_image(options, vpc, function, digest, base, &image).await?;
                Pool::new(name, self.slots.clone(), config, Some(&memory), policy).await?
            }
            started => started?,
        };
        Ok(self.run(&mut running, pool))
    }

    fn run(&self, running: &mut OwnedMutexGuard<Option<Running>>, pool: Pool) -> Arc<Pool> {
        tracing::info!(function = pool.template(), "zygote started");
        let pool = Arc::new(pool);
        self.pools.add(pool.clone());
        let fill = tokio::spawn(pool.clone().fill()).abort_handle();
        **running = Some(Running { pool: pool.clone(), fill });
        pool
    }

    /// Makes the image of a package, which is fetched if it is not here.
    async fn make_image(
        &self,
        options: &FunctionOptions,
        vpc: &str,
        function: &Function,
        digest: Digest,
        base: &Pool,
        image: &Path,
    ) -> Result<(), FunctionError> {
        let name = || function.name.clone();
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| FunctionError::File { path, source }
        };
        let package = options.cache.get(vpc, digest).await;
        let package = package.map_err(|source| FunctionError::Cache { name: name(), source })?;
        fs::create_dir_all(&options.images).map_err(failed(&options.images))?;
        let file = package.file.try_clone().map_err(failed(image))?;
        let sources = &base.config().sources;
        let mut command = Command::new(&self.vmm);
        command.arg("image").arg("--template").arg(&sources.template);
        // The very file that was verified.
        command.args(["--function", "/dev/stdin"]).arg("--output").arg(image);
        if let Some(key) = &sources.key {
            command.arg("--key").arg(key);
        }
        let made = command.stdin(Stdio::from(file)).kill_on_drop(true).output().await;
        let made = made.map_err(failed(&self.vmm))?;
        if !made.status.success() {
            let reason = String::from_utf8_lossy(&made.stderr).trim().to_owned();
            return Err(FunctionError::Image { name: name(), reason });
        }
        trim(&options.images, options.images_bytes).map_err(failed(&options.images))
    }

    /// Ends the zygotes of functions that are idle, for ever. Their instances live on.
    pub(super) async fn end_idle(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            let mut idle = Vec::new();
            self.known().retain(|_, known| {
                // Nobody has it, nor can get it while the map is locked.
                let stays = known.idle() < IDLE || Arc::strong_count(known) > 1;
                if !stays {
                    idle.push(known.clone());
                }
                stays
            });
            for known in idle {
                let Some(Running { pool, fill }) = known.running.lock().await.take() else {
                    continue;
                };
                fill.abort();
                self.pools.remove(&pool).await;
                tracing::info!(function = pool.template(), "zygote ended: it was not called");
            }
        }
    }
}

impl Known {
    fn new() -> Arc<Self> {
        Arc::new(Self { used: Lock::new(Instant::now()), running: Arc::default() })
    }

    fn touch(&self) {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn idle(&self) -> Duration {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

/// Removes images until there are no more bytes of them than these, the one unused for longest first. The
/// last that was used stays.
fn trim(images: &Path, most: u64) -> io::Result<()> {
    let mut kept = Vec::new();
    for entry in fs::read_dir(images)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_file() {
            kept.push((metadata.modified()?, metadata.len(), entry.path()));
        }
    }
    kept.sort();
    let mut bytes: u64 = kept.iter().map(|(_, bytes, _)| bytes).sum();
    kept.pop();
    for (_, length, path) in kept {
        if bytes <= most {
            break;
        }
        // A zygote that has it has it in memory.
        fs::remove_file(path)?;
        bytes -= length;
    }
    Ok(())
}

impl Host {
    /// A microVM of a function, on a slot of this host.
    pub(super) async fn of_function(
        &self,
        vpc: &str,
        function: &Function,
        template: &str,
    ) -> Result<Taken, HostError> {
        let pool = self.functions.pool(vpc, function, template).await?;
        Ok(self.pools.take_of(&pool).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_go_the_one_unused_for_longest_first() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        for (name, age) in [("old", 30), ("new", 10), ("older", 40), ("mid", 20)] {
            let file = File::create(dir.path().join(name)).unwrap();
            file.set_len(100).unwrap();
            file.set_modified(now - Duration::from_secs(age)).unwrap();
        }
        let names = || {
            let entries = fs::read_dir(dir.path()).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        trim(dir.path(), 400).unwrap();
        assert_eq!(names().len(), 4);
        trim(dir.path(), 250).unwrap();
        assert_eq!(names(), ["mid", "new"]);
        trim(dir.path(), 0).unwrap();
        assert_eq!(names(), ["new"]);
    }
}
