//! A datagram each millisecond, and as much by TCP, to servers that send it back: when it came back.

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;
use warren_netns::netns::Namespace;
use warren_netns::topology::SERVER;

const PORT: u16 = 7100;
const PERIOD: Duration = Duration::from_millis(1);
/// How long a thread waits for something until it looks whether it is to end.
const PATIENCE: Duration = Duration::from_millis(50);
/// What came back so long ago is not of interest any more.
const KEPT: Duration = Duration::from_secs(30);
/// Something that was alive has had something come back within this time.
const ALIVE: Duration = Duration::from_millis(100);

/// When something came back.
#[derive(Clone, Default)]
pub struct Arrivals(Arc<Mutex<Vec<Instant>>>);

impl Arrivals {
    fn note(&self) {
        let now = Instant::now();
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if times.len() > 100_000 {
            times.retain(|time| now.duration_since(*time) < KEPT);
        }
        times.push(now);
    }

    /// The longest time in which nothing came back, from the last before `since` until now.
    pub fn longest_gap(&self, since: Instant) -> Duration {
        let times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = times.partition_point(|time| *time < since).saturating_sub(1);
        let mut last = times.get(first).copied().unwrap_or(since);
        let mut longest = Duration::ZERO;
        for time in times.iter().skip(first).copied().chain([Instant::now()]) {
            longest = longest.max(time.duration_since(last));
            last = time;
        }
        longest
    }

    /// Whether something came back a moment ago.
    pub fn is_alive(&self) -> bool {
        let times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        times.last().is_some_and(|time| time.elapsed() < ALIVE)
    }
}

/// The pulse of a guest's connection with its VPC.
pub struct Pulse {
    pub datagrams: Arrivals,
    pub stream: Arrivals,
    sent: Arc<AtomicU64>,
    /// The numbers of those that came back.
    received: Arc<Mutex<HashSet<u64>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pulse {
    pub fn start(guest: &Namespace, vpc: &Namespace) -> Result<Self> {
        let echo = vpc.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)))?;
        let listener = vpc.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))?;
        let datagrams = guest.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
        guest.run(|| datagrams.connect((SERVER, PORT)))?;
        let stream = guest.run(|| TcpStream::connect((SERVER, PORT)))?;
        let (peer, _) = listener.accept()?;
        for socket in [&echo, &datagrams] {
            socket.set_read_timeout(Some(PATIENCE))?;
        }
        for socket in [&stream, &peer] {
            socket.set_nodelay(true)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.set_write_timeout(Some(PATIENCE))?;
        }
        let mut pulse = Self {
            datagrams: Arrivals::default(),
            stream: Arrivals::default(),
            sent: Arc::default(),
            received: Arc::default(),
            stop: Arc::default(),
            threads: Vec::new(),
        };
        pulse.spawn({
            let mut bytes = [0; 64];
            move || {
                if let Ok((length, from)) = echo.recv_from(&mut bytes) {
                    echo.send_to(&bytes[..length], from).ok();
                }
            }
        });
        pulse.spawn({
            let (sender, sent) = (datagrams.try_clone()?, pulse.sent.clone());
            let mut next = Instant::now();
            move || {
                tick(&mut next);
                let mut bytes = [0; 64];
                bytes[..8].copy_from_slice(&sent.load(Ordering::SeqCst).to_be_bytes());
                sender.send(&bytes).ok();
                sent.fetch_add(1, Ordering::SeqCst);
            }
        });
        pulse.spawn({
            let (arrivals, received) = (pulse.datagrams.clone(), pulse.received.clone());
            move || {
                let mut bytes = [0; 64];
                if datagrams.recv(&mut bytes).is_ok() {
                    arrivals.note();
                    let [number, ..] = bytes.as_chunks().0 else { return };
                    let mut received = received.lock().unwrap_or_else(PoisonError::into_inner);
                    received.insert(u64::from_be_bytes(*number));
                }
            }
        });
        pulse.spawn({
            let mut bytes = [0; 4096];
            move || {
                if let Ok(length) = (&peer).read(&mut bytes) {
                    send(&peer, &bytes[..length]);
                }
            }
        });
        pulse.spawn({
            let sender = stream.try_clone()?;
            let mut next = Instant::now();
            move || {
                tick(&mut next);
                send(&sender, &[0; 64]);
            }
        });
        pulse.spawn({
            let arrivals = pulse.stream.clone();
            let mut bytes = [0; 4096];
            move || {
                if (&stream).read(&mut bytes).is_ok_and(|length| length > 0) {
                    arrivals.note();
                }
            }
        });
        Ok(pulse)
    }

    /// Repeats something until the end.
    fn spawn(&mut self, mut turn: impl FnMut() + Send + 'static) {
        let stop = self.stop.clone();
        self.threads.push(std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                turn();
            }
        }));
    }

    /// How many datagrams were sent.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }

    /// How many of these datagrams did not come back, or not yet.
    pub fn lost(&self, numbers: Range<u64>) -> u64 {
        let received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.filter(|number| !received.contains(number)).count() as u64
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}

/// Waits until the next period begins.
fn tick(next: &mut Instant) {
    *next += PERIOD;
    match next.checked_duration_since(Instant::now()) {
        Some(left) => std::thread::sleep(left),
        // What was missed is not made up for.
        None => *next = Instant::now(),
    }
}

/// Sends all of it, or nothing: while nothing comes through, the socket's buffer fills.
fn send(mut stream: &TcpStream, bytes: &[u8]) {
    let mut rest = bytes;
    while !rest.is_empty() {
        match stream.write(rest) {
            Ok(length) => rest = rest.get(length..).unwrap_or_default(),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                if rest.len() == bytes.len() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}
