//! TCP connections of a function.

use alloc::vec;
use alloc::vec::Vec;
use core::arch::asm;

use rand_chacha::rand_core::Rng;
use smoltcp::socket::tcp::{self, ConnectError, RecvError, State};
use smoltcp::wire::{IpEndpoint, IpListenEndpoint};

use crate::machine::Machine;
use crate::net::Owned;
use crate::stream::{Broken, End, Sink, Source};

/// Room for what came and for what goes, each, in bytes. Only what is used of it is ever touched.
const BUFFER: usize = 128 * 1024;

/// Ephemeral ports (RFC 6335).
const FIRST_PORT: u16 = 49152;

/// A port from the clone's own random generator.
pub fn ephemeral_port(machine: &mut Machine) -> u16 {
    FIRST_PORT + (machine.random.next_u32() % u32::from(u16::MAX - FIRST_PORT)) as u16
}

/// Memory that nothing was written to: to write zeroes would touch, and so copy, all of its pages.
pub fn untouched(bytes: usize) -> Vec<u8> {
    let mut buffer = Vec::<u8>::with_capacity(bytes);
    // SAFETY: the assembler block may have written to the memory, for all that the compiler knows, and
    // what the memory has held before are bytes. It is as long as the capacity.
    unsafe {
        asm!("/* {0} */", in(reg) buffer.as_mut_ptr(), options(nostack, preserves_flags));
        buffer.set_len(bytes);
    }
    buffer
}

/// A connection, closed when it is dropped: what is queued is still sent.
pub struct Tcp {
    socket: Owned,
    was_open: bool,
}

impl Tcp {
    /// Begins to connect, from a port that is free unless one is given.
    pub fn connect(
        machine: &mut Machine,
        to: IpEndpoint,
        port: Option<u16>,
    ) -> Result<Self, ConnectError> {
        let port = port.unwrap_or_else(|| ephemeral_port(machine));
        let buffer = || tcp::SocketBuffer::new(untouched(BUFFER));
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        let from = IpListenEndpoint { addr: None, port };
        socket.connect(machine.interface.context(), to, from)?;
        Ok(Self { socket: machine.sockets.add(socket), was_open: false })
    }

    /// The socket itself.
    pub fn socket<'a>(&self, machine: &'a mut Machine) -> &'a mut tcp::Socket<'static> {
        machine.sockets.set.get_mut(self.socket.handle)
    }

    /// `None` while it is being connected, then whether it could be.
    pub fn is_connected(&mut self, machine: &mut Machine) -> Option<bool> {
        match self.socket(machine).state() {
            State::SynSent | State::SynReceived => None,
            State::Closed => Some(self.was_open),
            _ => {
                self.was_open = true;
                Some(true)
            }
        }
    }

    /// Takes what came, up to the buffer's length; 0: nothing did, yet.
    pub fn receive(&mut self, machine: &mut Machine, buffer: &mut [u8]) -> Result<usize, End> {
        let socket = self.socket(machine);
        match socket.recv_slice(buffer) {
            Ok(length) => Ok(length),
            Err(RecvError::Finished) => Err(End::Closed),
            Err(RecvError::InvalidState) => match socket.state() {
                State::SynSent | State::SynReceived => Ok(0),
                _ => Err(End::Failed(Broken::Reset)),
            },
        }
    }

    /// Whether [`Tcp::receive`] has something to say.
    pub fn has_received(&self, machine: &mut Machine) -> bool {
        let socket = self.socket(machine);
        socket.can_recv() || !(socket.may_recv() || is_opening(socket))
    }

    /// How many bytes it takes.
    pub fn room(&self, machine: &mut Machine) -> Result<usize, End> {
        let socket = self.socket(machine);
        match socket.may_send() {
            true => Ok(socket.send_capacity() - socket.send_queue()),
            false if is_opening(socket) => Ok(0),
            false => Err(End::Failed(Broken::Reset)),
        }
    }

    /// Queues bytes, and returns how many.
    pub fn send(&mut self, machine: &mut Machine, bytes: &[u8]) -> Result<usize, End> {
        self.socket(machine).send_slice(bytes).map_err(|_| End::Failed(Broken::Reset))
    }
}

fn is_opening(socket: &tcp::Socket<'_>) -> bool {
    matches!(socket.state(), State::SynSent | State::SynReceived)
}

impl Source for Tcp {
    fn read(&mut self, machine: &mut Machine, limit: usize) -> Result<Vec<u8>, End> {
        let socket = self.socket(machine);
        let mut bytes = vec![0; limit.min(socket.recv_queue())];
        if bytes.is_empty() {
            // At least a byte: to be told of the end.
            let length = self.receive(machine, &mut [0; 0])?;
            debug_assert_eq!(length, 0);
            return Ok(bytes);
        }
        let length = self.receive(machine, &mut bytes)?;
        bytes.truncate(length);
        Ok(bytes)
    }

    fn is_ready(&mut self, machine: &mut Machine) -> bool {
        self.has_received(machine)
    }
}

impl Sink for Tcp {
    fn room(&mut self, machine: &mut Machine) -> Result<usize, End> {
        Tcp::room(self, machine)
    }

    fn write(&mut self, machine: &mut Machine, bytes: &[u8]) -> Result<(), End> {
        self.send(machine, bytes).map(drop)
    }
}
