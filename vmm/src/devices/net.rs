//! virtio-net (virtio 1.2, 5.1) over a TAP, with one pair of queues or several.
//!
//! All pairs send to the one queue of the TAP. What comes from it goes to the pair that [`Steering`]
//! says, and waits there for the driver's buffers: frames behind it wait, too.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::limiter::Limiter;
use super::mmio::{Kind, Mmio, MmioState, QueueKind};
use super::offload::{
    CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HEADER, HOST_TSO4, HOST_TSO6, Header, from_driver,
    from_host, tun_offloads,
};
use super::steering::Steering;
use super::{Device, QueueError};

/// `VIRTIO_NET_F_MAC`
const MAC: u64 = 1 << 5;
/// `VIRTIO_NET_F_MRG_RXBUF`
const MRG_RXBUF: u64 = 1 << 15;
/// `VIRTIO_NET_F_CTRL_VQ`
const CTRL_VQ: u64 = 1 << 17;
/// `VIRTIO_NET_F_MQ`
const MQ: u64 = 1 << 22;

const RECEIVE: QueueKind = QueueKind { name: "net rx", size: 256, notify: false };
const TRANSMIT: QueueKind = QueueKind { name: "net tx", size: 256, notify: false };
const CONTROL: QueueKind = QueueKind { name: "net control", size: 64, notify: true };

const SINGLE: Kind = Kind {
    id: 1,
    features: CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6 | MRG_RXBUF,
    optional: MAC,
    // 5.1.3.1
    requires: &[
        (GUEST_TSO4, GUEST_CSUM),
        (GUEST_TSO6, GUEST_CSUM),
        (HOST_TSO4, CSUM),
        (HOST_TSO6, CSUM),
        (MQ, CTRL_VQ),
    ],
    queues: &[RECEIVE, TRANSMIT],
};

/// virtio-net with one pair of queues.
pub static KIND: Kind = SINGLE;

/// virtio-net with [`PAIRS`].
pub static MULTIQUEUE: Kind = Kind {
    features: SINGLE.features | CTRL_VQ | MQ,
    queues: &[RECEIVE, TRANSMIT, RECEIVE, TRANSMIT, RECEIVE, TRANSMIT, RECEIVE, TRANSMIT, CONTROL],
    ..SINGLE
};

/// Pairs of queues that a driver may use which takes `VIRTIO_NET_F_MQ`.
pub const PAIRS: u16 = 4;
const _: () = assert!(MULTIQUEUE.queues.len() == 2 * PAIRS as usize + 1);

// The first pair's queues (5.1.2), by which directions are told apart as well.
const RX: usize = 0;
const TX: usize = 1;

/// The receive queue of a pair.
fn rx(pair: u16) -> usize {
    2 * usize::from(pair) + RX
}

/// The transmit queue of a pair.
fn tx(pair: u16) -> usize {
    2 * usize::from(pair) + TX
}

// The control queue's commands and answers (5.1.6.5).
/// `VIRTIO_NET_CTRL_MQ`
const CONTROL_MQ: u8 = 4;
/// `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`
const SET_PAIRS: u8 = 0;
const ACK_OK: u8 = 0;
const ACK_ERROR: u8 = 1;

/// The longest frame on the wire with its header: an Ethernet header, a VLAN tag and an IP packet of
/// 1500.
const FRAME_MAX: usize = HEADER + 1518;

/// The longest frame that is yet to be segmented, with its header (5.1.6.3.1).
const SEGMENTED_MAX: usize = HEADER + 14 + 65536;

/// How many frames may wait in a TAP: what [`Net::drain`] throws away at most.
const TAP_QUEUE: usize = 4096;

nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD);

