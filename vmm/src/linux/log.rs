//! What a guest writes to its serial port and its console, as lines of the host's log.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::time::Instant;

use crate::devices::limiter::{Limit, Limiter};

/// The longest line, in bytes; a longer one is broken.
const LINE_MAX: usize = 512;

/// How many lines are kept to tell why a guest ended.
const KEPT: usize = 8;

/// What a line of Linux' has that says why it ends.
const PANIC: &str = "Kernel panic";

/// What a guest may write, in bytes per second and at once.
const BYTES_PER_SECOND: NonZeroU64 = NonZeroU64::new(64 << 10).unwrap();

/// Lines of one source.
pub struct Log {
    source: &'static str,
    line: Vec<u8>,
    last: VecDeque<String>,
    panic: Option<String>,
    lost: u64,
    limiter: Limiter,
}

impl Log {
    /// Nothing yet.
    pub fn new(source: &'static str) -> Self {
        let bytes = Limit { per_second: BYTES_PER_SECOND, burst: BYTES_PER_SECOND.get() };
        let limiter = Limiter::new(Some(bytes), None, Instant::now());
        Self { source, line: Vec::new(), last: VecDeque::new(), panic: None, lost: 0, limiter }
    }

    /// Takes some of what the guest wrote, anything, in whatever parts.
    pub fn take(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' => self.end_line(),
                _ => self.line.push(byte),
            }
            if self.line.len() >= LINE_MAX {
                self.end_line();
            }
        }
    }

    /// So many bytes were lost before they came here.
    pub fn lost(&mut self, bytes: u64) {
        self.lost += bytes;
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let line = line.trim_ascii_end();
        // Escaped: the guest shall not write lines of its own into our log.
        let text = String::from_utf8_lossy(line).escape_debug().to_string();
        if text.is_empty() {
            return;
        }
        if text.contains(PANIC) {
            self.panic.get_or_insert_with(|| text.clone());
        }
        if self.last.len() == KEPT {
            self.last.pop_front();
        }
        self.last.push_back(text.clone());
        if self.limiter.stopped_until().is_some() {
            self.lost += line.len() as u64;
            return;
        }
        self.limiter.passed(line.len());
        if self.lost > 0 {
            tracing::warn!(source = self.source, bytes = self.lost, "the guest wrote too much");
            self.lost = 0;
        }
        tracing::info!(source = self.source, "{text}");
    }

    /// The last lines; or why the kernel panicked, which it says before much else.
    pub fn last(&self) -> String {
        if let Some(panic) = &self.panic {
            return panic.clone();
        }
        self.last.iter().map(String::as_str).collect::<Vec<_>>().join(" | ")
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.take(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_however_they_come_and_hold_nothing_but_text() {
        let mut log = Log::new("test");
        for part in [&b"Linux ver"[..], b"sion\r\n\r\nwarn\x1b[1ming\nno end"] {
            log.take(part);
        }
        assert_eq!(log.last(), "Linux version | warn\\u{1b}[1ming");
    }

    #[test]
    fn a_flood_is_cut_and_counted_and_its_end_still_told() {
        let mut log = Log::new("test");
        for number in 0..10_000 {
            log.take(format!("{number:<100}x\n").as_bytes());
        }
        assert!(log.lost > 0);
        assert!(log.last().contains("9999"));
        log.take(&[b'a'; 10 * LINE_MAX]);
        assert!(log.line.len() < LINE_MAX);
    }
}
