//! What tenants do meanwhile: a database's clients, a transfer, a cache, and connections that wait.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, connect, listen, setsockopt,
    socket, sockopt,
};
use warren_netns::netns::Namespace;
use warren_netns::postgres;
use warren_netns::process::Process;
use warren_netns::servers;
use warren_netns::topology::SERVER;

/// Connections that wait.
pub const CONNECTIONS: usize = 1000;
const IDLE_PORT: u16 = 7200;
/// Both guests' connections begin here: what stands for the one cannot stand for the other.
const FIRST_PORT: u16 = 20_000;
/// So many times, others are used.
const TURNS: u16 = 20;
/// Bits a second of the transfer, and transactions a second.
const TCP_RATE: &str = "100M";
const TRANSACTIONS: &str = "200";
const REDIS_PERIOD: Duration = Duration::from_millis(5);
/// A connection on which nothing comes back in this time is lost.
const PATIENCE: Duration = Duration::from_secs(3);

/// What was lost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Losses {
    /// Of the connections that wait.
    pub connections: u64,
    /// Clients of the database that broke off, and transactions that failed.
    pub database: u64,
    /// Requests to the cache that failed.
    pub redis: u64,
}

/// Traffic between a guest and its VPC.
pub struct Load {
    clients: Process,
    _transfer: Process,
    _servers: [Process; 3],
    stop: Arc<AtomicBool>,
    redis: Option<JoinHandle<u64>>,
}

impl Load {
    pub fn start(guest: &Namespace, vpc: &Namespace, dir: &Path) -> Result<Self> {
        let dir = dir.join("load");
        // What an earlier one left there is not this one's.
        std::fs::remove_dir_all(&dir).ok();
        std::fs::create_dir_all(&dir)?;
        let database = postgres::start(vpc, &dir)?;
        let cache = servers::redis(vpc, &dir)?;
        let receiver = servers::iperf3(vpc, &dir)?;
        let mut clients = postgres::pgbench(guest, SERVER)?;
        clients.args(["--no-vacuum", "--client", "2", "-T", "3600", "--rate", TRANSACTIONS]);
        clients.arg("postgres");
        let mut transfer = guest.command("iperf3");
        transfer.args(["--client", &SERVER.to_string(), "-t", "3600", "-b", TCP_RATE]);
        let stop = Arc::new(AtomicBool::new(false));
        let requests = guest.run(|| TcpStream::connect((SERVER, 6379)))?;
        requests.set_nodelay(true)?;
        requests.set_read_timeout(Some(PATIENCE))?;
        let stopped = stop.clone();
        let redis = std::thread::spawn(move || count(requests, &stopped));
        Ok(Self {
            clients: Process::start("pgbench", clients, &dir.join("pgbench.log"))?,
            _transfer: Process::start("transfer", transfer, &dir.join("transfer.log"))?,
            _servers: [database, cache, receiver],
            stop,
            redis: Some(redis),
        })
    }

    /// Errors of the database's clients, and of the cache's.
    pub fn finish(mut self) -> Result<(u64, u64)> {
        self.stop.store(true, Ordering::SeqCst);
        let redis = self.redis.take().context("it was finished before")?;
        let redis = redis.join().expect("it does not panic");
        let log = self.clients.log();
        let is_trouble = |line: &&str| line.contains("error") || line.contains("aborted");
        let errors = log.lines().filter(is_trouble).count() as u64;
        Ok((errors + u64::from(self.clients.has_ended()?), redis))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

/// Has the cache count up, and counts what it did not.
fn count(mut cache: TcpStream, stop: &AtomicBool) -> u64 {
    let mut expected = 1u64;
    while !stop.load(Ordering::SeqCst) {
        let mut reply = [0; 64];
        let asked = cache.write_all(b"INCR count\r\n").and_then(|()| cache.read(&mut reply));
        let is_right =
            asked.is_ok_and(|length| reply[..length] == *format!(":{expected}\r\n").as_bytes());
        if !is_right {
            // Whatever comes now is not known to be the answer.
            return 1;
        }
        expected += 1;
        std::thread::sleep(REDIS_PERIOD);
    }
    0
}

/// Connections that wait: both ends of each.
pub struct Idle {
    ends: Vec<(TcpStream, TcpStream)>,
}

impl Idle {
    /// Opens them, the same number from each guest, from the same ports; those of an earlier `turn`
    /// may not be free yet.
    pub fn open(guests: &[Namespace], vpc: &Namespace, turn: u16) -> Result<Self> {
        let listener = vpc.run(|| reusable(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, IDLE_PORT)));
        let listener: TcpListener = {
            let socket = listener?;
            listen(&socket, Backlog::new(128)?)?;
            socket.into()
        };
        let mut ends = Vec::new();
        for guest in guests {
            let count = (CONNECTIONS / guests.len()) as u16;
            for port in (FIRST_PORT + turn % TURNS * count..).take(count.into()) {
                let own = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
                let to = SockaddrIn::from(SocketAddrV4::new(SERVER, IDLE_PORT));
                let client = guest.run(|| -> Result<TcpStream> {
                    let socket = reusable(own)?;
                    connect(socket.as_raw_fd(), &to).context("cannot connect")?;
                    Ok(socket.into())
                })?;
                let (server, _): (_, SocketAddr) = listener.accept()?;
                for end in [&client, &server] {
                    end.set_read_timeout(Some(PATIENCE))?;
                }
                ends.push((client, server));
            }
        }
        Ok(Self { ends })
    }

    /// How many do not carry a byte from the server to the guest and back any more.
    pub fn lost(&self) -> u64 {
        for (_, server) in &self.ends {
            // What cannot be written is not read.
            (&*server).write_all(b"?").ok();
        }
        let there = answers(self.ends.iter().map(|(client, _)| client));
        for (client, _) in &self.ends {
            (&*client).write_all(b"!").ok();
        }
        let back = answers(self.ends.iter().map(|(_, server)| server));
        there.into_iter().zip(back).filter(|(there, back)| !(*there && *back)).count() as u64
    }
}

/// On which of these a byte came, in a time for all of them.
fn answers<'a>(ends: impl Iterator<Item = &'a TcpStream>) -> Vec<bool> {
    let deadline = Instant::now() + PATIENCE;
    let came = |mut end: &TcpStream| {
        let left = deadline.saturating_duration_since(Instant::now());
        end.set_read_timeout(Some(left.max(Duration::from_millis(1)))).ok();
        end.read(&mut [0; 1]).is_ok_and(|length| length == 1)
    };
    ends.map(came).collect()
}

/// A socket at a port that may have been another's a moment ago.
fn reusable(address: SocketAddrV4) -> Result<OwnedFd> {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrIn::from(address))?;
    Ok(socket)
}
