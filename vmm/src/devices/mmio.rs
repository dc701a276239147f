//! virtio-mmio registers, version 2 (virtio 1.2, 4.2.2).

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestMemoryMmap;

use super::QueueError;
use super::queue::Virtqueue;

/// `VIRTIO_F_INDIRECT_DESC` and `VIRTIO_F_EVENT_IDX`: offered to drivers with interrupts. A driver
/// that polls needs neither, and event indices would not let the device do without notifications.
pub const RING_INDIRECT_DESC: u64 = 1 << 28;
/// See [`RING_INDIRECT_DESC`].
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`: no device works without.
pub const VERSION_1: u64 = 1 << 32;

// Device status (2.1).
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// `InterruptStatus`: buffers were used.
const USED_BUFFER: u32 = 1;

/// The registers of one device.
pub struct Mmio {
    kind: &'static Kind,
    /// Features offered.
    offered: u64,
    /// The driver is interrupted; if not, it polls.
    interrupts: bool,
    status: u32,
    interrupt_status: u32,
    device_features_select: u32,
    driver_features: u64,
    driver_features_select: u32,
    queue_select: u32,
    /// The device's queues.
    pub queues: Vec<Virtqueue>,
}

/// What a device is.
pub struct Kind {
    /// Device ID (virtio 1.2, 5).
    pub id: u32,
    /// Features of this kind of device that are always offered.
    pub features: u64,
    /// Features that some devices of this kind offer.
    pub optional: u64,
    /// Features, and what a driver must take together with them.
    pub requires: &'static [(u64, u64)],
    /// Its queues, in order.
    pub queues: &'static [QueueKind],
}

/// What a queue is.
pub struct QueueKind {
    /// Device and queue, for errors.
    pub name: &'static str,
    /// Most descriptors.
    pub size: u16,
    /// Whether a driver that polls is to write `QueueNotify`; if not it is told so in the used ring
    /// (`VIRTQ_USED_F_NO_NOTIFY`), and the queue is served whenever the guest waits.
    pub notify: bool,
}

/// What the driver did by writing a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It made buffers of this queue available.
    Notified(usize),
    /// It settled the features, or reset the device.
    Negotiated,
}

/// Registers and queues, saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    offered: u64,
    interrupts: bool,
    status: u32,
    interrupt_status: u32,
    driver_features: u64,
    queues: Vec<SavedQueue>,
}

impl MmioState {
    /// Whether the device offers this feature.
    pub fn offers(&self, feature: u64) -> bool {
        self.offered & feature != 0
    }
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
    /// A device after reset, for a driver that polls.
    pub fn new(kind: &'static Kind) -> Self {
        Self::with(kind, VERSION_1 | kind.features, false)
    }

    fn with(kind: &'static Kind, offered: u64, interrupts: bool) -> Self {
        let queues = kind.queues.iter().map(|queue| {
            // The sizes are constants, powers of two.
            Virtqueue::new(queue.name, Queue::new(queue.size).unwrap_or_default())
        });
        Self {
            kind,
            offered,
            interrupts,
            status: 0,
            interrupt_status: 0,
            device_features_select: 0,
            driver_features: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues: queues.collect(),
        }
    }

    /// Makes it a device for a driver with interrupts. Before the driver begins.
    pub fn use_interrupts(&mut self) {
        self.interrupts = true;
        self.offered |= RING_INDIRECT_DESC | RING_EVENT_IDX;
    }

    /// Offers one of the kind's optional features. Before the driver begins.
    pub fn offer(&mut self, feature: u64) {
        self.offered |= feature & self.kind.optional;
    }

    /// Whether the driver is interrupted, instead of polling.
    pub fn has_interrupts(&self) -> bool {
        self.interrupts
    }

    /// Whether the driver is offered this feature.
    pub fn offers(&self, feature: u64) -> bool {
        self.offered & feature != 0
    }

    /// Whether the driver took this feature.
    pub fn has(&self, feature: u64) -> bool {
        self.features() & feature != 0
    }

    /// The features that driver and device agreed on; none before they did.
    pub fn features(&self) -> u64 {
        if self.status & FEATURES_OK == 0 { 0 } else { self.driver_features }
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
        let queue = self.queues.get(self.queue_select as usize).map(Virtqueue::registers);
        let value = match offset {
            0x00 => u32::from_le_bytes(*b"virt"),
            0x04 => 2,
            0x08 => self.kind.id,
            0x0c => u32::from_le_bytes(*b"WRRN"),
            0x10 => match self.device_features_select {
                0 => self.offered as u32,
                1 => (self.offered >> 32) as u32,
                _ => 0,
            },
            0x34 => queue.map_or(0, |queue| queue.max_size().into()),
            0x44 => queue.map_or(0, |queue| queue.ready().into()),
            0x60 => self.interrupt_status,
            0x70 => self.status,
            // Length and place of a shared memory region, of which there is none.
            0xb0..=0xbc => u32::MAX,
            // The rest, among it ConfigGeneration: nothing in our configuration spaces changes.
            _ => 0,
        };
        if let [a, b, c, d] = data {
            [*a, *b, *c, *d] = value.to_le_bytes();
        }
    }

    /// Writes a register; returns what the device has to act upon.
    ///
    /// # Errors
    /// The queue that the driver declares ready cannot be used.
    pub fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        memory: &GuestMemoryMmap,
    ) -> Result<Option<Event>, QueueError> {
        // Registers are 32 bits wide (4.2.2.2); nothing in our configuration spaces is writable.
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return Ok(None) };
        let value = u32::from_le_bytes(bytes);
        match offset {
            0x14 => self.device_features_select = value,
            // Settled features stay what they are until reset.
            0x20 if self.status & FEATURES_OK == 0 => {
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
                let is_live = index < self.queues.len() && self.is_live(index);
                return Ok(is_live.then_some(Event::Notified(index)));
            }
            0x64 => self.interrupt_status &= !value,
            0x70 => return Ok(self.write_status(value)),
            _ => self.write_queue(offset, value, memory)?,
        }
        Ok(None)
    }

    fn write_status(&mut self, value: u32) -> Option<Event> {
        if value == 0 {
            *self = Self::with(self.kind, self.offered, self.interrupts);
            return Some(Event::Negotiated);
        }
        let before = self.status;
        // A driver sets bits and never clears one (2.1.1).
        self.status |= value;
        if !self.accepts(self.driver_features) {
            self.status &= !FEATURES_OK;
        }
        if self.status & FEATURES_OK == 0 {
            self.status &= !DRIVER_OK;
        }
        (self.status & !before & FEATURES_OK != 0).then_some(Event::Negotiated)
    }

    /// Whether a driver may take these features, and no others (2.2.2).
    fn accepts(&self, features: u64) -> bool {
        let has = |required: u64| features & required == required;
        let is_whole = |&(feature, required): &(u64, u64)| !has(feature) || has(required);
        has(VERSION_1) && features & !self.offered == 0 && self.kind.requires.iter().all(is_whole)
    }

    fn write_queue(
        &mut self,
        offset: u64,
        value: u32,
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        let index = self.queue_select as usize;
        let event_idx = self.has(RING_EVENT_IDX);
        let Some(virtqueue) = self.queues.get_mut(index) else { return Ok(()) };
        let queue = virtqueue.registers_mut();
        match offset {
            // Once it is ready a queue's place may not change (4.2.2.2).
            0x38 if !queue.ready() => queue.set_size(value.min(u16::MAX.into()) as u16),
            0x80 if !queue.ready() => queue.set_desc_table_address(Some(value), None),
            0x84 if !queue.ready() => queue.set_desc_table_address(None, Some(value)),
            0x90 if !queue.ready() => queue.set_avail_ring_address(Some(value), None),
            0x94 if !queue.ready() => queue.set_avail_ring_address(None, Some(value)),
            0xa0 if !queue.ready() => queue.set_used_ring_address(Some(value), None),
            0xa4 if !queue.ready() => queue.set_used_ring_address(None, Some(value)),
            0x44 if value != 1 => queue.set_ready(false),
            0x44 if !queue.ready() => {
                queue.set_ready(true);
                queue.set_event_idx(event_idx);
                check(virtqueue, memory)?;
                if !self.interrupts && !self.kind.queues[index].notify {
                    let queue = virtqueue.registers_mut();
                    let disabled = queue.disable_notification(memory);
                    disabled.map_err(|error| virtqueue.error(&error))?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether the driver has set up the device and this queue: before it did the device touches
    /// nothing (2.1.2).
    pub fn is_live(&self, queue: usize) -> bool {
        self.status & DRIVER_OK != 0 && self.queues[queue].registers().ready()
    }

    /// See [`super::Device::due`].
    pub(super) fn has_backlog(&self) -> bool {
        self.queues.iter().any(Virtqueue::has_backlog)
    }

    /// See [`super::Device::take_interrupt`].
    pub(super) fn take_interrupt(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let mut wanted = false;
        for index in 0..self.queues.len() {
            wanted |= self.is_live(index) && self.queues[index].take_interrupt(memory)?;
        }
        if wanted {
            self.interrupt_status |= USED_BUFFER;
        }
        Ok(wanted)
    }

    /// Saves what a clone continues with. No interrupt may be owed: see
    /// [`super::Device::take_interrupt`].
    pub fn save(&self) -> MmioState {
        let queues = self.queues.iter().map(|queue| {
            let state = queue.registers().state();
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
            offered: self.offered,
            interrupts: self.interrupts,
            status: self.status,
            interrupt_status: self.interrupt_status,
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
        let mut mmio = Self::with(kind, state.offered, state.interrupts);
        mmio.status = state.status;
        mmio.interrupt_status = state.interrupt_status;
        mmio.driver_features = state.driver_features;
        let ours = kind.features | kind.optional | VERSION_1 | RING_INDIRECT_DESC | RING_EVENT_IDX;
        let is_settled = state.status & FEATURES_OK != 0;
        if state.offered & !ours != 0 || is_settled && !mmio.accepts(state.driver_features) {
            return Err(QueueError::new(kind.queues[0].name, &"saved with other features"));
        }
        if state.queues.len() != kind.queues.len() {
            return Err(QueueError::new(kind.queues[0].name, &"saved with other queues"));
        }
        let event_idx_enabled = mmio.has(RING_EVENT_IDX);
        for ((queue, kind), saved) in mmio.queues.iter_mut().zip(kind.queues).zip(&state.queues) {
            let registers = Queue::try_from(QueueState {
                max_size: kind.size,
                next_avail: saved.next_avail,
                next_used: saved.next_used,
                event_idx_enabled,
                size: saved.size,
                ready: saved.ready,
                desc_table: saved.descriptors,
                avail_ring: saved.available,
                used_ring: saved.used,
            })
            .map_err(|error| QueueError::new(kind.name, &error))?;
            *queue = Virtqueue::new(kind.name, registers);
            if saved.ready {
                check(queue, memory)?;
            }
        }
        Ok(mmio)
    }
}

fn check(queue: &Virtqueue, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
    if queue.registers().is_valid(memory) {
        Ok(())
    } else {
        Err(queue.error(&"its rings lie outside of the program's memory"))
    }
}
