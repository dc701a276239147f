//! The whole of Warren on a [`Topology`]: control plane, one host, one proxy, and a VPC for each
//! tenant.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use tonic::transport::Channel;
use warren_abi::probe::{self, Operation};
use warren_proto::endpoint::{Endpoint, connect};
use warren_proto::v1;
use warren_proto::v1::agent_service_client::AgentServiceClient;
use warren_proto::v1::control_service_client::ControlServiceClient;
use warren_vmm::jail::{self, Inhabitant, JailConfig};

use crate::netns::Namespace;
use crate::process::{self, Process};
use crate::rundir::RunDir;
use crate::topology::{
    CIDR, CONTROL, HOST, PROXY, SERVER, SHARED, Topology, UNDERLAY, VPC_INTERFACES,
};

/// Names of the tenants' VPCs.
pub const VPCS: [&str; 2] = ["tenant-a", "tenant-b"];

/// Where each agent serves metrics, in its own namespace.
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9401);
/// Where the control plane's state is, beside files that the name of each begins with this one.
const STATE: &str = "control.db";
const PATIENCE: Duration = Duration::from_secs(20);
const PROBE_TIMEOUT_MS: u32 = 10_000;

/// How large a host to make.
#[derive(Clone, Copy, Debug)]
pub struct FleetOptions {
    /// TAP slots.
    pub slots: u32,
    /// MicroVMs of its template, [`TEMPLATE`], parked at their barrier.
    pub parked: u32,
    /// The guest's program, one of [`GUEST`] and [`HOSTILE`].
    pub guest: &'static str,
}

/// The template that a host has at first.
pub const TEMPLATE: &str = "default";

/// The guest that serves the network probe.
pub const GUEST: &str = "warren-guest.elf";
/// A guest that misbehaves when it is told to.
pub const HOSTILE: &str = "warren-guest-hostile.elf";

/// Everything, running. Dropping it ends and removes everything.
pub struct Fleet {
    /// The namespaces.
    pub topology: Topology,
    /// Sockets, state, logs and pins.
    pub run: RunDir,
    control: Process,
    host: Process,
    proxy: Process,
}

/// A daemon of the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Daemon {
    /// `warren-control`.
    Control,
    /// `warrend --role host`.
    Host,
    /// `warrend --role proxy`.
    Proxy,
}

impl Daemon {
    /// Its name, and that of its directory and log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Host => "host",
            Self::Proxy => "proxy",
        }
    }
}

/// Finds one of the workspace's build results beside this program.
pub fn built(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    // Tests lie one folder deeper than binaries.
    let found = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|p| p.exists());
    found.with_context(|| format!("{name} is not built: run `cargo xtask build` first"))
}

/// Boots a guest, one of [`GUEST`] and [`HOSTILE`], and saves it as a template.
pub fn template(run: &RunDir, guest: &str) -> Result<PathBuf> {
    template_with(run, guest, 16)
}

/// The same, with so many MiB of memory.
pub fn template_with(run: &RunDir, guest: &str, memory: u32) -> Result<PathBuf> {
    let template = run.path().join(guest).with_extension(format!("{memory}.template"));
    let made = Command::new(built("warren-vmm")?)
        .args(["template", "--guest"])
        .arg(built(guest)?)
        .args(["--memory", &memory.to_string()])
        .arg("--output")
        .arg(&template)
        .output()?;
    ensure!(
        made.status.success(),
        "cannot make the template: {}",
        String::from_utf8_lossy(&made.stderr)
    );
    Ok(template)
}

/// Puts the function that counts its calls into a template; returns the image.
pub fn function_image(run: &RunDir, template: &Path) -> Result<PathBuf> {
    let image = run.path().join("counter.image");
    let made = Command::new(built("warren-vmm")?)
        .arg("image")
        .arg("--template")
        .arg(template)
        .arg("--function")
        .arg(built("warren-function-counter.elf")?)
        .arg("--output")
        .arg(&image)
        .output()?;
    let error = String::from_utf8_lossy(&made.stderr);
    ensure!(made.status.success(), "cannot make the image: {error}");
    Ok(image)
}

/// Why microVMs cannot run here, if they cannot.
pub fn kvm_missing() -> Option<String> {
    warren_vmm::template::open_kvm().err().map(|error| error.to_string())
}

