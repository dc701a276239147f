//! Devices with a hostile driver: registers, rings and buffers, from any bytes.
//!
//! The driver's memory lies between pages that nobody may touch: a device that reached beyond it
//! would die of that. Each call of a device must come back, and each chain that it takes must come
//! back once.

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;
use std::time::Instant;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use warren_vmm::devices::blk::Blk;
use warren_vmm::devices::console::{Console, OUTPUT_MAX};
use warren_vmm::devices::disk::Disk;
use warren_vmm::devices::limiter::{Limit, Limiter};
use warren_vmm::devices::net::{Limits, Net};
use warren_vmm::devices::rng::Rng;
use warren_vmm::devices::vsock::Vsock;
use warren_vmm::devices::{Device, QueueError};

/// Where the driver's memory begins; what lies below is not the devices' to touch.
const BASE: u64 = 0x20_0000;

/// Size of the driver's memory, in bytes: 16 bits address all of it.
const BYTES: usize = 0x1_0000;

/// Size of the forbidden pages on both sides.
const GUARD: usize = 0x1_0000;

/// Descriptors in each queue of a driver that begins as it should. Few, so that rings wrap.
const SIZE: u16 = 8;

/// Registers that matter (virtio 1.2, 4.2.2).
const REGISTERS: [u16; 23] = [
    0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94,
    0xa0, 0xa4, 0xb0, 0xc0, 0xfc, 0x100, 0x104,
];

/// A device and the host's side of it.
trait Subject: Sized {
    fn device(&mut self) -> &mut dyn Device;

    /// Makes a device in a saved state, as a clone has it.
    fn again(&mut self, memory: &GuestMemoryMmap) -> Result<Self, QueueError>;

    /// Whether the device has chains that it will give back later.
    fn is_busy(&self) -> bool {
        false
    }

    /// Something happens on the host.
    fn stir(&mut self, kind: u8, bytes: &[u8], memory: &GuestMemoryMmap) -> Result<(), QueueError>;
}

/// The driver's memory.
struct Memory {
    // Declared first, dropped first: it points into the mapping.
    memory: GuestMemoryMmap,
    mapping: std::ptr::NonNull<std::ffi::c_void>,
}

impl Memory {
    const LENGTH: std::num::NonZeroUsize =
        std::num::NonZeroUsize::new(GUARD + BYTES + GUARD).unwrap();

    fn new() -> Self {
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a mapping of its own, at no place that is asked for.
        let mapping = unsafe {
            mmap_anonymous(None, Self::LENGTH, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE)
        };
        let mapping = mapping.expect("there is memory");
        // SAFETY: within the mapping.
        let begin = unsafe { mapping.byte_add(GUARD) };
        // SAFETY: the middle of the mapping, which nobody uses yet.
        unsafe { mprotect(begin, BYTES, rights) }.expect("the mapping is ours");
        let (rights, flags) = (rights.bits(), libc_flags());
        // SAFETY: the middle of the mapping, which `drop` unmaps only after the region is gone.
        let region = unsafe { MmapRegion::build_raw(begin.as_ptr().cast(), BYTES, rights, flags) };
        let region = Arc::new(region.expect("it is aligned"));
        let region =
            GuestRegionMmap::with_arc(region, GuestAddress(BASE)).expect("it does not wrap");
        let memory = GuestMemoryMmap::from_regions(vec![region]).expect("there is one");
        Self { memory, mapping }
    }
}

fn libc_flags() -> i32 {
    (MapFlags::MAP_PRIVATE | MapFlags::MAP_ANONYMOUS).bits()
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.memory = GuestMemoryMmap::new();
        // SAFETY: nothing points into it any more.
        unsafe { munmap(self.mapping, Self::LENGTH.get()) }.expect("it is mapped");
    }
}

/// A reader of the fuzzer's bytes: 0 when there are no more.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let part = self.take(N);
        array[..part.len()].copy_from_slice(part);
        array
    }

    fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    fn take(&mut self, length: usize) -> &'a [u8] {
        let (part, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        part
    }
}

