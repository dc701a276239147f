//! `datapath`: what a guest gets through Warren, and through what people use otherwise, by turns.

mod batch;
mod load;
mod microvm;
mod path;
mod pump;

use anyhow::Result;
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use warren_bench::figures::{Figures, grid, median};
use warren_bench::interrupt;
use warren_netns::rundir::RunDir;

use load::{METRICS, Servers};
use path::{Kind, Path};

/// Rounds, unless more or fewer are asked for.
pub const ROUNDS: u32 = 7;

/// One sample of each metric.
type Sample<const N: usize> = [f64; N];

/// Measures all paths; also returns the table to show.
pub fn run(rounds: u32) -> Result<(Figures, Table)> {
    interrupt::catch()?;
    let run = RunDir::new()?;
    let mut paths = Vec::new();
    for kind in Kind::ALL {
        interrupt::check()?;
        paths.push(Path::open(kind, &run)?);
    }
    let mut servers = Vec::new();
    for path in &paths {
        interrupt::check()?;
        load::check(path)?;
        servers.push(Servers::start(path.vpc())?);
    }
    let mut samples = vec![Vec::new(); paths.len()];
    let bar = progress(u64::from(rounds) * paths.len() as u64);
    for round in 0..rounds as usize {
        for turn in 0..paths.len() {
            interrupt::check()?;
            let index = (round + turn) % paths.len();
            bar.set_message(paths[index].kind.key());
            paths[index].sweep()?;
            samples[index].push(load::measure(&paths[index], &servers[index])?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let mut figures = Figures::new("datapath");
    figures.count("rounds", u64::from(rounds));
    let table = report(&mut figures, &samples);
    microvm::measure(&mut paths, &run, rounds, &mut figures)?;
    Ok((figures, table))
}

/// Medians of each path, and of Warren's ratios to each other path, round by round.
fn report(figures: &mut Figures, samples: &[Vec<Sample<{ METRICS.len() }>>]) -> Table {
    let mut columns = Vec::new();
    for (kind, samples) in Kind::ALL.iter().zip(samples) {
        columns.push((kind.key().to_owned(), medians(samples)));
    }
    for (kind, others) in Kind::ALL.iter().zip(samples).skip(1) {
        let name = format!("{}_vs_{}", Kind::Warren.key(), kind.key());
        columns.push((name, medians(&ratios(&samples[0], others))));
    }
    let rounds = samples[0].len() as f64;
    for (name, medians) in &columns {
        let named = METRICS.into_iter().zip(medians.iter().copied());
        figures.values(name, named.chain([("rounds", rounds)]));
    }
    let header: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
    let cell = |value: f64| {
        if value < 100.0 { format!("{value:.2}") } else { format!("{value:.0}") }
    };
    let row = |metric: usize| columns.iter().map(|(_, medians)| cell(medians[metric])).collect();
    grid(&header, METRICS.into_iter().enumerate().map(|(metric, name)| (name, row(metric))))
}

/// The median of each metric.
fn medians<const N: usize>(samples: &[Sample<N>]) -> Sample<N> {
    std::array::from_fn(|metric| {
        let values: Vec<f64> = samples.iter().map(|sample| sample[metric]).collect();
        median(&values).unwrap_or(f64::NAN)
    })
}

/// Round by round, each metric as a part of the other's.
fn ratios<const N: usize>(ours: &[Sample<N>], others: &[Sample<N>]) -> Vec<Sample<N>> {
    let ratio = |(ours, others): (&Sample<N>, &Sample<N>)| {
        std::array::from_fn(|metric| ours[metric] / others[metric])
    };
    ours.iter().zip(others).map(ratio).collect()
}

fn progress(length: u64) -> ProgressBar {
    let template = "{wide_bar} {pos}/{len} {msg}";
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    ProgressBar::new(length).with_style(style)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_rounds_not_of_medians() {
        // The machine was ten times as slow in the second round.
        let (ours, others) = ([[20.0], [2.0], [30.0]], [[10.0], [1.0], [10.0]]);
        let [ratio] = medians(&ratios(&ours, &others));
        assert!((ratio - 2.0).abs() < 1e-9, "{ratio}");
    }
}
