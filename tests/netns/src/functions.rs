//! What functions need beside a fleet: a template for components, a repository, a relay on the host, and
//! a gateway beside the control plane.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use warren_proto::endpoint::{Endpoint, connect};
use warren_proto::v1;
use warren_proto::v1::function_service_client::FunctionServiceClient;

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
pub const GATEWAY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

const PATIENCE: Duration = Duration::from_secs(10);

/// A call that is not answered within this time fails.
const CALL: Duration = Duration::from_mins(1);

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
            fleet.namespace(daemon).run(move || TcpStream::connect(address).is_ok())
        };
        let at = SocketAddr::from((HOST, RELAY));
        relay.wait_until(PATIENCE, || listens(at, Daemon::Host))?;
        gateway.wait_until(PATIENCE, || listens(GATEWAY, Daemon::Control))?;
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

/// An answer to a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// What Warren says in a function's place, if it does: the field `warren-error`.
    pub error: Option<String>,
    /// The body.
    pub body: String,
    /// From the request to the first byte of the answer.
    pub first_byte: Duration,
}

/// A connection for calls, one after the other; in the namespace of the thread that makes it.
#[derive(Debug)]
pub struct Caller {
    stream: BufReader<TcpStream>,
}

impl Caller {
    /// Connects.
    pub fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(CALL))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Calls, with a body if there is one.
    pub fn call(&mut self, method: &str, path: &str, body: &str) -> Result<Answer> {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: functions\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        let clock = Instant::now();
        self.stream.get_mut().write_all(request.as_bytes())?;
        ensure!(!self.stream.fill_buf()?.is_empty(), "no answer to {method} {path}");
        let first_byte = clock.elapsed();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            ensure!(self.stream.read_until(b'\n', &mut head)? > 0, "the answer's head is cut");
        }
        let head = String::from_utf8(head)?;
        let field = |name: &str| {
            let mut fields = head.lines().filter_map(|line| line.split_once(':'));
            let field = fields.find(|(known, _)| known.eq_ignore_ascii_case(name));
            field.map(|(_, value)| value.trim().to_owned())
        };
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        let body = match field("content-length") {
            Some(length) => self.take(length.parse()?)?,
            None if field("transfer-encoding").is_some() => self.take_chunks()?,
            None => String::new(),
        };
        let status = status.context("no status")?;
        Ok(Answer { status, error: field("warren-error"), body, first_byte })
    }

    fn take(&mut self, length: usize) -> Result<String> {
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok(String::from_utf8(body)?)
    }

    fn take_chunks(&mut self) -> Result<String> {
        let mut body = String::new();
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line)?;
            let length = usize::from_str_radix(line.trim(), 16)?;
            body += self.take(length + 2)?.trim_end_matches("\r\n");
            if length == 0 {
                return Ok(body);
            }
        }
    }
}

impl Fleet {
    /// Deploys a component under a name, and has it answer calls to paths that begin with the name: each
    /// instance one, or any number.
    pub async fn deploy(
        &self,
        name: &str,
        vpc: &str,
        component: &Path,
        environment: &[(&str, &str)],
        reuse: bool,
    ) -> Result<v1::DeployFunctionResponse> {
        use v1::deploy_function_request::Part;
        let variable = |(name, value): &(&str, &str)| v1::EnvironmentVariable {
            name: (*name).to_owned(),
            value: (*value).to_owned(),
        };
        let options = v1::FunctionOptions {
            name: name.to_owned(),
            vpc: vpc.to_owned(),
            environment: environment.iter().map(variable).collect(),
            reuse,
            ..v1::FunctionOptions::default()
        };
        let component = std::fs::read(component)?;
        let pieces = component.chunks(1 << 20).map(|piece| Part::Component(piece.to_vec()));
        let parts = std::iter::once(Part::Options(options)).chain(pieces);
        let parts: Vec<_> =
            parts.map(|part| v1::DeployFunctionRequest { part: Some(part) }).collect();
        let channel = connect(&self.control_endpoint()).await?;
        let mut control = FunctionServiceClient::new(channel);
        let deployed = control.deploy_function(tokio_stream::iter(parts)).await?.into_inner();
        let trigger = v1::Trigger {
            name: name.to_owned(),
            function: name.to_owned(),
            kind: Some(v1::trigger::Kind::Http(v1::HttpTrigger {
                prefix: format!("/{name}"),
                strip: true,
                ..v1::HttpTrigger::default()
            })),
            ..v1::Trigger::default()
        };
        control.create_trigger(v1::CreateTriggerRequest { trigger: Some(trigger) }).await?;
        Ok(deployed)
    }

    /// Calls through the gateway, on a connection of its own.
    pub fn call(&self, method: &str, path: &str, body: &str) -> Result<Answer> {
        let (method, path, body) = (method.to_owned(), path.to_owned(), body.to_owned());
        let call = move || Caller::connect(GATEWAY)?.call(&method, &path, &body);
        self.namespace(Daemon::Control).run(call)
    }

    /// Calls until the gateway knows the trigger, which it does a moment after it was made.
    pub fn call_when_known(&self, method: &str, path: &str, body: &str) -> Result<Answer> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.call(method, path, body)?;
            let unknown = answer.error.as_deref() == Some("no-route");
            if !unknown || Instant::now() > deadline {
                return Ok(answer);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