/// Lets the bytes drive a device until they end, or the device refuses the driver.
fn drive(mut subject: impl Subject, data: &[u8]) {
    let memory = Memory::new();
    let memory = &memory.memory;
    let mut bytes = Input(data);
    let begin = bytes.byte();
    if begin & 1 == 0 {
        subject.device().mmio_mut().use_interrupts();
    }
    if begin & 2 == 0 {
        set_up(subject.device(), &mut bytes, memory);
    }
    while !bytes.0.is_empty() {
        let result = act(&mut subject, &mut bytes, memory);
        let is_busy = subject.is_busy();
        for queue in &subject.device().mmio().queues {
            let taken = queue.in_flight();
            let may_be = if result.is_err() || is_busy { 256 } else { 0 };
            assert!(taken <= may_be, "{taken} chains are taken");
        }
        if result.is_err() {
            // The microVM ends here.
            return;
        }
    }
}

/// Begins as a driver should, with the features that the bytes choose.
fn set_up(device: &mut dyn Device, bytes: &mut Input<'_>, memory: &GuestMemoryMmap) {
    let queues = device.mmio().queues.len() as u32;
    let mut offered = [[0; 4]; 2];
    for (half, value) in (0u32..).zip(&mut offered) {
        device.write(0x14, &half.to_le_bytes(), memory).expect("it is done right");
        device.read(0x10, value);
    }
    let mut set = |register: u64, value: u32| {
        device.write(register, &value.to_le_bytes(), memory).expect("it is done right");
    };
    set(0x70, 0);
    set(0x70, 3);
    for (half, offered) in (0..).zip(offered) {
        set(0x24, half);
        // VERSION_1 is one of them.
        set(0x20, u32::from_le_bytes(offered) & (u32::from_le_bytes(bytes.array()) | half));
    }
    set(0x70, 11);
    for queue in 0..queues {
        set(0x30, queue);
        set(0x38, SIZE.into());
        for (register, part) in [(0x80, 0), (0x90, 0x100), (0xa0, 0x200)] {
            set(register, BASE as u32 + 0x400 * queue + part);
        }
        set(0x44, 1);
    }
    set(0x70, 15);
}

/// One thing that driver or host does.
fn act(
    subject: &mut impl Subject,
    bytes: &mut Input<'_>,
    memory: &GuestMemoryMmap,
) -> Result<(), QueueError> {
    let kind = bytes.byte();
    let device = subject.device();
    let put = |offset: u64, bytes: &[u8]| {
        // What does not fit is cut.
        let _ = memory.write(bytes, GuestAddress(BASE + offset));
    };
    match kind & 15 {
        // A register, of any width.
        0 | 1 => {
            let [register, width] = bytes.array();
            let offset = REGISTERS[usize::from(register) % REGISTERS.len()].into();
            let width = if width < 200 { 4 } else { usize::from(width % 9) };
            let mut value = [0; 8];
            if kind & 1 == 0 {
                device.read(offset, &mut value[..width]);
            } else {
                value = bytes.array();
                device.write(offset, &value[..width], memory)?;
            }
        }
        // Anything anywhere.
        2 => {
            let (offset, length) = (bytes.word(), bytes.byte());
            put(offset.into(), bytes.take(length.into()));
        }
        // A descriptor: queue and place, where its buffer is, how long, flags, the next.
        3..=5 => {
            let [place, flags, next] = bytes.array();
            let (address, length) = (bytes.word(), bytes.word());
            let high = if kind & 64 == 0 { BASE } else { u64::from(bytes.byte()) << 56 };
            let length = if kind & 128 == 0 { length.into() } else { u32::from(length) << 16 };
            let mut descriptor = (high + u64::from(address)).to_le_bytes().to_vec();
            descriptor.extend(u32::to_le_bytes(length));
            descriptor.extend(u16::from(flags & 7).to_le_bytes());
            descriptor.extend(u16::from(next & 15).to_le_bytes());
            let queue = 0x400 * u64::from(place >> 6 | (flags >> 1 & 0xc));
            put(queue + 16 * u64::from(place & 15), &descriptor);
        }
        // A chain is made available, and the device notified or not.
        6..=8 => {
            let [place, head] = bytes.array();
            let (queue, ahead) = (place & 15, u16::from(place >> 6) + 1);
            let ring = 0x400 * u64::from(queue) + 0x100;
            let index: u16 = memory.read_obj(GuestAddress(BASE + ring + 2)).unwrap_or(0);
            put(ring + 4 + 2 * u64::from(index % SIZE), &u16::from(head & 15).to_le_bytes());
            let ahead = if kind & 128 == 0 { 1 } else { ahead };
            put(ring + 2, &index.wrapping_add(ahead).to_le_bytes());
            if kind & 64 == 0 {
                device.write(0x50, &u32::from(queue).to_le_bytes(), memory)?;
            }
        }
        9 => {
            device.take_interrupt(memory)?;
        }
        10 => {
            if device.due().is_some() {
                device.serve(memory)?;
            }
        }
        11 => *subject = subject.again(memory)?,
        _ => {
            let length = usize::from(bytes.byte()) * if kind & 16 == 0 { 1 } else { 16 };
            let data = bytes.take(length);
            subject.stir(kind >> 5, data, memory)?;
        }
    }
    Ok(())
}

