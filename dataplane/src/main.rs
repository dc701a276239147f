//! `warrend`: wires the configuration, the data path, the agent and the heartbeat together.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;
use warren_dataplane::agent::Agent;
use warren_dataplane::boot::BootId;
use warren_dataplane::config::{self, Config, LogFormat};
use warren_dataplane::datapath::{
    DEFAULT_FLOWS, FlowLogLevel, FlowLogOptions, HostDatapath, HostOptions, ProxyDatapath,
    ProxyOptions,
};
use warren_dataplane::eni::{EniProvider, Exec, Linux};
use warren_dataplane::fragments::Fragments;
use warren_dataplane::host::{FunctionOptions, Host, HostOptions as RoleOptions, TemplateOptions};
use warren_dataplane::logs::LogServer;
use warren_dataplane::metrics::http::Exporter;
use warren_dataplane::proxy::Proxy;
use warren_dataplane::refill::Policy;
use warren_dataplane::services::Services as LinkLocal;
use warren_dataplane::{boot, flowlog, heartbeat};
use warren_function::cache::Cache;
use warren_proto::server::{Listeners, Services};
use warren_proto::v1::agent_service_server::AgentServiceServer;
use warren_proto::v1::log_service_server::LogServiceServer;
use warren_proto::v1::{HeartbeatRequest, HeartbeatResponse};
use warren_vmm::jail::{self, JailConfig};
use warren_vmm::snapshot::Sources;

/// The largest gRPC message: 10,000 routes take up to 1 MB, an invocation 1 MiB.
const MESSAGE_MAX: usize = 4 << 20;
/// TAPs are wrn1, wrn2 and so on, the tunnel device is wrn-vxlan.
const INTERFACE_PREFIX: &str = "wrn";
/// Ended flows give their ports back within this time.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The daemon of Warren's hosts and proxy nodes
#[derive(Parser)]
#[command(name = "warrend", version)]
struct Arguments {
    /// What this machine is
    #[arg(long)]
    role: Role,
    /// Configuration file
    #[arg(long, value_name = "FILE", default_value = "/etc/warren/warrend.toml")]
    config: PathBuf,
    /// Remove programs, pins, TAPs and the tunnel device, and exit
    #[arg(long)]
    uninstall: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Role {
    Host,
    Proxy,
}

fn main() -> ExitCode {
    match start(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Every error here holds its cause in its own text.
            eprintln!("warrend: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Arguments) -> Result<()> {
    let config = Config::load(&arguments.config)?;
    log(config.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run(arguments, config))
}

/// Writes the log to standard error from now on.
fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_env("WARREN_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,hickory_proto=error"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().with_span_events(FmtSpan::CLOSE).init(),
    }
}

async fn run(arguments: &Arguments, config: Config) -> Result<()> {
    std::fs::create_dir_all(&config.run_dir)
        .map_err(|error| anyhow!("cannot make run_dir {}: {error}", config.run_dir.display()))?;
    let boot = BootId::current()?;
    for path in boot::settle(&config.run_dir, &boot)? {
        tracing::info!("removed {}: it is of another boot of this machine", path.display());
    }
    let agent = match arguments.role {
        Role::Host => host(arguments, &config, boot).await?,
        Role::Proxy => proxy(arguments, &config)?,
    };
    let Some(agent) = agent else { return Ok(()) };

    let listeners = Listeners::bind(&config.listen).await?;
    if let Some(address) = config.metrics {
        tokio::spawn(Exporter::bind(address).await?.serve(agent.metrics()));
    }
    let served = agent.clone();
    let service = AgentServiceServer::new(agent.clone())
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX);
    if let (Some(control), Some(endpoint)) = (config.control.clone(), config.advertised()) {
        let endpoint = endpoint.to_string();
        let (name, underlay) = (config.name.clone(), config.underlay.address.to_string());
        let relay = config.relay.map(|relay| relay.to_string()).unwrap_or_default();
        let listener = agent.clone();
        let heard = move |answer: HeartbeatResponse| listener.want_parked(&answer.wanted);
        let report = move || {
            let report = agent.report();
            HeartbeatRequest {
                name: name.clone(),
                role: report.role.into(),
                endpoint: endpoint.clone(),
                underlay_address: underlay.clone(),
                slots: report.slots,
                instances: report.instances,
                version: env!("CARGO_PKG_VERSION").to_owned(),
                port_use: report.port_use,
                owned: report.owned,
                load: report.load,
                templates: report.templates,
                relay: relay.clone(),
            }
        };
        tokio::spawn(heartbeat::run(control, report, heard));
    }
    tokio::spawn(watchdog());
    tracing::info!(name = config.name, "ready");
    sd_notify::notify(&[sd_notify::NotifyState::Ready])?;
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let shutdown = async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        tracing::info!("stopping; microVMs and their traffic go on");
    };
    let mut services = Services::default().with(service);
    if let Agent::Host(host) = &served {
        services = services.with(LogServiceServer::new(LogServer(host.clone())));
    }
    listeners.serve(services, shutdown).await?;
    Ok(())
}