/// For tests of microVMs: false, with a loud line, where there is no KVM.
///
/// # Panics
/// If there is no KVM although `WARREN_REQUIRE_KVM=1`.
pub fn kvm_or_skip(test: &str) -> bool {
    let Some(reason) = kvm_missing() else { return true };
    let required = std::env::var_os("WARREN_REQUIRE_KVM").is_some_and(|value| value == "1");
    assert!(!required, "{test}: {reason}");
    // Not by eprintln!, which the test runner keeps to itself for a test that passes.
    writeln!(std::io::stderr(), "!!! SKIPPED {test}: {reason} !!!").ok();
    false
}

impl Fleet {
    /// Starts everything, makes both VPCs, and waits until the pool is full.
    pub async fn start(options: FleetOptions) -> Result<Self> {
        let fleet = Self::without_vpcs(options).await?;
        for (vpc, interface) in VPCS.iter().zip(VPC_INTERFACES) {
            let vpc = v1::Vpc {
                name: (*vpc).to_owned(),
                cidr: CIDR.to_owned(),
                shared_address: SHARED.to_string(),
                interface: interface.to_owned(),
                resolver: SERVER.to_string(),
                search_domain: "corp.internal".to_owned(),
                ..v1::Vpc::default()
            };
            let request = v1::CreateVpcRequest { vpc: Some(vpc) };
            fleet.control().await?.create_vpc(request).await?;
        }
        Ok(fleet)
    }

    /// Starts everything, and waits until the pool is full.
    pub async fn without_vpcs(options: FleetOptions) -> Result<Self> {
        let topology = Topology::new()?;
        let run = RunDir::new()?;
        let template = template(&run, options.guest)?;
        for daemon in [Daemon::Host, Daemon::Proxy] {
            write_config(&run, daemon, options, &template)?;
        }
        let control = start(&topology, &run, Daemon::Control)?;
        let proxy = start(&topology, &run, Daemon::Proxy)?;
        let host = start(&topology, &run, Daemon::Host)?;
        let mut fleet = Self { topology, run, control, host, proxy };
        for daemon in [Daemon::Control, Daemon::Proxy, Daemon::Host] {
            fleet.wait_listening(daemon)?;
        }
        fleet.wait_registered().await?;
        fleet.wait_parked(options.parked).await?;
        Ok(fleet)
    }

    /// The directory of a daemon: configuration, socket, state.
    pub fn dir(&self, daemon: Daemon) -> PathBuf {
        self.run.path().join(daemon.name())
    }

    /// Where the sockets of a template's microVMs are.
    pub fn sockets(&self, template: &str) -> PathBuf {
        self.dir(Daemon::Host).join("templates").join(template)
    }

    /// Where the control plane listens.
    pub fn control_endpoint(&self) -> Endpoint {
        endpoint(&self.run, Daemon::Control)
    }

    /// The command line, which asks this control plane.
    pub fn cli(&self) -> Result<Command> {
        let mut command = Command::new(built("warren")?);
        command.env("WARREN_ENDPOINT", self.control_endpoint().to_string());
        Ok(command)
    }

    /// Runs the command line with these words, and returns what it prints.
    ///
    /// # Errors
    /// What it complains of.
    pub fn warren(&self, line: &str) -> Result<String> {
        let output = self.cli()?.args(line.split_whitespace()).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`warren {line}`: {}", error.trim());
        Ok(String::from_utf8(output.stdout)?)
    }

    /// A client of the control plane.
    pub async fn control(&self) -> Result<ControlServiceClient<Channel>> {
        Ok(ControlServiceClient::new(connect(&endpoint(&self.run, Daemon::Control)).await?))
    }

    /// A client of an agent.
    pub async fn agent(&self, daemon: Daemon) -> Result<AgentServiceClient<Channel>> {
        Ok(AgentServiceClient::new(connect(&endpoint(&self.run, daemon)).await?))
    }

    /// The host's log of flows.
    pub fn flow_log(&self) -> PathBuf {
        flow_log(&self.run)
    }

