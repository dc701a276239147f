//! What tenants send, and what must come back.

use std::collections::HashSet;
use std::fmt::{self, Display, Formatter};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use warren_netns::guest::KernelGuest;
use warren_netns::netns::Namespace;
use warren_netns::topology::SERVER;

const PORT: u16 = 7300;
const PERIOD: Duration = Duration::from_millis(5);
/// Datagrams that follow each other at once.
const AT_ONCE: u32 = 4;
/// A connection that is held up longer than this is as good as broken.
const PATIENCE: Duration = Duration::from_secs(20);
/// A datagram that is under way so long is lost.
const ALIVE: Duration = Duration::from_secs(1);

/// Tells the user of a test something, also of one that passes.
pub fn say(text: &str) {
    writeln!(std::io::stderr(), "{text}").ok();
}

/// Who talks: an instance of a VPC's on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tenant {
    pub host: usize,
    pub vpc: usize,
    /// Of the VPC's shared addresses, the one that it is seen as.
    pub address: usize,
}

/// What was said: by whom, and which one it is. A server adds in which VPC it stands.
type Line = [u8; 16];

fn line(tenant: Tenant, number: u64, server: u8) -> Line {
    let mut line = [0; 16];
    line[0] = tenant.host as u8;
    line[1] = tenant.vpc as u8;
    line[2] = server;
    line[3] = tenant.address as u8;
    line[8..].copy_from_slice(&number.to_be_bytes());
    line
}

/// Ends its thread when it is dropped.
pub struct Worker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn spawn(mut turn: impl FnMut() + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                turn();
            }
        });
        Self { stop, thread: Some(thread) }
    }

    /// Ends it; a panic in it is one here.
    fn finish(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Servers of a VPC that say lines again, with where they stand.
pub fn serve(vpc: &Namespace, index: u8) -> Vec<Worker> {
    let socket = vpc.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))).expect("it is free");
    socket.set_read_timeout(Some(Duration::from_millis(50))).expect("it is not zero");
    let listener =
        vpc.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))).expect("it is free");
    listener.set_nonblocking(true).expect("it can be");
    let datagrams = Worker::spawn(move || {
        let mut said: Line = [0; 16];
        if let Ok((_, from)) = socket.recv_from(&mut said) {
            said[2] = index;
            socket.send_to(&said, from).ok();
        }
    });
    let streams = Worker::spawn(move || match listener.accept() {
        // It ends with its connection.
        Ok((stream, _)) => drop(std::thread::spawn(move || answer(stream, index))),
        Err(_) => std::thread::sleep(Duration::from_millis(5)),
    });
    vec![datagrams, streams]
}

fn answer(mut stream: TcpStream, index: u8) {
    stream.set_nonblocking(false).ok();
    stream.set_nodelay(true).ok();
    let mut said: Line = [0; 16];
    while stream.read_exact(&mut said).is_ok() {
        said[2] = index;
        if stream.write_all(&said).is_err() {
            return;
        }
    }
}

/// What became of a tenant's talk.
pub struct Told {
    pub sent: u64,
    pub lost: u64,
    /// Datagrams that came back more than once.
    pub twice: u64,
    /// Datagrams that came back behind a later one.
    pub overtaken: u64,
    /// By one connection that lasts.
    pub lines: u64,
    /// Connections that were opened, used and closed.
    pub connections: u64,
    /// The longest that a line was under way, in milliseconds.
    pub longest_ms: u64,
    /// Whether datagrams come back at the end.
    pub came_back_last: bool,
}

impl Display for Told {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { sent, lost, twice, overtaken, lines, connections, longest_ms, .. } = self;
        write!(
            f,
            "{lost} of {sent} datagrams lost, {twice} came twice, {overtaken} late, {lines} lines and {connections} connections, \
             the slowest in {longest_ms} ms"
        )
    }
}

#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    received: AtomicU64,
    twice: AtomicU64,
    overtaken: AtomicU64,
    lines: AtomicU64,
    connections: AtomicU64,
    longest_ms: AtomicU64,
    last: std::sync::Mutex<Option<Instant>>,
}

/// Has all of them talk.
pub fn start(tenants: &[Tenant], guests: &[KernelGuest]) -> Vec<Talk> {
    let both = tenants.iter().zip(guests);
    both.map(|(tenant, guest)| Talk::start(*tenant, &guest.namespace)).collect()
}

/// A tenant's traffic with its VPC.
pub struct Talk {
    counts: Arc<Counts>,
    workers: Vec<Worker>,
}

