//! Does what is decided about the number of proxies.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior};
use warren_proto::v1;

use super::{Action, Config, Proxy, Scaling};
use crate::fleet::{DrainError, Fleet, ForgetError};
use crate::store::{Store, StoreError, Write, decode};

/// How often is decided: as often as proxies tell what they have to do.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long the command may take.
const LIMIT: Duration = Duration::from_mins(2);
/// After a failure, so long nothing is tried.
const REST: Duration = Duration::from_secs(10);
/// The proxy that is about to go, for a control plane that restarts.
const LEAVING: &str = "proxy-pool/leaving";

/// What the command reads.
#[derive(Serialize)]
struct Message<'a> {
    version: u32,
    action: &'static str,
    /// How many to make.
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u32>,
    /// Which one to remove.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'a str,
    /// Those that are there now.
    proxies: Vec<&'a String>,
}

/// Keeps as many proxies as are needed, for ever.
pub async fn run(config: Config, fleet: Arc<Fleet>, store: Arc<dyn Store>) {
    let leaving = match load(&*store).await {
        Ok(leaving) => leaving,
        Err(error) => {
            tracing::error!(%error, "proxies are not scaled");
            return;
        }
    };
    let mut scaling = Scaling::new(config, leaving);
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // Who is there is not known before.
        if !fleet.is_settled() {
            continue;
        }
        let proxies = proxies(&fleet);
        let before = scaling.leaving().map(str::to_owned);
        let Some(action) = scaling.decide(&proxies, Instant::now()) else { continue };
        // Before it is drained: one that is drained by nobody's order stays so.
        if before.as_deref() != scaling.leaving()
            && let Err(error) = save(&*store, scaling.leaving()).await
        {
            tracing::error!(%error, "which proxy is about to go is not kept");
        }
        let done = act(&action, &scaling, &proxies, &fleet).await;
        scaling.done(&action, done.is_ok());
        if let Err(reason) = done {
            tracing::error!(?action, reason, "the number of proxies stays");
            tokio::time::sleep(REST).await;
        } else {
            tracing::info!(?action, "proxies are scaled");
        }
    }
}

fn proxies(fleet: &Fleet) -> BTreeMap<String, Proxy> {
    let proxy = |host: v1::Host| Proxy {
        is_alive: host.alive,
        is_drained: host.drained,
        owned: host.owned,
        load: host.load.unwrap_or_default(),
    };
    let all = fleet.hosts().into_iter().filter(|host| host.role() == v1::Role::Proxy);
    all.map(|host| (host.name.clone(), proxy(host))).collect()
}

async fn act(
    action: &Action,
    scaling: &Scaling,
    proxies: &BTreeMap<String, Proxy>,
    fleet: &Fleet,
) -> Result<(), String> {
    let proxies: Vec<_> = proxies.keys().collect();
    let message = |action, count, name, reason| Message {
        version: 1,
        action,
        count,
        name,
        reason,
        proxies: proxies.clone(),
    };
    let drained = |done: Result<(), DrainError>| done.map_err(|error| error.to_string());
    let message = match action {
        Action::Add(count, reason) => message("add", Some(*count), None, reason.as_str()),
        Action::Remove(name) => message("remove", None, Some(name.as_str()), ""),
        Action::Drain(name) => return drained(fleet.drain(name, true).await),
        Action::Undrain(name) => return drained(fleet.drain(name, false).await),
        Action::Forget(name) => {
            return match fleet.forget(name).await {
                Ok(()) | Err(ForgetError::Unknown(_)) => Ok(()),
                Err(error) => Err(error.to_string()),
            };
        }
    };
    scaling.hook().run(&message, LIMIT).await.map_err(|error| error.to_string())
}

async fn load(store: &dyn Store) -> Result<Option<String>, StoreError> {
    let entry = store.get(LEAVING).await?;
    entry.map(|entry| decode(LEAVING, &entry.value)).transpose()
}

async fn save(store: &dyn Store, leaving: Option<&str>) -> Result<(), StoreError> {
    let write = match leaving {
        Some(name) => Write::put(LEAVING, &name)?,
        None => Write { key: LEAVING.to_owned(), value: None },
    };
    store.commit(vec![], vec![write]).await.map(drop)
}
