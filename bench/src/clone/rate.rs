//! How many starts a second go on for half a minute, stop and tear-down included.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::ProgressBar;
use tokio::task::JoinSet;
use warren_bench::figures::Figures;
use warren_bench::interrupt;
use warren_vmm::client::MicroVm;
use warren_vmm::control::Tier;

use super::nursery::{Nursery, identity};

/// How long.
const LASTS: Duration = Duration::from_secs(30);
/// MicroVMs at a time: as many starts, stops and refills are under way.
const LANES: u32 = 8;

/// Adds `starts_per_s`: of a fresh microVM each, and of one recycled in place.
pub async fn measure(figures: &mut Figures) -> Result<()> {
    let nursery = Arc::new(Nursery::new(LANES).await?);
    let fresh = lanes(&nursery, fresh).await?;
    let recycled = lanes(&nursery, recycled).await?;
    figures.values("starts_per_s", [("fresh", fresh), ("recycled", recycled)]);
    Ok(())
}

/// Starts a second in all lanes, each of which has a parked microVM when it begins and when it ends.
async fn lanes<F>(
    nursery: &Arc<Nursery>,
    once: impl Fn(Arc<Nursery>, u32, MicroVm) -> F,
) -> Result<f64>
where
    F: Future<Output = Result<(MicroVm, u64)>> + Send + 'static,
{
    let mut parked = Vec::new();
    for slot in 0..LANES {
        parked.push(nursery.prepared(slot, Tier::Parked).await?);
    }
    let progress = ProgressBar::new(LASTS.as_secs());
    let began = Instant::now();
    let mut lanes = JoinSet::new();
    for (slot, microvm) in (0..LANES).zip(parked) {
        lanes.spawn(once(nursery.clone(), slot, microvm));
    }
    let mut starts = 0;
    let mut ended = Vec::new();
    while let Some(lane) = lanes.join_next().await {
        let (microvm, count) = lane??;
        starts += count;
        ended.push(microvm);
    }
    let took = began.elapsed();
    progress.finish_and_clear();
    for microvm in ended {
        nursery.stop(microvm).await?;
    }
    interrupt::check()?;
    Ok(starts as f64 / took.as_secs_f64())
}

/// Release, stop, and another one in its place, parked.
async fn fresh(nursery: Arc<Nursery>, slot: u32, mut microvm: MicroVm) -> Result<(MicroVm, u64)> {
    let began = Instant::now();
    let mut starts = 0;
    while began.elapsed() < LASTS {
        microvm.release(&identity(slot)).await?;
        starts += 1;
        nursery.stop(microvm).await?;
        microvm = nursery.prepared(slot, Tier::Parked).await?;
    }
    Ok((microvm, starts))
}

/// Release, and back to the image, parked.
async fn recycled(
    _nursery: Arc<Nursery>,
    slot: u32,
    mut microvm: MicroVm,
) -> Result<(MicroVm, u64)> {
    let began = Instant::now();
    let mut starts = 0;
    while began.elapsed() < LASTS {
        microvm.release(&identity(slot)).await?;
        starts += 1;
        microvm.recycle().await?;
    }
    Ok((microvm, starts))
}
