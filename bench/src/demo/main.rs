//! `cargo xtask demo`: from nothing to cloned microVMs that talk to databases in their tenants'
//! VPCs, on one machine, and nothing left of it afterwards.

mod isolation;
mod scene;
mod starts;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use warren_bench::figures::{Figure, Figures, waterfall};
use warren_netns::fleet::kvm_missing;

use crate::scene::Scene;

/// Clones microVMs into two tenants' VPCs with the same CIDR, and shows what it took
#[derive(Parser)]
#[command(name = "warren-demo")]
struct Arguments {
    /// How many microVMs to clone, over both tenants
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=1000))]
    clones: u32,
    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Says what was done.
pub fn step(text: &str) {
    eprintln!("  ✓ {text}");
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    if let Some(missing) = missing() {
        bail!("cannot run here: {missing}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        // Caught from here on: a signal that comes while something blocks is heard after it.
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        // Dropping the demo ends and removes everything it made.
        tokio::select! {
            biased;
            _ = interrupt.recv() => bail!("interrupted; everything was removed again"),
            _ = terminate.recv() => bail!("terminated; everything was removed again"),
            result = demo(arguments) => result,
        }
    })
}

/// What this machine lacks, and what to do about it.
fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("it makes network namespaces and loads eBPF programs: run it as root".into());
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (6, 6) {
        return Some(format!(
            "kernel {} has no tcx (BPF_LINK_TYPE_TCX): boot Linux 6.6 or newer",
            release.trim()
        ));
    }
    kvm_missing()
}

async fn demo(arguments: &Arguments) -> Result<()> {
    let mut figures = Figures::new("demo");
    let scene = Scene::set(arguments.clones).await?;
    let starts = starts::run(&scene, arguments.clones, &mut figures).await?;
    isolation::check(&scene, &starts, &mut figures).await?;
    let left = scene.clear()?;
    step(&format!("everything ended; left over: {}", left.len()));
    for line in &left {
        eprintln!("    {line}");
    }
    figures.count("leftovers", left.len() as u64);

    let median = starts.median();
    println!("\nOne start, the median of {} (instance {}):\n", starts.len(), median.id);
    println!("{}", waterfall(&median.stages()));
    println!("The slowest one:\n\n{}", waterfall(&starts.slowest().stages()));
    println!("Times in microseconds, counts as they are:\n\n{}", figures.table());
    if let Some(path) = &arguments.json {
        figures.write(path)?;
    }
    verdict(&figures)
}

/// Fails if a count that must be 0 is not, or a tenant was seen at several addresses.
fn verdict(figures: &Figures) -> Result<()> {
    for key in ["isolation_violations", "duplicate_identities", "leftovers"] {
        match figures.get(key) {
            Some(Figure::Count(0)) => {}
            other => bail!("{key} must be 0 and is {other:?}"),
        }
    }
    match figures.get("client_addresses_seen") {
        Some(Figure::Count(2)) => Ok(()),
        other => bail!("client_addresses_seen must be 2, one a tenant, and is {other:?}"),
    }
}
