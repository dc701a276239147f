//! `clone`: from a request for a microVM to its guest's acknowledged identity, from each tier, alone
//! and fifty at a time; sustained rates; and what four thousand of them take.

mod density;
mod hyperlight;
mod nursery;
mod peers;
mod rate;
mod stages;

use anyhow::{Result, bail};
use warren_bench::figures::Figures;
use warren_netns::fleet::kvm_missing;

/// Samples of each tier, one at a time.
pub const ROUNDS: u32 = 1000;

/// Measures everything.
pub async fn run(rounds: u32) -> Result<Figures> {
    if let Some(missing) = kvm_missing() {
        bail!("microVMs cannot be measured here: {missing}");
    }
    let mut figures = Figures::new("clone");
    stages::measure(rounds, &mut figures).await?;
    peers::measure(rounds, &mut figures).await?;
    rate::measure(&mut figures).await?;
    density::measure(&mut figures).await?;
    Ok(figures)
}