async fn host(arguments: &Arguments, config: &Config, boot: BootId) -> Result<Option<Agent>> {
    let section = config.host.as_ref();
    let section = section.context("--role host needs a [host] section in the configuration")?;
    let timeouts = &config.nat.timeouts;
    for warning in timeouts.warnings() {
        tracing::warn!("{warning}");
    }
    let options = HostOptions {
        bpffs: config.bpffs.clone(),
        object: programs(config)?,
        underlay_interface: config.underlay.interface.clone(),
        underlay_address: config.underlay.address,
        slots: section.slots,
        interface_prefix: INTERFACE_PREFIX.to_owned(),
        flows: DEFAULT_FLOWS,
        timers: timeouts.timers(),
        flow_log: FlowLogOptions {
            events: match &section.flow_log {
                None => FlowLogLevel::Off,
                Some(log) if log.starts => FlowLogLevel::All,
                Some(_) => FlowLogLevel::Ends,
            },
            ..FlowLogOptions::default()
        },
    };
    let jail = JailConfig {
        first_uid: section.jail.first_uid,
        cpu_percent: section.jail.cpu_percent,
        cgroup: section.jail.cgroup.clone().unwrap_or(JailConfig::named(&config.name).cgroup),
    };
    if arguments.uninstall {
        HostDatapath::uninstall(&options)?;
        boot::discard(&config.run_dir)?;
        jail::remove_groups(&jail.cgroup);
        return Ok(None);
    }
    let datapath = HostDatapath::open(&options)?;
    let events = datapath.flow_events();
    tokio::spawn(Fragments::open(datapath.fragments_device(), datapath.mtu())?.run());
    let templates = section.templates.iter().map(|template| TemplateOptions {
        name: template.name.clone(),
        sources: Sources {
            template: template.path.clone(),
            diff: template.image.clone(),
            disk: template.disk.clone(),
            key: template.key.clone(),
        },
        policy: Policy::new(template.least(), template.parked_most.unwrap_or(section.slots)),
    });
    let options = RoleOptions {
        name: config.name.clone(),
        vmm: section.vmm.clone(),
        run_dir: config.run_dir.clone(),
        jail,
        rates: section.limits,
        templates: templates.collect(),
        snapshots: section.snapshots.clone(),
        functions: section.functions.as_ref().map(functions).transpose()?,
    };
    let host = Host::new(options, datapath).await?;
    if let (Some(log), Some(events)) = (&section.flow_log, events) {
        let options = flowlog::Options {
            files: log.into(),
            host: config.name.clone(),
            memory: config.run_dir.join("flow-log-lost"),
        };
        let log = flowlog::start(options, events, host.clone()).map_err(|error| {
            anyhow!("cannot open the log of flows {}: {error}", log.path.display())
        })?;
        host.logs_flows(log);
    }
    tokio::spawn(sweep(host.clone()));
    tokio::spawn(LinkLocal::open(&host.services(boot), host.clone())?.run());
    Ok(Some(Agent::Host(host)))
}

fn functions(section: &config::Functions) -> Result<FunctionOptions> {
    let (source, directory) = (section.source()?, &section.directory);
    Ok(FunctionOptions {
        cache: Cache::open(&directory.join("packages"), section.packages_bytes, source)?,
        images: directory.join("images"),
        images_bytes: section.images_bytes,
        parked: section.parked,
    })
}

fn proxy(arguments: &Arguments, config: &Config) -> Result<Option<Agent>> {
    let options = ProxyOptions {
        bpffs: config.bpffs.clone(),
        object: programs(config)?,
        underlay_interface: config.underlay.interface.clone(),
        underlay_address: config.underlay.address,
        interface_prefix: INTERFACE_PREFIX.to_owned(),
    };
    if arguments.uninstall {
        ProxyDatapath::uninstall(&options)?;
        boot::discard(&config.run_dir)?;
        return Ok(None);
    }
    let datapath = ProxyDatapath::open(&options)?;
    tokio::spawn(Fragments::open(datapath.fragments_device(), datapath.mtu())?.run());
    let file = config.run_dir.join("proxies.json");
    let own = config.underlay.address;
    let linux = Linux::open().map_err(|error| anyhow!("cannot open a packet socket: {error}"))?;
    let mut providers: Vec<Box<dyn EniProvider>> = vec![Box::new(linux)];
    if let Some(hook) = &config.proxy.assign_command {
        providers.push(Box::new(Exec::new(hook.clone(), own)));
    }
    let proxy = Proxy::start(Arc::new(datapath), own, &file, providers)?;
    Ok(Some(Agent::Proxy(proxy)))
}

fn programs(config: &Config) -> Result<Vec<u8>> {
    let path = &config.programs;
    std::fs::read(path).map_err(|error| {
        anyhow!("cannot read the eBPF programs {}: {error}: set `programs`", path.display())
    })
}

/// Collects ended flows, for ever.
async fn sweep(host: Arc<Host>) {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        if let Err(error) = host.sweep() {
            tracing::error!("cannot collect ended flows: {error}");
        }
        if let Err(error) = host.count_ports() {
            tracing::error!("cannot count the ports in use: {error}");
        }
    }
}

/// Tells systemd that this process is alive, where systemd asks for it.
async fn watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    loop {
        tokio::time::sleep(limit / 2).await;
        if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]) {
            tracing::warn!("cannot reach the service manager: {error}");
        }
    }
}
