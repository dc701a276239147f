//! The microVM's socket: who connects, and what is asked on control connections.

use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::SigSet;
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::time::TimeSpec;

use crate::control::{CONTROL_LINE, EndReason, Refusal, Reply, Request, encode_frame, take_frame};
use crate::timer::kick_on_input;

/// Connections at a time that have not become a vsock stream; more wait in the backlog.
const CONNECTIONS_MAX: usize = 32;

/// The longest first line of a connection, in bytes.
const GREETING_MAX: usize = 32;

/// How long a client may take to read on from a long answer. The guest stands still meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

/// The listening socket and its connections.
pub struct Server {
    listener: UnixListener,
    connections: Vec<Connection>,
    next_id: u64,
    kicks: bool,
}

struct Connection {
    id: u64,
    stream: UnixStream,
    /// Said `CONTROL`; before, only its first line is awaited.
    control: bool,
    received: Vec<u8>,
}

/// What a connection wants.
pub enum Event {
    /// Asked on a control connection, to be answered with this id.
    Request(u64, Request),
    /// A stream for this vsock port.
    Connect(UnixStream, u32),
}

impl Server {
    /// Serves a listening socket.
    pub fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener, connections: Vec::new(), next_id: 0, kicks: false })
    }

    /// Has the guest kicked from now on whenever somebody wants something: see [`kick_on_input`].
    pub fn kick_guest(&mut self) -> io::Result<()> {
        self.kicks = true;
        kick_on_input(&self.listener)?;
        for connection in &self.connections {
            kick_on_input(&connection.stream)?;
        }
        Ok(())
    }

    /// What to wait for: the listener and each connection.
    pub fn poll_fds(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let full = self.connections.len() >= CONNECTIONS_MAX;
        let accept = if full { PollFlags::empty() } else { PollFlags::POLLIN };
        let connections = self.connections.iter().map(|c| (c.stream.as_fd(), PollFlags::POLLIN));
        std::iter::once((self.listener.as_fd(), accept)).chain(connections)
    }

    /// Acts on what poll said, in the order of [`Server::poll_fds`].
    pub fn polled(&mut self, mut events: impl Iterator<Item = PollFlags>, out: &mut Vec<Event>) {
        let accept = events.next().is_some_and(|events| !events.is_empty());
        let mut index = 0;
        for events in events {
            if events.is_empty() {
                index += 1;
                continue;
            }
            // Whether it stays.
            if self.serve(index, out) {
                index += 1;
            }
        }
        if accept {
            self.accept(out);
        }
    }

    fn accept(&mut self, out: &mut Vec<Event>) {
        while self.connections.len() < CONNECTIONS_MAX {
            let Ok((stream, _)) = self.listener.accept() else { return };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.kicks && kick_on_input(&stream).is_err() {
                continue;
            }
            self.next_id += 1;
            let connection =
                Connection { id: self.next_id, stream, control: false, received: Vec::new() };
            self.connections.push(connection);
            // Clients write at once: often all is there already.
            self.serve(self.connections.len() - 1, out);
        }
    }

    /// Reads what a connection has; returns whether it stays in the list.
    fn serve(&mut self, index: usize, out: &mut Vec<Event>) -> bool {
        let connection = &mut self.connections[index];
        let kept = if connection.control {
            connection.read_requests(out)
        } else {
            match connection.read_greeting() {
                Greeting::Incomplete => true,
                Greeting::Control => {
                    connection.control = true;
                    connection.read_requests(out)
                }
                Greeting::Connect(port) => {
                    let connection = self.connections.remove(index);
                    out.push(Event::Connect(connection.stream, port));
                    return false;
                }
                Greeting::Refused => false,
            }
        };
        if !kept {
            self.connections.remove(index);
        }
        kept
    }

    /// Answers a request. A client that does not read its answers loses its connection.
    pub fn reply(&mut self, id: u64, reply: &Reply) {
        let Some(index) = self.connections.iter().position(|connection| connection.id == id) else {
            return;
        };
        let frame = encode_frame(reply);
        if self.connections[index].stream.write(&frame).ok() != Some(frame.len()) {
            self.connections.remove(index);
        }
    }

    /// Answers a request, and writes more behind the answer. A client that does not read on loses its
    /// connection.
    pub fn stream(
        &mut self,
        id: u64,
        reply: &Reply,
        more: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) {
        let Some(index) = self.connections.iter().position(|connection| connection.id == id) else {
            return;
        };
        let mut out = BufWriter::with_capacity(64 << 10, Patient(&self.connections[index].stream));
        let written = out.write_all(&encode_frame(reply)).and_then(|()| more(&mut out));
        let written = written.and_then(|()| out.flush());
        // What is left in there after a failure is for nobody.
        drop(out.into_parts());
        if let Err(error) = written {
            tracing::warn!(%error, "a client did not take its answer");
            self.connections.remove(index);
        }
    }

    /// Stops listening, and tells every control connection, also those that are just coming, why the
    /// microVM ended.
    pub fn ended(mut self, reason: &EndReason) {
        self.accept(&mut Vec::new());
        let Self { listener, connections, .. } = self;
        drop(listener);
        let frame = encode_frame(&Reply::Ended(reason.clone()));
        for mut connection in connections {
            if connection.control {
                let _ = connection.stream.write(&frame);
            }
        }
    }
}

/// A socket that is waited for if it takes no more.
struct Patient<'s>(&'s UnixStream);

impl Write for Patient<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => return result,
            }
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
            match ppoll(&mut fds, Some(TimeSpec::from(PATIENCE)), None::<SigSet>) {
                Ok(0) => return Err(ErrorKind::TimedOut.into()),
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Greeting {
    Incomplete,
    Control,
    Connect(u32),
    Refused,
}

impl Connection {
    /// Takes the first line off the socket and nothing behind it: that belongs to the guest.
    fn read_greeting(&mut self) -> Greeting {
        let mut line = [0; GREETING_MAX];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let length = match recv(self.stream.as_raw_fd(), &mut line, flags) {
            Ok(0) => return Greeting::Refused,
            Ok(length) => length,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Greeting::Incomplete,
            Err(_) => return Greeting::Refused,
        };
        let Some(end) = line[..length].iter().position(|&byte| byte == b'\n') else {
            return if length < GREETING_MAX { Greeting::Incomplete } else { Greeting::Refused };
        };
        let line = &mut line[..=end];
        if self.stream.read_exact(line).is_err() {
            return Greeting::Refused;
        }
        if line == CONTROL_LINE {
            return Greeting::Control;
        }
        let port = std::str::from_utf8(&line[..end])
            .ok()
            .and_then(|line| line.strip_prefix("CONNECT ")?.parse().ok());
        port.map_or(Greeting::Refused, Greeting::Connect)
    }

    /// Reads requests until there are none; returns whether the connection can be used further.
    fn read_requests(&mut self, out: &mut Vec<Event>) -> bool {
        let mut buffer = [0; 4096];
        let open = loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => break false,
                Ok(length) => {
                    self.received.extend_from_slice(&buffer[..length]);
                    // There was no more.
                    if length < buffer.len() {
                        break true;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break true,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => break false,
            }
            // Whoever sends faster than this is read again next time.
            if self.received.len() > crate::control::MESSAGE_MAX {
                break true;
            }
        };
        loop {
            match take_frame(&mut self.received) {
                Ok(Some(request)) => out.push(Event::Request(self.id, request)),
                Ok(None) => return open,
                Err(_) => {
                    let _ = self.stream.write(&encode_frame(&Reply::Refused(Refusal::Malformed)));
                    return false;
                }
            }
        }
    }
}
