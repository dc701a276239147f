//! Carries out what [`Instances`] decides: hands instances to calls, starts and ends them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::instances::{Action, Begin, Instances, Level, Limits, Ticket};
use crate::metrics::Counts;
use crate::refusal::Refusal;
use crate::routes::Version;
use crate::start::{Instance, Starter, lock};

/// Deadlines are met this exactly.
const TICK: Duration = Duration::from_millis(20);

type Answer = Result<Lease, Refusal>;

struct State {
    instances: Instances<Instance>,
    waiting: HashMap<Ticket, oneshot::Sender<Answer>>,
    next: Ticket,
}

/// All instances of this gateway.
pub struct Dispatcher {
    /// Held for moments, and never while something is waited for.
    state: Mutex<State>,
    starter: Arc<Starter>,
    counts: Counts,
}

impl Dispatcher {
    /// With no instances yet. Must be called in a runtime, where it works from now on.
    pub fn start(limits: Limits, starter: Arc<Starter>, counts: Counts) -> Arc<Self> {
        let (instances, waiting) = (Instances::new(limits), HashMap::new());
        let state = Mutex::new(State { instances, waiting, next: 0 });
        let dispatcher = Arc::new(Self { state, starter, counts });
        let weak = Arc::downgrade(&dispatcher);
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(TICK);
            loop {
                ticks.tick().await;
                let Some(dispatcher) = weak.upgrade() else { return };
                dispatcher.act(|state, actions| state.instances.tick(Instant::now(), actions));
            }
        });
        dispatcher
    }

    /// An instance for a call, idle, started, or after a wait.
    pub async fn acquire(self: &Arc<Self>, version: &Arc<Version>) -> Answer {
        let mut actions = Vec::new();
        let (receiver, ticket) = {
            let mut state = lock(&self.state);
            let ticket = state.next;
            state.next += 1;
            match state.instances.call(Instant::now(), version, ticket, &mut actions) {
                Begin::Use(instance) => return Ok(self.lease(version.clone(), instance)),
                Begin::Refuse(refusal) => return Err(refusal),
                Begin::Wait => {
                    let (sender, receiver) = oneshot::channel();
                    state.waiting.insert(ticket, sender);
                    (receiver, ticket)
                }
            }
        };
        let _waiting = Waiting { dispatcher: self, version, ticket };
        self.carry_out(actions);
        // The sender goes only together with its call.
        receiver.await.unwrap_or(Err(Refusal::QueueTimeout))
    }

    /// How things stand with each version. Peaks begin anew.
    pub fn levels(&self) -> Vec<Level> {
        lock(&self.state).instances.levels()
    }

    /// Ends all idle instances: the gateway stops.
    pub async fn drain(&self) {
        let idle = lock(&self.state).instances.drain();
        let ends: Vec<_> = idle.into_iter().map(|(_, instance)| self.end(instance)).collect();
        for end in ends {
            // A panic is in the log.
            let _ = end.await;
        }
    }

    fn lease(self: &Arc<Self>, version: Arc<Version>, instance: Instance) -> Lease {
        Lease { instance: Some(instance), version, dispatcher: self.clone(), used: false }
    }

    fn act(self: &Arc<Self>, decide: impl FnOnce(&mut State, &mut Vec<Action<Instance>>)) {
        let mut actions = Vec::new();
        decide(&mut lock(&self.state), &mut actions);
        self.carry_out(actions);
    }

    fn carry_out(self: &Arc<Self>, actions: Vec<Action<Instance>>) {
        for action in actions {
            match action {
                Action::Use(ticket, version, instance) => {
                    self.answer(ticket, Ok(self.lease(version, instance)));
                }
                Action::Refuse(ticket, refusal) => self.answer(ticket, Err(refusal)),
                Action::Start(version) => {
                    tokio::spawn(self.clone().cold_start(version));
                }
                Action::End(_, instance) => {
                    self.end(instance);
                }
            }
        }
    }

    fn answer(&self, ticket: Ticket, answer: Answer) {
        let sender = lock(&self.state).waiting.remove(&ticket);
        if let Some(sender) = sender {
            // Whoever does not wait any more gives the instance back by dropping it.
            let _ = sender.send(answer);
        }
    }

    async fn cold_start(self: Arc<Self>, version: Arc<Version>) {
        let (weak, of) = (Arc::downgrade(&self), version.clone());
        let closed = move |id: String| {
            let Some(dispatcher) = weak.upgrade() else { return };
            let lost = lock(&dispatcher.state).instances.lost(&of, |other| other.id == id);
            if let Some(instance) = lost {
                dispatcher.end(instance);
            }
        };
        let begun = Instant::now();
        let started = self.starter.start(&version, closed).await;
        self.counts.start(begun.elapsed(), started.is_ok());
        self.act(|state, actions| {
            let now = Instant::now();
            match started {
                Ok(instance) => state.instances.started(now, &version, instance, actions),
                Err(failure) => state.instances.start_failed(now, &version, failure, actions),
            }
        });
    }

    fn end(&self, instance: Instance) -> tokio::task::JoinHandle<()> {
        let starter = self.starter.clone();
        let Instance { id, host, sender } = instance;
        drop(sender);
        tokio::spawn(async move { starter.end(&host.name, host.endpoint, id).await })
    }
}

/// A call's place in the queue, given up when it is dropped.
struct Waiting<'a> {
    dispatcher: &'a Dispatcher,
    version: &'a Arc<Version>,
    ticket: Ticket,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.dispatcher.state);
        if state.waiting.remove(&self.ticket).is_some() {
            state.instances.cancel(self.version, self.ticket);
        }
    }
}

/// An instance that a call has. Dropped, it is given back if the call did not touch it, else ended.
pub struct Lease {
    instance: Option<Instance>,
    version: Arc<Version>,
    dispatcher: Arc<Dispatcher>,
    used: bool,
}

impl Lease {
    /// The instance, to be called.
    pub fn instance(&mut self) -> Option<&mut Instance> {
        self.used = true;
        self.instance.as_mut()
    }

    /// The call is over, and the instance is as good as before.
    pub fn release(mut self) {
        self.used = false;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(instance) = self.instance.take() else { return };
        let now = Instant::now();
        // One whose connection ended before it came back here would never be missed.
        if self.used || instance.sender.is_closed() {
            self.dispatcher.end(instance);
            self.dispatcher.act(|state, actions| state.instances.gone(now, &self.version, actions));
        } else {
            self.dispatcher.act(|state, actions| {
                state.instances.release(now, &self.version, instance, actions);
            });
        }
    }
}
