//! virtio-vsock (virtio 1.2, 5.10) over Unix stream sockets: connections from the host only.

mod connection;

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::poll::PollFlags;
use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};
use vm_memory::{Bytes, GuestMemoryMmap, VolatileSlice};
use warren_abi::microvm::GUEST_CID;

use connection::{Connection, Header, State, write_some};

use super::mmio::{Kind, Mmio, MmioState, QueueKind};
use super::queue::Virtqueue;
use super::{Device, QueueError};

/// virtio-vsock. The driver that polls sends one packet at a time and spins until it is used, so it
/// notifies.
pub static KIND: Kind = Kind {
    id: 19,
    features: 0,
    optional: 0,
    requires: &[],
    queues: &[
        QueueKind { name: "vsock rx", size: 64, notify: false },
        QueueKind { name: "vsock tx", size: 64, notify: true },
        QueueKind { name: "vsock event", size: 64, notify: false },
    ],
};
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// The guest's context identifier (5.10.4).
const CONFIG: [u8; 8] = GUEST_CID.to_le_bytes();

/// The host's context identifier.
const HOST_CID: u64 = 2;

/// How much the guest may send ahead on a connection, in bytes.
const CREDIT: u32 = 256 * 1024;

/// The longest packet taken from the guest, in bytes.
const PACKET_MAX: u32 = 64 * 1024;

/// Connections at a time.
pub const CONNECTIONS_MAX: usize = 64;

/// Packets without data that wait for the guest; only a hostile one lets so many collect.
const WAITING_MAX: usize = 256;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
const STREAM: u16 = 1;

// Operations (5.10.6).
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// Who says so sends no more; and neither receives any more (5.10.6.1).
const SHUTDOWN_SEND: u32 = 2;
const SHUTDOWN_BOTH: u32 = 3;

/// The vsock device and its connections.
pub struct Vsock {
    mmio: Mmio,
    connections: Vec<Connection>,
    /// Packets without data, for the guest.
    waiting: VecDeque<Header>,
    next_port: u32,
    /// As long as the longest packet's data so far.
    buffer: Vec<u8>,
}

impl Default for Vsock {
    fn default() -> Self {
        Self {
            mmio: Mmio::new(&KIND),
            connections: Vec::new(),
            waiting: VecDeque::new(),
            next_port: 1024,
            buffer: Vec::new(),
        }
    }
}

impl Vsock {
    /// A device after reset.
    pub fn new() -> Self {
        Self::default()
    }

    /// A device in a saved state, without connections.
    pub fn load(state: &MmioState, memory: &GuestMemoryMmap) -> Result<Self, QueueError> {
        Ok(Self { mmio: Mmio::load(&KIND, state, memory)?, ..Self::new() })
    }

    /// Saves the device. Connections are not part of a template: there is no host side to them.
    pub fn save(&self) -> MmioState {
        self.mmio.save()
    }

    /// Tells the driver that its connections are gone, and that its context identifier may be
    /// another: what a clone must hear whose template had connections (5.10.6.7). A driver that has
    /// made no buffer available for that does not hear it.
    ///
    /// # Errors
    /// Its buffer is not what virtio allows.
    pub fn tell_reset(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        if !self.mmio.is_live(EVENT) {
            return Ok(());
        }
        let queue = &mut self.mmio.queues[EVENT];
        queue.begin();
        let Some(chain) = queue.next_chain(memory)? else { return Ok(()) };
        let (head, event) = (chain.head_index(), TRANSPORT_RESET.to_le_bytes());
        let mut writer = chain.writer(memory).map_err(|error| queue.error(&error))?;
        writer.write_all(&event).map_err(|error| queue.error(&error))?;
        queue.add_used(memory, head, event.len() as u32)
    }

    /// Connects a stream to a port of the guest's. If there are too many it is dropped, which
    /// closes it.
    pub fn connect(&mut self, stream: UnixStream, guest_port: u32) {
        if self.connections.len() >= CONNECTIONS_MAX {
            return;
        }
        let host_port = self.next_port;
        self.next_port = self.next_port.wrapping_add(1).max(1024);
        let connection = Connection::new(stream, host_port, guest_port);
        self.waiting.push_back(connection.header(REQUEST, 0));
        self.connections.push(connection);
    }

