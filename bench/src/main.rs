//! `warren-bench`: the benchmarks behind `cargo xtask bench`.

mod attach;
mod start;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures one thing, its peers side by side in the same run
#[derive(Parser)]
#[command(name = "warren-bench", arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
    /// Also write the figures to this file
    #[arg(long, value_name = "FILE", global = true)]
    json: Option<PathBuf>,
    /// Samples of each figure
    #[arg(long, default_value_t = 200, global = true, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

#[derive(Subcommand)]
enum Bench {
    /// Connecting a slot to a VPC: the map write, and until its first packet is at the proxy
    Attach,
    /// From a request at the agent to an acknowledged identity: parked clones against cold ones
    Start,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let figures = match arguments.bench {
        Bench::Attach => attach::run(arguments.rounds)?,
        Bench::Start => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            runtime.block_on(start::run(arguments.rounds))?
        }
    };
    println!("Times in microseconds:\n\n{}", figures.table());
    match arguments.json {
        Some(path) => figures.write(&path),
        None => Ok(()),
    }
}
