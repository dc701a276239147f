//! The interface's part of an identity, over rtnetlink.
//!
//! Not by ioctl(2): that gives an address the broadcast address of its class, and takes a call for
//! each value. Here all changes go to the kernel in one piece. There are four kinds of them, which a
//! crate for all of rtnetlink would make twice as much code as the rest of the agent.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use warren_abi::microvm::Identity;

use crate::error::{AgentError, system};
use crate::netlink::{self, Request};

const IPV4: u8 = libc::AF_INET as u8;

/// An interface, and a socket by which it is configured.
pub struct Link {
    name: String,
    index: u32,
    socket: OwnedFd,
}

/// Brings an interface up.
///
/// # Errors
/// There is none of this name, or the kernel refuses.
pub fn up(name: &str) -> Result<(), AgentError> {
    let link = Link::open(name)?;
    let mut request = Request::default();
    link.change(&mut request, "state", libc::IFF_UP as u32);
    link.apply_all(request)
}

impl Link {
    /// Finds an interface.
    ///
    /// # Errors
    /// There is none of this name, or the kernel refuses.
    pub fn open(name: &str) -> Result<Self, AgentError> {
        let index = if_nametoindex(name).map_err(system(format!("interface {name}")))?;
        let (flags, protocol) = (SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute);
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)
            .map_err(system("rtnetlink"))?;
        Ok(Self { name: name.to_owned(), index, socket })
    }

    /// Goes the kernel's way of [`Link::apply`] without a change.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn rehearse(&self) -> Result<(), AgentError> {
        let mut request = Request::default();
        self.change(&mut request, "rehearsal", 0);
        self.apply_all(request)
    }

    /// Gives the interface, which must be down, MAC address, MTU and IPv4 address, brings it up, and
    /// routes everything over the gateway.
    ///
    /// # Errors
    /// The kernel refuses one of them.
    pub fn apply(&self, identity: &Identity) -> Result<(), AgentError> {
        let mut request = Request::default();
        // The kernel takes the flags last.
        self.change(&mut request, "MAC address, MTU or state", libc::IFF_UP as u32);
        request.attribute(libc::IFLA_ADDRESS, &identity.mac);
        request.attribute(libc::IFLA_MTU, &u32::from(identity.mtu).to_ne_bytes());

        // struct ifaddrmsg: family, length of the prefix, flags, scope, interface.
        let index = self.index.to_ne_bytes();
        let header = [&[IPV4, 32, 0, libc::RT_SCOPE_UNIVERSE], &index[..]].concat();
        request.message("address", libc::RTM_NEWADDR, &header);
        request.attribute(libc::IFA_LOCAL, &identity.ipv4);
        request.attribute(libc::IFA_ADDRESS, &identity.ipv4);

        self.route(&mut request, "route to the gateway", 32, libc::RT_SCOPE_LINK);
        request.attribute(libc::RTA_DST, &identity.gateway);
        self.route(&mut request, "default route", 0, libc::RT_SCOPE_UNIVERSE);
        request.attribute(libc::RTA_GATEWAY, &identity.gateway);
        self.apply_all(request)
    }

    /// Begins a change of the interface, which sets these flags.
    fn change(&self, request: &mut Request, what: &'static str, flags: u32) {
        // struct ifinfomsg: family and type (16 bits each), interface, flags, which of them change.
        let words = [0, self.index, flags, flags];
        request.message(what, libc::RTM_SETLINK, &words.map(u32::to_ne_bytes).concat());
    }

    /// Begins a route out of the interface.
    fn route(&self, request: &mut Request, what: &'static str, length: u8, scope: u8) {
        let (table, kind) = (libc::RT_TABLE_MAIN, libc::RTN_UNICAST);
        // struct rtmsg: family, length of destination and source, TOS, table, who made it, scope,
        // type, flags (32 bits).
        let header = [IPV4, length, 0, 0, table, libc::RTPROT_STATIC, scope, kind, 0, 0, 0, 0];
        request.message(what, libc::RTM_NEWROUTE, &header);
        request.attribute(libc::RTA_OIF, &self.index.to_ne_bytes());
    }

    /// Sends a request, and waits until the kernel has acknowledged all of it.
    fn apply_all(&self, request: Request) -> Result<(), AgentError> {
        let cannot = |what: &str| format!("{what} of {}", self.name);
        let socket = self.socket.as_raw_fd();
        let (bytes, names) = request.finish();
        send(socket, &bytes, MsgFlags::empty()).map_err(system(cannot("configuration")))?;
        let mut acknowledged = 0;
        let mut buffer = [0; 4096];
        while acknowledged < names.len() {
            let length = recv(socket, &mut buffer, MsgFlags::empty())
                .map_err(system(cannot("configuration")))?;
            for (number, code) in netlink::acknowledgements(&buffer[..length]) {
                let Some(what) = names.get(number as usize) else { continue };
                if code != 0 {
                    return Err(system(cannot(what))(io::Error::from_raw_os_error(-code)));
                }
                acknowledged += 1;
            }
        }
        Ok(())
    }
}