    /// Takes all packets that the guest queued.
    pub fn transmit(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        if !self.mmio.is_live(TX) {
            return Ok(());
        }
        self.mmio.queues[TX].begin();
        while let Some(mut chain) = self.mmio.queues[TX].next_chain(memory)? {
            let head = chain.head_index();
            let packet = VsockPacket::from_tx_virtq_chain(memory, &mut chain, PACKET_MAX)
                .map_err(|error| self.mmio.queues[TX].error(&error))?;
            let data = match packet.data_slice() {
                Some(slice) => {
                    let data = room_for(&mut self.buffer, slice.len());
                    slice.copy_to(data);
                    data.len()
                }
                None => 0,
            };
            self.take_packet(&packet, data);
            self.mmio.queues[TX].add_used(memory, head, 0)?;
        }
        Ok(())
    }

    /// Acts on a packet whose data is in `buffer`.
    fn take_packet<B: vm_memory::bitmap::BitmapSlice>(
        &mut self,
        packet: &VsockPacket<'_, B>,
        length: usize,
    ) {
        let operation = packet.op();
        let known = self.connections.iter_mut().position(|connection| {
            connection.host_port == packet.dst_port() && connection.guest_port == packet.src_port()
        });
        let valid = packet.src_cid() == GUEST_CID
            && packet.dst_cid() == HOST_CID
            && packet.type_() == STREAM;
        let Some(index) = known.filter(|_| valid) else {
            // Answered so that the guest forgets it too, but never a reset by a reset.
            if operation != RST && self.waiting.len() < WAITING_MAX {
                self.waiting.push_back(Header {
                    host_port: packet.dst_port(),
                    guest_port: packet.src_port(),
                    operation: RST,
                    flags: 0,
                    forwarded: 0,
                });
            }
            return;
        };
        let connection = &mut self.connections[index];
        connection.guest_buffer = packet.buf_alloc();
        connection.guest_forwarded = packet.fwd_cnt();
        let mut reply = None;
        match operation {
            RESPONSE if connection.state == State::Requested => {
                connection.state = State::Established;
                connection.readable = true;
                // The guest's first bytes come later: a fresh socket takes this line at once.
                let line = format!("OK {}\n", connection.host_port);
                write_some(&mut connection.stream, line.as_bytes());
            }
            RW if connection.state == State::Established && connection.has_room_for(length) => {
                connection.received = connection.received.wrapping_add(length as u32);
                connection.forward(&self.buffer[..length]);
                if connection.forwarded.wrapping_sub(connection.announced) > CREDIT / 2 {
                    reply = Some(CREDIT_UPDATE);
                }
            }
            CREDIT_UPDATE => {}
            CREDIT_REQUEST => reply = Some(CREDIT_UPDATE),
            SHUTDOWN
                if (connection.guest_ended | packet.flags()) & SHUTDOWN_BOTH != SHUTDOWN_BOTH =>
            {
                connection.guest_ended |= packet.flags();
                connection.end_if_sent();
            }
            RST => connection.state = State::Closing,
            // A shutdown of both directions; or what the protocol does not allow here.
            _ => {
                connection.state = State::Closing;
                reply = Some(RST);
            }
        }
        if connection.state == State::Closing {
            tracing::debug!(
                host_port = connection.host_port,
                operation,
                length,
                "vsock connection closed by the guest"
            );
        }
        if let Some(operation) = reply.filter(|_| self.waiting.len() < WAITING_MAX) {
            let header = connection.header(operation, 0);
            connection.announced = connection.forwarded;
            self.waiting.push_back(header);
        }
        self.forget_closed();
    }

    /// Hands packets to the guest while there are any and it has buffers; returns whether it did.
    pub fn receive(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        if !self.mmio.is_live(RX) {
            return Ok(false);
        }
        let Self { mmio, connections, waiting, buffer, .. } = self;
        let queue = &mut mmio.queues[RX];
        queue.begin();
        let mut received = false;
        while let Some(header) = waiting.front().copied() {
            if !deliver(queue, memory, |_| Some((header, &[])))? {
                return Ok(received);
            }
            waiting.pop_front();
            received = true;
        }
        for connection in connections {
            while connection.readable
                && connection.room_in_guest() > 0
                && deliver(queue, memory, |room| connection.read(room_for(buffer, room)))?
            {
                received = true;
            }
        }
        Ok(received)
    }

