//! TAP devices, by the ioctls of `/dev/net/tun`.
//!
//! Not by `tokio-tun`, which knows no `IFF_VNET_HDR`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rtnetlink::packet_route::link::InfoKind;

use super::netlink::{Interface, Netlink};
use super::{Error, sysctl};

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_persist, libc::TUNSETPERSIST);
nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD);
nix::ioctl_write_ptr_bad!(tun_set_vnet_hdr_size, libc::TUNSETVNETHDRSZ, libc::c_int);

/// Size of `struct virtio_net_hdr_mrg_rxbuf`, the header of modern virtio devices (virtio 1.2,
/// 5.1.6).
const VNET_HEADER: libc::c_int = 12;

/// What a slot's TAP is.
const TAP: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Makes a TAP that stays when nobody has it open; or, if it is there, makes sure that it stays.
pub(super) fn create(name: &str) -> Result<(), Error> {
    persist(name, TAP).map_err(|source| Error::system("create TAP", name, source))
}

/// A device of the daemon's.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// Of IP packets without any header.
    Tun = libc::IFF_TUN as isize,
    /// Of plain Ethernet frames.
    Tap = libc::IFF_TAP as isize,
}

/// Makes or adopts a device of the daemon's, which is down if it is new. It stays when nobody has it
/// open.
pub(super) fn adopt(netlink: &mut Netlink, name: &str, kind: Kind) -> Result<Interface, Error> {
    match netlink.interface(name) {
        Ok(device) if device.kind == Some(InfoKind::Tun) => Ok(device),
        Ok(device) => {
            let remedy = "remove the interface, or choose another prefix";
            Err(Error::invalid("kind of interface", device.name, remedy))
        }
        Err(Error::NoInterface { .. }) => {
            persist(name, kind as libc::c_int | libc::IFF_NO_PI)
                .map_err(|source| Error::system("create device", name, source))?;
            sysctl::disable_ipv6(name)?;
            netlink.interface(name)
        }
        Err(error) => Err(error),
    }
}

/// Opens a TAP's only queue: non-blocking, header of 12 bytes, no offloads.
pub(super) fn open(name: &str) -> Result<OwnedFd, Error> {
    let open = || {
        let tap = attach(name, TAP)?;
        // SAFETY: the descriptor is open; the requests take an integer and a pointer to one.
        unsafe {
            tun_set_vnet_hdr_size(tap.as_raw_fd(), &VNET_HEADER)?;
            tun_set_offload(tap.as_raw_fd(), 0)?;
        }
        Ok(tap.into())
    };
    open().map_err(|source| Error::system("open TAP", name, source))
}

fn persist(name: &str, flags: libc::c_int) -> io::Result<()> {
    let device = attach(name, flags)?;
    // SAFETY: the descriptor is open; the request takes an integer.
    unsafe { tun_set_persist(device.as_raw_fd(), 1) }?;
    Ok(())
}

fn attach(name: &str, flags: libc::c_int) -> io::Result<File> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: all of its fields are integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    let room = request.ifr_name.len() - 1;
    if name.len() > room {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open; the request points to a whole `ifreq`.
    unsafe { tun_set_iff(tun.as_raw_fd(), &raw const request) }?;
    Ok(tun)
}