struct NetSubject {
    net: Net,
    tap: OwnedFd,
    host: UnixDatagram,
}

impl NetSubject {
    fn new(mut net: Net) -> Self {
        let (tap, host) = UnixDatagram::pair().expect("a pair of sockets");
        for end in [&tap, &host] {
            end.set_nonblocking(true).expect("a socket");
        }
        let tap = OwnedFd::from(tap);
        net.set_mac([2, 0, 0, 0, 0, 1]);
        net.attach(tap.try_clone().expect("a descriptor"));
        Self { net, tap, host }
    }
}

impl Subject for NetSubject {
    fn device(&mut self) -> &mut dyn Device {
        &mut self.net
    }

    fn again(&mut self, memory: &GuestMemoryMmap) -> Result<Self, QueueError> {
        let clone = || Some((self.tap.try_clone().ok()?, self.host.try_clone().ok()?));
        let (tap, host) = clone().expect("descriptors");
        let net = Net::load(&self.net.save(), memory, tap.try_clone().ok())?;
        Ok(Self { net, tap, host })
    }

    fn stir(&mut self, kind: u8, bytes: &[u8], memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        match kind {
            // A frame comes, as long as it says.
            0..4 => {
                let mut frame = bytes.to_vec();
                if let [.., a, b] = *bytes {
                    frame.resize(usize::from(u16::from_le_bytes([a, b])) + 12, 0);
                }
                let _ = self.host.send(&frame);
            }
            4 => self.net.drain(memory)?,
            5 => {
                let per_second = NonZeroU64::MIN.saturating_add(1 << 20);
                let limit = bytes.first().map(|&burst| Limit { per_second, burst: burst.into() });
                let limiter = Limiter::new(limit, None, Instant::now());
                self.net.set_limits(Limits { receive: limiter, transmit: limiter });
            }
            _ => {}
        }
        self.net.poll_fd(memory)?;
        self.net.receive(memory)?;
        self.net.transmit(memory)?;
        while let Ok(length) = self.host.recv(&mut [0; 12]) {
            assert_eq!(length, 12, "the header is there");
        }
        Ok(())
    }
}

struct VsockSubject {
    vsock: Vsock,
    hosts: Vec<UnixStream>,
}

impl Subject for VsockSubject {
    fn device(&mut self) -> &mut dyn Device {
        &mut self.vsock
    }

    fn again(&mut self, memory: &GuestMemoryMmap) -> Result<Self, QueueError> {
        Ok(Self { vsock: Vsock::load(&self.vsock.save(), memory)?, hosts: Vec::new() })
    }

    fn stir(&mut self, kind: u8, bytes: &[u8], memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        match kind {
            0 => {
                if let Ok((host, stream)) = UnixStream::pair() {
                    let ready = host.set_nonblocking(true).and(stream.set_nonblocking(true));
                    ready.expect("sockets");
                    self.vsock.connect(stream, 52);
                    self.hosts.push(host);
                }
            }
            1 | 2 => {
                if let Some(host) = self.hosts.last_mut() {
                    let _ = host.write(bytes);
                }
            }
            3 => drop(self.hosts.pop()),
            4 => self.vsock.tell_reset(memory)?,
            _ => {
                for host in &mut self.hosts {
                    let _ = host.read(&mut [0; 4096]);
                }
            }
        }
        let events: Vec<_> = self.vsock.poll_fds().map(|(_, events)| events).collect();
        self.vsock.polled(events.into_iter());
        self.vsock.transmit(memory)?;
        self.vsock.receive(memory)?;
        assert!(self.vsock.poll_fds().count() <= warren_vmm::devices::vsock::CONNECTIONS_MAX);
        Ok(())
    }
}