    /// The streams to wait for, and for what.
    pub fn poll_fds(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let wanted = |c| Connection::interest(c).map(|events| (c.stream.as_fd(), events));
        self.connections.iter().filter_map(wanted)
    }

    /// Acts on what poll said of the streams, in the order of [`Vsock::poll_fds`].
    pub fn polled(&mut self, events: impl Iterator<Item = PollFlags>) {
        let wanted = self.connections.iter_mut().filter(|c| c.interest().is_some());
        for (connection, events) in wanted.zip(events) {
            let failed = events.intersects(PollFlags::POLLERR | PollFlags::POLLHUP);
            if failed && connection.state == State::Requested {
                // Nobody waits for the guest's answer any more; it will get a reset for it.
                connection.state = State::Closing;
            }
            if failed
                && let Some(end) = connection.hang_up()
                && self.waiting.len() < WAITING_MAX
            {
                self.waiting.push_back(end);
            }
            if failed || events.contains(PollFlags::POLLIN) {
                connection.readable = true;
            }
            if failed || events.contains(PollFlags::POLLOUT) {
                connection.flush();
                let credit = connection.forwarded.wrapping_sub(connection.announced);
                if credit > CREDIT / 2 && self.waiting.len() < WAITING_MAX {
                    self.waiting.push_back(connection.header(CREDIT_UPDATE, 0));
                    connection.announced = connection.forwarded;
                }
            }
        }
        self.forget_closed();
    }

    fn forget_closed(&mut self) {
        self.connections.retain(|c| c.state != State::Closing || !c.outgoing.is_empty());
    }
}

impl Device for Vsock {
    fn mmio(&self) -> &Mmio {
        &self.mmio
    }

    fn mmio_mut(&mut self) -> &mut Mmio {
        &mut self.mmio
    }

    fn config(&self) -> &[u8] {
        &CONFIG
    }

    fn notify(&mut self, queue: usize, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        match queue {
            TX => self.transmit(memory)?,
            RX => {}
            _ => return Ok(()),
        }
        // A driver that polls looks for packets before it waits, and not after that.
        if self.mmio.has_interrupts() {
            self.receive(memory)?;
        }
        Ok(())
    }

    fn negotiated(&mut self) {
        // A driver that begins anew knows of no connection.
        self.connections.clear();
        self.waiting.clear();
    }
}

/// Lets a buffer grow to what is wanted, [`PACKET_MAX`] at most, and returns as much of it.
fn room_for(buffer: &mut Vec<u8>, length: usize) -> &mut [u8] {
    let length = length.min(PACKET_MAX as usize);
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    &mut buffer[..length]
}

/// Puts one packet into the guest's next buffer; `false` if it has none, or `packet`, which is told
/// how many bytes of data there is room for, has nothing.
fn deliver<'b>(
    queue: &mut Virtqueue,
    memory: &GuestMemoryMmap,
    packet: impl FnOnce(usize) -> Option<(Header, &'b [u8])>,
) -> Result<bool, QueueError> {
    let Some(mut chain) = queue.next_chain(memory)? else { return Ok(false) };
    let head = chain.head_index();
    let mut buffer = VsockPacket::from_rx_virtq_chain(memory, &mut chain, PACKET_MAX)
        .map_err(|error| queue.error(&error))?;
    let room = buffer.data_slice().map_or(0, VolatileSlice::len);
    if room == 0 {
        return Err(queue.error(&"a buffer has no room for data"));
    }
    let Some((header, data)) = packet(room) else {
        queue.undo(1);
        return Ok(false);
    };
    buffer
        .set_src_cid(HOST_CID)
        .set_dst_cid(GUEST_CID)
        .set_src_port(header.host_port)
        .set_dst_port(header.guest_port)
        .set_len(data.len() as u32)
        .set_type(STREAM)
        .set_op(header.operation)
        .set_flags(header.flags)
        .set_buf_alloc(CREDIT)
        .set_fwd_cnt(header.forwarded);
    if let Some(slice) = buffer.data_slice() {
        slice.write_slice(data, 0).map_err(|error| queue.error(&error))?;
    }
    queue.add_used(memory, head, (PKT_HEADER_SIZE + data.len()) as u32)?;
    Ok(true)
}
