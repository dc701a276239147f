//! virtio-net (virtio 1.2, 5.1) over a TAP.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::mmio::{Kind, Mmio, MmioState, QueueKind};
use super::{QueueError, next_chain};

/// virtio-net.
pub static KIND: Kind = Kind {
    id: 1,
    queues: &[
        QueueKind { name: "net rx", size: 64, notify: false },
        QueueKind { name: "net tx", size: 64, notify: false },
    ],
};
const RX: usize = 0;
const TX: usize = 1;

/// `struct virtio_net_hdr_v1`, in front of each frame on both sides.
const HEADER: usize = 12;

/// The longest frame with its header: an Ethernet header, a VLAN tag and an IP packet of 1500.
const FRAME_MAX: usize = HEADER + 1518;

/// MAC of all zeroes (the guest takes its own from its identity), link up.
const CONFIG: [u8; 8] = [0, 0, 0, 0, 0, 0, 1, 0];

/// How many frames may wait in a TAP: what [`Net::drain`] throws away at most.
const TAP_QUEUE: usize = 4096;

/// The network device.
pub struct Net {
    mmio: Mmio,
    /// None in a template, and when the interface was removed.
    tap: Option<File>,
    /// One frame, and room to see that one is too long.
    buffer: [u8; 2048],
}

impl Net {
    /// A device after reset, without a TAP.
    pub fn new() -> Self {
        Self { mmio: Mmio::new(&KIND), tap: None, buffer: [0; 2048] }
    }

    /// A device in a saved state on a TAP as described at
    /// [`crate::control::ZygoteRequest::Fork`], or without a cable.
    pub fn load(
        state: &MmioState,
        memory: &GuestMemoryMmap,
        tap: Option<OwnedFd>,
    ) -> Result<Self, QueueError> {
        let mmio = Mmio::load(&KIND, state, memory)?;
        Ok(Self { mmio, tap: tap.map(File::from), ..Self::new() })
    }

    /// Saves the device.
    pub fn save(&self) -> MmioState {
        self.mmio.save()
    }

    /// Reads a register.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.mmio.read(offset, data, &CONFIG);
    }

    /// Writes a register.
    pub fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        match self.mmio.write(offset, data, memory)? {
            Some(TX) => self.transmit(memory),
            _ => Ok(()),
        }
    }

    /// Sends all frames that the guest queued. What the TAP does not take is lost, as on a wire.
    pub fn transmit(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        if !self.mmio.ready(TX) {
            return Ok(());
        }
        let error = |error: &dyn std::fmt::Display| QueueError::new("net tx", &error);
        let queue = &mut self.mmio.queues[TX];
        while let Some(chain) = next_chain(queue, memory, "net tx")? {
            let head = chain.head_index();
            let mut reader = chain.reader(memory).map_err(|e| error(&e))?;
            let length = reader.available_bytes();
            if length <= HEADER {
                return Err(error(&"a frame is shorter than its header"));
            }
            if length <= FRAME_MAX {
                let frame = &mut self.buffer[..length];
                reader.read_exact(frame).map_err(|e| error(&e))?;
                // No offload was negotiated: the kernel need not look at what the guest put there.
                frame[..HEADER].fill(0);
                if let Some(tap) = &mut self.tap {
                    let _ = tap.write(frame);
                }
            }
            queue.add_used(memory, head, 0).map_err(|e| error(&e))?;
        }
        Ok(())
    }

    /// Hands frames to the guest while there are any and it has buffers; returns whether it did.
    pub fn receive(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let error = |error: &dyn std::fmt::Display| QueueError::new("net rx", &error);
        let mut received = false;
        while self.wants_frames(memory)? {
            let Some(tap) = &mut self.tap else { break };
            let length = match tap.read(&mut self.buffer[..]) {
                Ok(0) => break,
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            if !(HEADER..=FRAME_MAX).contains(&length) {
                continue;
            }
            // num_buffers, the header's last field.
            self.buffer[HEADER - 2..HEADER].copy_from_slice(&1u16.to_le_bytes());
            let queue = &mut self.mmio.queues[RX];
            let Some(chain) = next_chain(queue, memory, "net rx")? else { break };
            let head = chain.head_index();
            let mut writer = chain.writer(memory).map_err(|e| error(&e))?;
            writer
                .write_all(&self.buffer[..length])
                .map_err(|_| error(&"a buffer is shorter than a frame"))?;
            queue.add_used(memory, head, length as u32).map_err(|e| error(&e))?;
            received = true;
        }
        Ok(received)
    }

    /// Whether the guest has buffers for reception.
    fn wants_frames(&self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        if !self.mmio.ready(RX) {
            return Ok(false);
        }
        let queue = &self.mmio.queues[RX];
        let available = queue
            .avail_idx(memory, std::sync::atomic::Ordering::Acquire)
            .map_err(|error| QueueError::new("net rx", &error))?;
        Ok(available.0 != queue.next_avail())
    }

    /// The TAP, if a frame from it could be handed to the guest.
    pub fn poll_fd(&self, memory: &GuestMemoryMmap) -> Result<Option<BorrowedFd<'_>>, QueueError> {
        let wanted = self.wants_frames(memory)?;
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
        let Some(tap) = &mut self.tap else { return };
        for _ in 0..TAP_QUEUE {
            if !matches!(tap.read(&mut self.buffer[..]), Ok(1..)) {
                return;
            }
        }
    }
}
