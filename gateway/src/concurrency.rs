//! How many calls of each function run and wait, each second: what an autoscaler goes by.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::watch;

use crate::dispatch::Dispatcher;
use crate::instances::Level;

/// Time from one look to the next.
const INTERVAL: Duration = Duration::from_secs(1);

/// The last look.
#[derive(Clone, Debug)]
pub struct Concurrency(watch::Receiver<Arc<[Level]>>);

impl Concurrency {
    /// Looks each second for as long as there is the dispatcher. Must be called in a runtime.
    pub fn watch(dispatcher: &Arc<Dispatcher>) -> Self {
        let (sender, receiver) = watch::channel(Arc::default());
        tokio::spawn(look(Arc::downgrade(dispatcher), sender));
        Self(receiver)
    }

    /// Each version that has calls or instances: how many at the last look, and the most calls in
    /// the second before.
    pub fn latest(&self) -> Arc<[Level]> {
        self.0.borrow().clone()
    }

    /// Waits for the next look. `None`: the gateway stops.
    pub async fn next(&mut self) -> Option<Arc<[Level]>> {
        self.0.changed().await.ok()?;
        Some(self.0.borrow_and_update().clone())
    }
}

async fn look(dispatcher: Weak<Dispatcher>, sender: watch::Sender<Arc<[Level]>>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    loop {
        ticks.tick().await;
        let Some(dispatcher) = dispatcher.upgrade() else { return };
        sender.send_replace(dispatcher.levels().into());
    }
}
