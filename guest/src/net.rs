//! The network: virtio-net under smoltcp.

use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::{RefCell, UnsafeCell};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::{AnySocket, Socket, tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address};
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::mmio::MmioTransport;
use warren_abi::microvm::Identity;

use crate::hal::GuestHal;

/// Descriptors in each queue; also how many buffers are posted for reception.
const QUEUE: usize = 64;

/// Header that precedes each frame (virtio 1.2, 5.1.6).
const HEADER: usize = 12;

/// Room for a frame with its header.
const FRAME: usize = 2048;

/// One frame with its header. None is ever given back.
type Buffer = &'static mut [u8; FRAME];

/// A buffer outside of the heap: see `prefault` for why.
#[repr(C, align(4096))]
struct Cold<const BYTES: usize>(UnsafeCell<[u8; BYTES]>);

// SAFETY: there is one thread, and who takes a buffer takes the only reference.
unsafe impl<const BYTES: usize> Sync for Cold<BYTES> {}

impl<const BYTES: usize> Cold<BYTES> {
    const fn new() -> Self {
        Self(UnsafeCell::new([0; BYTES]))
    }

    /// Its first address, and the one behind its last.
    fn bounds(&self) -> (u64, u64) {
        let start = self.0.get().addr() as u64;
        (start, start + BYTES as u64)
    }
}

#[unsafe(link_section = ".bss.cold")]
static TCP_RX: Cold<{ 256 * 1024 }> = Cold::new();
#[unsafe(link_section = ".bss.cold")]
static TCP_TX: Cold<{ 256 * 1024 }> = Cold::new();
#[unsafe(link_section = ".bss.cold")]
static UDP_RX: Cold<{ 256 * 1024 }> = Cold::new();
#[unsafe(link_section = ".bss.cold")]
static UDP_TX: Cold<{ 16 * 1024 }> = Cold::new();
#[unsafe(link_section = ".bss.cold")]
static RECEIVED: Cold<{ QUEUE * FRAME }> = Cold::new();

/// Where the large buffers begin and end, ascending.
pub fn cold_buffers() -> [(u64, u64); 5] {
    let mut buffers =
        [TCP_RX.bounds(), TCP_TX.bounds(), UDP_RX.bounds(), UDP_TX.bounds(), RECEIVED.bounds()];
    buffers.sort_unstable();
    buffers
}

/// All sockets.
pub struct Sockets {
    pub set: SocketSet<'static>,
    fixed: Option<(SocketHandle, SocketHandle)>,
    /// Those whose owner is gone.
    left: Rc<RefCell<Vec<SocketHandle>>>,
}

/// A socket of an owner, who leaves it when this is dropped: what is queued is still sent.
pub struct Owned {
    pub handle: SocketHandle,
    left: Rc<RefCell<Vec<SocketHandle>>>,
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.left.borrow_mut().push(self.handle);
    }
}

impl Sockets {
    /// None, until some are added.
    pub fn none() -> Self {
        Self { set: SocketSet::new(Vec::new()), fixed: None, left: Rc::default() }
    }

    /// The two that a program has that answers one call at a time. Called once.
    pub fn fixed() -> Self {
        let mut sockets = Self::none();
        let (tcp, udp) = fixed();
        sockets.fixed = Some((sockets.set.add(tcp), sockets.set.add(udp)));
        sockets
    }

    /// Adds one.
    pub fn add(&mut self, socket: impl AnySocket<'static>) -> Owned {
        Owned { handle: self.set.add(socket), left: self.left.clone() }
    }

