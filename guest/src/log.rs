//! What a function writes to its standard output and error: lines for the host, over vsock.
//!
//! A line is the name of the stream, the wall clock in nanoseconds since 1970 (0: before the microVM
//! was released) and what was written, up to its end of line: `stdout 1764352800000000000 hello`.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use warren_abi::microvm::LOG_VSOCK_PORT;

use crate::channel::Channel;

/// The most that waits for somebody to read it, in bytes; the oldest lines go first.
const KEPT: usize = 64 * 1024;

/// The longest line, in bytes; the rest of a longer one becomes another line.
const LINE: usize = 8 * 1024;

/// Where a line comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
    /// The runtime itself.
    Runtime,
}

/// Lines that wait.
#[derive(Default)]
pub struct Log {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    lost: u64,
    /// What was written of a line that has not ended, to stdout and to stderr.
    begun: [Vec<u8>; 2],
    /// What the reader was not yet sent of the line that it has got a part of.
    rest: Vec<u8>,
}

impl Log {
    /// Takes what was written to a stream.
    pub fn write(&mut self, stream: Stream, wall_clock_ns: u64, bytes: &[u8]) {
        let Some(index) = [Stream::Stdout, Stream::Stderr].iter().position(|&of| of == stream)
        else {
            for line in bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
                self.add(stream, wall_clock_ns, line);
            }
            return;
        };
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            let mut line = core::mem::take(&mut self.begun[index]);
            line.extend_from_slice(part.strip_suffix(b"\n").unwrap_or(part));
            if part.ends_with(b"\n") {
                self.add(stream, wall_clock_ns, &line);
            } else if line.len() >= LINE {
                line.chunks(LINE).for_each(|line| self.add(stream, wall_clock_ns, line));
            } else {
                self.begun[index] = line;
            }
        }
    }

    /// Ends lines that were begun.
    pub fn end_lines(&mut self, wall_clock_ns: u64) {
        for (index, stream) in [Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
            let line = core::mem::take(&mut self.begun[index]);
            if !line.is_empty() {
                self.add(stream, wall_clock_ns, &line);
            }
        }
    }

    fn add(&mut self, stream: Stream, wall_clock_ns: u64, text: &[u8]) {
        let name = match stream {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
            Stream::Runtime => "runtime",
        };
        let mut line = Vec::with_capacity(text.len() + 32);
        line.extend_from_slice(format!("{name} {wall_clock_ns} ").as_bytes());
        line.extend_from_slice(String::from_utf8_lossy(text).as_bytes());
        line.push(b'\n');
        self.bytes += line.len();
        self.lines.push_back(line);
        while self.bytes > KEPT {
            let Some(line) = self.lines.pop_front() else { break };
            self.bytes -= line.len();
            self.lost += 1;
        }
    }

    /// Whether there is something that nobody was sent.
    pub fn is_waiting(&self) -> bool {
        !self.lines.is_empty() || !self.rest.is_empty()
    }

    /// Sends to the first who listens, as far as it takes it; returns whether something waits for it.
    pub fn send(&mut self, channel: &mut Channel) -> bool {
        let Some(reader) = channel.connections(LOG_VSOCK_PORT).next() else { return false };
        loop {
            if self.rest.is_empty() {
                if self.lost > 0 {
                    let lost = core::mem::take(&mut self.lost);
                    self.rest = format!("runtime 0 {lost} lines were lost\n").into_bytes();
                } else if let Some(line) = self.lines.pop_front() {
                    self.bytes -= line.len();
                    self.rest = line;
                    // As many as go into one packet.
                    while self.rest.len() < 4096
                        && let Some(line) = self.lines.pop_front()
                    {
                        self.bytes -= line.len();
                        self.rest.extend_from_slice(&line);
                    }
                } else {
                    return false;
                }
            }
            match channel.send(reader, &self.rest) {
                Ok(length) => drop(self.rest.drain(..length)),
                Err(_) => return true,
            }
        }
    }
}
