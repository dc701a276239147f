//! Which calls get which instance, which wait, which are refused, and when instances start and end.
//! Pure: the time is given, and what is to be done comes back as [`Action`]s.
//!
//! An idle instance is owned here and handed out by value: two calls cannot have one. A version's
//! most recently used instance goes first, so that those that are not needed become old and end. Calls of a
//! version wait in the order in which they came; versions of a tenant take turns.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::refusal::Refusal;
use crate::routes::Version;

/// What the gateway keeps within.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most calls of a tenant at one time, at least 1.
    pub tenant_calls: u32,
    /// Most calls of a version that wait without a start under way for them.
    pub queue: usize,
    /// The longest that a call waits for its instance.
    pub wait: Duration,
    /// How long an idle instance is kept.
    pub keep_alive: Duration,
    /// After a host had no room, the next start of the version is tried this much later.
    pub start_again: Duration,
}

/// A call that waits.
pub type Ticket = u64;

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Action<T> {
    /// The waiting call has this instance.
    Use(Ticket, Arc<Version>, T),
    /// Start an instance; then tell [`Instances::started`] or [`Instances::start_failed`].
    Start(Arc<Version>),
    /// End this instance.
    End(Arc<Version>, T),
    /// The waiting call is refused.
    Refuse(Ticket, Refusal),
}

/// How a call begins.
#[derive(Debug, PartialEq, Eq)]
pub enum Begin<T> {
    /// It has this instance.
    Use(T),
    /// It waits: an [`Action`] with its ticket comes in time.
    Wait,
    /// It is refused.
    Refuse(Refusal),
}

/// Why a start failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartFailure {
    /// No host has room: calls wait on.
    NoCapacity,
    /// It would fail again: the call that waits the longest is refused with this reason.
    Broken(String),
}

/// How things stand with a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level {
    /// Which one.
    pub version: Arc<Version>,
    /// Calls that have an instance.
    pub running: u32,
    /// Calls that wait.
    pub waiting: u32,
    /// Starts under way.
    pub starting: u32,
    /// Instances without a call.
    pub idle: u32,
    /// Most calls, running and waiting, at one time since the last look.
    pub peak: u32,
}

struct Pool<T> {
    /// The most recently used last.
    idle: Vec<(T, Instant)>,
    running: u32,
    starting: u32,
    waiting: VecDeque<(Ticket, Instant)>,
    /// No host had room, and until when no start is tried.
    lacking: Option<Instant>,
    peak: u32,
    /// It is among its tenant's turns.
    in_turns: bool,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        let (idle, waiting) = (Vec::new(), VecDeque::new());
        Self { idle, running: 0, starting: 0, waiting, lacking: None, peak: 0, in_turns: false }
    }
}

impl<T> Pool<T> {
    fn may_start(&self, now: Instant) -> bool {
        match self.lacking {
            None => self.waiting.len() > self.starting as usize,
            // One tries for all.
            Some(until) => !self.waiting.is_empty() && self.starting == 0 && now >= until,
        }
    }

    fn note_peak(&mut self) {
        self.peak = self.peak.max(self.running + self.waiting.len() as u32);
    }

    fn is_unused(&self) -> bool {
        self.idle.is_empty()
            && self.running + self.starting == 0
            && self.waiting.is_empty()
            && !self.in_turns
    }
}

/// Calls that run and starts under way: what limits are about.
type Active = u32;

#[derive(Default)]
struct Tenant {
    active: Active,
    /// Versions with calls that wait; the first is the next.
    turns: VecDeque<Arc<Version>>,
}

/// All instances of a gateway, and all calls that wait for one. `T` is an instance.
pub struct Instances<T> {
    limits: Limits,
    pools: HashMap<Arc<Version>, Pool<T>>,
    functions: HashMap<Arc<str>, Active>,
    tenants: HashMap<Arc<str>, Tenant>,
}

impl<T> Instances<T> {
    /// None yet.
    pub fn new(limits: Limits) -> Self {
        let (pools, functions) = (HashMap::new(), HashMap::new());
        Self { limits, pools, functions, tenants: HashMap::new() }
    }

    /// A call of a version came. A ticket names it alone.
    pub fn call(
        &mut self,
        now: Instant,
        version: &Arc<Version>,
        ticket: Ticket,
        actions: &mut Vec<Action<T>>,
    ) -> Begin<T> {
        let allowed = self.is_allowed(version);
        if !self.pools.contains_key(version) {
            self.pools.insert(version.clone(), Pool::default());
        }
        let Some(pool) = self.pools.get_mut(version) else { return Begin::Wait };
        if allowed
            && pool.waiting.is_empty()
            && let Some((instance, _)) = pool.idle.pop()
        {
            pool.running += 1;
            pool.note_peak();
            self.activate(version);
            return Begin::Use(instance);
        }
        let uncovered = pool.waiting.len().saturating_sub(pool.starting as usize);
        let starts = allowed && uncovered == 0 && pool.lacking.is_none();
        if !starts && uncovered >= self.limits.queue {
            return Begin::Refuse(if allowed { Refusal::QueueFull } else { Refusal::Concurrency });
        }
        if !std::mem::replace(&mut pool.in_turns, true) {
            let tenant = self.tenants.entry(version.vpc.clone()).or_default();
            tenant.turns.push_back(version.clone());
        }
        pool.waiting.push_back((ticket, now + self.limits.wait));
        pool.note_peak();
        self.advance(now, &version.vpc, actions);
        Begin::Wait
    }

