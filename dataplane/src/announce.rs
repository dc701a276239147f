//! Tells a VPC that addresses are this proxy's now: an ARP announcement (RFC 5227, section 3) and an
//! unsolicited neighbour advertisement (RFC 4861, section 7.2.6). And asks there for a neighbour, in
//! nobody's name (RFC 5227, section 1.1).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, Icmpv6Type, PacketBuilder, err::packet,
};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, sendto, socket};
use warren_abi::icmp::v6::NEIGHBOUR_ADVERTISEMENT;
use warren_abi::wire::Neighbour;

use crate::capture;

const BROADCAST: [u8; 6] = [0xff; 6];
/// All nodes of the link (RFC 4291, section 2.7.1), and their MAC address (RFC 2464, section 7).
const ALL_NODES: (Ipv6Addr, [u8; 6]) =
    (Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), [0x33, 0x33, 0, 0, 0, 1]);

/// Addresses at an interface in a VPC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Index of the interface.
    pub ifindex: u32,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// The addresses.
    pub addresses: Vec<IpAddr>,
}

/// Sends announcements. It receives nothing: the kernel waits for all processors when it closes a
/// socket that does.
#[derive(Debug)]
pub struct Announcer {
    socket: OwnedFd,
}

impl Announcer {
    /// In the calling thread's network namespace. Needs `CAP_NET_RAW`.
    pub fn open() -> io::Result<Self> {
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Self { socket })
    }

    /// Sends an announcement once.
    pub fn send(&self, announcement: &Announcement) -> io::Result<()> {
        let interface = capture::link_address(announcement.ifindex, 0)?;
        for address in &announcement.addresses {
            let frame = frame(announcement.mac, *address).map_err(io::Error::other)?;
            sendto(self.socket.as_raw_fd(), &frame, &interface, MsgFlags::empty())?;
        }
        Ok(())
    }

    /// Asks at an interface, from its MAC address, for a neighbour, of whom the MAC address may be
    /// known.
    pub fn ask(
        &self,
        (ifindex, mac): (u32, [u8; 6]),
        neighbour: Ipv4Addr,
        to: Option<[u8; 6]>,
    ) -> io::Result<()> {
        let to = to.unwrap_or(BROADCAST);
        let frame =
            request((mac, to), Ipv4Addr::UNSPECIFIED, neighbour).map_err(io::Error::other)?;
        let interface = capture::link_address(ifindex, 0)?;
        sendto(self.socket.as_raw_fd(), &frame, &interface, MsgFlags::empty())?;
        Ok(())
    }
}

fn frame(mac: [u8; 6], address: IpAddr) -> Result<Vec<u8>, packet::BuildWriteError> {
    match address {
        IpAddr::V4(address) => request((mac, BROADCAST), address, address),
        IpAddr::V6(address) => advertisement(mac, address),
    }
}

fn request(
    (mac, to): ([u8; 6], [u8; 6]),
    sender: Ipv4Addr,
    target: Ipv4Addr,
) -> Result<Vec<u8>, packet::BuildWriteError> {
    let mut bytes = Vec::new();
    let (sender, target) = (sender.octets(), target.octets());
    let (ethernet, ipv4) = (ArpHardwareId::ETHERNET, EtherType::IPV4);
    let request =
        ArpPacket::new(ethernet, ipv4, ArpOperation::REQUEST, &mac, &sender, &[0; 6], &target)
            .expect("the lengths are those of Ethernet and IPv4");
    PacketBuilder::ethernet2(mac, to).arp(request).write(&mut bytes)?;
    Ok(bytes)
}

fn advertisement(mac: [u8; 6], address: Ipv6Addr) -> Result<Vec<u8>, packet::BuildWriteError> {
    let mut bytes = Vec::new();
    let (to, to_mac) = ALL_NODES;
    let kind = Icmpv6Type::Unknown {
        type_u8: NEIGHBOUR_ADVERTISEMENT,
        code_u8: 0,
        bytes5to8: [Neighbour::OVERRIDE, 0, 0, 0],
    };
    let option = [&address.octets()[..], &Neighbour::TARGET_MAC, &mac].concat();
    PacketBuilder::ethernet2(mac, to_mac)
        .ipv6(address.octets(), to.octets(), Neighbour::HOP_LIMIT)
        .icmpv6(kind)
        .write(&mut bytes, &option)?;
    Ok(bytes)
}