    /// Adds to a daemon's configuration; it reads it when it starts.
    pub fn append_config(&self, daemon: Daemon, text: &str) -> Result<()> {
        let path = config_file(&self.run, daemon);
        let config = std::fs::read_to_string(&path)?;
        Ok(std::fs::write(path, config + text)?)
    }

    /// Replaces a value of a daemon's configuration, or adds it at its top; it reads it when it starts.
    pub fn configure(&self, daemon: Daemon, key: &str, value: &str) -> Result<()> {
        let path = config_file(&self.run, daemon);
        let config = std::fs::read_to_string(&path)?;
        let is_it = |line: &str| line.split_once(" = ").is_some_and(|(other, _)| other == key);
        let set = format!("{key} = {value}");
        let mut lines: Vec<&str> = config.lines().collect();
        match lines.iter().position(|line| is_it(line)) {
            Some(index) => lines[index] = &set,
            None => lines.insert(0, &set),
        }
        Ok(std::fs::write(path, lines.join("\n") + "\n")?)
    }

    /// What Prometheus would be told of a metric, by its name and labels as in its text.
    pub fn metric(&self, daemon: Daemon, name: &str) -> Result<u64> {
        let metrics = self.scrape(daemon)?;
        let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.with_context(|| format!("no {name} in\n{metrics}"))?.parse()?)
    }

    /// The processes of all microVMs of the host, with their slots.
    pub fn microvms(&self) -> Vec<Inhabitant> {
        jail::inhabitants(&JailConfig { cgroup: self.run.cgroup(), ..JailConfig::named("host") })
    }

    /// What an agent dropped for a reason, over all slots or VPCs.
    pub async fn drops(&self, daemon: Daemon, reason: &str) -> Result<u64> {
        let drops = self.agent(daemon).await?.list_drops(v1::ListDropsRequest {}).await?;
        let drops = drops.into_inner().drops;
        Ok(drops.iter().filter(|drop| drop.reason == reason).map(|drop| drop.packets).sum())
    }

    /// What Prometheus would scrape of an agent, with the head of the HTTP answer.
    pub fn scrape(&self, daemon: Daemon) -> Result<String> {
        self.namespace(daemon).run(|| {
            let mut stream = TcpStream::connect(METRICS)?;
            stream
                .write_all(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })
    }

    /// Where a daemon runs.
    pub fn namespace(&self, daemon: Daemon) -> &Namespace {
        match daemon {
            Daemon::Control => &self.topology.control,
            Daemon::Host => &self.topology.host,
            Daemon::Proxy => &self.topology.proxy,
        }
    }

    /// Starts an instance in a VPC, on the host, and invokes the probe.
    pub async fn run(
        &self,
        vpc: &str,
        operation: Option<Operation>,
    ) -> Result<(v1::RunInstanceResponse, Option<probe::Reply>)> {
        let request = v1::RunInstanceRequest {
            vpc: vpc.to_owned(),
            invocation: operation.map(|operation| encode(operation, PROBE_TIMEOUT_MS)),
            ..v1::RunInstanceRequest::default()
        };
        let response = self.control().await?.run_instance(request).await?.into_inner();
        let reply = response.reply.as_deref().map(probe::decode).transpose()?;
        Ok((response, reply))
    }

    /// Calls the probe in an instance.
    pub async fn probe(&self, id: &str, operation: Operation) -> Result<probe::Reply> {
        self.probe_within(id, operation, PROBE_TIMEOUT_MS).await
    }

    /// Calls the probe, which gives up after so many milliseconds.
    pub async fn probe_within(
        &self,
        id: &str,
        operation: Operation,
        timeout_ms: u32,
    ) -> Result<probe::Reply> {
        let invocation = encode(operation, timeout_ms);
        let request = v1::CallInstanceRequest { id: id.to_owned(), invocation };
        let response = self.control().await?.call_instance(request).await?.into_inner();
        Ok(probe::decode(&response.reply)?)
    }

    /// Stops an instance.
    pub async fn stop(&self, id: &str) -> Result<()> {
        let request = v1::StopInstanceRequest { id: id.to_owned() };
        self.control().await?.stop_instance(request).await?;
        Ok(())
    }

    /// The process of a daemon.
    pub fn process(&mut self, daemon: Daemon) -> &mut Process {
        match daemon {
            Daemon::Control => &mut self.control,
            Daemon::Host => &mut self.host,
            Daemon::Proxy => &mut self.proxy,
        }
    }

    /// Kills a daemon with SIGKILL, starts it again, and waits until it serves.
    pub async fn kill_and_restart(&mut self, daemon: Daemon) -> Result<()> {
        self.kill_and_restart_alone(daemon)?;
        self.wait_registered().await
    }

    /// The same where there is no control plane.
    pub fn kill_and_restart_alone(&mut self, daemon: Daemon) -> Result<()> {
        self.process(daemon).kill()?;
        *self.process(daemon) = start(&self.topology, &self.run, daemon)?;
        self.wait_listening(daemon)
    }

    /// Kills the control plane, and removes all that it stored.
    pub fn lose_control(&mut self) -> Result<()> {
        self.process(Daemon::Control).kill()?;
        for entry in std::fs::read_dir(self.run.path())? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(STATE) {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Stops a daemon, starts it with other eBPF programs, and waits until it serves.
    pub async fn upgrade(&mut self, daemon: Daemon, programs: &Path) -> Result<()> {
        self.configure(daemon, "programs", &format!("'{}'", programs.display()))?;
        self.process(daemon).stop(PATIENCE)?;
        self.kill_and_restart(daemon).await
    }

    /// Waits until so many microVMs of [`TEMPLATE`] are parked on the host.
    pub async fn wait_parked(&self, parked: u32) -> Result<()> {
        self.wait_parked_of(TEMPLATE, parked).await
    }

    /// Waits until so many microVMs of a template are parked on the host. Asks the host itself: what the
    /// control plane knows is as old as the last heartbeat.
    pub async fn wait_parked_of(&self, template: &str, parked: u32) -> Result<()> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let metric = format!("warren_parked_microvms{{template=\"{template}\"}}");
        loop {
            let now = self.metric(Daemon::Host, &metric)?;
            if now >= parked.into() {
                return Ok(());
            }
            if tokio::time::Instant::now() > deadline {
                let log = self.host.log();
                bail!("{now} of {parked} microVMs of {template} are parked; host's log:\n{log}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn wait_registered(&self) -> Result<()> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let mut control = self.control().await?;
        loop {
            let hosts = control.list_hosts(v1::ListHostsRequest {}).await?.into_inner().hosts;
            if hosts.iter().filter(|host| host.alive).count() == 2 {
                return Ok(());
            }
            if tokio::time::Instant::now() > deadline {
                let log = self.host.log();
                bail!("host and proxy do not register; hosts: {hosts:?}\nhost's log:\n{log}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn wait_listening(&mut self, daemon: Daemon) -> Result<()> {
        let Endpoint::Unix(path) = endpoint(&self.run, daemon) else { return Ok(()) };
        self.process(daemon)
            .wait_until(PATIENCE, || std::os::unix::net::UnixStream::connect(&path).is_ok())
    }

    /// Ends everything gracefully and returns what is left: processes, pins, TAPs, tunnel devices,
    /// mounts, the directory.
    pub fn shut_down(mut self) -> Result<Vec<String>> {
        for daemon in [Daemon::Control, Daemon::Host, Daemon::Proxy] {
            self.process(daemon).stop(Duration::from_secs(5))?;
        }
        self.kill_microvms();
        let mut left = Vec::new();
        for daemon in [Daemon::Host, Daemon::Proxy] {
            let output = command(&self.topology, &self.run, daemon)?.arg("--uninstall").output()?;
            if !output.status.success() {
                let error = String::from_utf8_lossy(&output.stderr).into_owned();
                left.push(format!("{}: uninstall failed: {error}", daemon.name()));
            }
            let links = self.namespace(daemon).ip_lines("link")?;
            let ours = |line: &&String| line.contains(": wrn");
            left.extend(links.iter().filter(ours).cloned());
        }
        left.extend(self.run.pins().iter().map(|pin| format!("pin {}", pin.display())));
        let run = self.run.path().to_string_lossy().into_owned();
        drop(self);
        left.extend(process::mentioning(&run).iter().map(|pid| format!("process {pid}")));
        let mounts = std::fs::read_to_string("/proc/mounts")?;
        left.extend(mounts.lines().filter(|line| line.contains(&run)).map(str::to_owned));
        if Path::new(&run).exists() {
            left.push(format!("directory {run}"));
        }
        Ok(left)
    }

    /// Kills whatever runs on the host still, and waits until it is gone.
    fn kill_microvms(&self) {
        for _ in 0..200 {
            if !kill_mentioning(self.run.path()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        tracing::error!("processes of {} cannot be killed", self.run.path().display());
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for daemon in [Daemon::Control, Daemon::Host, Daemon::Proxy] {
            self.process(daemon).kill().ok();
        }
        self.kill_microvms();
    }
}

/// Kills what was started with this directory on its command line: only this fleet's processes
/// have it there. True if there was any.
fn kill_mentioning(dir: &Path) -> bool {
    let found = process::mentioning(&dir.join("host").to_string_lossy());
    for pid in &found {
        // One that ended in the meantime needs no signal.
        kill(*pid, Signal::SIGKILL).ok();
    }
    !found.is_empty()
}

fn encode(operation: Operation, timeout_ms: u32) -> Vec<u8> {
    probe::encode(&probe::Request { operation, timeout_ms })
}

fn endpoint(run: &RunDir, daemon: Daemon) -> Endpoint {
    Endpoint::Unix(run.path().join(daemon.name()).join("grpc.sock"))
}

fn config_file(run: &RunDir, daemon: Daemon) -> PathBuf {
    run.path().join(format!("{}.toml", daemon.name()))
}

fn write_config(
    run: &RunDir,
    daemon: Daemon,
    options: FleetOptions,
    template: &Path,
) -> Result<()> {
    let dir = run.path().join(daemon.name());
    std::fs::create_dir_all(&dir)?;
    let address = if daemon == Daemon::Host { HOST } else { PROXY };
    let mut text = format!(
        "name = '{name}'\n\
         control = 'http://{CONTROL}:7700'\n\
         listen = ['{unix}', 'http://{address}:7701']\n\
         metrics = '{METRICS}'\n\
         run_dir = '{dir}'\n\
         bpffs = '{bpf}/{name}'\n\
         programs = '{programs}'\n\
         [underlay]\n\
         interface = '{UNDERLAY}'\n\
         address = '{address}'\n",
        name = daemon.name(),
        unix = endpoint(run, daemon),
        dir = dir.display(),
        bpf = run.bpf().display(),
        programs = built("warren-ebpf.o")?.display(),
    );
    if daemon == Daemon::Host {
        text += &format!(
            "[host]\nslots = {}\nvmm = '{}'\nsnapshots = '{}'\n\
             [[host.templates]]\nname = '{TEMPLATE}'\npath = '{}'\nparked = {}\nparked_most = {}\n\
             [host.flow_log]\npath = '{}'\n[host.jail]\ncgroup = '{}'\n",
            options.slots,
            built("warren-vmm")?.display(),
            dir.join("snapshots").display(),
            template.display(),
            options.parked,
            options.parked,
            flow_log(run).display(),
            run.cgroup().display()
        );
    }
    Ok(std::fs::write(config_file(run, daemon), text)?)
}

fn flow_log(run: &RunDir) -> PathBuf {
    run.path().join(Daemon::Host.name()).join("flows.jsonl")
}

fn command(topology: &Topology, run: &RunDir, daemon: Daemon) -> Result<Command> {
    Ok(match daemon {
        Daemon::Control => {
            let mut command = topology.control.command(built("warren-control")?);
            command.arg("--listen").arg(endpoint(run, daemon).to_string());
            command.arg("--listen").arg(format!("http://{CONTROL}:7700"));
            command.arg("--state").arg(run.path().join(STATE));
            command
        }
        Daemon::Host | Daemon::Proxy => {
            let namespace = if daemon == Daemon::Host { &topology.host } else { &topology.proxy };
            let mut command = namespace.command(built("warrend")?);
            command.args(["--role", daemon.name(), "--config"]).arg(config_file(run, daemon));
            command
        }
    })
}

fn start(topology: &Topology, run: &RunDir, daemon: Daemon) -> Result<Process> {
    let log = run.path().join(format!("{}.log", daemon.name()));
    Process::start(daemon.name(), command(topology, run, daemon)?, &log)
}