    /// A waiting call is not wanted any more. One that is not waiting is left alone.
    pub fn cancel(&mut self, version: &Arc<Version>, ticket: Ticket) {
        if let Some(pool) = self.pools.get_mut(version) {
            pool.waiting.retain(|(waiting, _)| *waiting != ticket);
        }
    }

    /// A call is over and its instance can be used again.
    pub fn release(
        &mut self,
        now: Instant,
        version: &Arc<Version>,
        instance: T,
        actions: &mut Vec<Action<T>>,
    ) {
        if let Some(pool) = self.pools.get_mut(version) {
            pool.running -= 1;
            pool.idle.push((instance, now));
        }
        self.deactivate(version);
        self.advance(now, &version.vpc, actions);
    }

    /// A call is over and its instance is no more.
    pub fn gone(&mut self, now: Instant, version: &Arc<Version>, actions: &mut Vec<Action<T>>) {
        if let Some(pool) = self.pools.get_mut(version) {
            pool.running -= 1;
        }
        self.deactivate(version);
        self.advance(now, &version.vpc, actions);
    }

    /// An idle instance is no more: the first that fits. `None` if it was not idle.
    pub fn lost(&mut self, version: &Arc<Version>, fits: impl Fn(&T) -> bool) -> Option<T> {
        let idle = &mut self.pools.get_mut(version)?.idle;
        let index = idle.iter().position(|(instance, _)| fits(instance))?;
        Some(idle.remove(index).0)
    }

    /// A start succeeded.
    pub fn started(
        &mut self,
        now: Instant,
        version: &Arc<Version>,
        instance: T,
        actions: &mut Vec<Action<T>>,
    ) {
        let Some(pool) = self.pools.get_mut(version) else { return };
        pool.starting -= 1;
        pool.lacking = None;
        if let Some((ticket, _)) = pool.waiting.pop_front() {
            // The call takes the place of the start among what is active.
            pool.running += 1;
            actions.push(Action::Use(ticket, version.clone(), instance));
        } else {
            pool.idle.push((instance, now));
            self.deactivate(version);
        }
        self.advance(now, &version.vpc, actions);
    }

    /// A start failed.
    pub fn start_failed(
        &mut self,
        now: Instant,
        version: &Arc<Version>,
        failure: StartFailure,
        actions: &mut Vec<Action<T>>,
    ) {
        let Some(pool) = self.pools.get_mut(version) else { return };
        pool.starting -= 1;
        match failure {
            StartFailure::NoCapacity => {
                pool.lacking = Some(now + self.limits.start_again);
                actions.extend(self.make_room(version));
            }
            StartFailure::Broken(reason) => {
                pool.lacking = None;
                if let Some((ticket, _)) = pool.waiting.pop_front() {
                    actions.push(Action::Refuse(ticket, Refusal::StartFailed(reason)));
                }
            }
        }
        self.deactivate(version);
        self.advance(now, &version.vpc, actions);
    }

    /// Time passed: calls at their deadline are refused, instances idle for too long end, starts
    /// that were put off are tried again. To be called several times a second.
    pub fn tick(&mut self, now: Instant, actions: &mut Vec<Action<T>>) {
        let Self { limits, pools, functions, tenants } = self;
        for (version, pool) in pools.iter_mut() {
            while let Some((ticket, deadline)) = pool.waiting.front().copied()
                && deadline <= now
            {
                pool.waiting.pop_front();
                let active = functions.get(&version.function).copied().unwrap_or_default();
                let of_tenant = tenants.get(&version.vpc).map_or(0, |tenant| tenant.active);
                let reason = match pool.lacking {
                    Some(_) => Refusal::NoCapacity,
                    None if !allows(limits, version, active, of_tenant) => Refusal::Concurrency,
                    None => Refusal::QueueTimeout,
                };
                actions.push(Action::Refuse(ticket, reason));
            }
            let old = pool.idle.iter().take_while(|(_, since)| *since + limits.keep_alive <= now);
            let old = old.count();
            let ended = pool.idle.drain(..old);
            actions.extend(ended.map(|(instance, _)| Action::End(version.clone(), instance)));
        }
        let waiting: Vec<_> = tenants
            .iter()
            .filter(|(_, tenant)| !tenant.turns.is_empty())
            .map(|(name, _)| name.clone())
            .collect();
        for tenant in waiting {
            self.advance(now, &tenant, actions);
        }
        self.pools.retain(|_, pool| !pool.is_unused());
        self.functions.retain(|_, active| *active > 0);
        self.tenants.retain(|_, tenant| tenant.active > 0 || !tenant.turns.is_empty());
    }

