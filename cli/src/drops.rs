//! `warren drops`: what was dropped so far, or from now on.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use tokio::time::MissedTickBehavior;
use warren_proto::v1::HostDrops;

use crate::args::Output;
use crate::client::Client;
use crate::commands::{all_done, print, unless_closed};
use crate::error::Error;
use crate::render::{self, DropRow, Scope, drop_rows};

/// Time from one look at the counters to the next.
const INTERVAL: Duration = Duration::from_secs(1);

/// Prints all counters. Hosts that do not answer are an error after the others are printed.
pub async fn show(mut client: Client, output: Output, host: Option<&str>) -> Result<(), Error> {
    let hosts = client.drops(host).await?;
    let (all, mut rows, mut errors) = (hosts.len(), vec![], vec![]);
    for host in hosts {
        match told(host) {
            Ok(of_host) => rows.extend(of_host),
            Err(error) => errors.push(error),
        }
    }
    if errors.len() < all || all == 0 {
        print(&render::list(output, &rows))?;
    }
    all_done(errors, all)
}

/// Prints what the counters rise by, until Ctrl-C or until nobody reads it.
pub async fn follow(client: Client, output: Output, host: Option<&str>) -> Result<(), Error> {
    tokio::select! {
        ended = watch(client, output, host) => ended,
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
    }
}

async fn watch(mut client: Client, output: Output, host: Option<&str>) -> Result<(), Error> {
    let mut counters = Counters::default();
    let mut problems = BTreeMap::new();
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let mut risen = vec![];
        for drops in client.drops(host).await? {
            let host = drops.host.clone();
            match told(drops) {
                Ok(rows) => {
                    problems.remove(&host);
                    risen.extend(counters.rise(host, rows));
                }
                // Told once, not every second.
                Err(error) => {
                    let problem = error.to_string();
                    if problems.insert(host, problem.clone()).as_ref() != Some(&problem) {
                        eprintln!("error: {problem}");
                    }
                }
            }
        }
        if risen.is_empty() {
            continue;
        }
        let written = writeln!(std::io::stdout().lock(), "{}", render::chunk(output, &risen));
        if written.is_err() {
            return unless_closed(written);
        }
    }
}

fn told(drops: HostDrops) -> Result<Vec<DropRow>, Error> {
    match drops.problem.as_str() {
        "" => Ok(drop_rows(drops)),
        _ => Err(Error::DropsUnknown { host: drops.host, problem: drops.problem }),
    }
}

/// What the counters were when each host answered last.
#[derive(Default)]
struct Counters {
    by_host: BTreeMap<String, BTreeMap<(Scope, String), u64>>,
}

impl Counters {
    /// What a host's counters rose by since it answered before; nothing if it did not. Counters
    /// that fell were made anew: all they say is new.
    fn rise(&mut self, host: String, rows: Vec<DropRow>) -> Vec<DropRow> {
        let key = |row: &DropRow| (row.scope(), row.reason.clone());
        let now = rows.iter().map(|row| (key(row), row.packets)).collect();
        let Some(before) = self.by_host.insert(host, now) else { return vec![] };
        let risen = rows.into_iter().map(|mut row| {
            let before = before.get(&key(&row)).filter(|before| **before <= row.packets);
            row.packets -= before.unwrap_or(&0);
            row
        });
        risen.filter(|row| row.packets > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use warren_proto::v1::{Role, ScopedDrops};

    use super::*;

    fn rows(counts: &[(u32, &str, u64)]) -> Vec<DropRow> {
        let drops = counts.iter().map(|&(scope, reason, packets)| ScopedDrops {
            scope,
            reason: reason.into(),
            packets,
            ..ScopedDrops::default()
        });
        drop_rows(HostDrops {
            host: "h1".into(),
            role: Role::Host.into(),
            drops: drops.collect(),
            problem: String::new(),
        })
    }

    #[test]
    fn only_what_rises_after_the_first_answer_is_shown() {
        let mut counters = Counters::default();
        let mut rise = |counts: &[_]| counters.rise("h1".into(), rows(counts));
        assert_eq!(rise(&[(1, "no-flow", 5), (2, "no-flow", 1)]), []);
        assert_eq!(
            rise(&[(1, "no-flow", 5), (1, "too-big", 4), (2, "no-flow", 3)]),
            rows(&[(1, "too-big", 4), (2, "no-flow", 2)]),
            "a counter that was zero is not told of before"
        );
        assert_eq!(rise(&[(1, "no-flow", 5), (1, "too-big", 4), (2, "no-flow", 3)]), []);
        assert_eq!(rise(&[(1, "no-flow", 2)]), rows(&[(1, "no-flow", 2)]), "made anew");
    }

    #[test]
    fn a_host_that_comes_later_begins_with_what_it_has() {
        let mut counters = Counters::default();
        assert_eq!(counters.rise("h1".into(), vec![]), []);
        assert_eq!(counters.rise("h2".into(), rows(&[(1, "no-flow", 9)])), []);
        assert_eq!(counters.rise("h1".into(), rows(&[(1, "no-flow", 9)])).len(), 1);
    }
}
