//! A control plane, hosts with agents and relays, and a gateway, all on the loopback.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::net::TcpStream;
use warren_proto::v1::trigger::Kind;
use warren_proto::v1::watch_data_flow_response::Change;
use warren_proto::v1::{FleetHost, Function, FunctionVersion, HttpTrigger, Trigger};

use crate::agent::{Machine, Server, any_port, services};
use crate::control::Control;
use crate::guest::{Shared, until};

/// A program of this crate, which is killed at the end.
pub struct Program {
    child: Child,
    pub address: SocketAddr,
    pub metrics: Option<SocketAddr>,
}

impl Program {
    fn start(path: &str, arguments: &[&str], has_metrics: bool) -> Self {
        let mut child = Command::new(path)
            .args(arguments)
            .env("RUST_LOG", "info")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (mut address, mut metrics) = (None, None);
        while address.is_none() || (has_metrics && metrics.is_none()) {
            let line = lines.next().expect("it ended before it listened").unwrap();
            eprintln!("{line}");
            let found = line.rsplit_once("address=").and_then(|(_, text)| text.trim().parse().ok());
            if line.contains("serving metrics") {
                metrics = found;
            } else {
                address = found.or(address);
            }
        }
        std::thread::spawn(move || {
            lines.for_each(|line| eprintln!("{}", line.unwrap_or_default()));
        });
        Self { child, address: address.unwrap(), metrics }
    }

    pub fn relay(run_dir: &Path, listen: &str) -> Self {
        let arguments = ["--run-dir", run_dir.to_str().unwrap(), "--listen", listen];
        Self::start(env!("CARGO_BIN_EXE_warren-relay"), &arguments, false)
    }

