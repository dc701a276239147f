//! The invocation channel: calls that come over vsock, each a length and so many bytes.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use virtio_drivers::device::socket::{
    SocketError, VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType,
};
use virtio_drivers::transport::mmio::MmioTransport;
use warren_abi::microvm::{INVOCATION_MAX, INVOCATION_PORT};

use crate::hal::GuestHal;

/// Size of each buffer posted for reception: a packet's header and its bytes.
const PACKET: usize = 4096;

/// How much a connection may send ahead, in bytes.
const CREDIT: u32 = 16 * 1024;

/// The most that is sent in one packet.
const CHUNK: usize = 32 * 1024;

/// The invocation channel's connections.
pub struct Calls {
    manager: VsockConnectionManager<GuestHal, MmioTransport<'static>, PACKET>,
    callers: VecDeque<Caller>,
    scratch: Vec<u8>,
    /// A long request is being answered: until then no other is taken.
    serving_long: bool,
}

struct Caller {
    peer: VsockAddr,
    received: Vec<u8>,
    /// Bytes taken since the caller was told how much it may send.
    taken: u32,
}

impl Caller {
    /// Whether more was received of it than may be of each.
    fn is_long(&self) -> bool {
        self.received.len() > CREDIT as usize
    }

    /// Makes room for the whole request at once.
    fn reserve(&mut self) {
        if let Some(header) = self.received.first_chunk::<4>() {
            let length = u32::from_le_bytes(*header).min(INVOCATION_MAX) as usize;
            self.received.reserve_exact((4 + length).saturating_sub(self.received.len()));
        }
    }
}

/// The caller cannot take so much now.
pub struct NoCredit;

impl Calls {
    /// Takes the device over and listens.
    pub fn new(transport: MmioTransport<'static>) -> Self {
        let driver = VirtIOSocket::new(transport).expect("the VMM's vsock device");
        let mut manager = VsockConnectionManager::new_with_capacity(driver, CREDIT);
        manager.listen(INVOCATION_PORT);
        Self {
            manager,
            callers: VecDeque::new(),
            scratch: alloc::vec![0; CREDIT as usize],
            serving_long: false,
        }
    }

    /// Takes what the device has received.
    pub fn poll(&mut self) {
        while let Some(event) = self.manager.poll().expect("packets of the VMM") {
            let peer = event.source;
            match event.event_type {
                VsockEventType::ConnectionRequest => {
                    self.callers.push_back(Caller { peer, received: Vec::new(), taken: 0 });
                }
                VsockEventType::Disconnected { .. } => {
                    self.callers.retain(|caller| caller.peer != peer);
                    // It is known still if it left something to be read.
                    let _ = self.manager.force_close(peer, INVOCATION_PORT);
                }
                VsockEventType::Received { .. }
                | VsockEventType::Connected
                | VsockEventType::CreditRequest
                | VsockEventType::CreditUpdate => {}
            }
            self.receive();
        }
        self.receive();
    }

    /// Takes bytes from all callers, but of long requests one at a time: the others wait in their
    /// callers' sockets, or a few of them would fill the memory.
    fn receive(&mut self) {
        let mut long = self.callers.iter().find(|caller| caller.is_long()).map(|c| c.peer);
        for caller in &mut self.callers {
            loop {
                if caller.is_long() {
                    if self.serving_long || *long.get_or_insert(caller.peer) != caller.peer {
                        break;
                    }
                    caller.reserve();
                }
                // Errors mean that the connection is gone, which an event tells.
                let Ok(length @ 1..) =
                    self.manager.recv(caller.peer, INVOCATION_PORT, &mut self.scratch)
                else {
                    break;
                };
                caller.received.extend_from_slice(&self.scratch[..length]);
                caller.taken += length as u32;
            }
            if caller.taken >= CREDIT / 2 {
                caller.taken = 0;
                let _ = self.manager.update_credit(caller.peer, INVOCATION_PORT);
            }
        }
    }

    /// Takes the next whole request, of callers in turn. Who sends a request that is too long is
    /// disconnected.
    pub fn next(&mut self) -> Option<(VsockAddr, Vec<u8>)> {
        for _ in 0..self.callers.len() {
            let mut caller = self.callers.pop_front()?;
            let peer = caller.peer;
            let Some(header) = caller.received.first_chunk::<4>() else {
                self.callers.push_back(caller);
                continue;
            };
            let length = u32::from_le_bytes(*header);
            if length > INVOCATION_MAX {
                let _ = self.manager.force_close(peer, INVOCATION_PORT);
                continue;
            }
            let end = 4 + length as usize;
            if caller.received.len() < end {
                self.callers.push_back(caller);
                continue;
            }
            let rest = caller.received.split_off(end);
            let mut request = core::mem::replace(&mut caller.received, rest);
            request.drain(..4);
            self.callers.push_back(caller);
            self.serving_long = request.len() > CREDIT as usize;
            return Some((peer, request));
        }
        None
    }

    /// Forgets all callers: they are those of the one that this is a clone of.
    pub fn forget(&mut self) {
        for caller in self.callers.drain(..) {
            // The VMM does not know the connection, and so says nothing to the reset.
            let _ = self.manager.force_close(caller.peer, INVOCATION_PORT);
        }
        self.serving_long = false;
    }

    /// The last request was answered.
    pub fn answered(&mut self) {
        self.serving_long = false;
    }

    /// Sends as much as one packet takes, and returns how much that was. A caller that is gone
    /// takes everything.
    pub fn send(&mut self, peer: VsockAddr, bytes: &[u8]) -> Result<usize, NoCredit> {
        let chunk = &bytes[..bytes.len().min(CHUNK)];
        match self.manager.send(peer, INVOCATION_PORT, chunk) {
            Ok(()) => Ok(chunk.len()),
            Err(virtio_drivers::Error::SocketDeviceError(
                SocketError::InsufficientBufferSpaceInPeer,
            )) => Err(NoCredit),
            Err(_) => Ok(bytes.len()),
        }
    }
}
