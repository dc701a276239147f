//! What functions on this host write: their instances are listened to, and the last lines are kept.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::broadcast;
use warren_abi::microvm::LOG_VSOCK_PORT;
use warren_proto::v1::LogLine;

/// Lines of a function that are kept.
const LINES: usize = 1000;

/// Functions of which lines are kept; of one more, those of the quietest go.
const FUNCTIONS: usize = 1000;

/// Lines that one who follows may be late by, before he loses some.
const LATE: usize = 4096;

/// The longest line, in bytes: the guest's are shorter.
const LINE_BYTES: u64 = 64 * 1024;

/// An instance is listened to a moment after its start, which this does not slow down: its guest keeps
/// what it writes meanwhile.
const DELAY: Duration = Duration::from_millis(50);

/// The lines of all functions.
#[derive(Clone)]
pub struct Logs {
    kept: Arc<Mutex<HashMap<String, VecDeque<LogLine>>>>,
    /// Function and line.
    written: broadcast::Sender<(String, LogLine)>,
}

impl Default for Logs {
    fn default() -> Self {
        Self { kept: Arc::default(), written: broadcast::channel(LATE).0 }
    }
}

impl Logs {
    fn kept(&self) -> MutexGuard<'_, HashMap<String, VecDeque<LogLine>>> {
        // No code panics while it holds the lock; if some did, the lines are still whole.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last lines of a function, and all that are written from then on.
    pub fn tail(
        &self,
        function: &str,
        lines: usize,
    ) -> (Vec<LogLine>, broadcast::Receiver<(String, LogLine)>) {
        // Locked before: no line is missed, and none comes twice.
        let kept = self.kept();
        let written = self.written.subscribe();
        let last = kept.get(function).map(|kept| {
            let before = kept.len().saturating_sub(lines);
            kept.iter().skip(before).cloned().collect()
        });
        (last.unwrap_or_default(), written)
    }

    fn write(&self, function: &str, line: LogLine) {
        let mut kept = self.kept();
        if !kept.contains_key(function) && kept.len() >= FUNCTIONS {
            let newest = |lines: &VecDeque<LogLine>| lines.back().map_or(0, |line| line.unix_ns);
            let quietest = kept.iter().min_by_key(|(_, lines)| newest(lines));
            if let Some(quietest) = quietest.map(|(name, _)| name.clone()) {
                kept.remove(&quietest);
            }
        }
        let lines = kept.entry(function.to_owned()).or_default();
        if lines.len() == LINES {
            lines.pop_front();
        }
        lines.push_back(line.clone());
        // Nobody may be following.
        self.written.send((function.to_owned(), line)).ok();
    }

    /// Listens to an instance of a function until it ends.
    pub async fn listen(self, socket: PathBuf, instance: String, function: String, version: u64) {
        tokio::time::sleep(DELAY).await;
        let Ok(mut stream) = UnixStream::connect(&socket).await else { return };
        if stream.write_all(format!("CONNECT {LOG_VSOCK_PORT}\n").as_bytes()).await.is_err() {
            return;
        }
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        // The first line says that the guest has accepted.
        for is_first in std::iter::once(true).chain(std::iter::repeat(false)) {
            line.clear();
            let read = (&mut reader).take(LINE_BYTES).read_until(b'\n', &mut line).await;
            if !matches!(read, Ok(1..)) {
                return;
            }
            if let Some(parsed) = parse(&line).filter(|_| !is_first) {
                self.write(&function, LogLine { instance: instance.clone(), version, ..parsed });
            }
        }
    }
}

/// A line as the guest sends it: stream, time and text.
fn parse(line: &[u8]) -> Option<LogLine> {
    let line = String::from_utf8_lossy(line);
    let mut parts = line.trim_end_matches('\n').splitn(3, ' ');
    let (stream, unix_ns, text) = (parts.next()?, parts.next()?.parse().ok()?, parts.next()?);
    Some(LogLine {
        stream: stream.to_owned(),
        unix_ns,
        text: text.to_owned(),
        ..LogLine::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_of_the_guest() {
        let line = parse(b"stderr 17 two words\n").unwrap();
        assert_eq!((&*line.stream, line.unix_ns, &*line.text), ("stderr", 17, "two words"));
        for other in [&b"stdout"[..], b"stdout x y\n", b"\n", b"\xff\xff\n"] {
            assert_eq!(parse(other), None);
        }
    }

    #[tokio::test]
    async fn who_follows_gets_the_last_lines_and_each_new_one_once() {
        let logs = Logs::default();
        let line = |number: u64| LogLine { unix_ns: number, ..LogLine::default() };
        for number in 0..1500 {
            logs.write("f", line(number));
        }
        let (last, mut new) = logs.tail("f", 3);
        assert_eq!(last, [1497, 1498, 1499].map(line));
        logs.write("g", line(7));
        logs.write("f", line(1500));
        assert_eq!(new.recv().await.unwrap(), ("g".to_owned(), line(7)));
        assert_eq!(new.recv().await.unwrap(), ("f".to_owned(), line(1500)));
        assert_eq!(logs.tail("f", 2000).0.len(), LINES);
        assert_eq!(logs.tail("none", 9).0, []);
    }
}
