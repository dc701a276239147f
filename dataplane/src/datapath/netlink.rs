//! Interfaces and addresses, by rtnetlink.
//!
//! Messages are built by `rtnetlink`, but sent on a blocking socket: the data path is opened before
//! there is a runtime, in the network namespace of the calling thread.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::tc::{
    TcAttribute, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption,
};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rtnetlink::{AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, LinkVxlan};
use warren_abi::maps::Traffic;
use warren_abi::wire::VXLAN_PORT;

use super::filter::Filter;
use super::{Carried, Error};

/// The group that interfaces are put into to be removed together: a number that is no one else's.
const DOOMED: u32 = 0x7761_7272;

/// Requests that are sent at a time: their answers must fit the socket's buffer.
const BATCH: usize = 128;

/// A network interface.
#[derive(Clone, Debug)]
pub(super) struct Interface {
    pub index: u32,
    pub name: String,
    /// Largest IP packet, in bytes.
    pub mtu: u32,
    pub is_up: bool,
    /// Whether there is somebody at the other end.
    pub has_carrier: bool,
    /// None unless it is an Ethernet device.
    pub mac: Option<[u8; 6]>,
    pub kind: Option<InfoKind>,
}

/// A connection to the kernel's routing subsystem.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// A connection in the network namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(Self { socket, sequence: 0 })
        };
        open().map_err(|source| Error::system("open", "rtnetlink socket", source))
    }

    /// All interfaces.
    pub fn interfaces(&mut self) -> Result<Vec<Interface>, Error> {
        let mut request = LinkMessage::default();
        // Statistics are most of an answer, and the dearest.
        request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let request = RouteNetlinkMessage::GetLink(request);
        let answers = self
            .request(request, NLM_F_DUMP)
            .map_err(|source| Error::system("list", "interfaces", source))?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(link) => Some(interface(link)),
                _ => None,
            })
            .collect())
    }

    /// The interface of this name.
    pub fn interface(&mut self, name: &str) -> Result<Interface, Error> {
        let request = LinkUnspec::new_with_name(name).build();
        match self.request(RouteNetlinkMessage::GetLink(request), 0) {
            Ok(answers) => answers
                .into_iter()
                .find_map(|answer| match answer {
                    RouteNetlinkMessage::NewLink(link) => Some(interface(link)),
                    _ => None,
                })
                .ok_or_else(|| Error::NoInterface { name: name.to_owned() }),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                Err(Error::NoInterface { name: name.to_owned() })
            }
            Err(source) => Err(Error::system("look up", name, source)),
        }
    }

    /// The interface of this index, if there is one.
    pub fn interface_at(&mut self, index: u32) -> Result<Option<Interface>, Error> {
        let request = LinkUnspec::new_with_index(index).build();
        match self.request(RouteNetlinkMessage::GetLink(request), 0) {
            Ok(answers) => Ok(answers.into_iter().find_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(link) => Some(interface(link)),
                _ => None,
            })),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(source) => Err(Error::system("look up", index, source)),
        }
    }

    /// The number of a filter's program, if it is there.
    pub fn filter_program(&mut self, filter: Filter) -> Result<Option<u32>, Error> {
        let minor = if filter.is_egress { TcHandle::MIN_EGRESS } else { TcHandle::MIN_INGRESS };
        let parent = TcHandle { minor, ..TcHandle::CLSACT };
        let mut request = TcMessage::default();
        let index = filter.interface as i32;
        request.header = TcHeader { index, parent, ..TcHeader::default() };
        let answers = match self.request(RouteNetlinkMessage::GetTrafficFilter(request), NLM_F_DUMP)
        {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            answers => answers.map_err(|source| Error::system("look up", filter, source))?,
        };
        // The upper half of `tcm_info` is the priority (`linux/rtnetlink.h`).
        Ok(answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewTrafficFilter(found)
                if found.header.info >> 16 == u32::from(filter.priority) =>
            {
                filter_program(found)
            }
            _ => None,
        }))
    }

    /// What a TAP carried, by its index.
    pub fn carried(&mut self, index: u32) -> Result<Carried, Error> {
        let request = LinkUnspec::new_with_index(index).build();
        let answers = self
            .request(RouteNetlinkMessage::GetLink(request), 0)
            .map_err(|source| Error::system("read statistics of", index, source))?;
        Ok(answers.into_iter().find_map(carried).unwrap_or_default().1)
    }

    /// What all interfaces carried, as if they were TAPs, by their indices.
    pub fn all_carried(&mut self) -> Result<Vec<(u32, Carried)>, Error> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self
            .request(request, NLM_F_DUMP)
            .map_err(|source| Error::system("read statistics of", "interfaces", source))?;
        Ok(answers.into_iter().filter_map(carried).collect())
    }

    /// Makes a VXLAN device that takes packets of every VNI and tells each one's, and is down.
    ///
    /// It ignores reserved bits (RFC 7348, section 5), where the kernel can (Linux 6.14).
    pub fn create_vxlan(&mut self, name: &str) -> Result<(), Error> {
        let link = LinkVxlan::new(name, 0).collect_metadata(true).learning(false).port(VXLAN_PORT);
        // In IPv6, a checksum of zero is what the programs send (RFC 6935, section 5).
        let link = link.udp_zero_csum6_rx(true).reserved_bits(0).build();
        self.request(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK)
            .map(drop)
            .map_err(|source| Error::system("create VXLAN device", name, source))
    }

    /// Sets interfaces' MTU and takes them up, those that are not so already.
    pub fn set_up(&mut self, interfaces: &[&Interface], mtu: u32) -> Result<(), Error> {
        let down: Vec<_> = interfaces.iter().filter(|i| !i.is_up || i.mtu != mtu).collect();
        let links = down
            .iter()
            .map(|interface| LinkUnspec::new_with_index(interface.index).mtu(mtu).up().build());
        self.set_links(links).map_err(|(n, source)| Error::system("take up", &down[n].name, source))
    }

    /// Removes interfaces, all at once: one by one, each would wait for the kernel to settle.
    pub fn delete(&mut self, interfaces: &[Interface]) -> Result<(), Error> {
        let links = interfaces.iter().map(|interface| {
            LinkUnspec::new_with_index(interface.index).link_group(DOOMED).build()
        });
        self.set_links(links).map_err(|(n, source)| {
            Error::system("mark for removal", &interfaces[n].name, source)
        })?;
        let Some(first) = interfaces.first() else { return Ok(()) };
        let link = LinkMessageBuilder::<LinkUnspec>::new().link_group(DOOMED).build();
        self.request(RouteNetlinkMessage::DelLink(link), NLM_F_ACK).map(drop).map_err(|source| {
            let object = format!("{} and {} more", first.name, interfaces.len() - 1);
            Error::system("remove", object, source)
        })
    }

    /// The addresses of an interface.
    pub fn addresses(&mut self, interface: &Interface) -> Result<Vec<IpAddr>, Error> {
        let request = AddressMessage::default();
        let answers = self
            .request(RouteNetlinkMessage::GetAddress(request), NLM_F_DUMP)
            .map_err(|source| Error::system("list addresses of", &interface.name, source))?;
        let mut addresses = Vec::new();
        for answer in answers {
            let RouteNetlinkMessage::NewAddress(answer) = answer else { continue };
            if answer.header.index != interface.index {
                continue;
            }
            // IPv4 has both, and this is the own one; IPv6 has the other one alone.
            let local = answer.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let address = answer.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            addresses.extend(local.or(address));
        }
        Ok(addresses)
    }

    /// Gives an interface an address at once, without a route to it.
    pub fn add_address(&mut self, interface: &Interface, address: IpAddr) -> Result<(), Error> {
        let mut request = host_address(interface, address);
        let flags = AddressFlags::Noprefixroute
            | if address.is_ipv6() { AddressFlags::Nodad } else { AddressFlags::empty() };
        request.attributes.push(AddressAttribute::Flags(flags));
        let flags = NLM_F_CREATE | NLM_F_REPLACE | NLM_F_ACK;
        self.request(RouteNetlinkMessage::NewAddress(request), flags)
            .map(drop)
            .map_err(|source| Error::system("add the shared address to", &interface.name, source))
    }

    /// Takes an address from an interface; no error if it has it not.
    pub fn remove_address(&mut self, interface: &Interface, address: IpAddr) -> Result<(), Error> {
        let request = RouteNetlinkMessage::DelAddress(host_address(interface, address));
        match self.request(request, NLM_F_ACK) {
            Err(source) if source.raw_os_error() != Some(libc::EADDRNOTAVAIL) => {
                Err(Error::system("take the shared address from", &interface.name, source))
            }
            _ => Ok(()),
        }
    }

    /// Changes links, many to a message. An error comes with its link's place in the list.
    fn set_links(
        &mut self,
        links: impl Iterator<Item = LinkMessage>,
    ) -> Result<(), (usize, io::Error)> {
        let links: Vec<_> = links.collect();
        for (batch, links) in links.chunks(BATCH).enumerate() {
            let first = self.sequence.wrapping_add(1);
            let mut bytes = Vec::new();
            for (n, link) in links.iter().enumerate() {
                // Errors are answered in any case; that all is done, only once.
                let flags = if n + 1 == links.len() { NLM_F_ACK } else { 0 };
                bytes.extend(self.message(RouteNetlinkMessage::SetLink(link.clone()), flags));
            }
            let place = |sequence: u32| batch * BATCH + sequence.wrapping_sub(first) as usize;
            self.socket.send(&bytes, 0).map_err(|error| (place(first), error))?;
            self.answers(first, NLM_F_ACK).map_err(|(sequence, error)| (place(sequence), error))?;
        }
        Ok(())
    }

    /// Sends a request; returns what the kernel answers, until the end of its answer.
    fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let bytes = self.message(message, flags);
        self.socket.send(&bytes, 0)?;
        self.answers(self.sequence, flags).map_err(|(_, error)| error)
    }

    /// The bytes of a request, under a number of its own.
    fn message(&mut self, message: RouteNetlinkMessage, flags: u16) -> Vec<u8> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        bytes
    }

    /// What the kernel answers to the requests from number `first` on, until the last one's end or
    /// the first error, which comes with its request's number.
    fn answers(
        &mut self,
        first: u32,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, (u32, io::Error)> {
        let last = self.sequence;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full().map_err(|error| (last, error))?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| (last, io::Error::new(io::ErrorKind::InvalidData, error)))?;
                let length = (answer.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                let sequence = answer.header.sequence_number;
                // What an earlier request left unread, after an error, is none of this one's.
                if sequence.wrapping_sub(first) > last.wrapping_sub(first) {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err((sequence, error.to_io()));
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    _ => {}
                }
            }
            if flags & (NLM_F_ACK | NLM_F_DUMP) == 0 && !answers.is_empty() {
                return Ok(answers);
            }
        }
    }
}

