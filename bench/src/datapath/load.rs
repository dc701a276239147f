//! What is measured on a path, each for a second: from the guest's namespace to a server in the VPC.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use warren_bench::figures::percentile;
use warren_netns::netns::Namespace;
use warren_netns::servers::{self, Server, TICK};
use warren_netns::topology::SERVER;

use super::batch::Batch;
use super::path::Path;

/// How long each measurement takes.
const DURATION: Duration = Duration::from_secs(1);
/// Bytes of a datagram, of a request and of a response.
const SMALL: usize = 64;
/// Datagrams on their way at a time: more than any queue on the way would hold are lost.
const WINDOW: u64 = 512;
/// Datagrams that did not arrive by then are lost.
const LOST: Duration = Duration::from_millis(5);
/// How often the server's process looks for datagrams: as one that has other work, it is not woken
/// for each.
const LOOK: Duration = Duration::from_micros(500);
/// Clients that connect at the same time.
const CLIENTS: usize = 4;
/// Bytes of the transfer that every byte of is checked.
const CHECKED: u64 = 16 << 20;

const UDP_PORT: u16 = 9001;
const ECHO_PORT: u16 = 9002;
const SINK_PORT: u16 = 9004;
const SOURCE_PORT: u16 = 9005;
/// Several, by turns: towards one, the guest's kernel would soon search for a port that no closed
/// connection still has.
const CONNECT_PORTS: Range<u16> = 9010..9018;

/// Names of the metrics, in the order in which [`measure`] yields them.
pub const METRICS: [&str; 7] = [
    "tcp_to_vpc_gbps",
    "tcp_from_vpc_gbps",
    "udp_64b_kpps",
    "rr_per_s",
    "rr_p50_us",
    "rr_p99_us",
    "connects_per_s",
];

/// The servers in the VPC, besides iperf3.
pub struct Servers {
    udp: Server,
    _echo: Server,
    _connect: Vec<Server>,
}

impl Servers {
    pub fn start(vpc: &Namespace) -> Result<Self> {
        Ok(Self { udp: udp_sink(vpc)?, _echo: tcp_echo(vpc)?, _connect: acceptors(vpc)? })
    }
}

/// Checks that both directions carry what was sent, to the byte: checksums and segmentation are
/// left to the far end, where a mistake would show.
pub fn check(path: &Path) -> Result<()> {
    let sink = servers::bulk_sink(path.vpc(), SINK_PORT)?;
    let source = servers::bulk_source(path.vpc(), SOURCE_PORT, CHECKED, 0)?;
    let key = path.kind.key();
    path.guest.run(|| -> Result<()> {
        let pattern: Vec<u8> = (0..CHECKED).map(|n| (n % 251) as u8).collect();
        let mut stream = connect(SINK_PORT)?;
        stream.write_all(&pattern)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        // The sink closes when it has read everything.
        stream.read_to_end(&mut Vec::new())?;
        ensure!(sink.count() == CHECKED, "{key}: what the server received is not what was sent");
        let mut received = Vec::new();
        connect(SOURCE_PORT)?.read_to_end(&mut received)?;
        ensure!(received == pattern, "{key}: what the guest received is not what was sent");
        Ok(())
    })?;
    drop(source);
    Ok(())
}

/// Measures all metrics once.
pub fn measure(path: &Path, servers: &Servers) -> Result<[f64; METRICS.len()]> {
    let to_vpc = iperf3(&path.guest, &[])?;
    let from_vpc = iperf3(&path.guest, &["--reverse"])?;
    let kpps = path.guest.run(|| udp_flood(&servers.udp))?;
    let (per_s, p50, p99) = path.guest.run(request_response)?;
    let connects = path.guest.run(connects)?;
    Ok([to_vpc, from_vpc, kpps, per_s, p50, p99, connects])
}

/// Gigabits per second that were received on one TCP connection.
fn iperf3(guest: &Namespace, options: &[&str]) -> Result<f64> {
    let output = guest
        .command("iperf3")
        .args(["--json", "--connect-timeout", "5000", "--client"])
        .arg(SERVER.to_string())
        .args(["--time", &DURATION.as_secs().to_string()])
        .args(options)
        .output()
        .context("cannot run iperf3 (package iperf3)")?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let rate = report.pointer("/end/sum_received/bits_per_second");
    let rate = rate.and_then(serde_json::Value::as_f64);
    let rate = rate.with_context(|| format!("iperf3 says: {}", report["error"]))?;
    Ok(rate / 1e9)
}

fn server(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(SERVER, port)
}

fn connect(port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server(port).into(), Duration::from_secs(5))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(stream)
}

