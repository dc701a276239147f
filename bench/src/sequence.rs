//! Numbered datagrams at a steady rate, to a server that sends them back.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};
use warren_netns::netns::Namespace;

/// Room for what comes while a thread has to wait for its processor, in bytes.
const BUFFER: usize = 32 << 20;
/// After the last datagram was sent, how long to wait for those that are on their way.
const PATIENCE: Duration = Duration::from_secs(2);
/// Datagrams are sent so often, as many as are due.
const TICK: Duration = Duration::from_micros(500);
/// Bytes of a datagram.
const LENGTH: usize = 64;

fn socket(namespace: &Namespace, port: u16) -> Result<UdpSocket> {
    namespace.run(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
        setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
        setsockopt(&socket, sockopt::SndBufForce, &BUFFER)?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        Ok(socket)
    })
}

/// Sends each datagram back, until it is dropped.
pub struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// Serves in the namespace.
    pub fn start(namespace: &Namespace, port: u16) -> Result<Self> {
        let (socket, stop) = (socket(namespace, port)?, Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut datagram = [0; LENGTH];
            while !stopped.load(Ordering::SeqCst) {
                if let Ok((length, from)) = socket.recv_from(&mut datagram) {
                    socket.send_to(&datagram[..length], from).ok();
                }
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// What became of a stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Datagrams sent.
    pub sent: u64,
    /// Of them, those that came back.
    pub received: u64,
}

impl Outcome {
    /// Datagrams that did not come back.
    pub fn lost(self) -> u64 {
        self.sent - self.received
    }
}

/// Sends `rate` datagrams a second while `wanted` says so. Each counts once, however often it comes
/// back.
pub fn stream(
    namespace: &Namespace,
    to: SocketAddrV4,
    rate: f64,
    wanted: impl Fn() -> bool + Sync,
) -> Result<Outcome> {
    let socket = socket(namespace, 0)?;
    namespace.run(|| socket.connect(to))?;
    let (done, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let (mut seen, mut received) = (Vec::<bool>::new(), 0);
            let mut datagram = [0; LENGTH];
            let mut last = Instant::now();
            loop {
                if let Ok(LENGTH) = socket.recv(&mut datagram) {
                    let number = datagram.first_chunk().map_or(0, |n| u64::from_be_bytes(*n));
                    let number = number as usize;
                    if number >= seen.len() {
                        seen.resize(number + 1, false);
                    }
                    received += u64::from(!std::mem::replace(&mut seen[number], true));
                    last = Instant::now();
                }
                let is_over = done.load(Ordering::SeqCst);
                if is_over && (received == sent.load(Ordering::SeqCst) || last.elapsed() > PATIENCE)
                {
                    return received;
                }
            }
        });
        let start = Instant::now();
        let mut number = 0u64;
        let mut datagram = [0; LENGTH];
        let mut failed = None;
        while wanted() && failed.is_none() {
            let due = (start.elapsed().as_secs_f64() * rate) as u64;
            while number < due && failed.is_none() && wanted() {
                datagram[..8].copy_from_slice(&number.to_be_bytes());
                failed = socket.send(&datagram).err();
                number += 1;
            }
            std::thread::sleep(TICK);
        }
        sent.store(number, Ordering::SeqCst);
        done.store(true, Ordering::SeqCst);
        let arrived = receiver.join().expect("it does not panic");
        match failed {
            Some(error) => Err(error).context("cannot send a datagram"),
            None => Ok(Outcome { sent: number, received: arrived }),
        }
    })
}
