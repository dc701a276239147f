//! A driver of several processors: it writes to rings and descriptors while the device reads them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use warren_vmm::devices::Device;
use warren_vmm::devices::blk::Blk;
use warren_vmm::devices::console::Console;
use warren_vmm::devices::disk::Disk;
use warren_vmm::devices::net::Net;
use warren_vmm::devices::offload::Header;
use warren_vmm::devices::rng::Rng;
use warren_vmm::devices::vsock::Vsock;

use crate::driver::{BASE, BYTES, Driver, SIZE};

/// How long each device is raced with.
const TIME: Duration = Duration::from_millis(300);

/// Numbers that look random (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Writes descriptors, heads and indices of all queues, most of them possible.
fn scribble(memory: &GuestMemoryMmap, queues: u64, is_over: &AtomicBool) {
    let mut numbers = Numbers(0x5eed);
    let size = u64::from(SIZE);
    while !is_over.load(Ordering::Relaxed) {
        let number = numbers.next();
        let ring = BASE + 0x1000 * (number % queues);
        let slot = number >> 8 & (size - 1);
        let wild = number >> 16 & 0xff;
        let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).unwrap();
        match number >> 24 & 3 {
            0 => {
                // In memory; now and then across its end, or far away.
                let address = match wild {
                    0 => numbers.next(),
                    1 => BASE + BYTES - 8,
                    _ => BASE + numbers.next() % BYTES,
                };
                let length = if wild == 2 { u32::MAX } else { numbers.next() as u32 % 3000 };
                put(ring + 16 * slot, &address.to_le_bytes());
                put(ring + 16 * slot + 8, &length.to_le_bytes());
            }
            1 => {
                let flags = if wild < 8 { number >> 32 & 7 } else { number >> 32 & 3 };
                put(ring + 16 * slot + 12, &(flags as u16).to_le_bytes());
                put(ring + 16 * slot + 14, &((number >> 40 & (size - 1)) as u16).to_le_bytes());
            }
            2 => put(ring + 0x404 + 2 * slot, &((number >> 40 & (size - 1)) as u16).to_le_bytes()),
            _ => {
                // Ahead of what the device has used.
                let used: u16 = memory.read_obj(GuestAddress(ring + 0x802)).unwrap();
                let ahead = if wild == 3 { 1000 } else { number >> 40 & (size - 1) };
                put(ring + 0x402, &used.wrapping_add(ahead as u16).to_le_bytes());
            }
        }
    }
}

/// Lets a device serve such a driver; returns how many chains it used. When it refuses the driver it
/// begins anew.
fn race<D: Device>(make: impl Fn() -> D, mut serve: impl FnMut(&mut D, &GuestMemoryMmap)) -> u64 {
    let mut driver = Driver::reset(make());
    driver.device.mmio_mut().use_interrupts();
    let (memory, queues) = (driver.memory.clone(), driver.device.mmio().queues.len());
    let is_over = AtomicBool::new(false);
    let mut used = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| scribble(&memory, queues as u64, &is_over));
        let end = Instant::now() + TIME;
        while Instant::now() < end {
            driver.set(0x70, 0);
            let features = driver.offered();
            assert!(driver.negotiate(features));
            driver.set_up_queues();
            (0..queues as u64).for_each(|queue| driver.put(BASE + 0x1000 * queue + 0x802, &[0; 2]));
            driver.set(0x70, 15);
            let mut begun = vec![0; queues];
            for turn in 0..1000 {
                let queue = turn % queues;
                let kicked = driver.try_kick(queue);
                let index = driver.used_index(queue);
                used += u64::from(index.wrapping_sub(begun[queue]).min(SIZE));
                begun[queue] = index;
                if kicked.is_err()
                    || driver.device.take_interrupt(&memory).is_err()
                    || driver.device.due().is_some() && driver.device.serve(&memory).is_err()
                {
                    break;
                }
                serve(&mut driver.device, &memory);
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });
    used
}

#[test]
fn no_device_is_harmed_by_a_driver_that_changes_its_mind() {
    let disk = || {
        let base = tempfile::tempfile().unwrap();
        base.set_len(64 * 512).unwrap();
        Blk::new(Disk::with_layer_in_memory(base).unwrap(), [0; 20])
    };
    let ring = || {
        let mut blk = disk();
        blk.use_uring().unwrap();
        blk
    };
    let (tap, host) = crate::net::tap();
    let attached = |mut net: Net| {
        net.attach(tap.try_clone().unwrap());
        net
    };
    let exchange = |net: &mut Net, memory: &GuestMemoryMmap| {
        let _ = host.send(&[&Header::default().bytes()[..], &[0; 1000]].concat());
        let _ = net.receive(memory);
        while host.recv(&mut [0; 12]).is_ok() {}
    };
    let used = [
        race(Rng::new, |_, _| {}),
        race(Console::new, |console, memory| {
            console.take_output();
            console.input(b"typed");
            let _ = console.receive(memory);
        }),
        race(|| attached(Net::new()), exchange),
        race(|| attached(Net::multiqueue()), exchange),
        race(Vsock::new, |_, _| {}),
        race(disk, |_, _| {}),
        race(ring, |blk, memory| {
            let _ = blk.complete(memory);
        }),
    ];
    assert!(used.iter().all(|&used| used > 0), "{used:?}");
}