    /// The program's TCP socket.
    pub fn tcp(&mut self) -> &mut tcp::Socket<'static> {
        let (tcp, _) = self.fixed.expect("a program that has fixed sockets");
        self.set.get_mut(tcp)
    }

    /// The program's UDP socket.
    pub fn udp(&mut self) -> &mut udp::Socket<'static> {
        let (_, udp) = self.fixed.expect("a program that has fixed sockets");
        self.set.get_mut(udp)
    }

    /// Ends what was left, as far as it can be ended now.
    pub fn clear(&mut self) {
        let set = &mut self.set;
        self.left.borrow_mut().retain(|&handle| {
            let is_needed = match set.iter_mut().find(|(known, _)| *known == handle) {
                Some((_, Socket::Tcp(tcp))) => {
                    tcp.close();
                    !matches!(tcp.state(), tcp::State::Closed | tcp::State::TimeWait)
                }
                _ => false,
            };
            if !is_needed {
                set.remove(handle);
            }
            is_needed
        });
    }

    /// All of them are as if new. What the former ones would still send is not sent.
    pub fn renew(&mut self) {
        let fixed = self.fixed.map(|(tcp, udp)| {
            drop((self.set.remove(tcp), self.set.remove(udp)));
            fixed()
        });
        for (_, socket) in self.set.iter_mut() {
            match socket {
                Socket::Tcp(socket) => {
                    let (rx, tx) = (Vec::new(), Vec::new());
                    *socket =
                        tcp::Socket::new(tcp::SocketBuffer::new(rx), tcp::SocketBuffer::new(tx));
                }
                Socket::Udp(socket) => socket.close(),
                _ => {}
            }
        }
        self.fixed = fixed.map(|(tcp, udp)| (self.set.add(tcp), self.set.add(udp)));
    }
}

fn fixed() -> (tcp::Socket<'static>, udp::Socket<'static>) {
    // SAFETY: `machine::run` makes one `Sockets` with them, and the sockets that had the buffers before
    // are gone when this is called again: nothing else refers to them.
    let (tcp_rx, tcp_tx, udp_rx, udp_tx) = unsafe {
        (&mut *TCP_RX.0.get(), &mut *TCP_TX.0.get(), &mut *UDP_RX.0.get(), &mut *UDP_TX.0.get())
    };
    let mut tcp = tcp::Socket::new(
        tcp::SocketBuffer::new(&mut tcp_rx[..]),
        tcp::SocketBuffer::new(&mut tcp_tx[..]),
    );
    tcp.set_nagle_enabled(false);
    let metadata = |count| vec![udp::PacketMetadata::EMPTY; count];
    let udp = udp::Socket::new(
        udp::PacketBuffer::new(metadata(256), &mut udp_rx[..]),
        udp::PacketBuffer::new(metadata(32), &mut udp_tx[..]),
    );
    (tcp, udp)
}

/// The interface of a clone: its MAC, its address, and everything through the gateway.
pub fn interface(
    identity: &Identity,
    seed: u64,
    device: &mut NetDevice,
    now: Instant,
) -> Interface {
    let mut config = Config::new(EthernetAddress(identity.mac).into());
    config.random_seed = seed;
    let mut interface = Interface::new(config, device, now);
    let (address, gateway) =
        (Ipv4Address::from(identity.ipv4), Ipv4Address::from(identity.gateway));
    // smoltcp takes ARP replies only from its own network, so a /32 could not reach the gateway:
    // take the smallest network that holds both, but at least a /16, whose broadcast address no
    // guest has.
    let common = (address.to_bits() ^ gateway.to_bits()).leading_zeros() as u8;
    interface.update_ip_addrs(|addresses| {
        // The list is empty and holds one.
        let _ = addresses.push(IpCidr::new(address.into(), common.min(16)));
    });
    // The table is empty and holds one.
    let _ = interface.routes_mut().add_default_ipv4_route(gateway);
    interface
}

/// virtio-net for smoltcp. The two tokens that smoltcp holds at a time share it.
pub struct NetDevice {
    inner: RefCell<Inner>,
    pub mtu: u16,
}

struct Inner {
    driver: VirtIONetRaw<GuestHal, MmioTransport<'static>, QUEUE>,
    /// The buffer that each descriptor holds, by token.
    receiving: [Option<Buffer>; QUEUE],
    /// The same for transmission, with its length.
    sending: [Option<(Buffer, usize)>; QUEUE],
    /// Unused buffers for transmission, the one used last on top. More are made when they are
    /// needed, so that a clone with little to say touches few pages.
    free: Vec<Buffer>,
    in_flight: usize,
}

