//! The pools of a host, one for each template, side by side on its slots.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use warren_vmm::client::{MicroVm, Zygote};
use warren_vmm::control::Tier;
use warren_vmm::make::Make;

use crate::pool::{Level, Pool, PoolError, Taken};
use crate::refill;
use crate::slots::{Slots, stop};

/// A start that finds all slots taken looks again after this time for one that was being prepared.
const LOOK: Duration = Duration::from_millis(1);

/// The pools.
pub struct Pools {
    slots: Arc<Slots>,
    /// That of the default template first.
    templates: Vec<Arc<Pool>>,
    /// Those of functions, which come and go.
    functions: Mutex<Vec<Arc<Pool>>>,
}

impl Pools {
    /// These, that of the default template first, on the slots that they share.
    pub fn new(slots: Arc<Slots>, pools: Vec<Arc<Pool>>) -> Self {
        Self { slots, templates: pools, functions: Mutex::default() }
    }

    /// Keeps all of them full from now on.
    pub fn fill(&self) {
        for pool in &self.templates {
            tokio::spawn(pool.clone().fill());
        }
    }

    /// Adds the pool of a function, which gives way to starts of others as all do.
    pub fn add(&self, pool: Arc<Pool>) {
        self.functions().push(pool);
    }

    /// Forgets the pool of a function, and ends its microVMs.
    pub async fn remove(&self, pool: &Arc<Pool>) {
        self.functions().retain(|known| !Arc::ptr_eq(known, pool));
        for tier in [Tier::Shell, Tier::Loaded, Tier::Parked] {
            while let Some(microvm) = pool.give_up(tier) {
                self.slots.discard(microvm).await;
            }
        }
    }

    fn functions(&self) -> MutexGuard<'_, Vec<Arc<Pool>>> {
        // No code panics while it holds the lock; if some did, the list is still whole.
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> Vec<Arc<Pool>> {
        self.templates.iter().chain(self.functions().iter()).cloned().collect()
    }

    /// The pool of a template; without a name, of the default one.
    pub fn get(&self, template: &str) -> Result<&Pool, PoolError> {
        let is_it = |pool: &&Arc<Pool>| template.is_empty() || pool.template() == template;
        let found = self.templates.iter().find(is_it).map(Arc::as_ref);
        found.ok_or_else(|| PoolError::UnknownTemplate {
            name: template.to_owned(),
            known: self.templates.iter().map(|pool| pool.template().to_owned()).collect(),
        })
    }

    /// A template's name, where that of the default one stands in for none: in what former versions kept.
    pub fn named(&self, template: String) -> String {
        match self.templates.first() {
            Some(default) if template.is_empty() => default.template().to_owned(),
            _ => template,
        }
    }

    /// The pool whose microVMs are of this make.
    pub async fn of(&self, make: Make) -> Option<&Pool> {
        for pool in &self.templates {
            if pool.make().await == make {
                return Some(pool);
            }
        }
        None
    }

    /// How each stands.
    pub fn levels(&self) -> Vec<Level> {
        self.templates.iter().map(|pool| pool.level()).collect()
    }

    /// The control plane wants so many parked, by template.
    pub fn want_parked(&self, wanted: &HashMap<String, u32>) {
        let of = |pool: &Arc<Pool>| {
            (pool.policy(), wanted.get(pool.template()).copied().unwrap_or_default())
        };
        let wanted: Vec<_> = self.templates.iter().map(of).collect();
        for (pool, parked) in self.templates.iter().zip(refill::bound(self.slots.count(), &wanted))
        {
            pool.want_parked(parked);
        }
    }

    /// Takes the microVM of a template that is furthest; if there is none, forks one at once.
    pub async fn take(&self, template: &str) -> Result<Taken, PoolError> {
        self.take_of(self.get(template)?).await
    }

    /// The same of a pool.
    pub async fn take_of(&self, pool: &Pool) -> Result<Taken, PoolError> {
        if let Some(taken) = pool.take() {
            return Ok(taken);
        }
        let slot = self.make_room().await?;
        Ok(Taken { microvm: pool.fork(slot, Tier::Shell).await?, from: None })
    }

    /// Forks a microVM of a zygote that has no pool, at once.
    pub async fn fork_of(&self, zygote: &Zygote) -> Result<Taken, PoolError> {
        let slot = self.make_room().await?;
        let forked = self.slots.fork(zygote, slot, Tier::Shell).await;
        if forked.is_err() {
            self.slots.free(slot);
        }
        Ok(Taken { microvm: forked?, from: None })
    }

    /// Takes a slot for a start. If none is free, the microVM that is the least prepared makes room, of
    /// whatever pool.
    async fn make_room(&self) -> Result<u32, PoolError> {
        loop {
            let coming = self.all().iter().any(|pool| pool.is_preparing());
            if let Some(slot) = self.slots.take() {
                return Ok(slot);
            }
            if let Some(microvm) = self.give_up() {
                let slot = microvm.slot();
                stop(microvm).await;
                return Ok(slot);
            }
            if !coming {
                return Err(PoolError::NoSlot);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The least prepared microVM, of the pool that has the most of that tier.
    fn give_up(&self) -> Option<MicroVm> {
        [Tier::Shell, Tier::Loaded, Tier::Parked].into_iter().find_map(|tier| {
            let all = self.all();
            all.iter().max_by_key(|pool| pool.level().now.of(tier))?.give_up(tier)
        })
    }
}
