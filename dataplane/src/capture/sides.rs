//! The outer side of a slot: which of a tunnel's packets are of its flows.

use std::net::IpAddr;

use etherparse::{Ipv6ExtensionSlice, LaxNetSlice, LaxSlicedPacket};
use warren_abi::flow::Direction;
use warren_abi::maps::{InFlow, InKey};
use warren_abi::wire::{Be16, ICMP, ICMPV6, Ip, TCP, UDP, VXLAN_PORT};

/// UDP's header and VXLAN's.
const HEADERS: usize = 16;

/// An IP packet's first bytes after its headers, and who sends it to whom.
struct Packet<'a> {
    source: IpAddr,
    destination: IpAddr,
    /// [`ICMP`] also stands for `ICMPv6`.
    protocol: u8,
    payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Nothing of what is no IP, and of fragments that are not their datagram's first: they have
    /// no ports.
    fn new(packet: &LaxSlicedPacket<'a>) -> Option<Self> {
        let (source, destination, payload) = match packet.net.as_ref()? {
            LaxNetSlice::Ipv4(ip) => {
                let header = ip.header();
                if header.fragments_offset().value() > 0 {
                    return None;
                }
                (header.source_addr().into(), header.destination_addr().into(), ip.payload())
            }
            LaxNetSlice::Ipv6(ip) => {
                let is_later = |extension| match extension {
                    Ipv6ExtensionSlice::Fragment(header) => header.fragment_offset().value() > 0,
                    _ => false,
                };
                if ip.extensions().clone().into_iter().any(is_later) {
                    return None;
                }
                let header = ip.header();
                (header.source_addr().into(), header.destination_addr().into(), ip.payload())
            }
            LaxNetSlice::Arp(_) => return None,
        };
        let protocol = match payload.ip_number.0 {
            ICMPV6 => ICMP,
            protocol => protocol,
        };
        Some(Self { source, destination, protocol, payload: payload.payload })
    }

    fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }

    /// What its flow, if it is of one, claims on the shared address. `way` is the packet's.
    fn claim(&self, vni: u32, way: Direction) -> Option<InKey> {
        let (source_port, destination_port) = match self.protocol {
            TCP | UDP => (self.number(0)?, self.number(2)?),
            // An identifier is the same both ways, and the peer has no port.
            ICMP => match (way, self.number(4)?) {
                (Direction::Out, id) => (id, 0),
                (Direction::In, id) => (0, id),
            },
            _ => return None,
        };
        let (peer, peer_port, port) = match way {
            Direction::Out => (self.destination, destination_port, source_port),
            Direction::In => (self.source, source_port, destination_port),
        };
        let (peer_port, port) = (Be16::new(peer_port), Be16::new(port));
        Some(InKey { vni, peer: Ip::from(peer), peer_port, port, protocol: self.protocol.into() })
    }

    /// The packet that an ICMP error is about.
    fn subject(&self) -> Option<Packet<'a>> {
        let is_error = self.protocol == ICMP
            && match self.payload.first()? {
                3 | 4 | 5 | 11 | 12 => self.is_v4(),
                kind => !self.is_v4() && *kind < 128,
            };
        if !is_error {
            return None;
        }
        Packet::new(&LaxSlicedPacket::from_ip(self.payload.get(8..)?).ok()?)
    }

    fn number(&self, at: usize) -> Option<u16> {
        Some(u16::from_be_bytes(self.payload.get(at..at + 2)?.try_into().ok()?))
    }
}

/// Who is captured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    /// Index of its TAP.
    pub ifindex: u32,
    /// Its attachment.
    pub generation: u32,
    /// The VPC.
    pub vni: u32,
}

