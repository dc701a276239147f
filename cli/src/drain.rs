//! `warren host drain`: until the proxies own nothing any more.

use std::time::{Duration, Instant};

use crate::args::Output;
use crate::client::Client;
use crate::commands::print;
use crate::error::Error;
use crate::render::{self, HostRow};

/// Time from one look at what they own to the next: they tell it once a second.
const INTERVAL: Duration = Duration::from_millis(250);
/// The longest time that it takes, if there are others to take over.
const PATIENCE: Duration = Duration::from_secs(10);

/// Drains proxies, waits until they own nothing, and prints them.
pub async fn run(mut client: Client, output: Output, names: Vec<String>) -> Result<(), Error> {
    for name in &names {
        client.drain_proxy(name.clone(), true).await?;
    }
    let start = Instant::now();
    let mut owners = names.clone();
    while !owners.is_empty() {
        if start.elapsed() > PATIENCE {
            return Err(Error::Undrained { names: owners });
        }
        tokio::time::sleep(INTERVAL).await;
        let hosts = client.hosts().await?;
        let owns = |name: &String| {
            // What a dead one owned last is not what it owns.
            hosts.iter().any(|host| host.name == *name && host.alive && host.owned > 0)
        };
        owners.retain(owns);
    }
    show(client, output, &names).await
}

/// Prints these proxies.
pub async fn show(mut client: Client, output: Output, names: &[String]) -> Result<(), Error> {
    let mut hosts = client.hosts().await?;
    hosts.retain(|host| names.contains(&host.name));
    let rows: Vec<_> = hosts.into_iter().map(HostRow::from).collect();
    print(&render::list(output, &rows))
}
