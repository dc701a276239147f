//! warren-relay: the relay's process.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use warren_gateway::metrics::{self, RelayCounts};
use warren_gateway::relay;

/// The relay of Warren: leads gateways to the instances of this host.
///
/// SIGTERM makes it stop listening; it ends with its last connection, or at a second SIGTERM.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Where to listen, unless systemd passes a socket.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7703")]
    listen: SocketAddr,
    /// warrend's run directory.
    #[arg(long, value_name = "DIRECTORY", default_value = "/run/warren")]
    run_dir: PathBuf,
    /// Where `GET /metrics` is answered; without it, nowhere.
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(&Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let listener = match passed_socket()? {
        Some(listener) => listener,
        None => relay::listen(arguments.listen)
            .with_context(|| format!("cannot listen at {}: set --listen", arguments.listen))?,
    };
    tracing::info!(address = %listener.local_addr()?, "listening");
    let counts = RelayCounts::default();
    if let Some(address) = arguments.metrics {
        metrics::serve(address, counts.registry()).await?;
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut again = signal(SignalKind::terminate())?;
    // Does nothing where systemd did not start it.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let stop = async {
        tokio::select! { _ = terminate.recv() => {}, _ = tokio::signal::ctrl_c() => {} }
    };
    let second = async {
        again.recv().await;
        again.recv().await;
    };
    tokio::select! {
        () = relay::serve(listener, &arguments.run_dir, counts, stop) => {}
        () = second => tracing::warn!("told to stop twice: connections are cut"),
    }
    Ok(())
}

/// The socket of a systemd socket unit.
fn passed_socket() -> anyhow::Result<Option<TcpListener>> {
    let Some(fd) = sd_notify::listen_fds().context("systemd's sockets")?.next() else {
        return Ok(None);
    };
    // SAFETY: systemd opened this descriptor for this process, and nothing else here takes it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let listener = std::net::TcpListener::from(fd);
    listener.set_nonblocking(true).context("the socket that systemd passed is none of TCP")?;
    Ok(Some(TcpListener::from_std(listener)?))
}
