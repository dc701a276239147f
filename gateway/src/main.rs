//! warren-gateway: the data flow's process.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use warren_gateway::Gateway;
use warren_gateway::config::Config;
use warren_proto::endpoint::Endpoint;

/// The gateway of Warren: functions' calls over HTTP. Flags come before the configuration file.
#[derive(Parser)]
#[command(name = "warren-gateway", version)]
struct Arguments {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where calls come in; may be repeated.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Vec<SocketAddr>,
    /// The control plane.
    #[arg(long, value_name = "unix:PATH|http://ADDRESS:PORT")]
    control: Option<Endpoint>,
    /// Directory of its state.
    #[arg(long, value_name = "DIRECTORY")]
    state: Option<PathBuf>,
    /// Where `GET /metrics` is answered.
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let mut config = match &arguments.config {
        Some(path) => Config::read(path)?,
        None => Config::default(),
    };
    if !arguments.listen.is_empty() {
        config.listen = arguments.listen;
    }
    config.control = arguments.control.unwrap_or(config.control);
    config.state = arguments.state.unwrap_or(config.state);
    config.metrics = arguments.metrics.or(config.metrics);

    let gateway = Gateway::start(&config).await?;
    for address in gateway.addresses()? {
        tracing::info!(%address, "listening");
    }
    // Does nothing where systemd did not start it.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = async {
        tokio::select! { _ = terminate.recv() => {}, _ = tokio::signal::ctrl_c() => {} }
        tracing::info!("stopping: calls that run have {} ms to end", config.drain_ms);
    };
    gateway.serve(stop).await;
    Ok(())
}
