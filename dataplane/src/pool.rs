//! The microVMs of one template that wait for an instance, in three tiers.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, RwLock};
use warren_vmm::client::{ClientError, MicroVm, TemplateMemory, Zygote, ZygoteConfig};
use warren_vmm::control::Tier;
use warren_vmm::make::Make;

use crate::datapath;
use crate::refill::{Policy, Refill, Tiers};
use crate::slots::Slots;

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
    /// No such template.
    #[error(
        "no template \"{name}\" on this host: name one of {}, or add it to host.templates",
        known.join(", ")
    )]
    UnknownTemplate {
        /// What was asked for.
        name: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// The data path failed.
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// The VMM failed.
    #[error(transparent)]
    Vmm(#[from] ClientError),
}

/// A microVM that was taken out of a pool, to be released.
pub struct Taken {
    /// The microVM.
    pub microvm: MicroVm,
    /// Where it stood; none: the pool was empty, and it was forked for the one who took it.
    pub from: Option<Tier>,
}

/// How a pool stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level {
    /// Its template.
    pub template: String,
    /// MicroVMs in each tier.
    pub now: Tiers,
    /// How many are to be parked.
    pub parked_target: u32,
}

#[derive(Default)]
struct State {
    shells: VecDeque<MicroVm>,
    loaded: VecDeque<MicroVm>,
    parked: VecDeque<MicroVm>,
    /// One is on its way into a tier.
    preparing: bool,
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

/// The pool of a template.
pub struct Pool {
    template: String,
    slots: Arc<Slots>,
    config: ZygoteConfig,
    zygote: RwLock<Zygote>,
    policy: Policy,
    state: Mutex<State>,
    changed: Notify,
}

impl Pool {
    /// Starts a zygote of the template for a pool without microVMs: [`Pool::keep`] and [`Pool::fill`]
    /// fill it. If there is memory, it is that of a pool whose template is in the same file.
    pub async fn new(
        template: String,
        slots: Arc<Slots>,
        config: ZygoteConfig,
        memory: Option<&TemplateMemory>,
        policy: Policy,
    ) -> Result<Self, PoolError> {
        let zygote = match memory {
            Some(memory) => Zygote::spawn_sharing(&config, memory).await?,
            None => Zygote::spawn(&config).await?,
        };
        let zygote = RwLock::new(zygote);
        let (state, changed) = Default::default();
        Ok(Self { template, slots, config, zygote, policy, state, changed })
    }

    /// Name of the template.
    pub fn template(&self) -> &str {
        &self.template
    }

    /// What its zygote is started with.
    pub fn config(&self) -> &ZygoteConfig {
        &self.config
    }

    /// The template's memory, for other zygotes of it.
    pub async fn memory(&self) -> TemplateMemory {
        self.zygote.read().await.memory()
    }

    /// How many it is to hold.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// What microVMs of this pool are of.
    pub async fn make(&self) -> Make {
        self.zygote.read().await.make()
    }

    /// How it stands.
    pub fn level(&self) -> Level {
        let state = self.state();
        let parked_target = self.policy.target(state.wanted()).parked;
        Level { template: self.template.clone(), now: state.count(), parked_target }
    }

    /// The control plane wants so many parked.
    pub fn want_parked(&self, parked: u32) {
        let before = self.state().wanted.replace((parked, Instant::now()));
        if before.is_none_or(|(before, _)| before != parked) {
            self.changed.notify_one();
        }
    }

    /// Takes the microVM that is furthest, for a start.
    pub fn take(&self) -> Option<Taken> {
        let taken = {
            let mut state = self.state();
            state.last_taken = Some(Instant::now());
            let tiers = [Tier::Parked, Tier::Loaded, Tier::Shell];
            tiers.into_iter().find_map(|tier| Some((state.tier(tier).pop_front()?, tier)))
        };
        self.changed.notify_one();
        taken.map(|(microvm, tier)| Taken { microvm, from: Some(tier) })
    }

    /// Takes a microVM of a tier, to make room for a start of another template.
    pub fn give_up(&self, tier: Tier) -> Option<MicroVm> {
        let microvm = self.state().tier(tier).pop_front();
        self.changed.notify_one();
        microvm
    }

    /// True while one is on its way into a tier: it is in none, and has a slot.
    pub fn is_preparing(&self) -> bool {
        self.state().preparing
    }

    /// Adds a microVM that is prepared up to this tier.
    pub fn keep(&self, microvm: MicroVm, tier: Tier) {
        self.state().tier(tier).push_back(microvm);
    }

    /// Keeps the pool full, for ever. It takes free slots only: pools that took each other's would never
    /// come to rest.
    pub async fn fill(self: Arc<Self>) {
        let began = Instant::now();
        let mut freed = self.slots.freed();
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
                        self.slots.discard(microvm).await;
                    }
                }
                Refill::Now(from, to) => {
                    freed.mark_unchanged();
                    self.state().preparing = true;
                    let prepared = self.prepare(from, to).await;
                    self.state().preparing = false;
                    match prepared {
                        Ok(()) => {}
                        Err(PoolError::NoSlot) => tokio::select! {
                            () = self.changed.notified() => {}
                            _ = freed.changed() => {}
                        },
                        Err(error) => {
                            tracing::error!(
                                template = self.template,
                                "cannot fill the pool: {error}"
                            );
                            tokio::time::sleep(RETRY).await;
                        }
                    }
                }
            }
        }
    }

    /// Brings a microVM to a tier: the oldest of another one, or a new process.
    async fn prepare(&self, from: Option<Tier>, to: Tier) -> Result<(), PoolError> {
        let waiting = from.and_then(|from| self.state().tier(from).pop_front());
        let mut microvm = match waiting {
            Some(microvm) => microvm,
            None => self.fork(self.slots.take().ok_or(PoolError::NoSlot)?, to).await?,
        };
        match microvm.advance(to).await {
            Ok(_) => {
                self.keep(microvm, to);
                Ok(())
            }
            Err(error) => {
                self.slots.discard(microvm).await;
                Err(error.into())
            }
        }
    }

    /// Forks a microVM into a slot that was taken, which is free again if that fails.
    pub async fn fork(&self, slot: u32, tier: Tier) -> Result<MicroVm, PoolError> {
        let mut forked = self.fork_once(slot, tier).await;
        if matches!(forked, Err(PoolError::Vmm(ClientError::ZygoteEnded))) {
            forked = match self.replace_zygote().await {
                Ok(()) => self.fork_once(slot, tier).await,
                Err(error) => Err(error),
            };
        }
        if forked.is_err() {
            self.slots.free(slot);
        }
        forked
    }

    async fn fork_once(&self, slot: u32, tier: Tier) -> Result<MicroVm, PoolError> {
        let zygote = self.zygote.read().await;
        self.slots.fork(&zygote, slot, tier).await
    }

    /// Starts another zygote, unless somebody else has by now. MicroVMs do not notice.
    async fn replace_zygote(&self) -> Result<(), PoolError> {
        let ended = self.zygote.read().await.pid();
        let mut zygote = self.zygote.write().await;
        if zygote.pid() == ended {
            tracing::error!(template = self.template, "the zygote ended: starting another one");
            *zygote = Zygote::spawn_sharing(&self.config, &zygote.memory()).await?;
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; if some did, the state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
