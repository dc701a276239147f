//! `warren-bench`: the benchmarks behind `cargo xtask bench`.

mod attach;
mod clone;
mod cold_start;
mod datapath;
mod failover;
mod options;
mod packet;
mod restart;
mod scale;
mod sequence;
mod start;
mod tap;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use warren_bench::figures::Figures;

/// Measures one thing, its peers side by side in the same run
#[derive(Parser)]
#[command(name = "warren-bench", arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
    /// Also write the figures to this file
    #[arg(long, value_name = "FILE", global = true)]
    json: Option<PathBuf>,
    /// Samples of each figure; each benchmark has a number of its own
    #[arg(long, global = true, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
}

#[derive(Subcommand)]
enum Bench {
    /// 4,000 slots: making them, connecting one to a VPC, and until its first packet is at the proxy
    Attach,
    /// Starts of microVMs from each tier, sustained rates, and the memory of thousands
    Clone,
    /// Calls of functions through the gateway: cold, parked and warm, alone and 50 at once
    ColdStart,
    /// Kills and upgrades of the daemons under traffic: what is lost
    Restart,
    /// 10,000 hosts and 1,000 VPCs: memory of maps, time to make them known, and one change
    Scale,
    /// From a request at the agent to an acknowledged identity: parked clones against cold ones
    Start,
    /// Each program's nanoseconds per packet, over 1 to 1,000,000 live flows
    Packet,
    /// Proxy nodes that die, are drained and join under traffic, beside a pair of gateways of the kernel's
    Failover,
    /// Throughput and latency through Warren, routing, SNAT by nftables, and the kernel's VXLAN
    Datapath,
}

/// Samples of figures that one start or one attachment yields.
const ROUNDS: u32 = 200;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let log = tracing_subscriber::fmt().with_max_level(tracing::Level::ERROR);
    log.with_writer(std::io::stderr).init();
    let rounds = |default| arguments.rounds.unwrap_or(default);
    let (figures, table) = match arguments.bench {
        Bench::Attach => times(attach::run(rounds(ROUNDS))?),
        Bench::Clone => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            // A task, as a start in the agent is: the thread that waits for sockets runs it as well.
            let task = runtime.spawn(clone::run(rounds(clone::ROUNDS)));
            times(runtime.block_on(task)??)
        }
        Bench::ColdStart => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            times(runtime.block_on(cold_start::run(rounds(cold_start::ROUNDS)))?)
        }
        Bench::Restart => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            times(runtime.block_on(restart::run())?)
        }
        Bench::Start => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            times(runtime.block_on(start::run(rounds(ROUNDS)))?)
        }
        Bench::Scale => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            times(runtime.block_on(scale::run(rounds(scale::ROUNDS)))?)
        }
        Bench::Packet => {
            let (figures, table) = packet::run(rounds(packet::ROUNDS))?;
            (figures, format!("Nanoseconds per packet:\n\n{table}"))
        }
        Bench::Failover => times(failover::run(rounds(failover::ROUNDS))?),
        Bench::Datapath => {
            let (figures, table) = datapath::run(rounds(datapath::ROUNDS))?;
            (figures, format!("Medians, and of Warren's ratios to the others:\n\n{table}"))
        }
    };
    println!("{table}");
    for note in figures.notes() {
        println!("\n{note}");
    }
    match arguments.json {
        Some(path) => figures.write(&path),
        None => Ok(()),
    }
}

fn times(figures: Figures) -> (Figures, String) {
    let table = figures.table();
    (figures, format!("Counts, and microseconds, but for names in _s, _ms and _tps:\n\n{table}"))
}
