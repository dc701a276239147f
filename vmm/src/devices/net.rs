//! virtio-net (virtio 1.2, 5.1) over a TAP.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use vm_memory::GuestMemoryMmap;

use super::limiter::Limiter;
use super::mmio::{Kind, Mmio, MmioState, QueueKind};
use super::offload::{
    CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HEADER, HOST_TSO4, HOST_TSO6, Header, from_driver,
    from_host, tun_offloads,
};
use super::{Device, QueueError};

/// `VIRTIO_NET_F_MAC`
const MAC: u64 = 1 << 5;
/// `VIRTIO_NET_F_MRG_RXBUF`
const MRG_RXBUF: u64 = 1 << 15;

/// virtio-net.
pub static KIND: Kind = Kind {
    id: 1,
    features: CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6 | MRG_RXBUF,
    optional: MAC,
    // 5.1.3.1
    requires: &[
        (GUEST_TSO4, GUEST_CSUM),
        (GUEST_TSO6, GUEST_CSUM),
        (HOST_TSO4, CSUM),
        (HOST_TSO6, CSUM),
    ],
    queues: &[
        QueueKind { name: "net rx", size: 256, notify: false },
        QueueKind { name: "net tx", size: 256, notify: false },
    ],
};
const RX: usize = 0;
const TX: usize = 1;

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
    /// MAC address, link up.
    config: [u8; 8],
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

impl Default for Net {
    fn default() -> Self {
        Self {
            mmio: Mmio::new(&KIND),
            // All zeroes: the guest takes its own from its identity.
            config: [0, 0, 0, 0, 0, 0, 1, 0],
            tap: None,
            offloads: 0,
            sending: vec![0; FRAME_MAX + 1],
            receiving: vec![0; FRAME_MAX + 1],
            held: 0,
            limits: Limits::default(),
            stopped: [None; 2],
        }
    }
}

impl Net {
    /// A device after reset, without a TAP.
    pub fn new() -> Self {
        Self::default()
    }

    /// A device in a saved state on a TAP as described at
    /// [`crate::control::ZygoteRequest::Fork`], or without a cable.
    pub fn load(
        state: &MmioState,
        memory: &GuestMemoryMmap,
        tap: Option<OwnedFd>,
    ) -> Result<Self, QueueError> {
        let mmio = Mmio::load(&KIND, state, memory)?;
        let mut net = Self { mmio, tap: tap.map(File::from), ..Self::new() };
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

    /// Limits the rate of frames from now on. A frame over the limit waits: one of the guest's in
    /// its queue, one for it in the TAP.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
        self.stopped = [None; 2];
    }

    /// Saves the device.
    pub fn save(&self) -> MmioState {
        self.mmio.save()
    }

    /// Sends the frames that the guest queued. What the TAP does not take is lost, as on a wire.
    pub fn transmit(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        if !self.mmio.is_live(TX) {
            return Ok(());
        }
        let features = self.mmio.features();
        let queue = &mut self.mmio.queues[TX];
        queue.begin();
        self.stopped[TX] = None;
        while queue.is_available(memory)? {
            self.stopped[TX] = self.limits.transmit.stopped_until();
            if self.stopped[TX].is_some() {
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
                if let (true, Some(tap)) = (check_sent(packet, features), &mut self.tap) {
                    let _ = tap.write(packet);
                }
            }
            queue.add_used(memory, head, 0)?;
        }
        Ok(())
    }

    /// Hands frames to the guest while there are any and it has buffers; returns whether it did.
    pub fn receive(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        if !self.mmio.is_live(RX) {
            return Ok(false);
        }
        self.mmio.queues[RX].begin();
        self.stopped[RX] = None;
        let mut received = false;
        // As long as a turn, also if all frames are dropped.
        for _ in 0..self.mmio.queues[RX].size() {
            if !self.mmio.queues[RX].is_available(memory)? {
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
        self.mmio.queues[RX].is_available(memory)?;
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

    /// Puts the frame that was read into the guest's buffers; `false` if they have no room yet.
    fn deliver(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let mergeable = self.mmio.has(MRG_RXBUF);
        let queue = &mut self.mmio.queues[RX];
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

    /// The TAP, if a frame from it could be handed to the guest.
    pub fn poll_fd(&self, memory: &GuestMemoryMmap) -> Result<Option<BorrowedFd<'_>>, QueueError> {
        let wanted = self.held == 0
            && self.stopped[RX].is_none()
            && self.mmio.is_live(RX)
            && self.mmio.queues[RX].has_chain(memory)?;
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

    /// Throws away what waits in the TAP: it was not for this instance.
    pub fn drain(&mut self) {
        self.held = 0;
        let Some(tap) = &mut self.tap else { return };
        for _ in 0..TAP_QUEUE {
            if !matches!(tap.read(&mut self.receiving[..]), Ok(1..)) {
                return;
            }
        }
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
            TX => self.transmit(memory),
            // A driver that polls looks for frames before it waits, and not after that.
            RX if self.mmio.has_interrupts() => self.receive(memory).map(|_| ()),
            _ => Ok(()),
        }
    }

    fn negotiated(&mut self) {
        self.held = 0;
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
