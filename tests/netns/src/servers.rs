//! Real servers from Debian, and a few small ones, inside a tenant's VPC.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::netns::Namespace;
use crate::process::Process;

const PATIENCE: Duration = Duration::from_secs(10);

fn listens(namespace: &Namespace, address: SocketAddr) -> bool {
    namespace.run(|| TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_ok())
}

/// Starts `redis-server` on all addresses of the namespace, port 6379, in memory only.
pub fn redis(namespace: &Namespace, dir: &Path) -> Result<Process> {
    let name = format!("redis-{}", namespace.name());
    let mut command = namespace.command("redis-server");
    command.args(["--port", "6379", "--bind", "0.0.0.0", "--protected-mode", "no"]);
    command.args(["--save", "", "--appendonly", "no", "--maxclients", "4000", "--dir"]).arg(dir);
    let mut process = Process::start(&name, command, &dir.join(format!("{name}.log")))?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 6379));
    process.wait_until(PATIENCE, || listens(namespace, address))?;
    Ok(process)
}

/// Starts nginx on all addresses of the namespace, port 80; `GET /` answers `page`.
pub fn nginx(namespace: &Namespace, dir: &Path, page: &str) -> Result<Process> {
    let name = format!("nginx-{}", namespace.name());
    let root = dir.join(&name);
    std::fs::create_dir_all(&root)?;
    // nginx's workers run as another user and must be able to read the page.
    for path in [dir, &root] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    }
    std::fs::write(root.join("index.html"), page)?;
    let config = root.join("nginx.conf");
    let root = root.display();
    std::fs::write(
        &config,
        format!(
            "daemon off; master_process off; pid {root}/nginx.pid; error_log {root}/error.log;\n\
             events {{ worker_connections 1024; }}\n\
             http {{ access_log {root}/access.log; client_body_temp_path {root}/body;\n\
             proxy_temp_path {root}/proxy; fastcgi_temp_path {root}/fastcgi;\n\
             uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi;\n\
             server {{ listen 80; root {root}; }} }}\n"
        ),
    )?;
    let mut command = namespace.command("nginx");
    command.arg("-c").arg(&config).arg("-e").arg(format!("{root}/error.log"));
    let mut process = Process::start(&name, command, &dir.join(format!("{name}.log")))?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 80));
    process.wait_until(PATIENCE, || listens(namespace, address))?;
    Ok(process)
}

/// Starts `iperf3 -s` on all addresses of the namespace, port 5201.
pub fn iperf3(namespace: &Namespace, dir: &Path) -> Result<Process> {
    let name = format!("iperf3-{}", namespace.name());
    let mut command = namespace.command("iperf3");
    command.args(["--server", "--forceflush"]);
    let log = dir.join(format!("{name}.log"));
    let mut process = Process::start(&name, command, &log)?;
    // A connection would be a test to it.
    let is_ready = || std::fs::read_to_string(&log).is_ok_and(|log| log.contains("listening"));
    process.wait_until(PATIENCE, is_ready)?;
    Ok(process)
}

/// Starts `unbound` on all addresses of the namespace, port 53, as the one who knows a zone; each
/// of `records` is a line such as `db.corp.internal. 60 A 10.0.0.7`. It logs each query.
pub fn unbound(namespace: &Namespace, dir: &Path, zone: &str, records: &[&str]) -> Result<Process> {
    let name = format!("unbound-{}", namespace.name());
    let mut text = format!(
        "server:\n directory: \"{}\"\n chroot: \"\"\n username: \"\"\n pidfile: \"\"\n \
         use-syslog: no\n logfile: \"\"\n log-queries: yes\n do-ip6: no\n \
         interface: 0.0.0.0\n access-control: 0.0.0.0/0 allow\n module-config: \"iterator\"\n \
         local-zone: \"{zone}\" static\n",
        dir.display()
    );
    for record in records {
        text += &format!(" local-data: '{record}'\n");
    }
    let config = dir.join(format!("{name}.conf"));
    std::fs::write(&config, text)?;
    let mut command = namespace.command("unbound");
    command.args(["-d", "-p", "-c"]).arg(&config);
    let mut process = Process::start(&name, command, &dir.join(format!("{name}.log")))?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 53));
    process.wait_until(PATIENCE, || listens(namespace, address))?;
    Ok(process)
}

/// Runs `redis-cli` in the namespace against its own server and returns what it prints.
pub fn redis_cli(namespace: &Namespace, words: &[&str]) -> Result<String> {
    let output = namespace
        .command("redis-cli")
        .args(words)
        .output()
        .context("cannot run redis-cli (package redis-tools)")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A thread that serves until it is dropped.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts a thread in the namespace: it serves until the flag is set, looking at it at least
    /// every [`TICK`], and counts.
    pub fn start(
        namespace: &Namespace,
        serve: impl FnOnce(&AtomicBool, &AtomicU64) + Send + 'static,
    ) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (their_stop, their_count) = (stop.clone(), count.clone());
        let thread = namespace.spawn(move || serve(&their_stop, &their_count));
        Self { stop, count, thread: Some(thread) }
    }

    /// Datagrams or bytes that came in.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// How long a server may wait for something before it looks whether it is to end.
