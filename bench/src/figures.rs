//! Measured figures: percentiles, the JSON file, tables and waterfalls.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// One measured quantity.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Figure {
    /// A count.
    Count(u64),
    /// A number.
    Number(f64),
    /// A distribution.
    Distribution {
        /// Median.
        p50: f64,
        /// 99th percentile.
        p99: f64,
        /// Number of samples.
        n: usize,
    },
    /// Numbers under names of their own.
    Values(BTreeMap<String, f64>),
}

/// The median of samples in any order, by the nearest-rank method; `None` without samples.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    percentile(&sorted, 50.0)
}

/// The percentile of sorted samples by the nearest-rank method; `None` without samples.
pub fn percentile(sorted: &[f64], percent: f64) -> Option<f64> {
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// Named figures of one run.
#[derive(Debug, Serialize)]
pub struct Figures {
    bench: String,
    #[serde(rename = "figures")]
    by_key: BTreeMap<String, Figure>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
    machine: BTreeMap<&'static str, String>,
}

impl Figures {
    /// No figures yet.
    pub fn new(bench: &str) -> Self {
        Self {
            bench: bench.to_owned(),
            by_key: BTreeMap::new(),
            notes: Vec::new(),
            machine: machine(),
        }
    }

    /// Adds a count.
    pub fn count(&mut self, key: &str, count: u64) {
        self.by_key.insert(key.to_owned(), Figure::Count(count));
    }

    /// Adds a number.
    pub fn number(&mut self, key: &str, value: f64) {
        self.by_key.insert(key.to_owned(), Figure::Number(value));
    }

    /// Adds a distribution; nothing if there are no samples.
    pub fn distribution(&mut self, key: &str, mut samples: Vec<f64>) {
        samples.sort_by(f64::total_cmp);
        let (Some(p50), Some(p99)) = (percentile(&samples, 50.0), percentile(&samples, 99.0))
        else {
            return;
        };
        let figure = Figure::Distribution { p50, p99, n: samples.len() };
        self.by_key.insert(key.to_owned(), figure);
    }

    /// Adds numbers under names of their own.
    pub fn values<K: Into<String>>(
        &mut self,
        key: &str,
        values: impl IntoIterator<Item = (K, f64)>,
    ) {
        let values = values.into_iter().map(|(name, value)| (name.into(), value)).collect();
        self.by_key.insert(key.to_owned(), Figure::Values(values));
    }

    /// Adds a sentence that the reader of the figures has to know.
    pub fn note(&mut self, sentence: impl Into<String>) {
        self.notes.push(sentence.into());
    }

    /// What [`Self::note`] has added.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// A figure by its key.
    pub fn get(&self, key: &str) -> Option<&Figure> {
        self.by_key.get(key)
    }

    /// A table of all figures.
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["", "p50", "p99", "n"]);
        for (key, figure) in &self.by_key {
            match figure {
                Figure::Count(count) => {
                    table.add_row([key.clone(), count.to_string(), String::new(), String::new()]);
                }
                Figure::Distribution { p50, p99, n } => {
                    table.add_row([key.clone(), number(*p50), number(*p99), n.to_string()]);
                }
                Figure::Number(value) => {
                    table.add_row([key.clone(), number(*value), String::new(), String::new()]);
                }
                Figure::Values(values) => {
                    for (name, value) in values {
                        let key = format!("{key} {name}");
                        table.add_row([key, number(*value), String::new(), String::new()]);
                    }
                }
            }
        }
        align(&mut table);
        table
    }

    /// Writes the JSON file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// A table of numbers: a name before each row.
pub fn grid<'a>(header: &[&str], rows: impl IntoIterator<Item = (&'a str, Vec<String>)>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([""].iter().chain(header));
    for (name, cells) in rows {
        table.add_row([name.to_owned()].into_iter().chain(cells));
    }
    align(&mut table);
    table
}

/// Numbers to the right.
fn align(table: &mut Table) {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

/// Small numbers with two decimals, others with none.
fn number(value: f64) -> String {
    if value < 10.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

/// What the figures depend on.
fn machine() -> BTreeMap<&'static str, String> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let after_colon = |text: String, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).map(str::to_owned);
        line.and_then(|line| Some(line.split_once(':')?.1.trim().to_owned())).unwrap_or_default()
    };
    let kernel_mode = if warren_vmm::can_run_linux() { "native" } else { "emulated" };
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    BTreeMap::from([
        ("cpu", after_colon(read("/proc/cpuinfo"), "model name")),
        ("cores", cores.to_string()),
        ("memory", after_colon(read("/proc/meminfo"), "MemTotal")),
        ("kernel", read("/proc/sys/kernel/osrelease").trim().to_owned()),
        ("guest_kernel_mode", kernel_mode.to_owned()),
    ])
}

/// A stage of something that took time.
#[derive(Clone, Debug)]
pub struct Stage {
    /// What happened.
    pub name: &'static str,
    /// Microseconds from the beginning to its start.
    pub start_us: f64,
    /// Microseconds from the beginning to its end.
    pub end_us: f64,
}

/// Draws stages as bars on one time axis.
pub fn waterfall(stages: &[Stage]) -> String {
    const WIDTH: f64 = 56.0;
    let total = stages.iter().map(|stage| stage.end_us).fold(1.0, f64::max);
    let mut text = String::new();
    for Stage { name, start_us, end_us } in stages {
        let from = (start_us / total * WIDTH).round() as usize;
        let to = ((end_us / total * WIDTH).round() as usize).max(from + 1);
        let bar = format!("{}{}", " ".repeat(from), "█".repeat(to - from));
        let width = WIDTH as usize + 1;
        let took = end_us - start_us;
        text += &format!("  {name:<22} {bar:<width$} {took:>6.0} µs\n");
    }
    text + &format!("  {:<22} {:>57} {total:>6.0} µs\n", "", "in all")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let samples: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&samples, 50.0), Some(50.0));
        assert_eq!(percentile(&samples, 99.0), Some(99.0));
        assert_eq!(percentile(&samples[..1], 99.0), Some(1.0));
        assert_eq!(percentile(&[], 50.0), None);
    }

    #[test]
    fn a_waterfall_has_a_line_for_each_stage() {
        let stage = |name, start_us, end_us| Stage { name, start_us, end_us };
        let text = waterfall(&[stage("a", 0.0, 10.0), stage("b", 10.0, 40.0)]);
        assert_eq!(text.lines().count(), 3);
        let bars: Vec<_> = text.lines().map(|line| line.matches('█').count()).collect();
        assert_eq!(bars, [14, 42, 0]);
    }
}
