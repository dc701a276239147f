//! `cargo xtask`: everything a developer runs.

mod archive;
mod build;
mod command;
mod examples;
mod fuzz;
mod kernels;
mod lab;
mod leftovers;
mod linux;
mod run;
mod setup;
mod suite;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Sets up, builds, shows, tests and measures Warren")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing, or list the commands that would
    Setup,
    /// Build the eBPF programs, the guests' programs and all binaries into target/release
    Build {
        /// Have the eBPF programs log each verdict (`WARREN_LOG=debug` shows them): slow, for debugging
        #[arg(long)]
        log_verdicts: bool,
    },
    /// Set up, build, and clone microVMs into two tenants' VPCs on this machine
    Demo {
        /// Also write the figures to this file
        #[arg(long, value_name = "FILE", conflicts_with = "lab")]
        json: Option<PathBuf>,
        /// In a machine that qemu emulates, where there is no /dev/kvm
        #[arg(long)]
        lab: bool,
    },
    /// Set up, build, and run every test
    Test {
        /// Only tests whose name contains this
        filter: Option<String>,
    },
    /// Set up, build, and have proxies and daemons fail at random under traffic
    Chaos {
        /// What fails when: the same seed, the same schedule; without one, another each time
        #[arg(long)]
        seed: Option<u64>,
        /// How long
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=1440))]
        minutes: u64,
    },
    /// Look for bytes that make a parser fail, until one is found or the time is over
    Fuzz {
        /// Which parser; without one they are listed
        target: Option<String>,
        /// How long
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// Set up, build, and run tests inside emulated machines: ordinary KVM, Debian's kernels
    Lab {
        /// Which check, whole; without one, all in their short form
        name: Option<String>,
        /// Under which kernel only
        #[arg(long, value_name = "VERSION")]
        kernel: Option<String>,
        /// All checks, whole
        #[arg(long, conflicts_with = "name")]
        all: bool,
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Set up, build, and make kernels, initrds and a test function's image for Linux guests
    Linux,
    /// Set up, and build the examples into target/examples: functions in four languages
    Examples {
        /// Which; without one, all
        names: Vec<examples::Example>,
    },
    /// Check formatting and lints
    Lint,
    /// Set up, build, and run a benchmark
    Bench {
        /// Which; without one they are listed
        name: Option<String>,
        /// Also write the figures to this file
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}

/// For whom results are printed.
#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    #[default]
    Text,
    Json,
}

fn main() -> ExitCode {
    match perform(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        // Without the stack of this program, which says nothing of what failed.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<()> {
    match task {
        Task::Setup => setup::all(),
        Task::Build { log_verdicts } => build::all(log_verdicts),
        Task::Demo { json, lab } => run::demo(json, lab),
        Task::Test { filter } => run::test(filter.as_deref()),
        Task::Chaos { seed, minutes } => run::chaos(seed, minutes),
        Task::Fuzz { target, seconds } => fuzz::run(target, seconds),
        Task::Lab { name, kernel, all, output } => {
            run::lab(&lab::Selection { check: name, kernel, all, json: output == Output::Json })
        }
        Task::Linux => run::linux(),
        Task::Examples { names } => run::examples(&names),
        Task::Lint => run::lint(),
        Task::Bench { name, json } => run::bench(name, json),
    }
}
