//! The pool of microVMs that are parked at their barrier, and the slots they stand on.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::{Notify, RwLock};
use warren_vmm::client::{ClientError, MicroVm, Zygote, ZygoteConfig};

use crate::datapath::{self, HostDatapath};
use crate::refill::{Policy, Refill};

/// A microVM that was told to stop is killed after this time.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// The TAP of a microVM that ended is its own until the kernel has closed it.
const TAP_PATIENCE: Duration = Duration::from_secs(2);
/// What could not be parked is tried again after this time.
const RETRY: Duration = Duration::from_secs(1);

/// Why there is no microVM to be had.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// All slots are taken.
    #[error("all slots of this host are taken: end instances, or raise host.slots")]
    NoSlot,
    /// The data path failed.
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// The VMM failed.
    #[error(transparent)]
    Vmm(#[from] ClientError),
}

/// A microVM at its barrier, taken out of the pool.
pub struct Taken {
    /// The microVM.
    pub microvm: MicroVm,
    /// The pool was empty: it was made for the one who took it.
    pub cold: bool,
}

#[derive(Default)]
struct State {
    /// Slots without a microVM; the one that rested longest first.
    free: VecDeque<u32>,
    parked: VecDeque<MicroVm>,
    last_taken: Option<Instant>,
}

/// The pool.
pub struct Pool {
    datapath: Arc<HostDatapath>,
    config: ZygoteConfig,
    zygote: RwLock<Zygote>,
    policy: Policy,
    state: Mutex<State>,
    changed: Notify,
}

impl Pool {
    /// Starts a zygote for a pool without microVMs and without slots: [`Pool::free`] and
    /// [`Pool::keep`] fill it.
    pub async fn new(
        datapath: Arc<HostDatapath>,
        config: ZygoteConfig,
        policy: Policy,
    ) -> Result<Self, PoolError> {
        let zygote = RwLock::new(Zygote::spawn(&config).await?);
        let (state, changed) = (Mutex::default(), Notify::new());
        Ok(Self { datapath, config, zygote, policy, state, changed })
    }

    /// MicroVMs that are parked now.
    pub fn parked(&self) -> u32 {
        self.state().parked.len() as u32
    }

    /// Slots without a microVM.
    pub fn free_slots(&self) -> u32 {
        self.state().free.len() as u32
    }

    /// Takes a parked microVM; if there is none, makes one at once.
    pub async fn take(&self) -> Result<Taken, PoolError> {
        let parked = {
            let mut state = self.state();
            state.last_taken = Some(Instant::now());
            state.parked.pop_front()
        };
        self.changed.notify_one();
        match parked {
            Some(microvm) => Ok(Taken { microvm, cold: false }),
            None => Ok(Taken { microvm: self.park().await?, cold: true }),
        }
    }

    /// Adds a microVM that is parked.
    pub fn keep(&self, microvm: MicroVm) {
        self.state().parked.push_back(microvm);
    }

    /// Detaches a slot that has no microVM any more, and makes it available.
    pub fn free(&self, slot: u32) {
        if let Err(error) = self.datapath.detach(slot) {
            tracing::error!(slot, "{error}");
        }
        self.state().free.push_back(slot);
        self.changed.notify_one();
    }

    /// Ends a microVM and frees its slot.
    pub async fn discard(&self, microvm: MicroVm) {
        let slot = microvm.slot();
        stop(microvm).await;
        self.free(slot);
    }

    /// Keeps the pool full, for ever.
    pub async fn fill(self: Arc<Self>) {
        loop {
            let (parked, quiet) = {
                let state = self.state();
                let quiet = state.last_taken.map_or(Duration::MAX, |taken| taken.elapsed());
                (state.parked.len() as u32, quiet)
            };
            match self.policy.refill(parked, quiet) {
                Refill::Full => self.changed.notified().await,
                Refill::After(pause) => tokio::time::sleep(pause).await,
                Refill::Now => match self.park().await {
                    Ok(microvm) => self.keep(microvm),
                    Err(PoolError::NoSlot) => self.changed.notified().await,
                    Err(error) => {
                        tracing::error!("cannot fill the pool: {error}");
                        tokio::time::sleep(RETRY).await;
                    }
                },
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; if some did, the state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a free slot and forks a microVM that parks on it.
    async fn park(&self) -> Result<MicroVm, PoolError> {
        let slot = self.state().free.pop_front().ok_or(PoolError::NoSlot)?;
        let parked = self.park_on(slot).await;
        if parked.is_err() {
            self.state().free.push_back(slot);
        }
        parked
    }

    async fn park_on(&self, slot: u32) -> Result<MicroVm, PoolError> {
        match self.fork(slot).await {
            Err(PoolError::Vmm(ClientError::ZygoteEnded)) => {
                self.replace_zygote().await?;
                self.fork(slot).await
            }
            result => result,
        }
    }

    async fn fork(&self, slot: u32) -> Result<MicroVm, PoolError> {
        let deadline = Instant::now() + TAP_PATIENCE;
        let tap = loop {
            match self.datapath.open_tap(slot) {
                Ok(tap) => break tap,
                Err(error) if is_busy(&error) && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(error) => return Err(error.into()),
            }
        };
        self.zygote.read().await.fork(slot, tap).await?;
        Ok(MicroVm::connect(&self.config.run_dir, slot).await?)
    }

    /// Starts another zygote, unless somebody else has by now. MicroVMs do not notice.
    async fn replace_zygote(&self) -> Result<(), PoolError> {
        let ended = self.zygote.read().await.pid();
        let mut zygote = self.zygote.write().await;
        if zygote.pid() == ended {
            tracing::error!("the zygote ended: starting another one");
            *zygote = Zygote::spawn(&self.config).await?;
        }
        Ok(())
    }
}

/// Ends a microVM.
pub async fn stop(mut microvm: MicroVm) {
    let (slot, pid) = (microvm.slot(), microvm.pid());
    if tokio::time::timeout(STOP_PATIENCE, microvm.stop()).await.is_err() {
        tracing::warn!(slot, pid, "microVM does not stop: killing it");
        // Its socket is still open, so the process is still this one.
        if let Err(error) = kill(Pid::from_raw(pid), Signal::SIGKILL) {
            tracing::error!(slot, pid, "cannot kill the microVM: {error}");
        }
    }
}

/// True while another process has the TAP open.
fn is_busy(error: &datapath::Error) -> bool {
    matches!(error, datapath::Error::System { source, .. }
        if source.kind() == std::io::ErrorKind::ResourceBusy)
}
