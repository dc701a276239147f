//! `warren-compile`: compiles the component on its standard input, behind walls.

use std::io;
use std::time::Duration;

use clap::Parser;
use warren_function::jailed::Limits;
use warren_function::{compile, jail};

/// Compiles the WebAssembly component on its standard input ahead of time. warren's code manager
/// starts it: what it answers is for programs.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Address space that it may use, in bytes
    #[arg(long)]
    memory_bytes: u64,
    /// Time of processors that it may use, in seconds
    #[arg(long)]
    cpu_seconds: u64,
}

fn main() -> anyhow::Result<()> {
    let Arguments { memory_bytes, cpu_seconds } = Arguments::parse();
    let cpu_time = Duration::from_secs(cpu_seconds);
    jail::enter(Limits { memory_bytes, cpu_time })?.close()?;
    Ok(compile::answer(io::stdin().lock(), io::stdout().lock())?)
}
