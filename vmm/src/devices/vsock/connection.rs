//! A connection between a stream on the host and a port of the guest's: how far each side is, and
//! how much it may send (virtio 1.2, 5.10.6.3).

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use nix::poll::PollFlags;

use super::{CREDIT, RW, SHUTDOWN, SHUTDOWN_BOTH, SHUTDOWN_SEND};

/// The header of a packet for the guest, as far as packets differ in it.
#[derive(Clone, Copy)]
pub(super) struct Header {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    pub(super) operation: u16,
    pub(super) flags: u32,
    pub(super) forwarded: u32,
}

/// The guest's side of a connection.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum State {
    /// Not accepted yet.
    Requested,
    Established,
    /// Closed: what is queued still goes out to the stream, then the connection ends.
    Closing,
}

/// A connection.
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    pub(super) state: State,
    /// The stream has ended: nothing more to read from it.
    ended: bool,
    /// Nor will it take anything any more.
    hung_up: bool,
    /// What the guest will not do any more: `SHUTDOWN_*`.
    pub(super) guest_ended: u32,
    /// The stream may have something to read.
    pub(super) readable: bool,
    /// For the stream, when it does not take it at once.
    pub(super) outgoing: VecDeque<u8>,
    /// Bytes from the guest, all of them, and those that the stream took (5.10.6.3, wrapping).
    pub(super) received: u32,
    pub(super) forwarded: u32,
    /// `forwarded`, as the guest last heard it.
    pub(super) announced: u32,
    /// Bytes to the guest, and what it said of its buffer.
    sent: u32,
    pub(super) guest_buffer: u32,
    pub(super) guest_forwarded: u32,
}

impl Connection {
    /// One that the guest is to be asked for.
    pub(super) fn new(stream: UnixStream, host_port: u32, guest_port: u32) -> Self {
        Self {
            stream,
            host_port,
            guest_port,
            state: State::Requested,
            ended: false,
            hung_up: false,
            guest_ended: 0,
            readable: false,
            outgoing: VecDeque::new(),
            received: 0,
            forwarded: 0,
            announced: 0,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
        }
    }

    pub(super) fn header(&self, operation: u16, flags: u32) -> Header {
        Header {
            host_port: self.host_port,
            guest_port: self.guest_port,
            operation,
            flags,
            forwarded: self.forwarded,
        }
    }

    /// What to wait for on the stream. `None` if nothing: poll would still report a stream that was
    /// hung up, again and again.
    pub(super) fn interest(&self) -> Option<PollFlags> {
        let mut events = PollFlags::empty();
        let wanted = self.state == State::Requested || self.room_in_guest() > 0;
        events.set(PollFlags::POLLIN, wanted && !self.readable);
        events.set(PollFlags::POLLOUT, !self.outgoing.is_empty());
        // One that only writes no more may still hang up.
        let is_half = self.ended && !self.hung_up;
        (is_half || !events.is_empty()).then_some(events)
    }

    /// How much the guest can take now: 0 also if there is nothing to be read.
    pub(super) fn room_in_guest(&self) -> usize {
        if self.state != State::Established || self.ended {
            return 0;
        }
        let on_the_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(on_the_way) as usize
    }

    /// The next packet for the guest out of the stream.
    pub(super) fn read<'b>(&mut self, buffer: &'b mut [u8]) -> Option<(Header, &'b [u8])> {
        if !self.readable {
            return None;
        }
        let room = self.room_in_guest().min(buffer.len());
        match self.stream.read(&mut buffer[..room]) {
            Ok(length @ 1..) => {
                self.sent = self.sent.wrapping_add(length as u32);
                self.announced = self.forwarded;
                Some((self.header(RW, 0), &buffer[..length]))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => None,
            Ok(_) => {
                self.ended = true;
                let flags = if self.hung_up { SHUTDOWN_BOTH } else { SHUTDOWN_SEND };
                Some((self.header(SHUTDOWN, flags), &[]))
            }
            Err(_) => {
                (self.ended, self.hung_up) = (true, true);
                Some((self.header(SHUTDOWN, SHUTDOWN_BOTH), &[]))
            }
        }
    }

    /// The stream was closed on the other side, for both directions. The packet that says so, unless
    /// what is still to be read comes before it.
    pub(super) fn hang_up(&mut self) -> Option<Header> {
        let is_new = !std::mem::replace(&mut self.hung_up, true);
        (is_new && self.ended).then(|| self.header(SHUTDOWN, SHUTDOWN_BOTH))
    }

    /// The guest sends no more: passed on behind what it sent.
    pub(super) fn end_if_sent(&mut self) {
        if self.guest_ended & SHUTDOWN_SEND != 0 && self.outgoing.is_empty() {
            // Fails if the other side is gone.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// Whether the guest keeps to the buffer that it was promised.
    pub(super) fn has_room_for(&self, length: usize) -> bool {
        let held = self.received.wrapping_sub(self.forwarded) as usize;
        held + length <= CREDIT as usize
    }

    /// Passes bytes of the guest's on to the stream, or keeps them until it takes them.
    pub(super) fn forward(&mut self, mut data: &[u8]) {
        if self.outgoing.is_empty() {
            let taken = write_some(&mut self.stream, data);
            self.forwarded = self.forwarded.wrapping_add(taken as u32);
            data = &data[taken..];
        }
        self.outgoing.extend(data);
    }

    pub(super) fn flush(&mut self) {
        while !self.outgoing.is_empty() {
            let taken = write_some(&mut self.stream, self.outgoing.as_slices().0);
            if taken == 0 {
                return;
            }
            self.outgoing.drain(..taken);
            self.forwarded = self.forwarded.wrapping_add(taken as u32);
        }
        self.end_if_sent();
    }
}

/// Writes what the stream takes. One that is broken takes everything: its reader is gone, which
/// reading from it will tell.
pub(super) fn write_some(stream: &mut UnixStream, data: &[u8]) -> usize {
    match stream.write(data) {
        Ok(length) => length,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
        Err(_) => data.len(),
    }
}
