//! virtio-mmio registers, version 2 (virtio 1.2, 4.2.2), for a device without interrupts.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestMemoryMmap;

use super::QueueError;

/// `VIRTIO_F_VERSION_1`, the only feature offered.
const VERSION_1: u64 = 1 << 32;

/// The registers of one device.
pub struct Mmio {
    kind: &'static Kind,
    status: u32,
    device_features_select: u32,
    driver_features: u64,
    driver_features_select: u32,
    queue_select: u32,
    /// The device's queues.
    pub queues: Vec<Queue>,
}

/// What a device is.
pub struct Kind {
    /// Device ID (virtio 1.2, 5).
    pub id: u32,
    /// Its queues, in order.
    pub queues: &'static [QueueKind],
}

/// What a queue is.
pub struct QueueKind {
    /// Device and queue, for errors.
    pub name: &'static str,
    /// Most descriptors.
    pub size: u16,
    /// Whether the driver is to write `QueueNotify`; if not it is told so in the used ring
    /// (`VIRTQ_USED_F_NO_NOTIFY`), and the queue is served whenever the guest waits.
    pub notify: bool,
}

/// Registers and queues, saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    status: u32,
    driver_features: u64,
    queues: Vec<SavedQueue>,
}

/// [`QueueState`], of which the crate has no serialised form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue {
    size: u16,
    next_avail: u16,
    next_used: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl Mmio {
    /// A device after reset.
    pub fn new(kind: &'static Kind) -> Self {
        let queues = kind.queues.iter().map(|queue| {
            // The sizes are constants, powers of two.
            Queue::new(queue.size).unwrap_or_default()
        });
        Self {
            kind,
            status: 0,
            device_features_select: 0,
            driver_features: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues: queues.collect(),
        }
    }

    /// Reads a register; `config` is the device's configuration space.
    pub fn read(&self, offset: u64, data: &mut [u8], config: &[u8]) {
        data.fill(0);
        if let Some(start) = offset.checked_sub(0x100) {
            let bytes = config.get(start as usize..).unwrap_or_default();
            for (byte, value) in data.iter_mut().zip(bytes) {
                *byte = *value;
            }
            return;
        }
        let queue = self.queues.get(self.queue_select as usize);
        let value = match offset {
            0x00 => u32::from_le_bytes(*b"virt"),
            0x04 => 2,
            0x08 => self.kind.id,
            0x0c => u32::from_le_bytes(*b"WRRN"),
            0x10 => match self.device_features_select {
                0 => VERSION_1 as u32,
                1 => (VERSION_1 >> 32) as u32,
                _ => 0,
            },
            0x34 => queue.map_or(0, |queue| queue.max_size().into()),
            0x44 => queue.map_or(0, |queue| queue.ready().into()),
            0x70 => self.status,
            _ => 0,
        };
        if let [a, b, c, d] = data {
            [*a, *b, *c, *d] = value.to_le_bytes();
        }
    }

    /// Writes a register; returns the queue that the driver notifies, if this is what it did.
    ///
    /// # Errors
    /// The queue that the driver declares ready cannot be used.
    pub fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        memory: &GuestMemoryMmap,
    ) -> Result<Option<usize>, QueueError> {
        // Registers are 32 bits wide (4.2.2.2); nothing in our configuration spaces is writable.
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return Ok(None) };
        let value = u32::from_le_bytes(bytes);
        match offset {
            0x14 => self.device_features_select = value,
            0x20 => {
                let shift = if self.driver_features_select == 1 { 32 } else { 0 };
                if self.driver_features_select <= 1 {
                    self.driver_features &= !(u64::from(u32::MAX) << shift);
                    self.driver_features |= u64::from(value) << shift;
                }
            }
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            0x50 => {
                let index = value as usize;
                return Ok((index < self.queues.len()).then_some(index));
            }
            0x70 if value == 0 => *self = Self::new(self.kind),
            0x70 => self.status = value,
            _ => self.write_queue(offset, value, memory)?,
        }
        Ok(None)
    }

    fn write_queue(
        &mut self,
        offset: u64,
        value: u32,
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        let index = self.queue_select as usize;
        let Some(queue) = self.queues.get_mut(index) else { return Ok(()) };
        match offset {
            // Once it is ready a queue's place may not change (4.2.2.2).
            0x38 if !queue.ready() => queue.set_size(value.min(u16::MAX.into()) as u16),
            0x80 if !queue.ready() => queue.set_desc_table_address(Some(value), None),
            0x84 if !queue.ready() => queue.set_desc_table_address(None, Some(value)),
            0x90 if !queue.ready() => queue.set_avail_ring_address(Some(value), None),
            0x94 if !queue.ready() => queue.set_avail_ring_address(None, Some(value)),
            0xa0 if !queue.ready() => queue.set_used_ring_address(Some(value), None),
            0xa4 if !queue.ready() => queue.set_used_ring_address(None, Some(value)),
            0x44 => {
                queue.set_ready(value == 1);
                if value == 1 {
                    let kind = &self.kind.queues[index];
                    check(queue, kind.name, memory)?;
                    if !kind.notify {
                        queue
                            .disable_notification(memory)
                            .map_err(|error| QueueError::new(kind.name, &error))?;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether the driver has set a queue up.
    pub fn ready(&self, queue: usize) -> bool {
        self.queues[queue].ready()
    }

    /// Saves what a clone continues with.
    pub fn save(&self) -> MmioState {
        let queues = self.queues.iter().map(|queue| {
            let state = queue.state();
            SavedQueue {
                size: state.size,
                next_avail: state.next_avail,
                next_used: state.next_used,
                ready: state.ready,
                descriptors: state.desc_table,
                available: state.avail_ring,
                used: state.used_ring,
            }
        });
        MmioState {
            status: self.status,
            driver_features: self.driver_features,
            queues: queues.collect(),
        }
    }

    /// A device in a saved state.
    ///
    /// # Errors
    /// The state is not one of this device in this memory.
    pub fn load(
        kind: &'static Kind,
        state: &MmioState,
        memory: &GuestMemoryMmap,
    ) -> Result<Self, QueueError> {
        let mut mmio = Self::new(kind);
        (mmio.status, mmio.driver_features) = (state.status, state.driver_features);
        if state.queues.len() != kind.queues.len() {
            return Err(QueueError::new(kind.queues[0].name, &"saved with other queues"));
        }
        for ((queue, kind), saved) in mmio.queues.iter_mut().zip(kind.queues).zip(&state.queues) {
            *queue = Queue::try_from(QueueState {
                max_size: kind.size,
                next_avail: saved.next_avail,
                next_used: saved.next_used,
                event_idx_enabled: false,
                size: saved.size,
                ready: saved.ready,
                desc_table: saved.descriptors,
                avail_ring: saved.available,
                used_ring: saved.used,
            })
            .map_err(|error| QueueError::new(kind.name, &error))?;
            if saved.ready {
                check(queue, kind.name, memory)?;
            }
        }
        Ok(mmio)
    }
}

fn check(queue: &Queue, name: &'static str, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
    if queue.is_valid(memory) {
        Ok(())
    } else {
        Err(QueueError::new(name, &"its rings lie outside of the program's memory"))
    }
}