fn host_address(interface: &Interface, address: IpAddr) -> AddressMessage {
    let index = interface.index;
    match address {
        IpAddr::V4(address) => {
            AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(address, 32).build()
        }
        IpAddr::V6(address) => {
            AddressMessageBuilder::<Ipv6Addr>::new().index(index).address(address, 128).build()
        }
    }
}

fn filter_program(filter: TcMessage) -> Option<u32> {
    let options = filter.attributes.into_iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    options.flatten().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(id),
        _ => None,
    })
}

/// What a TAP receives, its guest sent.
fn carried(answer: RouteNetlinkMessage) -> Option<(u32, Carried)> {
    let RouteNetlinkMessage::NewLink(link) = answer else { return None };
    let stats = link.attributes.into_iter().find_map(|attribute| match attribute {
        LinkAttribute::Stats64(stats) => Some(stats),
        _ => None,
    })?;
    let carried = Carried {
        sent: Traffic { packets: stats.rx_packets, bytes: stats.rx_bytes },
        received: Traffic { packets: stats.tx_packets, bytes: stats.tx_bytes },
    };
    Some((link.header.index, carried))
}

fn interface(link: LinkMessage) -> Interface {
    let mut interface = Interface {
        index: link.header.index,
        name: String::new(),
        mtu: 0,
        is_up: link.header.flags.contains(LinkFlags::Up),
        has_carrier: link.header.flags.contains(LinkFlags::LowerUp),
        mac: None,
        kind: None,
    };
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name = name,
            LinkAttribute::Mtu(mtu) => interface.mtu = mtu,
            LinkAttribute::Address(address) => interface.mac = address.try_into().ok(),
            LinkAttribute::LinkInfo(infos) => {
                interface.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    interface
}
