//! The machine as a function sees it, and the loop that serves calls.

use alloc::string::String;
use alloc::vec::Vec;
use core::ptr::NonNull;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::Rng;
use smoltcp::iface::Interface;
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use warren_abi::microvm::{
    ABI_VERSION, INVOCATION_PORT, Identity, MMIO_BYTES, NET_MMIO, VSOCK_MMIO, WAIT_FOREVER,
};

use crate::calls::Calls;
use crate::channel::{Channel, Connection, NoCredit};
use crate::clock::Clock;
use crate::loaded::Loaded;
use crate::log::{Log, Stream};
use crate::net::{NetDevice, Sockets};
use crate::{barrier, heap, identity, net, port};

/// A reply up to this length is copied behind its header, in bytes.
const COPY_MAX: usize = 16 * 1024;

/// What a program does with a call.
pub trait Function {
    /// Answers a request.
    fn call(&mut self, machine: &mut Machine, request: &[u8]) -> Vec<u8>;
}

/// A deadline passed.
#[derive(Debug)]
pub struct Timeout;

/// Devices, network and identity of a released clone.
pub struct Machine {
    pub(crate) clock: Clock,
    pub(crate) identity: Identity,
    /// The first bytes that the random generator gave.
    pub(crate) first_random: [u8; 32],
    pub(crate) random: ChaCha20Rng,
    pub(crate) device: NetDevice,
    pub(crate) interface: Interface,
    pub(crate) sockets: Sockets,
    pub(crate) channel: Channel,
    pub(crate) log: Log,
    is_released: bool,
    /// [`warren_abi::microvm::Boot::generation`] of this clone.
    generation: u64,
    /// The call in progress was the former one's: nobody waits for its answer.
    orphaned: bool,
}

/// Boots, stands at the release barrier, takes its identity and answers calls for ever: with the
/// function that was loaded, if one was, else with the program's own.
pub fn run(own: &mut dyn Function) -> ! {
    let mut loaded = None;
    let load = &mut |place| loaded = Loaded::from(place);
    let mut machine = Machine::boot(&[INVOCATION_PORT], Sockets::fixed);
    let mut calls = Calls::new();
    let identity = barrier::wait(load);
    machine.release(identity);
    let function = loaded.as_mut().map_or(own, |loaded| loaded as &mut dyn Function);
    loop {
        while let Some((caller, request)) = calls.next(&mut machine.channel) {
            machine.begin_call();
            let reply = function.call(&mut machine, &request);
            machine.answer(caller, &reply);
        }
        machine.wait(u64::MAX);
    }
}

/// What follows from an identity: a random generator, what that gave first, and an interface.
fn personal(
    identity: &Identity,
    device: &mut NetDevice,
    clock: &Clock,
) -> (ChaCha20Rng, [u8; 32], Interface) {
    let mut random = identity::random_generator(identity);
    let mut first_random = [0; 32];
    random.fill_bytes(&mut first_random);
    device.mtu = identity.mtu;
    let interface = net::interface(identity, random.next_u64(), device, clock.instant());
    (random, first_random, interface)
}

fn transport(address: u64) -> MmioTransport<'static> {
    let header = NonNull::new(address as *mut VirtIOHeader).expect("registers do not lie at 0");
    // SAFETY: the VMM answers all accesses to this window, and nothing else uses it.
    unsafe { MmioTransport::new(header, MMIO_BYTES as usize) }.expect("a virtio-mmio device")
}

impl Machine {
    /// Boots, up to the release barrier.
    pub(crate) fn boot(ports: &[u32], sockets: fn() -> Sockets) -> Self {
        let boot = barrier::boot();
        // SAFETY: called first of all, with what the VMM set aside for the heap.
        unsafe { heap::move_to(boot.heap_start, boot.heap_end) };
        assert_eq!(boot.abi_version, ABI_VERSION, "guest and VMM must be of one release");
        let mut device = NetDevice::new(transport(NET_MMIO));
        let channel = Channel::new(transport(VSOCK_MMIO), ports);
        let sockets = sockets();
        // Nobody yet.
        let identity = Identity::NOBODY;
        let clock = Clock::new(&identity);
        let (random, first_random, interface) = personal(&identity, &mut device, &clock);
        Self {
            clock,
            identity,
            first_random,
            random,
            device,
            interface,
            sockets,
            channel,
            log: Log::default(),
            generation: boot.generation,
            is_released: false,
            orphaned: false,
        }
    }

