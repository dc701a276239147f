//! What live microVMs take of the machine's memory, the kernel's share included.

use anyhow::{Context, Result, ensure};
use indicatif::ProgressIterator;
use warren_abi::probe::{Operation, Request, decode, encode};
use warren_bench::figures::Figures;
use warren_bench::interrupt;
use warren_vmm::client::invoke;

use super::nursery::{CALL_LIMIT, Nursery};

/// How many live at once.
const COUNTS: [u32; 2] = [1000, 4000];

/// Adds `mib_each_1000` and `mib_each_4000`: what `MemAvailable` lost for each, after each was
/// released and has answered a call. Their TAPs are there before.
pub async fn measure(figures: &mut Figures) -> Result<()> {
    let nursery = Nursery::new(COUNTS[COUNTS.len() - 1]).await?;
    let before = available_kib()?;
    let mut live = Vec::new();
    for count in COUNTS {
        for slot in (live.len() as u32..count).progress() {
            interrupt::check()?;
            let microvm = nursery.started(slot).await?;
            let request = encode(&Request { operation: Operation::Identity, timeout_ms: 1000 });
            let reply = invoke(microvm.path(), &request, CALL_LIMIT).await?;
            let reply = decode::<warren_abi::probe::Reply>(&reply);
            ensure!(reply.is_ok_and(|reply| reply.outcome.is_ok()), "slot {slot} did not answer");
            live.push(microvm);
        }
        let taken = before.saturating_sub(available_kib()?);
        let each = taken as f64 / 1024.0 / f64::from(count);
        figures.number(&format!("mib_each_{count}"), each);
    }
    for microvm in live.into_iter().progress() {
        nursery.stop(microvm).await?;
    }
    Ok(())
}

fn available_kib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let value = line.and_then(|line| line.split_whitespace().next());
    Ok(value.context("no MemAvailable")?.parse()?)
}
