//! One TCP connection at a time, and the operations that need nothing above it.

use alloc::vec::Vec;

use smoltcp::socket::tcp::{self, RecvError, State};
use warren_abi::probe::{Endpoint, Outcome, Timings};

use super::{Failure, endpoint};
use crate::machine::Machine;
use crate::tcp::ephemeral_port;

/// How long a peer may take to close after us, in nanoseconds.
const LINGER_NS: u64 = 1_000_000_000;

/// A TCP connection, aborted when it is dropped before it is closed.
pub struct Connection<'a> {
    pub machine: &'a mut Machine,
    deadline: u64,
}

impl<'a> Connection<'a> {
    /// Connects.
    pub fn open(
        machine: &'a mut Machine,
        to: Endpoint,
        deadline: u64,
        timings: &mut Timings,
    ) -> Result<Self, Failure> {
        let to = endpoint(to)?;
        let port = ephemeral_port(machine);
        let mut this = Self { machine, deadline };
        // What is left of the call before: nothing, or a connection in TIME-WAIT.
        this.socket().abort();
        let machine = &mut *this.machine;
        let socket = machine.sockets.tcp();
        if socket.connect(machine.interface.context(), to, port).is_err() {
            return Err("the server's address cannot be connected to".into());
        }
        loop {
            match this.socket().state() {
                State::SynSent | State::SynReceived => this.wait()?,
                State::Closed => return Err("connection refused".into()),
                _ => break,
            }
        }
        timings.connected_ns = this.machine.now_ns();
        Ok(this)
    }

    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.machine.sockets.tcp()
    }

    pub fn wait(&mut self) -> Result<(), Failure> {
        Ok(self.machine.wait_before(self.deadline)?)
    }

    /// Queues all of these bytes, waiting for room where there is none.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let mut sent = 0;
        while sent < bytes.len() {
            sent += self.send_some(&bytes[sent..])?;
            if sent < bytes.len() {
                self.wait()?;
            }
        }
        Ok(())
    }

    fn send_some(&mut self, bytes: &[u8]) -> Result<usize, Failure> {
        self.socket().send_slice(bytes).map_err(|_| "the server reset the connection".into())
    }

    /// Waits for bytes and hands them over; `None` if the server closed its side.
    ///
    /// `take` returns how many of them it takes, at least one.
    pub fn receive<R>(
        &mut self,
        mut take: impl FnMut(&mut [u8]) -> (usize, R),
    ) -> Result<Option<R>, Failure> {
        loop {
            if self.socket().can_recv() {
                return match self.socket().recv(&mut take) {
                    Ok(result) => Ok(Some(result)),
                    Err(_) => Err("the server reset the connection".into()),
                };
            }
            match self.socket().recv(|_| (0, ())) {
                Err(RecvError::Finished) => return Ok(None),
                Err(RecvError::InvalidState) => {
                    return Err("the server reset the connection".into());
                }
                Ok(()) => self.wait()?,
            }
        }
    }

    /// [`Connection::receive`] into a vector.
    pub fn receive_into(&mut self, buffer: &mut Vec<u8>) -> Result<bool, Failure> {
        let received = self.receive(|bytes| {
            buffer.extend_from_slice(bytes);
            (bytes.len(), ())
        })?;
        Ok(received.is_some())
    }

    /// Closes our side after what is queued, and waits until the server has closed its own.
    /// Whatever it still sends is thrown away.
    pub fn close(mut self, deadline: u64) -> Result<(), Failure> {
        self.socket().close();
        self.deadline = deadline;
        loop {
            match self.socket().state() {
                State::Closed | State::TimeWait => return Ok(()),
                _ => {
                    let _ = self.socket().recv(|bytes| (bytes.len(), ()));
                    self.wait()?;
                }
            }
        }
    }

    /// [`Connection::close`] when the result is known already: a server that does not close within
    /// a second is reset.
    pub fn finish(self) {
        let deadline = self.deadline.min(self.machine.now_ns() + LINGER_NS);
        let _ = self.close(deadline);
    }
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        if self.socket().state() != State::TimeWait {
            // The RST leaves when the machine waits next.
            self.socket().abort();
        }
    }
}

pub fn connect_and_close(
    machine: &mut Machine,
    to: Endpoint,
    deadline: u64,
    timings: &mut Timings,
) -> Result<Outcome, Failure> {
    Connection::open(machine, to, deadline, timings)?.finish();
    Ok(Outcome::Done)
}

pub fn bulk_send(
    machine: &mut Machine,
    to: Endpoint,
    bytes: u64,
    deadline: u64,
    timings: &mut Timings,
) -> Result<Outcome, Failure> {
    // Two periods, so that from any offset a whole chunk can be taken.
    let pattern: Vec<u8> = (0..2 * CHUNK).map(|n| (n % 251) as u8).collect();
    let mut connection = Connection::open(machine, to, deadline, timings)?;
    let mut sent = 0;
    while sent < bytes {
        let offset = (sent % 251) as usize;
        let length = (bytes - sent).min(CHUNK as u64) as usize;
        let taken = connection.send_some(&pattern[offset..offset + length])?;
        sent += taken as u64;
        if taken < length {
            connection.wait()?;
        }
    }
    connection.close(deadline)?;
    Ok(Outcome::Bulk { bytes: sent, corrupt_at: None })
}

/// How much of the pattern is handed over at a time.
const CHUNK: usize = 16 * 1024;

pub fn bulk_receive(
    machine: &mut Machine,
    to: Endpoint,
    limit: u64,
    deadline: u64,
    timings: &mut Timings,
) -> Result<Outcome, Failure> {
    let mut connection = Connection::open(machine, to, deadline, timings)?;
    let (mut received, mut corrupt_at) = (0, None);
    while received < limit {
        let check = |bytes: &mut [u8]| {
            let length = bytes.len().min((limit - received) as usize);
            let wrong = bytes[..length]
                .iter()
                .enumerate()
                .position(|(n, &byte)| byte != ((received + n as u64) % 251) as u8);
            (length, (length, wrong))
        };
        let Some((length, wrong)) = connection.receive(check)? else { break };
        if timings.first_byte_ns == 0 {
            timings.first_byte_ns = connection.machine.now_ns();
        }
        if let Some(n) = wrong {
            corrupt_at = corrupt_at.or(Some(received + n as u64));
        }
        received += length as u64;
    }
    connection.finish();
    Ok(Outcome::Bulk { bytes: received, corrupt_at })
}
