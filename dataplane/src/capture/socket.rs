//! A packet socket (packet(7)): frames as an interface sees them, with the kernel's time stamps.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType,
    SockaddrLike, bind, recvmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeSpec;

use super::filter::Filter;

/// A packet socket on one interface, for incoming and outgoing frames.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
}

/// A frame that was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// When the kernel saw it, in nanoseconds since 1970.
    pub unix_ns: u64,
    /// Its length in bytes; what is beyond the end of the buffer is not in there.
    pub length: usize,
}

/// An interface, as packet sockets name it; the protocol is in network byte order.
pub(crate) fn link_address(ifindex: u32, protocol: u16) -> io::Result<LinkAddr> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol,
        sll_ifindex: ifindex as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the pointer and the length are those of a whole sockaddr_ll.
    let address = unsafe {
        LinkAddr::from_raw((&raw const address).cast(), Some(size_of::<libc::sockaddr_ll>() as u32))
    };
    Ok(address.ok_or(Errno::EINVAL)?)
}

impl PacketSocket {
    /// Receives from now on what the interface of this index sees and the filter matches. What is
    /// not taken in time waits, in about `room` bytes of the kernel's, or is lost.
    ///
    /// The interface is one of the calling thread's network namespace. Needs `CAP_NET_RAW`, and
    /// `CAP_NET_ADMIN` for more room than the system's limit.
    pub fn open(ifindex: u32, filter: Option<&Filter>, room: usize) -> io::Result<Self> {
        // Of no protocol: nothing is received before it is bound.
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        if let Some(filter) = filter {
            filter.attach(socket.as_fd())?;
        }
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
        setsockopt(&socket, sockopt::RcvBufForce, &room)?;
        bind(socket.as_raw_fd(), &link_address(ifindex, SockProtocol::EthAll as u16)?)?;
        Ok(Self { socket })
    }

    /// A frame that is there already; what does not fit into the buffer is cut.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<Received>> {
        let mut space = cmsg_space!(TimeSpec);
        let mut parts = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        let fd = self.socket.as_raw_fd();
        let message = match recvmsg::<()>(fd, &mut parts, Some(&mut space), flags) {
            Ok(message) => message,
            // Told once, when the interface goes down: there may be more when it comes up.
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENETDOWN) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let stamp = message.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::ScmTimestampns(time) => Some(time),
            _ => None,
        });
        let stamp = stamp.ok_or_else(|| io::Error::other("the kernel gave no time stamp"))?;
        let unix_ns = stamp.tv_sec() as u64 * 1_000_000_000 + stamp.tv_nsec() as u64;
        Ok(Some(Received { unix_ns, length: message.bytes }))
    }

    /// How many frames were lost since this was asked before, for want of room.
    pub fn take_lost(&self) -> io::Result<u32> {
        let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = size_of_val(&stats) as libc::socklen_t;
        // SAFETY: the pointers are to a whole tpacket_stats and to its length.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut length,
            )
        };
        Errno::result(result)?;
        Ok(stats.tp_drops)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
