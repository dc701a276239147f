//! The slots of a host, which all of its pools share.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::watch;
use warren_vmm::client::{MicroVm, Zygote};
use warren_vmm::control::Tier;
use warren_vmm::jail::{self, Inhabitant, JailConfig};

use crate::datapath::{self, HostDatapath};
use crate::pool::PoolError;
use crate::recovery::Orphan;

/// A microVM that was told to stop is killed after this time.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// The TAP of a microVM that ended is its own until the kernel has closed it.
const TAP_PATIENCE: Duration = Duration::from_secs(2);

/// The slots.
pub struct Slots {
    datapath: Arc<HostDatapath>,
    /// That of all the host's microVMs, of whatever template.
    jail: JailConfig,
    /// Slots without a microVM; the one that rested longest first.
    free: Mutex<VecDeque<u32>>,
    freed: watch::Sender<()>,
    orphans_reaped: Counter,
}

impl Slots {
    /// Of a host whose microVMs are in this jail. None is free yet: see [`Slots::free`].
    pub fn new(datapath: Arc<HostDatapath>, jail: JailConfig) -> Self {
        let (free, freed, orphans_reaped) = Default::default();
        Self { datapath, jail, free, freed, orphans_reaped }
    }

    /// MicroVMs that were ended because nobody knew them.
    pub fn orphans_reaped(&self) -> &Counter {
        &self.orphans_reaped
    }

    /// Slots in all.
    pub fn count(&self) -> u32 {
        self.datapath.slots().len() as u32
    }

    /// How many are free.
    pub fn count_free(&self) -> u32 {
        self.queue().len() as u32
    }

    /// Changes when a slot becomes free.
    pub fn freed(&self) -> watch::Receiver<()> {
        self.freed.subscribe()
    }

    /// Takes a free slot.
    pub fn take(&self) -> Option<u32> {
        self.queue().pop_front()
    }

    /// Detaches a slot that has no microVM any more, and makes it available.
    pub fn free(&self, slot: u32) {
        if let Err(error) = self.datapath.detach(slot) {
            tracing::error!(slot, "{error}");
        }
        self.queue().push_back(slot);
        self.freed.send_replace(());
    }

    /// Forks a microVM into a slot that was taken.
    pub async fn fork(&self, zygote: &Zygote, slot: u32, tier: Tier) -> Result<MicroVm, PoolError> {
        let tap = self.take_tap(slot).await?;
        Ok(zygote.fork(slot, tap, tier).await?)
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
        let mut orphans = jail::inhabitants(&self.jail);
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
            let living = jail::inhabitants(&self.jail);
            orphans.retain(|orphan| living.contains(orphan));
        }
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

    fn queue(&self) -> MutexGuard<'_, VecDeque<u32>> {
        // No code panics while it holds the lock; if some did, the queue is still whole.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
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
