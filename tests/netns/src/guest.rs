//! A guest with the kernel's network stack, on the TAP of a slot: for what needs no microVM.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use warren_abi::wire::GATEWAY;

use crate::netns::Namespace;

nix::ioctl_write_ptr_bad!(
    /// Names the interface of an open TAP, which makes it if there is none.
    tun_set_iff,
    libc::TUNSETIFF,
    libc::ifreq
);

/// `struct virtio_net_hdr_mrg_rxbuf`, the header of a slot's TAP, in bytes.
pub const VNET_HEADER: usize = 12;

/// Frames that a guest may have sent and that are not yet on their way: as many as each kernel takes.
const QUEUE: u32 = (1 << 15) - 1;

/// A namespace whose `eth0` is wired to a slot.
#[derive(Debug)]
pub struct KernelGuest {
    /// Where its programs run.
    pub namespace: Namespace,
    stop: Arc<AtomicBool>,
    wires: Vec<JoinHandle<()>>,
}

impl KernelGuest {
    /// Wires a namespace to a slot's open TAP, with the slot's address and MAC, and the host's
    /// MTU.
    pub fn plug(outer: File, address: Ipv4Addr, mac: [u8; 6], mtu: u16) -> Result<Self> {
        let namespace = Namespace::new("guest")?;
        let inner = namespace.run(|| -> Result<File> {
            let tap = open_tap("eth0", 0)?;
            // A kernel without IPv6 has no such file, and needs none.
            std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1").ok();
            Ok(tap)
        })?;
        let mac = mac.map(|octet| format!("{octet:02x}")).join(":");
        for words in [
            // A virtio driver with a full queue has its senders wait; a TAP would lose what they send
            // while the wires wait for a processor.
            format!("link set eth0 address {mac} mtu {mtu} txqueuelen {QUEUE} up"),
            format!("addr add {address}/32 dev eth0"),
            format!("route add {GATEWAY} dev eth0"),
            format!("route add default via {GATEWAY}"),
        ] {
            namespace.ip(&words)?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (outer, inner) = (Arc::new(outer), Arc::new(inner));
        let wires = vec![
            wire(outer.clone(), inner.clone(), VNET_HEADER, 0, stop.clone()),
            wire(inner, outer, 0, VNET_HEADER, stop.clone()),
        ];
        Ok(Self { namespace, stop, wires })
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

/// Waits until a TAP has a frame, or `patience` is over.
pub fn readable(tap: &File, patience: Duration) {
    let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    poll(&mut fds, timeout).ok();
}

/// Makes or opens a TAP in the namespace of this thread, with further `flags` of `TUNSETIFF`
/// (`linux/if_tun.h`). One that is made lives as long as it is open.
pub fn open_tap(name: &str, flags: i32) -> Result<File> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: all of its fields are integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | flags) as libc::c_short;
    // SAFETY: the descriptor is open; the request points to a whole `ifreq`.
    unsafe { tun_set_iff(tun.as_raw_fd(), &raw const request) }?;
    Ok(tun)
}
