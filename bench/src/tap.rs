//! TAPs with virtio-net headers and offloads, as guests have them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};
use warren_netns::netns::Namespace;

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD);
nix::ioctl_write_ptr_bad!(tun_set_vnet_hdr_size, libc::TUNSETVNETHDRSZ, libc::c_int);

/// Size of `struct virtio_net_hdr_mrg_rxbuf` (virtio 1.2, 5.1.6).
pub const VNET_HEADER: usize = 12;

/// Makes a TAP in the namespace, non-blocking, without offloads: it goes when it is closed.
pub fn make(namespace: &Namespace, name: &str) -> Result<File> {
    namespace.run(|| open(name)).with_context(|| format!("cannot make the TAP {name}"))
}

fn open(name: &str) -> io::Result<File> {
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: all of its fields are integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open; the requests point to a whole `ifreq` and a whole `c_int`.
    unsafe {
        tun_set_iff(tap.as_raw_fd(), &raw const request)?;
        tun_set_vnet_hdr_size(tap.as_raw_fd(), &(VNET_HEADER as libc::c_int))?;
    }
    Ok(tap)
}

/// Has the kernel leave checksums and TCP's segmentation to whoever reads the TAP.
pub fn offload(tap: &File) -> Result<()> {
    let offloads = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    // SAFETY: the descriptor is open; the request takes an integer.
    unsafe { tun_set_offload(tap.as_raw_fd(), offloads as libc::c_int) }
        .context("cannot set a TAP's offloads")?;
    Ok(())
}
