//! The devices under a driver of somebody else's: `virtio-drivers`, with event indices and indirect
//! descriptors. It spins until the device has answered, so a notification that it was not asked for
//! hangs the test.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;
use std::rc::Rc;

use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::net::VirtIONet;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::device::socket::{
    VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType,
};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use warren_vmm::devices::Device;
use warren_vmm::devices::blk::Blk;
use warren_vmm::devices::console::Console;
use warren_vmm::devices::disk::Disk;
use warren_vmm::devices::net::Net;
use warren_vmm::devices::rng::Rng;
use warren_vmm::devices::vsock::Vsock;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Size of the driver's memory, in bytes.
const BYTES: usize = 32 << 20;

/// Memory of one test, which is a thread: its guest address is its host address.
struct Arena {
    memory: GuestMemoryMmap,
    next: u64,
    free: HashMap<usize, Vec<u64>>,
}

thread_local! {
    static ARENA: RefCell<Arena> = RefCell::new(Arena::new());
}

impl Arena {
    fn new() -> Self {
        let region = MmapRegion::new(BYTES).unwrap();
        let next = region.as_ptr() as u64;
        let region = GuestRegionMmap::new(region, GuestAddress(next)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        Self { memory, next, free: HashMap::new() }
    }

    /// Blocks of a power of two, aligned to it.
    fn class(bytes: usize) -> usize {
        bytes.next_power_of_two().max(16)
    }

    fn allocate(&mut self, bytes: usize) -> u64 {
        let class = Self::class(bytes);
        if let Some(address) = self.free.get_mut(&class).and_then(Vec::pop) {
            return address;
        }
        let address = self.next.next_multiple_of(class as u64);
        self.next = address + class as u64;
        address
    }

    fn release(&mut self, address: u64, bytes: usize) {
        self.free.entry(Self::class(bytes)).or_default().push(address);
    }
}

fn memory() -> GuestMemoryMmap {
    ARENA.with_borrow(|arena| arena.memory.clone())
}

/// Copies buffers to the driver's memory and back: the devices see nothing else.
struct Bounce;

// SAFETY: blocks of the arena are as large and aligned as is asked for, and given once.
unsafe impl Hal for Bounce {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        ARENA.with_borrow_mut(|arena| {
            let address = arena.allocate(pages * PAGE_SIZE);
            arena.memory.write_slice(&vec![0; pages * PAGE_SIZE], GuestAddress(address)).unwrap();
            (address, NonNull::new(address as *mut u8).unwrap())
        })
    }

    unsafe fn dma_dealloc(address: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        ARENA.with_borrow_mut(|arena| arena.release(address, pages * PAGE_SIZE));
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("only for PCI");
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        ARENA.with_borrow_mut(|arena| {
            let address = arena.allocate(buffer.len());
            // SAFETY: the caller promises that nobody else uses it now.
            let bytes = unsafe { buffer.as_ref() };
            arena.memory.write_slice(bytes, GuestAddress(address)).unwrap();
            address
        })
    }

    unsafe fn unshare(address: PhysAddr, mut buffer: NonNull<[u8]>, way: BufferDirection) {
        ARENA.with_borrow_mut(|arena| {
            if way != BufferDirection::DriverToDevice {
                // SAFETY: the caller promises that nobody else uses it now.
                let bytes = unsafe { buffer.as_mut() };
                arena.memory.read_slice(bytes, GuestAddress(address)).unwrap();
            }
            arena.release(address, buffer.len());
        });
    }
}

/// The registers of a device, which the test holds, too.
struct Wire<D> {
    device: Rc<RefCell<D>>,
    /// What its owner does after a notification.
    after: fn(&mut D, &GuestMemoryMmap),
}

impl<D: Device> Wire<D> {
    /// A device for a driver with interrupts.
    fn new(mut device: D, after: fn(&mut D, &GuestMemoryMmap)) -> (Self, Rc<RefCell<D>>) {
        device.mmio_mut().use_interrupts();
        let device = Rc::new(RefCell::new(device));
        (Self { device: device.clone(), after }, device)
    }

