//! A driver: it sets a device up as virtio 1.2 says (3.1.1), makes buffers available and takes them
//! back.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use warren_vmm::devices::{Device, QueueError};

/// Where the driver's memory is.
pub const BASE: u64 = 0x20_0000;
/// Its size, in bytes.
pub const BYTES: u64 = 4 << 20;
/// Descriptors in each queue.
pub const SIZE: u16 = 16;

/// `VIRTIO_F_VERSION_1`
pub const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_EVENT_IDX`
pub const EVENT_IDX: u64 = 1 << 29;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

pub struct Driver<D> {
    pub device: D,
    pub memory: GuestMemoryMmap,
    rings: Vec<Ring>,
    free: u64,
}

#[derive(Clone)]
struct Ring {
    place: u64,
    next: u16,
    available: u16,
    used: u16,
}

/// Buffers that were made available as one.
#[derive(Clone, Debug)]
pub struct Chain {
    pub head: u16,
    /// Those that the device writes: where, and how many bytes.
    writable: Vec<(u64, usize)>,
}

impl Chain {
    /// Where the device writes first.
    pub fn place(&self) -> u64 {
        self.writable[0].0
    }
}

/// The memory of a guest.
pub fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), BYTES as usize)]).unwrap()
}

impl<D: Device> Driver<D> {
    /// A driver that took these features, and `VERSION_1`.
    pub fn new(device: D, features: u64) -> Self {
        let mut driver = Self::reset(device);
        assert!(driver.negotiate(features | VERSION_1), "features {features:#x} are refused");
        driver.set_up_queues();
        driver.set(0x70, 15);
        driver
    }

    /// A driver that has just reset its device.
    pub fn reset(device: D) -> Self {
        let rings = (0..device.mmio().queues.len() as u64).map(|index| Ring {
            place: BASE + 0x1000 * index,
            next: 0,
            available: 0,
            used: 0,
        });
        let rings: Vec<_> = rings.collect();
        let free = BASE + 0x1000 * rings.len() as u64;
        let mut driver = Self { device, memory: memory(), rings, free };
        driver.set(0x70, 0);
        assert_eq!(driver.register(0x70), 0);
        driver
    }

    /// Takes features; returns whether the device agrees.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.set(0x70, 3);
        for half in 0..2 {
            self.set(0x24, half);
            self.set(0x20, (features >> (32 * half)) as u32);
        }
        self.set(0x70, 11);
        self.register(0x70) & 8 != 0
    }

    /// Sets up all queues.
    pub fn set_up_queues(&mut self) {
        for index in 0..self.rings.len() {
            let place = self.rings[index].place;
            self.set(0x30, index as u32);
            assert!(self.register(0x34) >= SIZE.into());
            self.set(0x38, SIZE.into());
            for (register, part) in [(0x80, 0), (0x90, 0x400), (0xa0, 0x800)] {
                self.set(register, (place + part) as u32);
                self.set(register + 4, ((place + part) >> 32) as u32);
            }
            self.set(0x44, 1);
            assert_eq!(self.register(0x44), 1);
        }
    }

    /// What the device offers.
    pub fn offered(&mut self) -> u64 {
        let mut half = |index| {
            self.set(0x14, index);
            u64::from(self.register(0x10))
        };
        half(0) | half(1) << 32
    }

    pub fn register(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn try_set(&mut self, offset: u64, value: u32) -> Result<(), QueueError> {
        self.device.write(offset, &value.to_le_bytes(), &self.memory)
    }

    pub fn set(&mut self, offset: u64, value: u32) {
        self.try_set(offset, value).unwrap();
    }

    /// Room of its own for so many bytes.
    pub fn allocate(&mut self, bytes: usize) -> u64 {
        let address = self.free;
        self.free += bytes as u64;
        assert!(self.free <= BASE + BYTES);
        address
    }

    /// Room of earlier buffers is free again.
    pub fn rewind(&mut self) {
        self.free = BASE + 0x1000 * self.rings.len() as u64;
    }

    /// Makes buffers available: these bytes to be read, then so many to be written.
    pub fn add(&mut self, queue: usize, readable: &[&[u8]], writable: &[usize]) -> Chain {
        let mut parts = Vec::new();
        for bytes in readable {
            let address = self.allocate(bytes.len());
            self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
            parts.push((address, bytes.len(), 0));
        }
        for &bytes in writable {
            parts.push((self.allocate(bytes), bytes, WRITE));
        }
        let head = self.rings[queue].next;
        for (index, &(address, length, flags)) in parts.iter().enumerate() {
            let slot = self.rings[queue].next;
            self.rings[queue].next = (slot + 1) % SIZE;
            let more = if index + 1 < parts.len() { NEXT } else { 0 };
            let next = (slot + 1) % SIZE;
            self.descriptor(queue, slot, address, length as u32, flags | more, next);
        }
        self.offer(queue, head);
        let writable = parts.iter().filter(|part| part.2 & WRITE != 0);
        Chain { head, writable: writable.map(|part| (part.0, part.1)).collect() }
    }

    /// Writes a descriptor (2.7.5).
    pub fn descriptor(
        &mut self,
        queue: usize,
        slot: u16,
        at: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let place = self.rings[queue].place + 16 * u64::from(slot);
        self.put(place, &at.to_le_bytes());
        self.put(place + 8, &len.to_le_bytes());
        self.put(place + 12, &flags.to_le_bytes());
        self.put(place + 14, &next.to_le_bytes());
    }

    /// Makes a chain available by its head (2.7.6).
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.place + 0x404 + 2 * u64::from(ring.available % SIZE);
        ring.available = ring.available.wrapping_add(1);
        let (index, place) = (ring.available, ring.place);
        self.put(slot, &head.to_le_bytes());
        self.put(place + 0x402, &index.to_le_bytes());
    }

    /// Flags of the available ring.
    pub fn set_flags(&mut self, queue: usize, flags: u16) {
        self.put(self.rings[queue].place + 0x400, &flags.to_le_bytes());
    }

    /// After which used buffer the driver wants to be interrupted (2.7.7).
    pub fn set_used_event(&mut self, queue: usize, event: u16) {
        self.put(self.rings[queue].place + 0x404 + 2 * u64::from(SIZE), &event.to_le_bytes());
    }

    /// After which available buffer the device wants to be notified (2.7.10).
    pub fn avail_event(&self, queue: usize) -> u16 {
        self.word(self.rings[queue].place + 0x804 + 8 * u64::from(SIZE))
    }

    /// Flags of the used ring.
    pub fn used_flags(&self, queue: usize) -> u16 {
        self.word(self.rings[queue].place + 0x800)
    }

    /// How far the device is in the used ring.
    pub fn used_index(&self, queue: usize) -> u16 {
        self.word(self.rings[queue].place + 0x802)
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn word(&self, address: u64) -> u16 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    pub fn kick(&mut self, queue: usize) {
        self.try_kick(queue).unwrap();
    }

    pub fn try_kick(&mut self, queue: usize) -> Result<(), QueueError> {
        self.try_set(0x50, queue as u32)
    }

    /// The next used chain: its head, and how many bytes the device wrote.
    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let index = self.used_index(queue);
        let ring = &mut self.rings[queue];
        if ring.used == index {
            return None;
        }
        let place = ring.place + 0x804 + 8 * u64::from(ring.used % SIZE);
        ring.used = ring.used.wrapping_add(1);
        let element: [u32; 2] = self.memory.read_obj(GuestAddress(place)).unwrap();
        Some((element[0] as u16, element[1]))
    }

    /// What the device wrote into a chain, as many bytes as there are.
    pub fn written(&self, chain: &Chain, bytes: usize) -> Vec<u8> {
        let mut data = Vec::new();
        for &(address, length) in &chain.writable {
            let mut part = vec![0; length];
            self.memory.read_slice(&mut part, GuestAddress(address)).unwrap();
            data.extend(part);
        }
        data.truncate(bytes);
        data
    }

    /// The first bytes that a chain of this queue may be written to, by its head.
    pub fn buffer(&self, queue: usize, head: u16, mut bytes: usize) -> Vec<u8> {
        let (mut data, mut slot) = (Vec::new(), head);
        while bytes > 0 {
            let place = GuestAddress(self.rings[queue].place + 16 * u64::from(slot));
            let [low, high, length, flags]: [u32; 4] = self.memory.read_obj(place).unwrap();
            let mut part = vec![0; bytes.min(length as usize)];
            let address = u64::from(low) | u64::from(high) << 32;
            self.memory.read_slice(&mut part, GuestAddress(address)).unwrap();
            bytes -= part.len();
            data.extend(part);
            slot = (flags >> 16) as u16;
        }
        data
    }

    /// Whether the device raises its interrupt.
    pub fn interrupted(&mut self) -> bool {
        self.device.take_interrupt(&self.memory).unwrap()
    }
}
