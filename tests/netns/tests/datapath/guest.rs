//! Stand-ins for microVMs, on the TAP of a slot.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use etherparse::{
    Icmpv4Header, IpHeaders, Ipv4HeaderSlice, NetSlice, PacketBuilder, PacketBuilderStep,
    SlicedPacket, TcpHeader, UdpHeader,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use warren_abi::wire::{GATEWAY, GATEWAY_MAC};
use warren_netns::netns::Namespace;

use crate::bed::{Bed, eventually};

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);

/// `struct virtio_net_hdr_mrg_rxbuf`, of zeroes: no offload.
const VNET_HEADER: usize = 12;

/// How long to wait for a packet that must come.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for a packet that must not come.
pub const SILENCE: Duration = Duration::from_millis(300);

/// A guest that a test speaks for, frame by frame.
pub struct RawGuest {
    tap: File,
    pub address: Ipv4Addr,
    pub mac: [u8; 6],
}

impl RawGuest {
    /// Opens the slot's TAP.
    pub fn open(bed: &Bed, slot: u32) -> Self {
        let tap = open_slot(bed, slot).into();
        let slot = &bed.host().slots()[slot as usize - 1];
        Self { tap, address: slot.address, mac: slot.mac }
    }

    /// Sends a frame. When it returns, the program has dealt with it.
    pub fn send(&self, frame: &[u8]) {
        self.send_with([0; VNET_HEADER], frame);
    }

    /// Sends a frame behind a virtio-net header.
    pub fn send_with(&self, header: [u8; VNET_HEADER], frame: &[u8]) {
        let mut bytes = header.to_vec();
        bytes.extend_from_slice(frame);
        let sent = (&self.tap).write(&bytes).expect("the TAP takes the frame");
        assert_eq!(sent, bytes.len());
    }

    /// The beginning of a packet that this guest may send.
    pub fn packet(&self, to: Ipv4Addr, ttl: u8) -> PacketBuilderStep<IpHeaders> {
        PacketBuilder::ethernet2(self.mac, GATEWAY_MAC.octets()).ipv4(
            self.address.octets(),
            to.octets(),
            ttl,
        )
    }

    /// The next frame that comes, if one does in time.
    pub fn receive(&self, patience: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + patience;
        let mut buffer = vec![0; 65536 + VNET_HEADER];
        loop {
            match (&self.tap).read(&mut buffer) {
                Ok(length) => return Some(buffer[VNET_HEADER..length].to_vec()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => panic!("the TAP cannot be read: {error}"),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            readable(&self.tap, left);
        }
    }
}

/// Opens a slot's TAP as soon as it is free: a process that another test forks has this one's
/// descriptors until it executes its program.
pub fn open_slot(bed: &Bed, slot: u32) -> OwnedFd {
    let mut tap = None;
    eventually(|| {
        tap = bed.topology.host.run(|| bed.host().open_tap(slot)).ok();
        tap.is_some()
    });
    tap.expect("it was opened")
}

/// A frame with this payload.
pub fn frame<T>(builder: PacketBuilderStep<T>, payload: &[u8]) -> Vec<u8>
where
    PacketBuilderStep<T>: Build,
{
    builder.build(payload)
}

/// What can be built: every last step of a packet.
pub trait Build {
    fn build(self, payload: &[u8]) -> Vec<u8>;
}

macro_rules! build {
    ($($step:ty),+) => {
        $(
            impl Build for PacketBuilderStep<$step> {
                fn build(self, payload: &[u8]) -> Vec<u8> {
                    let mut frame = Vec::with_capacity(self.size(payload.len()));
                    self.write(&mut frame, payload).expect("a vector takes everything");
                    frame
                }
            }
        )+
    };
}
build!(UdpHeader, TcpHeader, Icmpv4Header);

/// A packet's IPv4 header.
pub fn ipv4<'a>(packet: &'a SlicedPacket<'a>) -> Ipv4HeaderSlice<'a> {
    match &packet.net {
        Some(NetSlice::Ipv4(slice)) => slice.header(),
        _ => panic!("it is no IPv4 packet"),
    }
}

/// A guest with the kernel's network stack: a namespace whose `eth0` is wired to a slot.
pub struct KernelGuest {
    pub namespace: Namespace,
    stop: Arc<AtomicBool>,
    wires: Vec<JoinHandle<()>>,
}

impl KernelGuest {
    /// Wires a namespace to a slot's TAP.
    pub fn plug(bed: &Bed, slot: u32) -> Self {
        let raw = RawGuest::open(bed, slot);
        let namespace = Namespace::new("guest").expect("namespaces can be made");
        let inner = namespace.run(|| {
            let tap = open_tap("eth0");
            // A kernel without IPv6 has no such file, and needs none.
            std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1").ok();
            tap
        });
        let mac = raw.mac.map(|octet| format!("{octet:02x}")).join(":");
        let mtu = bed.host().mtu();
        for words in [
            format!("link set eth0 address {mac} mtu {mtu} up"),
            format!("addr add {}/32 dev eth0", raw.address),
            format!("route add {GATEWAY} dev eth0"),
            format!("route add default via {GATEWAY}"),
        ] {
            namespace.ip(&words).expect("the guest can be configured");
        }
        let stop = Arc::new(AtomicBool::new(false));
        let outer = Arc::new(raw.tap);
        let inner = Arc::new(inner);
        let wires = vec![
            wire(outer.clone(), inner.clone(), VNET_HEADER, 0, stop.clone()),
            wire(inner, outer, 0, VNET_HEADER, stop.clone()),
        ];
        Self { namespace, stop, wires }
    }
}

impl Drop for KernelGuest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for wire in self.wires.drain(..) {
            wire.join().expect("a wire does not panic");
        }
    }
}

/// Carries frames from one TAP to the other, between headers of different length.
fn wire(
    from: Arc<File>,
    to: Arc<File>,
    from_header: usize,
    to_header: usize,
    stop: Arc<AtomicBool>,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65536 + 2 * VNET_HEADER];
        while !stop.load(Ordering::SeqCst) {
            match (&*from).read(&mut buffer[VNET_HEADER..]) {
                Ok(length) => {
                    let start = VNET_HEADER + from_header - to_header;
                    buffer[start..start + to_header].fill(0);
                    // A full queue drops, as a network card does; a TAP takes a frame whole.
                    let _ = (&*to).write(&buffer[start..VNET_HEADER + length]);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    readable(&from, Duration::from_millis(50));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    })
}

fn readable(file: &File, patience: Duration) {
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    poll(&mut fds, timeout).ok();
}

/// Makes a TAP in the namespace of this thread, which lives as long as it is open.
fn open_tap(name: &str) -> File {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .expect("there is a TUN driver");
    // SAFETY: all of its fields are integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is open; the request points to a whole `ifreq`.
    unsafe { tun_set_iff(tun.as_raw_fd(), &raw const request) }.expect("a TAP can be made");
    tun
}
