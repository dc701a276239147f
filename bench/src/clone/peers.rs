//! What Warren's clones compare with: a process for each microVM that restores it whole from the file,
//! and Hyperlight, by turns.

use std::time::Instant;

use anyhow::Result;
use indicatif::ProgressIterator;
use warren_bench::figures::Figures;
use warren_bench::interrupt;

use super::hyperlight::Hyperlight;
use super::nursery::Nursery;
use super::stages::us;

/// Adds `full_restore_us`: a program is started, which reads and verifies the template's file, fills
/// memory with it and runs a microVM, until that one's guest acknowledged its identity. And what
/// [`Hyperlight::report`] adds, or a sentence where Hyperlight does not run.
pub async fn measure(rounds: u32, figures: &mut Figures) -> Result<()> {
    let mut nursery = Nursery::new(1).await?;
    let mut samples = Vec::new();
    let mut hyperlight = Hyperlight::new();
    for _ in (0..rounds.div_ceil(10)).progress() {
        interrupt::check()?;
        let began = Instant::now();
        nursery.restart().await?;
        let microvm = nursery.started(0).await?;
        samples.push(us(began.elapsed()));
        nursery.stop(microvm).await?;
        if let Ok(peer) = &mut hyperlight
            && let Err(error) = peer.round().await
        {
            hyperlight = Err(error);
        }
    }
    figures.distribution("full_restore_us", samples);
    match hyperlight {
        Ok(peer) => peer.report(figures),
        Err(error) => figures.note(format!("Hyperlight is not measured: {error:#}.")),
    }
    Ok(())
}