/// The network device.
pub struct Net {
    mmio: Mmio,
    /// MAC address, link up, pairs of queues (5.1.4).
    config: [u8; 10],
    /// How many pairs the driver wants to use; 0 before it said so.
    pairs: u16,
    /// Where the limit stopped what the driver sends: another pair begins the next turn.
    first: u16,
    steering: Steering,
    /// None in a template, and when the interface was removed.
    tap: Option<File>,
    /// What the TAP was told to hand out: flags of `TUNSETOFFLOAD`.
    offloads: u32,
    /// One frame with its header, and room to see that one is too long, for each direction.
    sending: Vec<u8>,
    receiving: Vec<u8>,
    /// Length of a frame in `receiving` that the driver has no room for, or 0.
    held: usize,
    limits: Limits,
    /// When frames may pass again, each direction, if a limit stops them.
    stopped: [Option<Instant>; 2],
}

/// Rate limits of frames; their bytes are those of Ethernet frames without the preamble and checksum.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// To the guest.
    pub receive: Limiter,
    /// From the guest.
    pub transmit: Limiter,
}

/// What a look at the TAP brought.
enum Look {
    Nothing,
    Dropped,
    Frame,
}

/// A network device, saved. Of what it learned about flows it learns anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Its registers and queues.
    mmio: MmioState,
    /// How many pairs of queues the driver wants to use; 0 before it said so.
    pairs: u16,
}

impl From<MmioState> for NetState {
    /// Of a driver that uses one pair.
    fn from(mmio: MmioState) -> Self {
        Self { mmio, pairs: 0 }
    }
}

impl Default for Net {
    fn default() -> Self {
        Self::with(Mmio::new(&KIND))
    }
}

impl Net {
    /// A device after reset with one pair of queues, without a TAP.
    pub fn new() -> Self {
        Self::default()
    }

    /// A device after reset with [`PAIRS`], of which the driver uses one until it asks for more;
    /// without a TAP.
    pub fn multiqueue() -> Self {
        Self::with(Mmio::new(&MULTIQUEUE))
    }

    fn with(mmio: Mmio) -> Self {
        // All zeroes: the guest takes its own address from its identity.
        let mut config = [0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
        if mmio.offers(MQ) {
            config[8..].copy_from_slice(&PAIRS.to_le_bytes());
        }
        Self {
            mmio,
            config,
            pairs: 0,
            first: 0,
            steering: Steering::default(),
            tap: None,
            offloads: 0,
            sending: vec![0; FRAME_MAX + 1],
            receiving: vec![0; FRAME_MAX + 1],
            held: 0,
            limits: Limits::default(),
            stopped: [None; 2],
        }
    }

    /// A device in a saved state on a TAP as described at
    /// [`crate::control::ZygoteRequest::Fork`], or without a cable.
    ///
    /// # Errors
    /// The state is not one of this device in this memory.
    pub fn load(
        state: &NetState,
        memory: &GuestMemoryMmap,
        tap: Option<OwnedFd>,
    ) -> Result<Self, QueueError> {
        let kind = if state.mmio.offers(MQ) { &MULTIQUEUE } else { &KIND };
        let mut net = Self::with(Mmio::load(kind, &state.mmio, memory)?);
        if state.pairs > net.pairs_offered() {
            return Err(net.mmio.queues[RX].error(&"saved with more pairs of queues"));
        }
        net.pairs = state.pairs;
        net.tap = tap.map(File::from);
        net.set_offloads();
        Ok(net)
    }

    /// Puts the device on a TAP, as [`Net::load`] does.
    pub fn attach(&mut self, tap: OwnedFd) {
        self.tap = Some(File::from(tap));
        (self.offloads, self.held) = (0, 0);
        self.set_offloads();
    }

    /// Tells the driver which MAC address to use. Before it begins.
    pub fn set_mac(&mut self, mac: [u8; 6]) {
        self.mmio.offer(MAC);
        self.config[..6].copy_from_slice(&mac);
    }

    /// Limits the rates of frames from now on. A frame over the limit waits: one of the guest's in
    /// its queue, one for it in the TAP.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
        self.stopped = [None; 2];
    }

    /// Saves the device.
    pub fn save(&self) -> NetState {
        NetState { mmio: self.mmio.save(), pairs: self.pairs }
    }

    /// Pairs of queues that the driver may use: one, unless it took `VIRTIO_NET_F_MQ`.
    fn pairs_offered(&self) -> u16 {
        if self.mmio.has(MQ) { PAIRS } else { 1 }
    }

