//! Which interfaces changed, as the kernel tells it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::{Socket, protocols::NETLINK_ROUTE};

use super::Error;

/// What has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed {
    /// The interfaces of these indices, perhaps.
    Links(Vec<u32>),
    /// The kernel lost count.
    All,
}

/// Changes of the interfaces of one network namespace.
#[derive(Debug)]
pub struct LinkEvents {
    socket: Socket,
}

impl LinkEvents {
    /// Those of the calling thread's network namespace, from now on.
    pub fn open() -> Result<Self, Error> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.add_membership(libc::RTNLGRP_LINK)?;
            socket.set_non_blocking(true)?;
            Ok(Self { socket })
        };
        open().map_err(|source| Error::system("open", "rtnetlink events", source))
    }

    /// What is readable when something changed.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket is open as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }

    /// What changed since this was called last.
    pub fn take(&self) -> Changed {
        let mut links = Vec::new();
        loop {
            match self.socket.recv_from_full() {
                Ok((datagram, _)) => links.extend(indices(&datagram)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Changed::Links(links);
                }
                Err(_) => return Changed::All,
            }
        }
    }
}

fn indices(mut datagram: &[u8]) -> Vec<u32> {
    let mut indices = Vec::new();
    while !datagram.is_empty() {
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram) else {
            break;
        };
        if let NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link),
        ) = message.payload
        {
            indices.push(link.header.index);
        }
        let length = (message.header.length as usize).next_multiple_of(4);
        datagram = datagram.get(length..).unwrap_or_default();
    }
    indices
}