    /// Becomes who it is released as.
    pub(crate) fn release(&mut self, identity: Identity) {
        self.identity = identity;
        self.is_released = true;
        self.generation = barrier::boot().generation;
        self.clock = Clock::new(&self.identity);
        (self.random, self.first_random, self.interface) =
            personal(&self.identity, &mut self.device, &self.clock);
        port::ready();
    }

    /// Whether it was released: before, it has no time, no randomness and no address.
    pub(crate) fn is_released(&self) -> bool {
        self.is_released
    }

    /// Nanoseconds since 1970; before release 0.
    pub(crate) fn wall_clock_ns(&self) -> u64 {
        if self.is_released { self.clock.wall_clock_ns() } else { 0 }
    }

    /// Writes to the function's log.
    pub(crate) fn log(&mut self, stream: Stream, bytes: &[u8]) {
        let now = self.wall_clock_ns();
        self.log.write(stream, now, bytes);
    }

    /// Becomes the clone of what it was: with another identity, and without whatever tied the former
    /// one to others.
    fn become_another(&mut self) {
        self.channel.forget();
        self.orphaned = true;
        self.sockets.renew();
        // It has its function.
        let identity = barrier::wait(&mut |_| {});
        self.release(identity);
    }

    /// A call begins that is this clone's own.
    pub(crate) fn begin_call(&mut self) {
        self.orphaned = false;
    }

    /// Host name of this clone.
    pub fn hostname(&self) -> String {
        identity::hostname(&self.identity)
    }

    /// Nanoseconds since release; in a call that was another one's, later than any deadline.
    pub fn now_ns(&self) -> u64 {
        if self.orphaned { u64::MAX / 2 } else { self.clock.now_ns() }
    }

    /// Sends what is queued, then sleeps until something came, a timer of the network is due, or
    /// this time (nanoseconds since release) is reached.
    pub fn wait(&mut self, until_ns: u64) {
        self.poll();
        let now = self.clock.instant();
        let network = self.interface.poll_delay(now, &self.sockets.set);
        let mut microseconds = u64::from(WAIT_FOREVER);
        if let Some(delay) = network {
            microseconds = microseconds.min(delay.total_micros());
        }
        if until_ns != u64::MAX {
            let left = until_ns.saturating_sub(self.now_ns()).div_ceil(1000);
            microseconds = microseconds.min(left).min(u64::from(WAIT_FOREVER - 1));
        }
        self.log.send(&mut self.channel);
        port::wait(microseconds as u32);
        if barrier::boot().generation != self.generation {
            self.become_another();
        }
        self.poll();
    }

    /// [`Machine::wait`], unless the time has passed.
    pub(crate) fn wait_before(&mut self, deadline_ns: u64) -> Result<(), Timeout> {
        if self.now_ns() >= deadline_ns {
            return Err(Timeout);
        }
        self.wait(deadline_ns);
        Ok(())
    }

    fn poll(&mut self) {
        self.interface.poll(self.clock.instant(), &mut self.device, &mut self.sockets.set);
        self.sockets.clear();
        self.channel.poll();
    }

    fn answer(&mut self, caller: Connection, reply: &[u8]) {
        let header = (reply.len() as u32).to_le_bytes();
        if reply.len() <= COPY_MAX {
            // One packet, one exit.
            self.send(caller, &[&header, reply].concat());
        } else {
            self.send(caller, &header);
            self.send(caller, reply);
        }
    }

    /// Sends all of it, waiting until the other side takes it, or is gone.
    pub(crate) fn send(&mut self, to: Connection, bytes: &[u8]) {
        let mut sent = 0;
        while sent < bytes.len() {
            match self.channel.send(to, &bytes[sent..]) {
                Ok(length) => sent += length,
                Err(NoCredit) => self.wait(u64::MAX),
            }
        }
    }
}
