//! The invocation channel: calls that come over vsock, each a length and so many bytes.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use warren_abi::microvm::{INVOCATION_MAX, INVOCATION_PORT};

use crate::channel::{CREDIT, Channel, Connection};

/// The callers and what came of their requests.
pub struct Calls {
    callers: VecDeque<Caller>,
    scratch: Vec<u8>,
}

struct Caller {
    connection: Connection,
    received: Vec<u8>,
}

impl Caller {
    /// Whether more was received of it than may be of each.
    fn is_long(&self) -> bool {
        self.received.len() > CREDIT
    }

    /// Makes room for the whole request at once.
    fn reserve(&mut self) {
        if let Some(header) = self.received.first_chunk::<4>() {
            let length = u32::from_le_bytes(*header).min(INVOCATION_MAX) as usize;
            self.received.reserve_exact((4 + length).saturating_sub(self.received.len()));
        }
    }
}

impl Calls {
    pub fn new() -> Self {
        Self { callers: VecDeque::new(), scratch: alloc::vec![0; CREDIT] }
    }

    /// Takes bytes from all callers, but of long requests one at a time: the others wait in their
    /// callers' sockets, or a few of them would fill the memory.
    fn receive(&mut self, channel: &mut Channel) {
        self.callers.retain(|caller| channel.is_open(caller.connection));
        for connection in channel.connections(INVOCATION_PORT) {
            if !self.callers.iter().any(|caller| caller.connection == connection) {
                self.callers.push_back(Caller { connection, received: Vec::new() });
            }
        }
        let mut long = self.callers.iter().find(|caller| caller.is_long()).map(|c| c.connection);
        for caller in &mut self.callers {
            loop {
                if caller.is_long() {
                    if *long.get_or_insert(caller.connection) != caller.connection {
                        break;
                    }
                    caller.reserve();
                }
                let length = channel.receive(caller.connection, &mut self.scratch);
                if length == 0 {
                    break;
                }
                caller.received.extend_from_slice(&self.scratch[..length]);
            }
        }
    }

    /// Takes the next whole request, of callers in turn. Who sends a request that is too long is
    /// disconnected.
    pub fn next(&mut self, channel: &mut Channel) -> Option<(Connection, Vec<u8>)> {
        self.receive(channel);
        for _ in 0..self.callers.len() {
            let mut caller = self.callers.pop_front()?;
            let connection = caller.connection;
            let Some(header) = caller.received.first_chunk::<4>() else {
                self.callers.push_back(caller);
                continue;
            };
            let length = u32::from_le_bytes(*header);
            if length > INVOCATION_MAX {
                channel.close(connection);
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
            return Some((connection, request));
        }
        None
    }
}