    /// Pairs on which frames are received: one until the driver asks for more (5.1.6.5.6.2).
    fn pairs_receiving(&self) -> u16 {
        self.pairs.max(1)
    }

    /// Pairs on which frames are sent: all once the driver said how many it wants, so that what waits
    /// on a pair that it gives up is sent as well.
    fn pairs_sending(&self) -> u16 {
        if self.pairs == 0 { 1 } else { self.pairs_offered() }
    }

    /// The control queue's index (5.1.2), if the driver wants one.
    fn control_queue(&self) -> Option<usize> {
        self.mmio.has(CTRL_VQ).then_some(rx(self.pairs_offered()))
    }

    /// Sends the frames that the guest queued. What the TAP does not take is lost, as on a wire.
    ///
    /// # Errors
    /// As [`Device::notify`].
    pub fn transmit(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        (0..self.pairs_offered()).for_each(|pair| self.mmio.queues[tx(pair)].begin());
        self.stopped[TX] = None;
        let (first, pairs) = (self.first, self.pairs_sending());
        for pair in (0..pairs).map(|turn| (first + turn) % pairs) {
            if self.mmio.is_live(tx(pair)) && self.stopped[TX].is_none() {
                self.transmit_pair(pair, memory)?;
            }
        }
        Ok(())
    }

    fn transmit_pair(&mut self, pair: u16, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        let features = self.mmio.features();
        let queue = &mut self.mmio.queues[tx(pair)];
        while queue.is_available(memory)? {
            self.stopped[TX] = self.limits.transmit.stopped_until();
            if self.stopped[TX].is_some() {
                self.first = pair + 1;
                break;
            }
            let Some(chain) = queue.next_chain(memory)? else { break };
            let head = chain.head_index();
            let mut reader = chain.reader(memory).map_err(|error| queue.error(&error))?;
            let length = reader.available_bytes();
            if length <= HEADER {
                return Err(queue.error(&"a frame is shorter than its header"));
            }
            if let Some(packet) = self.sending.get_mut(..length) {
                reader.read_exact(packet).map_err(|error| queue.error(&error))?;
                self.limits.transmit.passed(length - HEADER);
                if self.pairs > 1 {
                    self.steering.sent(&packet[HEADER..], pair);
                }
                if let (true, Some(tap)) = (check_sent(packet, features), &mut self.tap) {
                    let _ = tap.write(packet);
                }
            }
            queue.add_used(memory, head, 0)?;
        }
        Ok(())
    }

    /// Hands frames to the guest while there are any and it has buffers; returns whether it did.
    ///
    /// # Errors
    /// As [`Device::notify`].
    pub fn receive(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        if !self.mmio.is_live(RX) {
            return Ok(false);
        }
        let mut turn = 0;
        for pair in 0..self.pairs_offered() {
            let queue = &mut self.mmio.queues[rx(pair)];
            queue.begin();
            turn += queue.size();
        }
        self.stopped[RX] = None;
        let mut received = false;
        // As long as a turn, also if all frames are dropped.
        for _ in 0..turn {
            if !self.has_buffers(memory)? {
                break;
            }
            self.stopped[RX] = self.limits.receive.stopped_until();
            if self.stopped[RX].is_some() {
                break;
            }
            if self.held == 0 {
                match self.read_frame() {
                    Look::Nothing => break,
                    Look::Dropped => continue,
                    Look::Frame => {}
                }
            }
            if !self.deliver(memory)? {
                break;
            }
            received = true;
        }
        // If that was the last buffer the driver is to tell of the next one: without one the TAP is
        // not looked at.
        for queue in (0..self.pairs_receiving()).map(rx) {
            if self.mmio.is_live(queue) {
                self.mmio.queues[queue].is_available(memory)?;
            }
        }
        Ok(received)
    }

