//! warren-control: the control plane's process.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use warren_control::Control;
use warren_control::config::Config;
use warren_control::functions::publish::Publisher;
use warren_control::store::SqliteStore;
use warren_proto::endpoint::Endpoint;
use warren_proto::server::Listeners;

/// The control plane of Warren. Flags come before the configuration file.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to listen; may be repeated.
    #[arg(long, value_name = "unix:PATH|http://ADDRESS:PORT")]
    listen: Vec<Endpoint>,
    /// File of the state.
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// A host or proxy is dead when its heartbeat is this late.
    #[arg(long, value_name = "MILLISECONDS")]
    heartbeat_deadline_ms: Option<u64>,
}

impl Arguments {
    fn config(self) -> anyhow::Result<Config> {
        let mut config = match &self.config {
            Some(path) => Config::read(path)?,
            None => Config::default(),
        };
        if !self.listen.is_empty() {
            config.listen = self.listen;
        }
        config.state = self.state.unwrap_or(config.state);
        config.heartbeat_deadline_ms =
            self.heartbeat_deadline_ms.unwrap_or(config.heartbeat_deadline_ms);
        config.check().with_context(|| match self.config {
            Some(path) => format!("the configuration (flags and {}) is wrong", path.display()),
            None => "the configuration (flags) is wrong".to_owned(),
        })?;
        Ok(config)
    }
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
    let config = arguments.config()?;
    let store = Arc::new(SqliteStore::open(&config.state).await?);
    let publisher = Publisher::open(&config.functions, &config.state, store.clone())?;
    let control = Control::start(store, publisher, config.heartbeat_deadline()).await?;
    if let Some(proxies) = config.proxies {
        control.scale(proxies);
    }
    let listeners = Listeners::bind(&config.listen).await?;
    for endpoint in listeners.endpoints() {
        tracing::info!(%endpoint, "listening");
    }
    // Does nothing where systemd did not start it.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let mut terminate = signal(SignalKind::terminate())?;
    let stopped = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        tracing::info!("stopping");
        control.stop();
    };
    listeners.serve(control.services(), stopped).await?;
    Ok(())
}
