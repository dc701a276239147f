//! Byte streams from the host, over vsock.

use alloc::vec::Vec;

use virtio_drivers::device::socket::{
    SocketError, VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType,
};
use virtio_drivers::transport::mmio::MmioTransport;

use crate::hal::GuestHal;

/// Size of each buffer posted for reception: a packet's header and its bytes.
const PACKET: usize = 4096;

/// How much a connection may send ahead, in bytes.
pub const CREDIT: usize = 16 * 1024;

/// The most that is sent in one packet.
const CHUNK: usize = 32 * 1024;

/// All connections from the host.
pub struct Channel {
    manager: VsockConnectionManager<GuestHal, MmioTransport<'static>, PACKET>,
    /// Those that are open, in the order in which they came.
    open: Vec<Open>,
    next: u64,
}

struct Open {
    connection: Connection,
    /// Bytes taken since the other side was told how much it may send.
    taken: usize,
}

/// A connection; another one never equals it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    peer: VsockAddr,
    /// The guest's port.
    pub port: u32,
    serial: u64,
}

/// The other side cannot take so much now.
pub struct NoCredit;

impl Channel {
    /// Takes the device over and listens on these ports.
    pub fn new(transport: MmioTransport<'static>, ports: &[u32]) -> Self {
        let driver = VirtIOSocket::new(transport).expect("the VMM's vsock device");
        let mut manager = VsockConnectionManager::new_with_capacity(driver, CREDIT as u32);
        for &port in ports {
            manager.listen(port);
        }
        Self { manager, open: Vec::new(), next: 0 }
    }

    /// Takes what the device has received. Who only stops sending counts as gone: the driver does not tell
    /// the one from the other.
    pub fn poll(&mut self) {
        while let Some(event) = self.manager.poll().expect("packets of the VMM") {
            let (peer, port) = (event.source, event.destination.port);
            match event.event_type {
                VsockEventType::ConnectionRequest => {
                    let connection = Connection { peer, port, serial: self.next };
                    self.next += 1;
                    self.open.push(Open { connection, taken: 0 });
                }
                VsockEventType::Disconnected { .. } => {
                    self.open.retain(|Open { connection: known, .. }| {
                        (known.peer, known.port) != (peer, port)
                    });
                    // It is known still if it left something to be read.
                    let _ = self.manager.force_close(peer, port);
                }
                VsockEventType::Received { .. }
                | VsockEventType::Connected
                | VsockEventType::CreditRequest
                | VsockEventType::CreditUpdate => {}
            }
        }
    }

    /// The open connections to a port, in the order in which they came.
    pub fn connections(&self, port: u32) -> impl Iterator<Item = Connection> {
        let connections = self.open.iter().map(|open| open.connection);
        connections.filter(move |connection| connection.port == port)
    }

    /// Whether both sides still hold it.
    pub fn is_open(&self, connection: Connection) -> bool {
        self.open.iter().any(|open| open.connection == connection)
    }

    /// Whether there is something to be received.
    pub fn has_received(&mut self, Connection { peer, port, .. }: Connection) -> bool {
        self.manager.recv_buffer_available_bytes(peer, port).is_ok_and(|bytes| bytes > 0)
    }

    /// Takes bytes that came, up to the buffer's length, and returns how many; 0: none now.
    pub fn receive(&mut self, connection: Connection, buffer: &mut [u8]) -> usize {
        let Some(open) = self.open.iter_mut().find(|open| open.connection == connection) else {
            return 0;
        };
        let Connection { peer, port, .. } = connection;
        // Errors mean that the connection is gone, which an event tells.
        let length = self.manager.recv(peer, port, buffer).unwrap_or(0);
        open.taken += length;
        if open.taken >= CREDIT / 2 {
            open.taken = 0;
            let _ = self.manager.update_credit(peer, port);
        }
        length
    }

    /// Sends as much as one packet takes, and returns how much that was. A connection that is gone
    /// takes everything.
    pub fn send(&mut self, connection: Connection, bytes: &[u8]) -> Result<usize, NoCredit> {
        if bytes.is_empty() || !self.is_open(connection) {
            return Ok(bytes.len());
        }
        let chunk = &bytes[..bytes.len().min(CHUNK)];
        match self.manager.send(connection.peer, connection.port, chunk) {
            Ok(()) => Ok(chunk.len()),
            Err(virtio_drivers::Error::SocketDeviceError(
                SocketError::InsufficientBufferSpaceInPeer,
            )) => Err(NoCredit),
            Err(_) => Ok(bytes.len()),
        }
    }

    /// Closes one, once what was sent has gone.
    pub fn close(&mut self, connection: Connection) {
        if self.is_open(connection) {
            self.open.retain(|open| open.connection != connection);
            let _ = self.manager.force_close(connection.peer, connection.port);
        }
    }

    /// Forgets all of them: they are those of the one that this is a clone of.
    pub fn forget(&mut self) {
        for Open { connection: Connection { peer, port, .. }, .. } in self.open.drain(..) {
            // The VMM does not know the connection, and so says nothing to the reset.
            let _ = self.manager.force_close(peer, port);
        }
    }
}