impl Talk {
    /// Begins to talk. Whatever comes back from another VPC, or for another tenant, is a panic, as is a
    /// connection that breaks.
    pub fn start(tenant: Tenant, guest: &Namespace) -> Self {
        let counts = Arc::new(Counts::default());
        let socket = guest.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).expect("it can be");
        guest.run(|| socket.connect((SERVER, PORT))).expect("there is a route");
        socket.set_read_timeout(Some(PERIOD)).expect("it is not zero");
        let listener = socket.try_clone().expect("it can be");
        let workers = vec![
            Worker::spawn({
                let (counts, mut number) = (counts.clone(), 0);
                move || {
                    for _ in 0..AT_ONCE {
                        number += 1;
                        // While nothing leads anywhere, sending may fail.
                        socket.send(&line(tenant, number, 0)).ok();
                        counts.sent.fetch_add(1, Ordering::SeqCst);
                    }
                    std::thread::sleep(PERIOD * AT_ONCE);
                }
            }),
            Worker::spawn({
                let (counts, mut seen, mut latest) =
                    (counts.clone(), HashSet::new(), Line::default());
                move || {
                    let mut heard: Line = [0; 16];
                    if listener.recv(&mut heard).is_ok() {
                        let expected = line(tenant, 0, tenant.vpc as u8);
                        assert_eq!(
                            heard[..8],
                            expected[..8],
                            "{tenant:?} hears what is not its own"
                        );
                        let is_new = seen.insert(heard);
                        let count = if is_new { &counts.received } else { &counts.twice };
                        count.fetch_add(1, Ordering::SeqCst);
                        if is_new && heard[8..] < latest[8..] {
                            counts.overtaken.fetch_add(1, Ordering::SeqCst);
                        }
                        latest = latest.max(heard);
                        *counts.last.lock().expect("nobody panics with it") = Some(Instant::now());
                    }
                }
            }),
            Worker::spawn({
                let (counts, mut number) = (counts.clone(), 0);
                let mut stream = connect(guest);
                move || {
                    number += 1;
                    say_line(&mut stream, tenant, number, &counts);
                    counts.lines.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(PERIOD);
                }
            }),
            Worker::spawn({
                let (counts, guest) = (counts.clone(), guest.clone());
                move || {
                    let mut stream = connect(&guest);
                    say_line(&mut stream, tenant, 1, &counts);
                    counts.connections.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(PERIOD * 10);
                }
            }),
        ];
        Self { counts, workers }
    }

    pub fn finish(self) -> Told {
        // What is under way when nobody sends any more is not lost.
        for worker in self.workers {
            worker.finish();
            std::thread::sleep(PERIOD * 4);
        }
        let count = |of: &AtomicU64| of.load(Ordering::SeqCst);
        let counts = self.counts;
        let last = *counts.last.lock().expect("nobody panics with it");
        Told {
            sent: count(&counts.sent),
            lost: count(&counts.sent).saturating_sub(count(&counts.received)),
            twice: count(&counts.twice),
            overtaken: count(&counts.overtaken),
            lines: count(&counts.lines),
            connections: count(&counts.connections),
            longest_ms: count(&counts.longest_ms),
            came_back_last: last.is_some_and(|last| last.elapsed() < ALIVE),
        }
    }
}

fn connect(guest: &Namespace) -> TcpStream {
    let address = (SERVER, PORT).into();
    let stream = guest.run(|| TcpStream::connect_timeout(&address, PATIENCE));
    let stream = stream.unwrap_or_else(|error| panic!("no connection begins: {error}"));
    stream.set_nodelay(true).expect("it can be");
    stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    stream
}

fn say_line(stream: &mut TcpStream, tenant: Tenant, number: u64, counts: &Counts) {
    let start = Instant::now();
    let mut heard: Line = [0; 16];
    let done =
        stream.write_all(&line(tenant, number, 0)).and_then(|()| stream.read_exact(&mut heard));
    match done {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            panic!("{tenant:?}: nothing came in {PATIENCE:?}")
        }
        Err(error) => panic!("{tenant:?}: a connection broke: {error}"),
    }
    let expected = line(tenant, number, tenant.vpc as u8);
    assert_eq!(heard, expected, "{tenant:?} hears what is not its own");
    counts.longest_ms.fetch_max(start.elapsed().as_millis() as u64, Ordering::SeqCst);
}

/// Has the cache count up.
pub struct Counter {
    worker: Worker,
    count: Arc<AtomicU64>,
}

impl Counter {
    /// How far it came.
    pub fn finish(self) -> u64 {
        self.worker.finish();
        self.count.load(Ordering::SeqCst)
    }
}

/// Begins to count at the VPC's Redis; whatever is not the next number is a panic.
pub fn count_up(guest: &Namespace) -> Counter {
    let mut cache = guest.run(|| TcpStream::connect((SERVER, 6379))).expect("it listens");
    cache.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    let count = Arc::new(AtomicU64::new(0));
    let counted = count.clone();
    let worker = Worker::spawn(move || {
        let mut reply = [0; 64];
        cache.write_all(b"INCR count\r\n").expect("the cache is there");
        let length = cache.read(&mut reply).expect("the cache answers");
        let next = counted.fetch_add(1, Ordering::SeqCst) + 1;
        assert_eq!(reply[..length], *format!(":{next}\r\n").as_bytes());
        std::thread::sleep(PERIOD);
    });
    Counter { worker, count }
}