    /// Takes out all idle instances, to be ended: the gateway stops.
    pub fn drain(&mut self) -> Vec<(Arc<Version>, T)> {
        let pools = self.pools.iter_mut();
        let idle = pools.flat_map(|(version, pool)| {
            pool.idle.drain(..).map(|(instance, _)| (version.clone(), instance))
        });
        idle.collect()
    }

    /// How things stand, by function and version. Peaks begin anew.
    pub fn levels(&mut self) -> Vec<Level> {
        let levels = self.pools.iter_mut().map(|(version, pool)| {
            let waiting = pool.waiting.len() as u32;
            Level {
                version: version.clone(),
                running: pool.running,
                waiting,
                starting: pool.starting,
                idle: pool.idle.len() as u32,
                peak: std::mem::replace(&mut pool.peak, pool.running + waiting),
            }
        });
        let mut levels: Vec<_> = levels.collect();
        levels.sort_by(|a, b| {
            let key = |level: &Level| (level.version.function.clone(), level.version.number);
            key(a).cmp(&key(b))
        });
        levels
    }

    fn is_allowed(&self, version: &Version) -> bool {
        let active = self.functions.get(&version.function).copied().unwrap_or_default();
        let of_tenant = self.tenants.get(&version.vpc).map_or(0, |tenant| tenant.active);
        allows(&self.limits, version, active, of_tenant)
    }

    fn activate(&mut self, version: &Version) {
        *self.functions.entry(version.function.clone()).or_default() += 1;
        self.tenants.entry(version.vpc.clone()).or_default().active += 1;
    }

    fn deactivate(&mut self, version: &Version) {
        if let Some(active) = self.functions.get_mut(&version.function) {
            *active -= 1;
        }
        if let Some(tenant) = self.tenants.get_mut(&version.vpc) {
            tenant.active -= 1;
        }
    }

    /// Gives a tenant's waiting calls what there is, in turns, until a whole round gives nothing.
    fn advance(&mut self, now: Instant, tenant: &Arc<str>, actions: &mut Vec<Action<T>>) {
        let mut without_gain = 0;
        loop {
            let Some(of_tenant) = self.tenants.get_mut(tenant) else { return };
            if without_gain >= of_tenant.turns.len() || of_tenant.active >= self.limits.tenant_calls
            {
                return;
            }
            let Some(version) = of_tenant.turns.pop_front() else { return };
            let gained = self.is_allowed(&version) && self.give(now, &version, actions);
            let waits = self.pools.get_mut(&version).is_some_and(|pool| {
                pool.in_turns = !pool.waiting.is_empty();
                pool.in_turns
            });
            if waits && let Some(of_tenant) = self.tenants.get_mut(tenant) {
                of_tenant.turns.push_back(version);
            }
            match (gained, waits) {
                (true, _) => without_gain = 0,
                (false, true) => without_gain += 1,
                (false, false) => {}
            }
        }
    }

    /// An idle instance or a start for the first call that waits; false: neither.
    fn give(&mut self, now: Instant, version: &Arc<Version>, actions: &mut Vec<Action<T>>) -> bool {
        let Some(pool) = self.pools.get_mut(version) else { return false };
        if pool.waiting.is_empty() {
            return false;
        }
        if let Some((instance, _)) = pool.idle.pop() {
            if let Some((ticket, _)) = pool.waiting.pop_front() {
                pool.running += 1;
                actions.push(Action::Use(ticket, version.clone(), instance));
            }
        } else if pool.may_start(now) {
            pool.starting += 1;
            actions.push(Action::Start(version.clone()));
        } else {
            return false;
        }
        self.activate(version);
        true
    }

    /// The instance of another version that is idle for the longest: its place is wanted.
    fn make_room(&mut self, wanted: &Arc<Version>) -> Option<Action<T>> {
        let others = self.pools.iter_mut().filter(|(version, _)| *version != wanted);
        let oldest = others
            .filter_map(|(version, pool)| Some((pool.idle.first()?.1, version, pool)))
            .min_by_key(|(since, ..)| *since);
        let (_, version, pool) = oldest?;
        Some(Action::End(version.clone(), pool.idle.remove(0).0))
    }
}

fn allows(limits: &Limits, version: &Version, active: Active, of_tenant: Active) -> bool {
    let function = version.concurrency == 0 || active < version.concurrency;
    function && of_tenant < limits.tenant_calls
}

#[cfg(test)]
mod tests;
