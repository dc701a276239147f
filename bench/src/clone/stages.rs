//! How long a start takes from each tier.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::ProgressIterator;
use nix::time::{ClockId, clock_gettime};
use tokio::task::JoinSet;
use warren_bench::figures::Figures;
use warren_bench::interrupt;
use warren_vmm::control::{Tier, Timeline};

use super::nursery::{Nursery, identity};

/// Starts at the same time.
const IN_FLIGHT: u32 = 50;
/// How long the machine rests between two measurements of one, so that what ended does not take the
/// next one's time.
const REST: Duration = Duration::from_millis(3);

/// Where starts begin; `None`: nothing is there but the zygote.
const TIERS: [(&str, Option<Tier>); 4] = [
    ("parked", Some(Tier::Parked)),
    ("loaded", Some(Tier::Loaded)),
    ("shell", Some(Tier::Shell)),
    ("cold", None),
];

/// Adds `parked_us`, `loaded_us`, `shell_us` and `cold_us`, the same with `_50`, and a cold start's
/// stages.
pub async fn measure(rounds: u32, figures: &mut Figures) -> Result<()> {
    let nursery = Arc::new(Nursery::new(IN_FLIGHT + 1).await?);
    // A host has others: KVM changes the kernel's code when its first machine comes and its last goes.
    let other = nursery.prepared(IN_FLIGHT, Tier::Parked).await?;
    let mut alone = [const { Vec::new() }; TIERS.len()];
    let mut stages = Samples::new();
    for round in (0..rounds).progress() {
        interrupt::check()?;
        for turn in 0..TIERS.len() {
            let index = (round as usize + turn) % TIERS.len();
            let tier = TIERS[index].1;
            let Start { began_ns, ended_ns, timeline } = once(&nursery, tier).await?;
            alone[index].push((ended_ns - began_ns) as f64 / 1000.0);
            match tier {
                None => note(&mut stages, "cold", timeline.stages()),
                Some(Tier::Parked) => {
                    let Timeline { received_ns, released_ns, ready_ns, .. } = timeline;
                    let parts = [
                        ("request", received_ns - began_ns),
                        ("identity", released_ns - received_ns),
                        ("guest", ready_ns - released_ns),
                        ("reply", ended_ns - ready_ns),
                    ];
                    note(&mut stages, "parked", parts.into_iter());
                }
                Some(_) => {}
            }
        }
    }
    for ((name, _), samples) in TIERS.into_iter().zip(alone) {
        figures.distribution(&format!("{name}_us"), samples);
    }
    for (name, samples) in stages {
        figures.distribution(&name, samples);
    }
    let mut together = [const { Vec::new() }; TIERS.len()];
    for round in (0..rounds.div_ceil(IN_FLIGHT)).progress() {
        interrupt::check()?;
        for turn in 0..TIERS.len() {
            let index = (round as usize + turn) % TIERS.len();
            together[index].extend(at_once(&nursery, TIERS[index].1).await?);
        }
    }
    for ((name, _), samples) in TIERS.into_iter().zip(together) {
        figures.distribution(&format!("{name}_us_{IN_FLIGHT}"), samples);
    }
    nursery.stop(other).await
}

/// A start, in nanoseconds on `CLOCK_MONOTONIC`.
struct Start {
    began_ns: u64,
    ended_ns: u64,
    timeline: Timeline,
}

fn monotonic_ns() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

/// One start, from the request for it to the acknowledged identity.
async fn once(nursery: &Nursery, tier: Option<Tier>) -> Result<Start> {
    let request = identity(0);
    let waiting = match tier {
        Some(tier) => Some(nursery.prepared(0, tier).await?),
        None => None,
    };
    tokio::time::sleep(REST).await;
    let began_ns = monotonic_ns()?;
    let mut microvm = match waiting {
        Some(microvm) => microvm,
        None => nursery.fork(0, Tier::Shell).await?,
    };
    let timeline = microvm.release(&request).await?;
    let ended_ns = monotonic_ns()?;
    nursery.stop(microvm).await?;
    Ok(Start { began_ns, ended_ns, timeline })
}

/// Many starts that are asked for together.
async fn at_once(nursery: &Arc<Nursery>, tier: Option<Tier>) -> Result<Vec<f64>> {
    let mut waiting = Vec::new();
    for slot in 0..IN_FLIGHT {
        waiting.push(match tier {
            Some(tier) => Some(nursery.prepared(slot, tier).await?),
            None => None,
        });
    }
    tokio::time::sleep(REST).await;
    let began = Instant::now();
    let mut starts = JoinSet::new();
    for (slot, microvm) in (0..IN_FLIGHT).zip(waiting) {
        let nursery = nursery.clone();
        starts.spawn(async move {
            let mut microvm = match microvm {
                Some(microvm) => microvm,
                None => nursery.fork(slot, Tier::Shell).await?,
            };
            microvm.release(&identity(slot)).await?;
            anyhow::Ok((us(began.elapsed()), microvm))
        });
    }
    let mut samples = Vec::new();
    for done in starts.join_all().await {
        let (took, microvm) = done?;
        samples.push(took);
        nursery.stop(microvm).await?;
    }
    Ok(samples)
}

/// Samples of several quantities, by name.
type Samples = Vec<(String, Vec<f64>)>;

/// Adds stages, in nanoseconds, to the samples of each.
fn note(samples: &mut Samples, of: &str, stages: impl Iterator<Item = (&'static str, u64)>) {
    for (stage, ns) in stages {
        let (name, us) = (format!("{of}_{stage}_us"), ns as f64 / 1000.0);
        match samples.iter_mut().find(|(known, _)| *known == name) {
            Some((_, samples)) => samples.push(us),
            None => samples.push((name, vec![us])),
        }
    }
}

/// In microseconds.
pub fn us(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}
