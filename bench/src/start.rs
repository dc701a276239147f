//! `start`: parked clones against cold ones, alternated on two fleets.

use anyhow::{Context, Result};
use indicatif::ProgressIterator;
use warren_bench::figures::Figures;
use warren_netns::fleet::{Fleet, FleetOptions, GUEST, VPCS};
use warren_proto::v1::StartTimings;

/// Parked microVMs of the pool: refilled between rounds, so one is always there.
const PARKED: u32 = 4;

pub async fn run(rounds: u32) -> Result<Figures> {
    let pooled = Fleet::start(FleetOptions { slots: 8, parked: PARKED, guest: GUEST }).await?;
    let cold = Fleet::start(FleetOptions { slots: 8, parked: 0, guest: GUEST }).await?;
    let (mut from_pool, mut from_template) = (Vec::new(), Vec::new());
    for _ in (0..rounds).progress() {
        pooled.wait_parked(PARKED).await?;
        from_pool.push(once(&pooled).await?);
        from_template.push(once(&cold).await?);
    }
    let us = |samples: &[StartTimings], f: fn(&StartTimings) -> u64| {
        samples.iter().map(|timings| f(timings) as f64 / 1000.0).collect::<Vec<_>>()
    };
    let mut figures = Figures::new("start");
    figures.count("cold_starts_of_the_pool", from_pool.iter().filter(|t| t.cold).count() as u64);
    figures.distribution("parked_clone_ready_us", us(&from_pool, |t| t.ready_ns));
    figures.distribution("cold_clone_ready_us", us(&from_template, |t| t.ready_ns));
    figures
        .distribution("parked_release_to_ready_us", us(&from_pool, |t| t.ready_ns - t.released_ns));
    figures.distribution("attach_us", us(&from_pool, |t| t.attach_end_ns - t.attach_start_ns));
    Ok(figures)
}

async fn once(fleet: &Fleet) -> Result<StartTimings> {
    let (response, _) = fleet.run(VPCS[0], None).await?;
    fleet.stop(&response.instance.context("no instance in the response")?.id).await?;
    response.timings.context("no timings in the response")
}
