//! What functions need beside a fleet: a template for components, a repository, a relay on the host, and
//! a gateway beside the control plane.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use warren_proto::endpoint::Endpoint;

use crate::fleet::{Daemon, Fleet, built, template_with};
use crate::process::Process;
use crate::topology::{CONTROL, HOST};

/// The template of functions' instances.
pub const RUNTIME: &str = "runtime";

/// The guest that runs components.
const GUEST: &str = "warren-runtime.elf";

/// Port of the host's relay, on its underlay address.
const RELAY: u16 = 7703;

/// Where the gateway listens, in the control plane's namespace.
pub const GATEWAY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

const PATIENCE: Duration = Duration::from_secs(10);

/// A relay and a gateway.
pub struct Functions {
    /// On the host.
    pub relay: Process,
    /// Beside the control plane.
    pub gateway: Process,
}

/// The repository of a fleet's control plane.
pub fn repository(fleet: &Fleet) -> PathBuf {
    fleet.run.path().join("functions")
}

/// Lets the host of a fleet take functions, of which it holds so many of each parked; it is started anew.
pub async fn take_functions(fleet: &mut Fleet, parked: u32) -> Result<()> {
    let template = template_with(&fleet.run, GUEST, 8)?;
    let config = format!(
        "[[host.templates]]\nname = '{RUNTIME}'\npath = '{}'\nparked = 0\n\
         [host.functions]\nrepository = '{}'\ndirectory = '{}'\nparked = {parked}\n",
        template.display(),
        repository(fleet).display(),
        fleet.dir(Daemon::Host).join("functions-cache").display(),
    );
    std::fs::create_dir_all(repository(fleet))?;
    fleet.append_config(Daemon::Host, &config)?;
    fleet.configure(Daemon::Host, "relay", &format!("'{HOST}:{RELAY}'"))?;
    fleet.kill_and_restart(Daemon::Host).await
}

impl Functions {
    /// Starts both, with more of the gateway's configuration.
    pub fn start(fleet: &Fleet, more: &str) -> Result<Self> {
        let mut relay = relay(fleet)?;
        let mut gateway = gateway(fleet, more)?;
        let listens = |address: SocketAddr, daemon: Daemon| {
            fleet.namespace(daemon).run(move || Ok(std::net::TcpStream::connect(address).is_ok()))
        };
        let at = SocketAddr::from((HOST, RELAY));
        relay.wait_until(PATIENCE, || listens(at, Daemon::Host).unwrap_or(false))?;
        gateway.wait_until(PATIENCE, || listens(GATEWAY, Daemon::Control).unwrap_or(false))?;
        Ok(Self { relay, gateway })
    }
}

/// Starts the host's relay.
pub fn relay(fleet: &Fleet) -> Result<Process> {
    let mut command = fleet.namespace(Daemon::Host).command(built("warren-relay")?);
    command.args(["--listen", &format!("{HOST}:{RELAY}")]);
    command.arg("--run-dir").arg(fleet.dir(Daemon::Host));
    Process::start("relay", command, &fleet.run.path().join("relay.log"))
}

/// Starts the gateway.
pub fn gateway(fleet: &Fleet, more: &str) -> Result<Process> {
    let state = fleet.run.path().join("gateway");
    std::fs::create_dir_all(&state)?;
    let file = fleet.run.path().join("gateway.toml");
    let control = Endpoint::Tcp(SocketAddr::from((CONTROL, 7700)));
    let config = format!(
        "listen = ['{GATEWAY}']\ncontrol = '{control}'\nstate = '{}'\n{more}",
        state.display()
    );
    std::fs::write(&file, config)?;
    let mut command = fleet.namespace(Daemon::Control).command(built("warren-gateway")?);
    command.arg("--config").arg(&file);
    Process::start("gateway", command, &fleet.run.path().join("gateway.log"))
}

/// An example of `examples/`, as `cargo xtask examples` builds it.
pub fn example(name: &str) -> Result<PathBuf> {
    let release = built("warren-vmm")?;
    let target = release.parent().and_then(|release| release.parent()).context("no target")?;
    let path = target.join("examples").join(format!("{name}.wasm"));
    ensure!(path.exists(), "no {}: run `cargo xtask examples`", path.display());
    Ok(path)
}