impl Slot {
    /// The frame that a tunnel's packet carries, if that is of this slot's flows. `end` is the
    /// host's address on the underlay, `claimed` looks up who claimed what.
    ///
    /// The flow is looked up later than the packet came: if its tuple is another slot's meanwhile,
    /// it is taken for that one's. Both are in the same VPC.
    pub fn outside<'a>(
        &self,
        frame: &'a [u8],
        end: IpAddr,
        claimed: impl Fn(&InKey) -> Option<InFlow>,
    ) -> Option<&'a [u8]> {
        let outer = Packet::new(&LaxSlicedPacket::from_ethernet(frame).ok()?)?;
        let way = if outer.source == end {
            Direction::Out
        } else if outer.destination == end {
            Direction::In
        } else {
            return None;
        };
        if outer.protocol != UDP || outer.number(2)? != VXLAN_PORT {
            return None;
        }
        let (headers, inner) = outer.payload.split_at_checked(HEADERS)?;
        if u32::from_be_bytes([0, headers[12], headers[13], headers[14]]) != self.vni {
            return None;
        }
        let packet = Packet::new(&LaxSlicedPacket::from_ethernet(inner).ok()?)?;
        let claim = match packet.subject() {
            // It went the other way.
            Some(subject) => subject.claim(self.vni, way.reversed()),
            None => packet.claim(self.vni, way),
        }?;
        let is_own = |claim: &InKey| {
            let owner = claimed(claim)?;
            Some(owner.ifindex == self.ifindex && owner.generation == self.generation)
        };
        // A UDP port is one guest's towards all peers: so are packets that begin no flow.
        let mapping = InKey { peer: Ip::UNSPECIFIED, peer_port: Be16(0), ..claim };
        let own = is_own(&claim)
            .or_else(|| if packet.protocol == UDP { is_own(&mapping) } else { None })?;
        own.then_some(inner)
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{
        IcmpEchoHeader, Icmpv4Type, IpFragOffset, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header,
        PacketBuilder, icmpv4,
    };
    use warren_abi::maps::Traffic;

    use super::super::tests::tunnelled;
    use super::*;

    const END: &str = "192.0.2.1";
    const SHARED: [u8; 4] = [10, 1, 0, 9];
    const PEER: [u8; 4] = [10, 1, 0, 20];
    const VNI: u32 = 4096;
    const SLOT: Slot = Slot { ifindex: 7, generation: 3, vni: VNI };

    fn ethernet(source: [u8; 4], destination: [u8; 4]) -> etherparse::PacketBuilderStep<IpHeaders> {
        let ip = Ipv4Header::new(0, 64, IpNumber::UDP, source, destination).unwrap();
        PacketBuilder::ethernet2([2; 6], [4; 6]).ip(IpHeaders::Ipv4(ip, Ipv4Extensions::default()))
    }

    fn written<T>(
        builder: T,
        write: impl FnOnce(T, &mut Vec<u8>) -> Result<(), etherparse::err::packet::BuildWriteError>,
    ) -> Vec<u8> {
        let mut frame = Vec::new();
        write(builder, &mut frame).unwrap();
        frame
    }

    fn udp(source: ([u8; 4], u16), destination: ([u8; 4], u16)) -> Vec<u8> {
        let builder = ethernet(source.0, destination.0).udp(source.1, destination.1);
        written(builder, |builder, frame| builder.write(frame, b"hello"))
    }

    fn tcp(source: ([u8; 4], u16), destination: ([u8; 4], u16)) -> Vec<u8> {
        let builder = ethernet(source.0, destination.0).tcp(source.1, destination.1, 1, 1024);
        written(builder, |builder, frame| builder.write(frame, b"hello"))
    }

    fn icmp(source: [u8; 4], destination: [u8; 4], kind: Icmpv4Type, payload: &[u8]) -> Vec<u8> {
        let builder = ethernet(source, destination).icmpv4(kind);
        written(builder, |builder, frame| builder.write(frame, payload))
    }

    fn key(protocol: u8, peer: [u8; 4], peer_port: u16, port: u16) -> InKey {
        let peer = if peer == [0; 4] { Ip::UNSPECIFIED } else { IpAddr::from(peer).into() };
        let (peer_port, port) = (Be16::new(peer_port), Be16::new(port));
        InKey { vni: VNI, peer, peer_port, port, protocol: protocol.into() }
    }

    /// Whether a frame that leaves, or comes, is told to be the slot's, if it has this claim.
    fn is_own(way: Direction, inner: &[u8], claim: InKey) -> bool {
        is_owned_by(SLOT, way, inner, claim)
    }

    fn is_owned_by(owner: Slot, way: Direction, inner: &[u8], claim: InKey) -> bool {
        let end: IpAddr = END.parse().unwrap();
        let frame = tunnelled(end, VNI, inner);
        let end = match way {
            Direction::Out => end,
            Direction::In => "192.0.2.2".parse().unwrap(),
        };
        let found = SLOT.outside(&frame, end, |asked| {
            let Slot { ifindex, generation, .. } = owner;
            (*asked == claim).then_some(InFlow {
                ifindex,
                generation,
                refreshed: 0,
                guest_port: Be16::new(1),
                judged: 0,
                received: Traffic::NONE,
            })
        });
        assert!(found.is_none_or(|found| found == inner));
        found.is_some()
    }

    #[test]
    fn a_flow_is_known_both_ways_and_by_its_peer() {
        let claim = key(TCP, PEER, 80, 4100);
        let (leaves, comes) = (tcp((SHARED, 4100), (PEER, 80)), tcp((PEER, 80), (SHARED, 4100)));
        assert!(is_own(Direction::Out, &leaves, claim));
        assert!(is_own(Direction::In, &comes, claim));
        assert!(!is_own(Direction::In, &leaves, claim));
        assert!(!is_own(Direction::Out, &leaves, key(TCP, PEER, 81, 4100)), "another peer");
        assert!(!is_own(Direction::Out, &leaves, key(UDP, PEER, 80, 4100)));
        assert!(!is_own(Direction::Out, &leaves, key(TCP, [0; 4], 0, 4100)), "no TCP mappings");
    }

    #[test]
    fn another_slots_are_not_shown_nor_a_former_tenants() {
        let (frame, claim) = (udp((SHARED, 4100), (PEER, 53)), key(UDP, PEER, 53, 4100));
        let is_owned_by = |owner| is_owned_by(owner, Direction::Out, &frame, claim);
        assert!(is_owned_by(SLOT));
        assert!(!is_owned_by(Slot { ifindex: 8, ..SLOT }));
        assert!(!is_owned_by(Slot { generation: 2, ..SLOT }));
    }

    #[test]
    fn other_vpcs_and_other_hosts_tunnels_are_not_shown() {
        let inner = udp((SHARED, 4100), (PEER, 53));
        let everything = |_: &InKey| Some(InFlow { ifindex: 7, generation: 3, ..no_flow() });
        let (end, other): (IpAddr, IpAddr) =
            (END.parse().unwrap(), "198.51.100.1".parse().unwrap());
        let shown = |vni, end| {
            SLOT.outside(&tunnelled(END.parse().unwrap(), vni, &inner), end, everything).is_some()
        };
        assert!(shown(VNI, end));
        assert!(!shown(VNI + 1, end));
        assert!(!shown(VNI, other));
        let v6 = "2001:db8::1".parse().unwrap();
        assert!(SLOT.outside(&tunnelled(v6, VNI, &inner), v6, everything).is_some());
        assert!(SLOT.outside(&inner, end, everything).is_none(), "no tunnel");
        for length in 0..inner.len() + 50 {
            let frame = &tunnelled(end, VNI, &inner)[..length];
            SLOT.outside(frame, end, everything);
        }
    }

    fn no_flow() -> InFlow {
        InFlow {
            ifindex: 0,
            generation: 0,
            refreshed: 0,
            guest_port: Be16::new(1),
            judged: 0,
            received: Traffic::NONE,
        }
    }

    #[test]
    fn a_udp_mapping_is_its_guests_towards_all_peers() {
        let comes = udp((PEER, 53), (SHARED, 4100));
        assert!(is_own(Direction::In, &comes, key(UDP, [0; 4], 0, 4100)));
        assert!(!is_own(Direction::In, &comes, key(UDP, [0; 4], 0, 4101)));
    }

    #[test]
    fn echoes_are_known_by_their_identifier_and_errors_by_what_they_are_about() {
        let echo = IcmpEchoHeader { id: 77, seq: 1 };
        let request = icmp(SHARED, PEER, Icmpv4Type::EchoRequest(echo), b"x");
        let reply = icmp(PEER, SHARED, Icmpv4Type::EchoReply(echo), b"x");
        let claim = key(ICMP, PEER, 0, 77);
        assert!(is_own(Direction::Out, &request, claim) && is_own(Direction::In, &reply, claim));

        let unreachable = Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port);
        // Only the first 8 bytes after the IP header are sure to be there (RFC 792).
        let sent = &tcp((SHARED, 4100), (PEER, 80))[14..14 + 28];
        let error = icmp([10, 1, 0, 1], SHARED, unreachable.clone(), sent);
        assert!(is_own(Direction::In, &error, key(TCP, PEER, 80, 4100)));
        assert!(!is_own(Direction::In, &error, key(TCP, PEER, 80, 4101)));
        let received = &udp((PEER, 53), (SHARED, 4100))[14..];
        let error = icmp(SHARED, PEER, unreachable, received);
        assert!(is_own(Direction::Out, &error, key(UDP, PEER, 53, 4100)));
    }

    #[test]
    fn later_fragments_have_no_ports() {
        let mut ip = Ipv4Header::new(8, 64, IpNumber::UDP, SHARED, PEER).unwrap();
        ip.fragment_offset = IpFragOffset::try_new(1).unwrap();
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6])
            .ip(IpHeaders::Ipv4(ip, Ipv4Extensions::default()));
        let frame = written(builder, |builder, frame| {
            builder.write(frame, IpNumber::UDP, &[0x10, 4, 0, 53, 0, 0, 0, 0])
        });
        assert!(!is_own(Direction::Out, &frame, key(UDP, PEER, 53, 4100)));
    }
}