    fn set(&self, register: u64, value: u32) {
        self.device.borrow_mut().write(register, &value.to_le_bytes(), &memory()).unwrap();
    }

    fn register(&self, register: u64) -> u32 {
        let mut value = [0; 4];
        self.device.borrow().read(register, &mut value);
        u32::from_le_bytes(value)
    }
}

impl<D: Device> Transport for Wire<D> {
    fn device_type(&self) -> DeviceType {
        self.register(8).try_into().unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        [1, 0].into_iter().fold(0, |features, half| {
            self.set(0x14, half);
            features << 32 | u64::from(self.register(0x10))
        })
    }

    fn write_driver_features(&mut self, features: u64) {
        for (half, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(0x24, half);
            self.set(0x20, value);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.set(0x30, queue.into());
        self.register(0x34)
    }

    fn notify(&mut self, queue: u16) {
        self.set(0x50, queue.into());
        (self.after)(&mut self.device.borrow_mut(), &memory());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.register(0x70))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.set(0x70, status.bits());
        assert_eq!(self.register(0x70), status.bits(), "the device agrees");
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, table: u64, available: u64, used: u64) {
        self.set(0x30, queue.into());
        self.set(0x38, size);
        for (register, place) in [(0x80, table), (0x90, available), (0xa0, used)] {
            self.set(register, place as u32);
            self.set(register + 4, (place >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.set(0x30, queue.into());
        self.set(0x44, 0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.set(0x30, queue.into());
        self.register(0x44) == 1
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.register(0x60);
        self.set(0x64, status);
        InterruptStatus::from_bits_retain(status)
    }

    fn read_config_generation(&self) -> u32 {
        self.register(0xfc)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        let mut value = T::new_zeroed();
        self.device.borrow().read(0x100 + offset as u64, value.as_mut_bytes());
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        _: usize,
        _: T,
    ) -> virtio_drivers::Result<()> {
        unreachable!("nothing there is writable");
    }
}

/// A disk of 64 sectors, each of them its number.
fn disk() -> Disk {
    let base = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..64).flat_map(|sector| [sector; SECTOR_SIZE]).collect();
    base.write_all_at(&bytes, 0).unwrap();
    Disk::with_layer_in_memory(base).unwrap()
}

fn finish(blk: &mut Blk, memory: &GuestMemoryMmap) {
    blk.quiesce(memory).unwrap();
}

#[test]
fn a_disk_is_read_and_written() {
    for use_uring in [false, true] {
        let mut blk = Blk::new(disk(), *b"serial-number-000001");
        if use_uring {
            blk.use_uring().unwrap();
        }
        let (wire, _device) = Wire::new(blk, finish);
        let mut driver = VirtIOBlk::<Bounce, _>::new(wire).unwrap();
        assert_eq!((driver.capacity(), driver.readonly()), (64, false));
        let mut id = [0; 20];
        driver.device_id(&mut id).unwrap();
        assert_eq!(&id, b"serial-number-000001");
        for round in 0..1000 {
            let sector = round * 7 % 64;
            let expected = if round < 64 { sector as u8 } else { (round - 64) as u8 };
            let mut bytes = [0; SECTOR_SIZE];
            driver.read_blocks(sector, &mut bytes).unwrap();
            assert_eq!(bytes, [expected; SECTOR_SIZE]);
            driver.write_blocks(sector, &[round as u8; SECTOR_SIZE]).unwrap();
        }
        driver.flush().unwrap();
        driver.read_blocks(64, &mut [0; SECTOR_SIZE]).unwrap_err();
    }
}

#[test]
fn a_read_only_disk_says_so() {
    let base = tempfile::tempfile().unwrap();
    base.set_len(4096).unwrap();
    let (wire, _device) = Wire::new(Blk::new(Disk::read_only(base).unwrap(), [0; 20]), finish);
    let mut driver = VirtIOBlk::<Bounce, _>::new(wire).unwrap();
    assert!(driver.readonly());
    driver.write_blocks(0, &[1; SECTOR_SIZE]).unwrap_err();
}

#[test]
fn entropy_comes() {
    let (wire, _device) = Wire::new(Rng::new(), |_, _| {});
    let mut driver = VirtIORng::<Bounce, _>::new(wire).unwrap();
    for _ in 0..1000 {
        let mut bytes = [0; 32];
        assert_eq!(driver.request_entropy(&mut bytes), Ok(32));
        assert_ne!(bytes, [0; 32]);
    }
}

#[test]
fn a_console_is_written_to_and_read_from() {
    let (wire, device) = Wire::new(Console::new(), |_, _| {});
    let mut driver = VirtIOConsole::<Bounce, _>::new(wire).unwrap();
    for round in 0..1000 {
        let line = format!("line {round}\n");
        driver.send_bytes(line.as_bytes()).unwrap();
        assert_eq!(device.borrow_mut().take_output().bytes, line.as_bytes());
        device.borrow_mut().input(line.as_bytes());
        device.borrow_mut().receive(&memory()).unwrap();
        let typed: Vec<u8> = std::iter::from_fn(|| driver.recv(true).unwrap()).collect();
        assert_eq!(typed, line.as_bytes());
    }
}

#[test]
fn frames_go_both_ways() {
    let (tap, host) = crate::net::tap();
    let mut net = Net::new();
    net.set_mac([2, 0, 0, 0, 0, 7]);
    net.attach(tap);
    let (wire, device) = Wire::new(net, |_, _| {});
    let mut driver = VirtIONet::<Bounce, _, 16>::new(wire, 2048).unwrap();
    assert_eq!(driver.mac_address(), [2, 0, 0, 0, 0, 7]);
    for round in 0..1000usize {
        let frame = vec![round as u8; 60 + round];
        let mut buffer = driver.new_tx_buffer(frame.len());
        buffer.packet_mut().copy_from_slice(&frame);
        driver.send(buffer).unwrap();
        let mut sent = vec![0; 2048];
        let length = host.recv(&mut sent).unwrap();
        assert_eq!(sent[12..length], frame);
        for _ in 0..3 {
            host.send(&sent[..length]).unwrap();
        }
        device.borrow_mut().receive(&memory()).unwrap();
        for _ in 0..3 {
            let received = driver.receive().unwrap();
            assert_eq!(received.packet(), frame);
            driver.recycle_rx_buffer(received).unwrap();
        }
        assert!(!driver.can_recv());
    }
}

#[test]
fn a_stream_echoes() {
    let (wire, device) = Wire::new(Vsock::new(), |_, _| {});
    let driver = VirtIOSocket::<Bounce, _, 4096>::new(wire).unwrap();
    let mut manager = VsockConnectionManager::new(driver);
    manager.listen(52);
    let (mut host, stream) = UnixStream::pair().unwrap();
    stream.set_nonblocking(true).unwrap();
    device.borrow_mut().connect(stream, 52);
    // What the guest does until it has nothing to do.
    let mut serve = || {
        loop {
            let events: Vec<_> = device.borrow().poll_fds().map(|(_, events)| events).collect();
            device.borrow_mut().polled(events.into_iter());
            device.borrow_mut().receive(&memory()).unwrap();
            let Some(event) = manager.poll().unwrap() else { return };
            if let VsockEventType::Received { length } = event.event_type {
                let mut bytes = vec![0; length];
                let from = VsockAddr { ..event.source };
                assert_eq!(manager.recv(from, 52, &mut bytes), Ok(length));
                manager.send(from, 52, &bytes).unwrap();
                manager.update_credit(from, 52).unwrap();
            }
        }
    };
    serve();
    let mut line = [0; 8];
    host.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 1024\n");
    for round in 0..1000usize {
        let bytes = vec![round as u8; 1 + round * 3];
        host.write_all(&bytes).unwrap();
        serve();
        let mut echo = vec![0; bytes.len()];
        host.read_exact(&mut echo).unwrap();
        assert_eq!(echo, bytes);
    }
}
