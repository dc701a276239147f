//! The pool of microVMs that wait for an instance, in three tiers, and the slots they stand on.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::{Notify, RwLock};
use warren_vmm::client::{ClientError, MicroVm, Zygote, ZygoteConfig};
use warren_vmm::control::Tier;
use warren_vmm::jail::{self, Inhabitant};
use warren_vmm::make::Make;

use crate::datapath::{self, HostDatapath};
use crate::recovery::Orphan;
use crate::refill::{Policy, Refill, Tiers};

/// A microVM that was told to stop is killed after this time.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// The TAP of a microVM that ended is its own until the kernel has closed it.
const TAP_PATIENCE: Duration = Duration::from_secs(2);
/// What could not be prepared is tried again after this time.
const RETRY: Duration = Duration::from_secs(1);

/// What the control plane wanted is forgotten after this time without a word of it.
const MEMORY: Duration = Duration::from_secs(30);

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
    /// How many the control plane wants parked, and since when.
    wanted: Option<(u32, Instant)>,
}

impl State {
    fn tier(&mut self, tier: Tier) -> &mut VecDeque<MicroVm> {
        match tier {
            Tier::Shell => &mut self.shells,
            Tier::Loaded => &mut self.loaded,
            Tier::Parked => &mut self.parked,
        }
    }

    /// How many the control plane wants parked, unless that is too old.
    fn wanted(&self) -> Option<u32> {
        let (parked, since) = self.wanted?;
        (since.elapsed() < MEMORY).then_some(parked)
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
    orphans_reaped: Counter,
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
        let (state, changed, orphans_reaped) = Default::default();
        Ok(Self { datapath, config, zygote, policy, state, changed, orphans_reaped })
    }

    /// What microVMs of this pool are of.
    pub async fn make(&self) -> Make {
        self.zygote.read().await.make()
    }

    /// MicroVMs that were ended because nobody knew them.
    pub fn orphans_reaped(&self) -> &Counter {
        &self.orphans_reaped
    }

    /// MicroVMs in each tier now.
    pub fn tiers(&self) -> Tiers {
        self.state().count()
    }

    /// MicroVMs that each tier is to hold now.
    pub fn target(&self) -> Tiers {
        self.policy.target(self.state().wanted())
    }

    /// The control plane wants so many parked.
    pub fn want_parked(&self, parked: u32) {
        let before = self.state().wanted.replace((parked, Instant::now()));
        if before.is_none_or(|(before, _)| before != parked) {
            self.changed.notify_one();
        }
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

    /// Ends a microVM that is nobody's. Its slot, if there is one, is free afterwards but for being said
    /// so.
    pub async fn end_orphan(&self, microvm: MicroVm, orphan: Orphan) {
        let (slot, pid, path) = (microvm.slot(), microvm.pid(), microvm.path().to_owned());
        tracing::warn!(slot, pid, "ending an orphaned microVM: {orphan}");
        stop(microvm).await;
        // Nobody listens there any more, and its zygote may be gone.
        std::fs::remove_file(path).ok();
        self.orphans_reaped.inc();
    }

    /// Kills all microVMs of this host, found by its jail, but those that somebody knows, by slot and
    /// process; and waits until they are gone, which takes longer than [`TAP_PATIENCE`] only if the
    /// kernel keeps them.
    pub async fn reap(&self, is_known: impl Fn(u32, i32) -> bool) {
        let mut orphans = jail::inhabitants(&self.config.jail);
        orphans.retain(|orphan| !is_known(orphan.slot, orphan.pid.as_raw()));
        for &Inhabitant { slot, pid } in &orphans {
            tracing::warn!(slot, %pid, "killing an orphaned microVM: {}", Orphan::Unreachable);
            match kill(pid, Signal::SIGKILL) {
                Ok(()) => drop(self.orphans_reaped.inc()),
                // It ended by itself.
                Err(Errno::ESRCH) => {}
                Err(error) => tracing::error!(slot, %pid, "cannot kill the microVM: {error}"),
            }
        }
        let deadline = Instant::now() + TAP_PATIENCE;
        while !orphans.is_empty() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let living = jail::inhabitants(&self.config.jail);
            orphans.retain(|orphan| living.contains(orphan));
        }
    }

    /// Keeps the pool full, for ever.
    pub async fn fill(self: Arc<Self>) {
        let began = Instant::now();
        loop {
            let (now, quiet, wanted) = {
                let state = self.state();
                let quiet = state.last_taken.unwrap_or(began).elapsed();
                (state.count(), quiet, state.wanted())
            };
            match self.policy.refill(now, quiet, wanted) {
                // What is wanted may become too old without a word.
                Refill::Full => drop(tokio::time::timeout(MEMORY, self.changed.notified()).await),
                Refill::After(pause) => tokio::time::sleep(pause).await,
                Refill::End(tier) => {
                    let surplus = self.state().tier(tier).pop_back();
                    if let Some(microvm) = surplus {
                        self.discard(microvm).await;
                    }
                }
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
        let tap = self.take_tap(slot).await?;
        Ok(self.zygote.read().await.fork(slot, tap, tier).await?)
    }

    /// Forks a microVM of another zygote's into a slot of this host, at once. If none is free, the
    /// microVM of the pool that is the least prepared makes room.
    pub async fn fork_of(&self, zygote: &Zygote) -> Result<MicroVm, PoolError> {
        let slot = self.take_slot().await?;
        let forked = async {
            let tap = self.take_tap(slot).await?;
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

    /// The TAP of a slot that is free. Who still has it is nobody that this host knows.
    async fn take_tap(&self, slot: u32) -> Result<OwnedFd, datapath::Error> {
        match self.open_tap(slot).await {
            Err(error) if is_busy(&error) => {
                self.reap(|other, _| other != slot).await;
                self.open_tap(slot).await
            }
            opened => opened,
        }
    }

    /// Opens a slot's TAP, which the microVM that was on it may have for a moment still.
    async fn open_tap(&self, slot: u32) -> Result<OwnedFd, datapath::Error> {
        let deadline = Instant::now() + TAP_PATIENCE;
        loop {
            match self.datapath.open_tap(slot) {
                Err(error) if is_busy(&error) && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                opened => return opened,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_wanted_long_ago_is_not_wanted_any_more() {
        let now = Instant::now();
        let wanted = |since| State { wanted: Some((5, since)), ..State::default() }.wanted();
        assert_eq!(wanted(now), Some(5));
        assert_eq!(wanted(now.checked_sub(MEMORY).expect("the machine is up so long")), None);
        assert_eq!(State::default().wanted(), None);
    }
}