/// Thousands of datagrams per second that arrive at the server's socket while the guest has no more
/// than a window of them under way.
fn udp_flood(sink: &Server) -> Result<f64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(server(UDP_PORT))?;
    let mut batch = Batch::new(SMALL);
    let begin = Instant::now();
    let first = sink.count();
    // What is counted as sent, so that `sent - arrived` is under way.
    let (mut sent, mut arrived, mut progress) = (first, first, begin);
    while begin.elapsed() < DURATION {
        let now_arrived = sink.count();
        if now_arrived != arrived {
            (arrived, progress) = (now_arrived, Instant::now());
        } else if progress.elapsed() > LOST {
            (sent, progress) = (arrived, Instant::now());
        }
        if sent.saturating_sub(arrived) < WINDOW {
            sent += batch.send(socket.as_raw_fd())? as u64;
        } else {
            std::thread::sleep(Duration::from_micros(10));
        }
    }
    Ok((sink.count() - first) as f64 / begin.elapsed().as_secs_f64() / 1000.0)
}

/// Requests per second on one TCP connection, each sent when the response to the one before came;
/// median and 99th percentile of their times, in microseconds.
fn request_response() -> Result<(f64, f64, f64)> {
    let mut stream = connect(ECHO_PORT)?;
    let mut buffer = [0; SMALL];
    let mut times = Vec::new();
    let begin = Instant::now();
    while begin.elapsed() < DURATION {
        let sent = Instant::now();
        stream.write_all(&buffer)?;
        stream.read_exact(&mut buffer)?;
        times.push(sent.elapsed().as_nanos() as f64 / 1000.0);
    }
    let per_s = times.len() as f64 / begin.elapsed().as_secs_f64();
    times.sort_by(f64::total_cmp);
    let at = |percent| percentile(&times, percent).context("no response");
    Ok((per_s, at(50.0)?, at(99.0)?))
}

/// TCP connections per second that were opened and closed on both sides, by several clients.
fn connects() -> Result<f64> {
    let begin = Instant::now();
    let count = std::thread::scope(|scope| {
        let client = || -> Result<u64> {
            let mut count = 0;
            for port in CONNECT_PORTS.cycle() {
                if begin.elapsed() >= DURATION {
                    break;
                }
                let mut stream = connect(port)?;
                stream.shutdown(std::net::Shutdown::Write)?;
                // The server closes when it has seen that we did.
                stream.read_to_end(&mut Vec::new())?;
                count += 1;
            }
            Ok(count)
        };
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        clients
            .into_iter()
            .map(|client| client.join().expect("a client does not panic"))
            .sum::<Result<u64>>()
    })?;
    Ok(count as f64 / begin.elapsed().as_secs_f64())
}

/// Counts datagrams.
fn udp_sink(vpc: &Namespace) -> Result<Server> {
    let socket = servers::udp(vpc, UDP_PORT)?;
    setsockopt(&socket, sockopt::RcvBufForce, &(4 << 20))?;
    Ok(Server::start(vpc, move |stop: &AtomicBool, count: &AtomicU64| {
        let mut batch = Batch::new(SMALL);
        while !stop.load(Ordering::Relaxed) {
            match batch.receive(socket.as_raw_fd()) {
                Ok(received @ 1..) => drop(count.fetch_add(received as u64, Ordering::SeqCst)),
                // None is there.
                _ => std::thread::sleep(LOOK),
            }
        }
    }))
}

/// Sends back what clients send, one at a time.
fn tcp_echo(vpc: &Namespace) -> Result<Server> {
    tcp_server(vpc, ECHO_PORT, |stream, stop| {
        let mut buffer = [0; SMALL];
        while !stop.load(Ordering::Relaxed) {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => stream.write_all(&buffer[..length])?,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    })
}

/// Accept connections, and close them when their clients do.
fn acceptors(vpc: &Namespace) -> Result<Vec<Server>> {
    let acceptor = |port| tcp_server(vpc, port, |stream, _| stream.read(&mut [0]).map(drop));
    CONNECT_PORTS.map(acceptor).collect()
}

fn tcp_server(
    vpc: &Namespace,
    port: u16,
    serve: impl Fn(&mut TcpStream, &AtomicBool) -> std::io::Result<()> + Send + 'static,
) -> Result<Server> {
    let listener = vpc.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))?;
    // It holds for `accept` too.
    let tick = TimeVal::new(0, i64::from(TICK.subsec_micros()));
    setsockopt(&listener, sockopt::ReceiveTimeout, &tick)?;
    Ok(Server::start(vpc, move |stop: &AtomicBool, count: &AtomicU64| {
        while !stop.load(Ordering::Relaxed) {
            let Ok((mut stream, _)) = listener.accept() else { continue };
            let timeout = stream.set_read_timeout(Some(TICK));
            let served = timeout
                .and_then(|()| stream.set_nodelay(true))
                .and_then(|()| serve(&mut stream, stop));
            if let Err(error) = served {
                tracing::debug!("connection to port {port}: {error}");
            }
            count.fetch_add(1, Ordering::SeqCst);
        }
    }))
}