    /// Takes a frame from the TAP.
    fn read_frame(&mut self) -> Look {
        let Some(tap) = &mut self.tap else { return Look::Nothing };
        let length = match tap.read(&mut self.receiving[..]) {
            Ok(length @ 1..) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Look::Dropped,
            Ok(_) | Err(_) => return Look::Nothing,
        };
        let Some((header, frame)) = self.receiving[..length].split_first_chunk() else {
            return Look::Dropped;
        };
        let header = from_host(Header::parse(*header), frame.len(), self.mmio.features());
        let Some(header) = header.filter(|header| length <= longest(*header)) else {
            return Look::Dropped;
        };
        self.receiving[..HEADER].copy_from_slice(&header.bytes());
        self.held = length;
        Look::Frame
    }

    /// The receive queue for the frame that was read.
    fn destination(&self) -> usize {
        if self.pairs <= 1 {
            return RX;
        }
        let queue = rx(self.steering.pair(&self.receiving[HEADER..self.held], self.pairs));
        if self.mmio.is_live(queue) { queue } else { RX }
    }

    /// Puts the frame that was read into the guest's buffers; `false` if they have no room yet.
    fn deliver(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let mergeable = self.mmio.has(MRG_RXBUF);
        // Asked anew each time: the driver may have given the pair up meanwhile.
        let destination = self.destination();
        let queue = &mut self.mmio.queues[destination];
        let mut room = 0;
        let mut buffers = Vec::with_capacity(1);
        while room < self.held {
            let Some(chain) = queue.next_chain(memory)? else {
                queue.undo(buffers.len() as u16);
                return Ok(false);
            };
            let head = chain.head_index();
            let writer = chain.writer(memory).map_err(|error| queue.error(&error))?;
            let length = writer.available_bytes();
            if length < if mergeable { HEADER } else { self.held } {
                return Err(queue.error(&"a buffer is shorter than a frame"));
            }
            room += length;
            buffers.push((head, writer));
        }
        // num_buffers, the header's last field.
        self.receiving[HEADER - 2..HEADER].copy_from_slice(&(buffers.len() as u16).to_le_bytes());
        let mut rest = &self.receiving[..self.held];
        let mut used = Vec::with_capacity(buffers.len());
        for (head, mut writer) in buffers {
            let (part, after) = rest.split_at(rest.len().min(writer.available_bytes()));
            writer.write_all(part).map_err(|error| queue.error(&error))?;
            used.push((head, part.len() as u32));
            rest = after;
        }
        queue.add_used_together(memory, &used)?;
        self.limits.receive.passed(self.held - HEADER);
        self.held = 0;
        Ok(true)
    }

    /// Does what the driver asks for in the control queue (5.1.6.5).
    fn control(&mut self, queue: usize, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        if !self.mmio.is_live(queue) {
            return Ok(());
        }
        self.mmio.queues[queue].begin();
        while let Some(chain) = self.mmio.queues[queue].next_chain(memory)? {
            let head = chain.head_index();
            let error = |error: &dyn std::fmt::Display| self.mmio.queues[queue].error(error);
            let mut reader = chain.clone().reader(memory).map_err(|cause| error(&cause))?;
            let mut writer = chain.writer(memory).map_err(|cause| error(&cause))?;
            if writer.available_bytes() == 0 {
                return Err(error(&"a command has no room for its answer"));
            }
            // Class, command and data: of the only one that there is, and room to see that it is longer.
            let mut bytes = [0; 5];
            let length = reader.read(&mut bytes).map_err(|cause| error(&cause))?;
            let is_done = match bytes[..length] {
                [CONTROL_MQ, SET_PAIRS, low, high] => {
                    self.set_pairs(u16::from_le_bytes([low, high]))
                }
                _ => false,
            };
            let answer = if is_done { ACK_OK } else { ACK_ERROR };
            let queue = &mut self.mmio.queues[queue];
            writer.write_all(&[answer]).map_err(|error| queue.error(&error))?;
            queue.add_used(memory, head, 1)?;
        }
        Ok(())
    }

    /// The driver wants to use so many pairs; whether it may.
    fn set_pairs(&mut self, pairs: u16) -> bool {
        let is_offered = self.mmio.has(MQ) && (1..=PAIRS).contains(&pairs);
        if is_offered {
            self.pairs = pairs;
        }
        is_offered
    }