impl Subject for Rng {
    fn device(&mut self) -> &mut dyn Device {
        self
    }

    fn again(&mut self, memory: &GuestMemoryMmap) -> Result<Self, QueueError> {
        Self::load(&self.save(), memory)
    }

    fn stir(&mut self, kind: u8, bytes: &[u8], _: &GuestMemoryMmap) -> Result<(), QueueError> {
        let limit = bytes.first().map(|&burst| Limit {
            per_second: NonZeroU64::MIN.saturating_add(u64::from(kind) << 20),
            burst: burst.into(),
        });
        self.set_limiter(Limiter::new(limit, None, Instant::now()));
        Ok(())
    }
}

impl Subject for Console {
    fn device(&mut self) -> &mut dyn Device {
        self
    }

    fn again(&mut self, memory: &GuestMemoryMmap) -> Result<Self, QueueError> {
        Self::load(&self.save(), memory)
    }

    fn stir(&mut self, kind: u8, bytes: &[u8], memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        if kind == 0 {
            assert!(self.take_output().bytes.len() <= OUTPUT_MAX);
        }
        assert!(self.input(bytes) <= bytes.len());
        self.receive(memory)
    }
}

struct BlkSubject {
    blk: Blk,
    base: File,
    layer: File,
}

impl BlkSubject {
    /// The base: three blocks and a half, of which each byte is the same.
    const BYTES: usize = 14 * 1024;

    fn new(use_uring: bool) -> Self {
        let file = || File::from(memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).expect("memory"));
        let (base, layer) = (file(), file());
        base.write_all_at(&[0x5a; Self::BYTES], 0).expect("memory");
        let clone = |file: &File| file.try_clone().expect("a descriptor");
        let disk = Disk::with_layer(clone(&base), clone(&layer)).expect("its size is right");
        let mut blk = Blk::new(disk, *b"fuzz-fuzz-fuzz-fuzz-");
        if use_uring {
            blk.use_uring().expect("a kernel with rings");
        }
        Self { blk, base, layer }
    }
}

impl Subject for BlkSubject {
    fn device(&mut self) -> &mut dyn Device {
        &mut self.blk
    }

    fn again(&mut self, memory: &GuestMemoryMmap) -> Result<Self, QueueError> {
        self.blk.quiesce(memory)?;
        let clone = |file: &File| file.try_clone().expect("a descriptor");
        let (base, layer, state) = (clone(&self.base), clone(&self.layer), self.blk.save());
        let disk = Disk::load(&state.disk, clone(&base), Some(clone(&layer)));
        let disk = disk.expect("it is the same disk");
        let blk = Blk::load(&state, memory, disk, *b"fuzz-fuzz-fuzz-fuzz-")?;
        Ok(Self { blk, base, layer })
    }

    fn is_busy(&self) -> bool {
        self.blk.poll_fd().is_some()
    }

    fn stir(&mut self, _: u8, _: &[u8], memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        let mut base = vec![0; Self::BYTES];
        self.base.read_exact_at(&mut base, 0).expect("memory");
        assert!(base.iter().all(|&byte| byte == 0x5a), "nobody writes the base");
        self.blk.complete(memory)
    }
}

/// The block device.
pub fn blk(data: &[u8]) {
    drive(BlkSubject::new(data.first().is_some_and(|begin| begin & 4 != 0)), data);
}

/// The console.
pub fn console(data: &[u8]) {
    drive(Console::new(), data);
}

/// The entropy device.
pub fn rng(data: &[u8]) {
    drive(Rng::new(), data);
}

/// The network device, with one pair of queues or several.
pub fn net(data: &[u8]) {
    let has_several = data.first().is_some_and(|begin| begin & 4 != 0);
    drive(NetSubject::new(if has_several { Net::multiqueue() } else { Net::new() }), data);
}

/// The vsock device.
pub fn vsock(data: &[u8]) {
    drive(VsockSubject { vsock: Vsock::new(), hosts: Vec::new() }, data);
}
