//! The pool of microVMs that wait for an instance, in three tiers, and the slots they stand on.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::{Notify, RwLock};
use warren_vmm::client::{ClientError, MicroVm, Zygote, ZygoteConfig};
use warren_vmm::control::Tier;

use crate::datapath::{self, HostDatapath};
use crate::refill::{Policy, Refill, Tiers};

/// A microVM that was told to stop is killed after this time.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// The TAP of a microVM that ended is its own until the kernel has closed it.
const TAP_PATIENCE: Duration = Duration::from_secs(2);
/// What could not be prepared is tried again after this time.
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

/// A microVM that was taken out of the pool, to be released.
pub struct Taken {
    /// The microVM.
    pub microvm: MicroVm,
    /// Where it stood; none: the pool was empty, and it was forked for the one who took it.
    pub from: Option<Tier>,
}

#[derive(Default)]
struct State {
    /// Slots without a microVM; the one that rested longest first.
    free: VecDeque<u32>,
    shells: VecDeque<MicroVm>,
    loaded: VecDeque<MicroVm>,
    parked: VecDeque<MicroVm>,
    last_taken: Option<Instant>,
}

impl State {
    fn tier(&mut self, tier: Tier) -> &mut VecDeque<MicroVm> {
        match tier {
            Tier::Shell => &mut self.shells,
            Tier::Loaded => &mut self.loaded,
            Tier::Parked => &mut self.parked,
        }
    }

    fn count(&self) -> Tiers {
        let [shells, loaded, parked] =
            [&self.shells, &self.loaded, &self.parked].map(|tier| tier.len() as u32);
        Tiers { shells, loaded, parked }
    }
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

    /// MicroVMs in each tier now.
    pub fn tiers(&self) -> Tiers {
        self.state().count()
    }

    /// Slots without a microVM.
    pub fn free_slots(&self) -> u32 {
        self.state().free.len() as u32
    }

    /// Takes the microVM that is furthest; if there is none, forks one at once.
    pub async fn take(&self) -> Result<Taken, PoolError> {
        let ready = {
            let mut state = self.state();
            state.last_taken = Some(Instant::now());
            let tiers = [Tier::Parked, Tier::Loaded, Tier::Shell];
            tiers.into_iter().find_map(|tier| Some((state.tier(tier).pop_front()?, tier)))
        };
        self.changed.notify_one();
        match ready {
            Some((microvm, tier)) => Ok(Taken { microvm, from: Some(tier) }),
            None => Ok(Taken { microvm: self.fork(Tier::Shell).await?, from: None }),
        }
    }

    /// Adds a microVM that is prepared up to this tier.
    pub fn keep(&self, microvm: MicroVm, tier: Tier) {
        self.state().tier(tier).push_back(microvm);
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
            let (now, quiet) = {
                let state = self.state();
                let quiet = state.last_taken.map_or(Duration::MAX, |taken| taken.elapsed());
                (state.count(), quiet)
            };
            match self.policy.refill(now, quiet) {
                Refill::Full => self.changed.notified().await,
                Refill::After(pause) => tokio::time::sleep(pause).await,
                Refill::Now(from, to) => match self.prepare(from, to).await {
                    Ok(()) => {}
                    Err(PoolError::NoSlot) => self.changed.notified().await,
                    Err(error) => {
                        tracing::error!("cannot fill the pool: {error}");
                        tokio::time::sleep(RETRY).await;
                    }
                },
            }
        }
    }

    /// Brings a microVM to a tier: the oldest of another one, or a new process.
    async fn prepare(&self, from: Option<Tier>, to: Tier) -> Result<(), PoolError> {
        let waiting = from.and_then(|from| self.state().tier(from).pop_front());
        let mut microvm = match waiting {
            Some(microvm) => microvm,
            None => self.fork(to).await?,
        };
        match microvm.advance(to).await {
            Ok(_) => {
                self.keep(microvm, to);
                Ok(())
            }
            Err(error) => {
                self.discard(microvm).await;
                Err(error.into())
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; if some did, the state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a free slot and forks a microVM into it.
    async fn fork(&self, tier: Tier) -> Result<MicroVm, PoolError> {
        let slot = self.state().free.pop_front().ok_or(PoolError::NoSlot)?;
        let forked = self.fork_into(slot, tier).await;
        if forked.is_err() {
            self.state().free.push_back(slot);
        }
        forked
    }

    async fn fork_into(&self, slot: u32, tier: Tier) -> Result<MicroVm, PoolError> {
        match self.fork_once(slot, tier).await {
            Err(PoolError::Vmm(ClientError::ZygoteEnded)) => {
                self.replace_zygote().await?;
                self.fork_once(slot, tier).await
            }
            result => result,
        }
    }

    async fn fork_once(&self, slot: u32, tier: Tier) -> Result<MicroVm, PoolError> {
        let tap = self.open_tap(slot).await?;
        Ok(self.zygote.read().await.fork(slot, tap, tier).await?)
    }

    /// Forks a microVM of another zygote's into a slot of this host, at once. If none is free, the
    /// microVM of the pool that is the least prepared makes room.
    pub async fn fork_of(&self, zygote: &Zygote) -> Result<MicroVm, PoolError> {
        let slot = self.take_slot().await?;
        let forked = async {
            let tap = self.open_tap(slot).await?;
            Ok(zygote.fork(slot, tap, Tier::Shell).await?)
        };
        let forked = forked.await;
        if forked.is_err() {
            self.free(slot);
        }
        forked
    }

    async fn take_slot(&self) -> Result<u32, PoolError> {
        let pooled = {
            let mut state = self.state();
            if let Some(slot) = state.free.pop_front() {
                return Ok(slot);
            }
            let tiers = [Tier::Shell, Tier::Loaded, Tier::Parked];
            tiers.into_iter().find_map(|tier| state.tier(tier).pop_front())
        };
        let microvm = pooled.ok_or(PoolError::NoSlot)?;
        let slot = microvm.slot();
        stop(microvm).await;
        Ok(slot)
    }

    /// The TAP of a slot, as soon as its former microVM has let go of it.
    async fn open_tap(&self, slot: u32) -> Result<OwnedFd, PoolError> {
        let deadline = Instant::now() + TAP_PATIENCE;
        loop {
            match self.datapath.open_tap(slot) {
                Ok(tap) => return Ok(tap),
                Err(error) if is_busy(&error) && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
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