    /// Whether the driver has buffers for frames.
    fn has_buffers(&self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        for queue in (0..self.pairs_receiving()).map(rx) {
            if self.mmio.is_live(queue) && self.mmio.queues[queue].has_chain(memory)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The TAP, if a frame from it could be handed to the guest.
    ///
    /// # Errors
    /// The driver's rings cannot be read.
    pub fn poll_fd(&self, memory: &GuestMemoryMmap) -> Result<Option<BorrowedFd<'_>>, QueueError> {
        let wanted = self.held == 0
            && self.stopped[RX].is_none()
            && self.mmio.is_live(RX)
            && self.has_buffers(memory)?;
        Ok(self.tap.as_ref().filter(|_| wanted).map(AsFd::as_fd))
    }

    /// Closes the TAP: frames go nowhere from now on, and another process can attach to it.
    pub fn close_tap(&mut self) {
        self.tap = None;
    }

    /// Takes the TAP out of the device.
    pub fn take_tap(&mut self) -> Option<OwnedFd> {
        self.tap.take().map(OwnedFd::from)
    }

    /// Throws away what waits in the TAP, and what the driver queued: neither is this instance's.
    ///
    /// # Errors
    /// As [`Net::transmit`].
    pub fn drain(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        self.held = 0;
        let mut tap = self.tap.take();
        // Without a cable frames go nowhere, and do not count.
        let limits = std::mem::take(&mut self.limits);
        let drained = self.transmit(memory);
        self.limits = limits;
        if let Some(tap) = &mut tap {
            for _ in 0..TAP_QUEUE {
                if !matches!(tap.read(&mut self.receiving[..]), Ok(1..)) {
                    break;
                }
            }
        }
        self.tap = tap;
        drained
    }

    /// Lets the TAP hand out what the driver can take.
    fn set_offloads(&mut self) {
        let has_segments = self.mmio.has(GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6);
        let longest = if has_segments { SEGMENTED_MAX } else { FRAME_MAX };
        self.sending.resize(longest + 1, 0);
        self.receiving.resize(longest + 1, 0);
        let offloads = tun_offloads(self.mmio.features());
        let Some(tap) = self.tap.as_ref().filter(|_| offloads != self.offloads) else { return };
        // SAFETY: the descriptor is open; the request takes an integer.
        match unsafe { tun_set_offload(tap.as_raw_fd(), offloads as i32) } {
            Ok(_) => self.offloads = offloads,
            // Features allow the device to hand out such frames, they do not oblige it to.
            Err(errno) => tracing::warn!(%errno, "the TAP keeps its offloads as they are"),
        }
    }
}

impl Device for Net {
    fn mmio(&self) -> &Mmio {
        &self.mmio
    }

    fn mmio_mut(&mut self) -> &mut Mmio {
        &mut self.mmio
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn notify(&mut self, queue: usize, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        match queue {
            _ if Some(queue) == self.control_queue() => self.control(queue, memory),
            _ if queue % 2 == TX => self.transmit(memory),
            // A driver that polls looks for frames before it waits, and not after that.
            _ if self.mmio.has_interrupts() => self.receive(memory).map(|_| ()),
            _ => Ok(()),
        }
    }

    fn negotiated(&mut self) {
        (self.held, self.pairs, self.first) = (0, 0, 0);
        self.set_offloads();
    }

    fn due(&self) -> Option<Instant> {
        let backlog = self.mmio.has_backlog().then(Instant::now);
        self.stopped.into_iter().chain([backlog]).flatten().min()
    }
}

/// Checks a frame of the driver's, and replaces its header by what the host may see.
fn check_sent(packet: &mut [u8], features: u64) -> bool {
    let length = packet.len();
    let Some((bytes, frame)) = packet.split_first_chunk_mut() else { return false };
    let header = from_driver(Header::parse(*bytes), frame, features);
    let Some(header) = header.filter(|header| length <= longest(*header)) else { return false };
    *bytes = header.bytes();
    true
}

/// The longest frame with this header, and with it, in bytes.
fn longest(header: Header) -> usize {
    if header.is_segmented() { SEGMENTED_MAX } else { FRAME_MAX }
}
