//! The guest's devices: virtio-mmio registers, and behind them network, vsock, disks, entropy and
//! console.
//!
//! A device is passive, and begins as one for a driver that polls; [`mmio::Mmio::use_interrupts`]
//! makes it one for a driver with interrupts. Its owner
//!
//! - passes on accesses to registers ([`Device::read`], [`Device::write`]); a notification may come
//!   by an eventfd instead ([`Device::notify`]);
//! - tells it what happens on the host: polls [`net::Net::poll_fd`] and calls
//!   [`net::Net::receive`], [`vsock::Vsock::poll_fds`], `polled` and `receive`,
//!   [`blk::Blk::poll_fd`] and `complete`, calls [`console::Console::input`] and `receive`;
//! - after each of these looks whether the driver is to be interrupted
//!   ([`Device::take_interrupt`]), and until when it may wait at most before it lets the device go
//!   on by itself ([`Device::due`], [`Device::serve`]).
//!
//! No device waits for anything but files: see [`blk::Blk::use_uring`].

pub mod blk;
pub mod console;
pub mod disk;
pub mod limiter;
pub mod mmio;
pub mod net;
pub mod offload;
pub mod queue;
pub mod rng;
pub mod steering;
pub mod uring;
pub mod vsock;

use std::time::Instant;

use vm_memory::GuestMemoryMmap;

use mmio::{Event, Mmio};

/// A guest wrote something into a queue that virtio does not allow.
#[derive(Debug, thiserror::Error)]
#[error("virtqueue {queue}: {error}")]
pub struct QueueError {
    /// Device and queue.
    pub queue: &'static str,
    /// What is wrong.
    pub error: String,
}

impl QueueError {
    fn new(queue: &'static str, error: &dyn std::fmt::Display) -> Self {
        Self { queue, error: error.to_string() }
    }
}

/// A virtio device.
pub trait Device {
    /// Its registers.
    fn mmio(&self) -> &Mmio;

    /// Its registers.
    fn mmio_mut(&mut self) -> &mut Mmio;

    /// Its configuration space, little-endian.
    fn config(&self) -> &[u8];

    /// The driver says that it made buffers of a queue available.
    ///
    /// # Errors
    /// What it made available is not what virtio allows.
    fn notify(&mut self, queue: usize, memory: &GuestMemoryMmap) -> Result<(), QueueError>;

    /// Features were negotiated, or the device was reset and has none.
    fn negotiated(&mut self) {}

    /// When the device has something to do of which nobody will notify it; it is to be done by
    /// [`Device::serve`]. A time that has passed means at once, `None` never.
    fn due(&self) -> Option<Instant> {
        self.mmio().has_backlog().then(Instant::now)
    }

    /// Does what is [due](Device::due), on all queues.
    ///
    /// # Errors
    /// As [`Device::notify`].
    fn serve(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        (0..self.mmio().queues.len()).try_for_each(|queue| self.notify(queue, memory))
    }

    /// Reads a register or the configuration space; `offset` in bytes, from the first register.
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.mmio().read(offset, data, self.config());
    }

    /// Writes a register.
    ///
    /// # Errors
    /// The driver declared a queue ready that cannot be used, or as [`Device::notify`].
    fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        match self.mmio_mut().write(offset, data, memory)? {
            Some(Event::Notified(queue)) => self.notify(queue, memory),
            Some(Event::Negotiated) => {
                self.negotiated();
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Whether the device's interrupt is to be raised now: buffers were used since this was last
    /// asked, and the driver wants to hear of it. `InterruptStatus` tells it why (virtio 1.2,
    /// 4.2.2.2).
    ///
    /// # Errors
    /// The driver's wishes cannot be read.
    fn take_interrupt(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        self.mmio_mut().take_interrupt(memory)
    }
}