pub const TICK: Duration = Duration::from_millis(50);

/// A UDP socket of the namespace, with a read time-out of 50 ms.
pub fn udp(namespace: &Namespace, port: u16) -> Result<UdpSocket> {
    udp_at(namespace, (Ipv4Addr::UNSPECIFIED, port))
}

/// The same at an address.
pub fn udp_at(namespace: &Namespace, at: impl Into<SocketAddr>) -> Result<UdpSocket> {
    let at = at.into();
    namespace.run(|| {
        let socket = UdpSocket::bind(at)?;
        socket.set_read_timeout(Some(TICK))?;
        Ok(socket)
    })
}

/// Sends each datagram back to where it came from; counts them.
pub fn udp_echo(namespace: &Namespace, port: u16) -> Result<Server> {
    udp_echo_at(namespace, (Ipv4Addr::UNSPECIFIED, port))
}

/// The same at an address.
pub fn udp_echo_at(namespace: &Namespace, at: impl Into<SocketAddr>) -> Result<Server> {
    let socket = udp_at(namespace, at)?;
    Ok(Server::start(namespace, move |stop, count| {
        let mut buffer = vec![0; 65536];
        while !stop.load(Ordering::SeqCst) {
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                count.fetch_add(1, Ordering::SeqCst);
                socket.send_to(&buffer[..length], from).ok();
            }
        }
    }))
}

/// The bytes of a bulk transfer: byte `n` of the stream is `n % 251`.
fn pattern(offset: u64, buffer: &mut [u8]) {
    for (n, byte) in (offset..).zip(buffer) {
        *byte = (n % 251) as u8;
    }
}

fn accept_loop(
    listener: &TcpListener,
    stop: &AtomicBool,
    mut serve: impl FnMut(TcpStream) -> std::io::Result<()>,
) {
    while !stop.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).ok();
                if let Err(error) = serve(stream) {
                    tracing::debug!("bulk connection: {error}");
                }
            }
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn listener(namespace: &Namespace, at: SocketAddr) -> Result<TcpListener> {
    namespace.run(|| {
        let listener = TcpListener::bind(at)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    })
}

/// Sends the bulk pattern to whoever connects, `bytes` of it at `bytes_per_second` (0: as fast as
/// it goes), one connection at a time; counts the bytes.
pub fn bulk_source(
    namespace: &Namespace,
    port: u16,
    bytes: u64,
    bytes_per_second: u64,
) -> Result<Server> {
    bulk_source_at(namespace, (Ipv4Addr::UNSPECIFIED, port), bytes, bytes_per_second)
}

/// The same at an address.
pub fn bulk_source_at(
    namespace: &Namespace,
    at: impl Into<SocketAddr>,
    bytes: u64,
    bytes_per_second: u64,
) -> Result<Server> {
    let listener = listener(namespace, at.into())?;
    Ok(Server::start(namespace, move |stop, count| {
        accept_loop(&listener, stop, |mut stream| {
            let started = std::time::Instant::now();
            let mut buffer = [0; 16384];
            let mut sent = 0;
            while sent < bytes && !stop.load(Ordering::SeqCst) {
                let length = buffer.len().min((bytes - sent) as usize);
                pattern(sent, &mut buffer[..length]);
                std::io::Write::write_all(&mut stream, &buffer[..length])?;
                sent += length as u64;
                count.fetch_add(length as u64, Ordering::SeqCst);
                if bytes_per_second > 0 {
                    let due = Duration::from_secs_f64(sent as f64 / bytes_per_second as f64);
                    std::thread::sleep(due.saturating_sub(started.elapsed()));
                }
            }
            Ok(())
        });
    }))
}

/// Reads what clients send until they close, one at a time; counts the bytes that match the
/// pattern, and stops counting at the first that does not.
pub fn bulk_sink(namespace: &Namespace, port: u16) -> Result<Server> {
    bulk_sink_at(namespace, (Ipv4Addr::UNSPECIFIED, port))
}

/// The same at an address.
pub fn bulk_sink_at(namespace: &Namespace, at: impl Into<SocketAddr>) -> Result<Server> {
    let listener = listener(namespace, at.into())?;
    Ok(Server::start(namespace, move |stop, count| {
        accept_loop(&listener, stop, |mut stream| {
            stream.set_read_timeout(Some(TICK))?;
            let (mut buffer, mut expected) = (vec![0; 65536], vec![0; 65536]);
            let mut received = 0;
            while !stop.load(Ordering::SeqCst) {
                match std::io::Read::read(&mut stream, &mut buffer) {
                    Ok(0) => break,
                    Ok(length) => {
                        pattern(received, &mut expected[..length]);
                        if buffer[..length] != expected[..length] {
                            break;
                        }
                        received += length as u64;
                        count.fetch_add(length as u64, Ordering::SeqCst);
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        });
    }))
}
