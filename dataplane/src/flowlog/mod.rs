//! The log of flows: who talked to whom, as whom, for how long and how much. Lines of JSON.
//!
//! Programs tell of flows through a ring buffer that outlives this process ([`FlowEvents`]). A
//! thread takes them out, adds names ([`owners`]) and writes ([`file`]) a [`Record`] each. An event
//! leaves the buffer only when its line is written: a daemon that is killed loses none. [`search`]
//! finds who had a port.

pub mod file;
pub mod owners;
pub mod record;
pub mod search;

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use self::file::{Files, Writer};
use self::owners::Names;
use self::record::{Line, Record, WallClock};
use crate::datapath::FlowEvents;

/// How often it is looked for events that woke nobody.
const INTERVAL_MS: u16 = 100;

/// What a log is made from.
pub struct Options {
    /// Where it is.
    pub files: Files,
    /// Name of this host.
    pub host: String,
    /// Remembers across restarts what was said of events that were lost.
    pub memory: PathBuf,
}

/// What became of the events, since this process began.
#[derive(Debug, Default)]
pub struct Counts {
    written: AtomicU64,
    unwritten: AtomicU64,
}

impl Counts {
    /// Lines that were written.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Events that could not be written: the disk is full, say.
    pub fn unwritten(&self) -> u64 {
        self.unwritten.load(Ordering::Relaxed)
    }
}

/// What the log asks its host.
pub trait Source: Names + Send + Sync + 'static {
    /// How many events were lost on their way, since the maps were made; none: it is not known.
    fn lost(&self) -> Option<u64>;
}

/// The log, for as long as it lives.
#[derive(Debug)]
pub struct FlowLog {
    files: Files,
    counts: Arc<Counts>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FlowLog {
    /// Where it is.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// What became of the events.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }
}

impl Drop for FlowLog {
    /// Waits until everything is written that was told so far.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // If it panicked, that was told.
            thread.join().ok();
        }
    }
}

/// Writes the log on a thread of its own: a disk may keep it waiting.
pub fn start(
    options: Options,
    mut events: FlowEvents,
    source: Arc<impl Source>,
) -> io::Result<FlowLog> {
    let files = options.files.clone();
    let writer = Writer::open(options.files)?;
    let counts = Arc::new(Counts::default());
    let told = std::fs::read_to_string(&options.memory).ok();
    let told = told.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let (host, memory) = (options.host, options.memory);
    let mut log = Log { writer, counts: counts.clone(), host, memory, told, failing: false };
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let work = move || {
        loop {
            let is_last = stopped.load(Ordering::Relaxed);
            let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
            // Interrupted or timed out: there may be something all the same.
            let _ = poll(&mut fds, PollTimeout::from(INTERVAL_MS));
            let clock = WallClock::now();
            while events.take(|event| {
                if let Some(record) = Record::new(event, &log.host, &*source, clock) {
                    log.write(&Line::Flow(Box::new(record)));
                }
            }) {}
            log.tell_lost(source.lost());
            if is_last {
                return;
            }
        }
    };
    let thread = Some(std::thread::Builder::new().name("flow-log".to_owned()).spawn(work)?);
    Ok(FlowLog { files, counts, stop, thread })
}

struct Log {
    writer: Writer,
    counts: Arc<Counts>,
    host: String,
    memory: PathBuf,
    /// How many lost events the log tells of.
    told: u64,
    /// Whether the last line could not be written.
    failing: bool,
}

impl Log {
    fn write(&mut self, line: &Line) -> bool {
        let written = serde_json::to_vec(line).map_err(io::Error::from).and_then(|mut bytes| {
            bytes.push(b'\n');
            self.writer.append(&bytes)
        });
        let counter = if written.is_ok() { &self.counts.written } else { &self.counts.unwritten };
        counter.fetch_add(1, Ordering::Relaxed);
        // Told once, not for each line.
        if let (Err(error), false) = (&written, self.failing) {
            tracing::error!("the log of flows cannot be written, flows are not logged: {error}");
        }
        self.failing = written.is_err();
        !self.failing
    }

    /// Writes that events were lost, if there are more of them than it said before.
    fn tell_lost(&mut self, lost: Option<u64>) {
        let Some(lost) = lost.filter(|lost| *lost != self.told) else { return };
        // Fewer: the maps were made anew.
        let events = if lost > self.told { lost - self.told } else { lost };
        let line = Line::lost(&self.host, events, WallClock::now());
        if events == 0 || self.write(&line) {
            self.told = lost;
            if let Err(error) = std::fs::write(&self.memory, lost.to_string()) {
                tracing::warn!("cannot write {}: {error}", self.memory.display());
            }
        }
    }
}