impl NetDevice {
    /// Takes the device over and posts all buffers for reception.
    pub fn new(transport: MmioTransport<'static>) -> Self {
        let driver = VirtIONetRaw::new(transport).expect("the VMM's network device");
        let mut inner = Inner {
            driver,
            receiving: [const { None }; QUEUE],
            sending: [const { None }; QUEUE],
            free: Vec::with_capacity(QUEUE),
            in_flight: 0,
        };
        // SAFETY: `machine::run` makes one of these: nothing else refers to the buffers.
        let received = unsafe { &mut *RECEIVED.0.get() };
        for buffer in received.as_chunks_mut().0 {
            inner.post(buffer);
        }
        Self { inner: RefCell::new(inner), mtu: 1500 }
    }

    /// Sends a frame as it is; `false` if the queue is full.
    pub fn send(&self, frame: &[u8]) -> bool {
        let mut inner = self.inner.borrow_mut();
        inner.reclaim();
        if inner.in_flight == QUEUE {
            return false;
        }
        let buffer = inner.take_free();
        buffer[..HEADER].fill(0);
        let length = frame.len().min(buffer.len() - HEADER);
        buffer[HEADER..HEADER + length].copy_from_slice(&frame[..length]);
        inner.transmit(buffer, HEADER + length);
        true
    }
}

impl Inner {
    fn post(&mut self, buffer: Buffer) {
        // SAFETY: the buffer goes into `receiving`, where nothing touches it until the device has
        // returned it.
        let token = unsafe { self.driver.receive_begin(&mut buffer[..]) };
        let token = token.expect("as many buffers as descriptors");
        self.receiving[usize::from(token)] = Some(buffer);
    }

    fn take_received(&mut self) -> Option<(Buffer, usize)> {
        let token = self.driver.poll_receive()?;
        let buffer = self.receiving[usize::from(token)].take()?;
        // SAFETY: the same buffer that was posted with this token.
        let (_, length) = unsafe { self.driver.receive_complete(token, &mut buffer[..]) }
            .expect("the VMM returns whole frames");
        Some((buffer, length.min(FRAME - HEADER)))
    }

    fn take_free(&mut self) -> Buffer {
        self.free.pop().unwrap_or_else(|| Box::leak(Box::new([0; FRAME])))
    }

    fn transmit(&mut self, buffer: Buffer, length: usize) {
        self.in_flight += 1;
        // SAFETY: the buffer goes into `sending`, where nothing touches it until the device has
        // returned it.
        let token = unsafe { self.driver.transmit_begin(&buffer[..length]) };
        let token = token.expect("as many buffers as descriptors");
        self.sending[usize::from(token)] = Some((buffer, length));
    }

    fn reclaim(&mut self) {
        while let Some(token) = self.driver.poll_transmit() {
            let Some((buffer, length)) = self.sending[usize::from(token)].take() else { return };
            // SAFETY: the same buffer that was sent with this token. The result is its length.
            let _ = unsafe { self.driver.transmit_complete(token, &buffer[..length]) };
            self.free.push(buffer);
            self.in_flight -= 1;
        }
    }
}

impl Device for NetDevice {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        let mut inner = self.inner.borrow_mut();
        inner.reclaim();
        // A frame may need an answer.
        if inner.in_flight == QUEUE {
            return None;
        }
        let (buffer, length) = inner.take_received()?;
        drop(inner);
        let device = &self.inner;
        Some((RxToken { device, buffer, length }, TxToken { device }))
    }

    fn transmit(&mut self, _: Instant) -> Option<TxToken<'_>> {
        let mut inner = self.inner.borrow_mut();
        inner.reclaim();
        (inner.in_flight < QUEUE).then_some(TxToken { device: &self.inner })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        // smoltcp counts the Ethernet header in.
        capabilities.max_transmission_unit = usize::from(self.mtu) + 14;
        capabilities.max_burst_size = Some(QUEUE);
        capabilities
    }
}

pub struct RxToken<'a> {
    device: &'a RefCell<Inner>,
    buffer: Buffer,
    length: usize,
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        let result = take(&self.buffer[HEADER..HEADER + self.length]);
        self.device.borrow_mut().post(self.buffer);
        result
    }
}

pub struct TxToken<'a> {
    device: &'a RefCell<Inner>,
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let buffer = self.device.borrow_mut().take_free();
        buffer[..HEADER].fill(0);
        let result = fill(&mut buffer[HEADER..HEADER + length]);
        self.device.borrow_mut().transmit(buffer, HEADER + length);
        result
    }
}