    pub fn gateway(config: &Path) -> Self {
        let arguments = ["--config", config.to_str().unwrap()];
        Self::start(env!("CARGO_BIN_EXE_warren-gateway"), &arguments, true)
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub struct Host {
    pub machine: Arc<Machine>,
    pub agent: Option<Server>,
    pub relay: Option<Program>,
}

impl Host {
    /// The agent is gone, and comes back where it was.
    pub async fn stop_agent(&mut self) -> warren_proto::endpoint::Endpoint {
        let agent = self.agent.take().unwrap();
        let endpoint = agent.endpoint.clone();
        agent.stop().await;
        endpoint
    }
}

pub struct World {
    pub directory: TempDir,
    pub shared: Arc<Shared>,
    pub control: Control,
    pub control_server: Option<Server>,
    pub hosts: Vec<Host>,
    pub gateway: Option<Program>,
}

impl World {
    /// With a host for each number of slots. `config` are more lines of the gateway's configuration.
    pub async fn new(slots: &[usize], config: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (shared, control) = (Arc::new(Shared::default()), Control::default());
        let mut hosts = Vec::new();
        for (index, &slots) in slots.iter().enumerate() {
            let run_dir = directory.path().join(index.to_string());
            let machine = Machine::new(run_dir.clone(), slots, shared.clone());
            let agent = Server::start(&any_port(), services(machine.clone())).await;
            let relay = Program::relay(&run_dir, "127.0.0.1:0");
            control.tell(Change::Host(FleetHost {
                name: format!("host{index}"),
                endpoint: agent.endpoint.to_string(),
                relay: relay.address.to_string(),
                alive: true,
                // More than there are: the agents refuse.
                slots: 10_000 - index as u32,
                taken: 0,
                vpcs: vec!["blue".into(), "red".into()],
                templates: vec!["small".into()],
            }));
            hosts.push(Host { machine, agent: Some(agent), relay: Some(relay) });
        }
        let server = Server::start(&any_port(), control.services()).await;
        let text = format!(
            "listen = [\"127.0.0.1:0\"]\nmetrics = \"127.0.0.1:0\"\ncontrol = \"{}\"\nstate = \"{}\"\n{config}\n",
            server.endpoint,
            directory.path().join("state").display()
        );
        std::fs::write(directory.path().join("gateway.toml"), text).unwrap();
        let control_server = Some(server);
        let mut world = Self { directory, shared, control, control_server, hosts, gateway: None };
        world.start_gateway();
        world
    }

    pub fn start_gateway(&mut self) {
        self.gateway = Some(Program::gateway(&self.directory.path().join("gateway.toml")));
    }

    /// A function with a version 1, called at `NAME.test`; the gateway knows it.
    pub async fn function(&self, name: &str, timeout_ms: u32, concurrency: u32) {
        self.control.tell(function(name, &[1], timeout_ms, concurrency));
        let http = HttpTrigger { host: format!("{name}.test"), ..Default::default() };
        self.trigger(name, name, Kind::Http(http));
        self.settled().await;
    }

    pub fn trigger(&self, name: &str, function: &str, kind: Kind) {
        let (name, function, alias) = (name.to_owned(), function.to_owned(), String::new());
        self.control.tell(Change::Trigger(Trigger { name, function, alias, kind: Some(kind) }));
    }

    /// The gateway has heard all that was told.
    pub async fn settled(&self) {
        static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let name = format!("mark{}", NEXT.fetch_add(1, Ordering::SeqCst));
        let http = HttpTrigger { host: format!("{name}.test"), ..Default::default() };
        self.trigger(&name, "no-function", Kind::Http(http));
        for _ in 0..2000 {
            if self.get(&name, "/").await.error == "no-version" {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        panic!("the gateway never heard it");
    }

    pub fn address(&self) -> SocketAddr {
        self.gateway.as_ref().unwrap().address
    }

    pub fn machine(&self, index: usize) -> &Machine {
        &self.hosts[index].machine
    }

    pub async fn get(&self, function: &str, path: &str) -> Got {
        get(self.address(), function, path).await
    }

    /// Begins a call that is answered when the gate lets it.
    pub fn spawn_get(&self, function: &str, path: &str) -> tokio::task::JoinHandle<Got> {
        let (address, function, path) = (self.address(), function.to_owned(), path.to_owned());
        tokio::spawn(async move { get(address, &function, &path).await })
    }

    pub async fn held(&self, count: usize) {
        until("calls are held", || self.shared.held.load(Ordering::SeqCst) == count).await;
    }

    pub async fn metric(&self, line: &str) -> u64 {
        let address = self.gateway.as_ref().unwrap().metrics.unwrap();
        let text = get(address, "metrics", "/metrics").await.body;
        let value = text.lines().find_map(|other| other.strip_prefix(line)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().unwrap())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        assert!(!self.shared.overlapped.load(Ordering::SeqCst), "two calls on one instance");
    }
}

pub fn function(name: &str, numbers: &[u64], timeout_ms: u32, concurrency: u32) -> Change {
    let version = |number: &u64| FunctionVersion {
        number: *number,
        package: "00".repeat(32),
        template: "small".to_owned(),
        memory_bytes: 64 << 20,
        timeout_ms,
        concurrency,
        ..Default::default()
    };
    Change::Function(Function {
        name: name.to_owned(),
        vpc: "blue".to_owned(),
        versions: numbers.iter().map(version).collect(),
        aliases: Vec::new(),
    })
}

/// An answer, whole.
#[derive(Debug)]
pub struct Got {
    pub status: u16,
    /// `warren-error`.
    pub error: String,
    pub body: String,
}

impl Got {
    pub async fn whole(answer: Response<Incoming>) -> Self {
        let error = answer.headers().get("warren-error");
        let error = error.map(|error| error.to_str().unwrap().to_owned()).unwrap_or_default();
        let status = answer.status().as_u16();
        // What was cut has an end that tells.
        let body = match answer.into_body().collect().await {
            Ok(body) => String::from_utf8(body.to_bytes().to_vec()).unwrap(),
            Err(_) => "CUT".to_owned(),
        };
        Self { status, error, body }
    }
}

pub fn request(function: &str, path: &str) -> hyper::http::request::Builder {
    Request::builder().uri(path).header("host", format!("{function}.test"))
}

pub async fn get(address: SocketAddr, function: &str, path: &str) -> Got {
    let request = request(function, path).body(Full::<Bytes>::default()).unwrap();
    Got::whole(send(address, request).await).await
}

/// Sends a request on a connection of its own.
pub async fn send<B>(address: SocketAddr, request: Request<B>) -> Response<Incoming>
where
    B: Body<Data = Bytes, Error: std::error::Error + Send + Sync> + Send + 'static,
{
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender.send_request(request).await.unwrap()
}

/// An HTTP/2 connection.
pub async fn http2(address: SocketAddr) -> hyper::client::conn::http2::SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(address).await.unwrap();
    let io = TokioIo::new(stream);
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), io);
    let (sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    sender
}
