//! Frames in plain memory, and what another reader of packets says of them: `etherparse`.

use std::net::IpAddr;

use etherparse::defrag::IpDefragBuf;
use etherparse::{
    IpFragOffset, IpNumber, Ipv4HeaderSlice, Ipv6FragmentHeaderSlice, Ipv6HeaderSlice,
    TcpHeaderSlice, UdpHeaderSlice,
};
use warren_abi::drop::Drop;
use warren_abi::family::{Family, V4, V6};
use warren_abi::flow::Direction;
use warren_abi::fragment::{First, Fragmented, Piece};
use warren_abi::maps::Traffic;
use warren_abi::packet::{Frame, IP, Packet};
use warren_abi::wire::{Be16, Ip6Fragment, IpHeader};

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
const ICMPV6: u8 = 58;

/// A frame, all of which can be read.
struct Bytes<'a> {
    /// Aligned as packets are.
    words: Vec<u16>,
    all: &'a [u8],
    segment: u32,
}

impl<'a> Bytes<'a> {
    fn new(bytes: &'a [u8], segment: u32) -> Self {
        let words = bytes
            .chunks(2)
            .map(|pair| u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or_default()]));
        Self { words: words.collect(), all: bytes, segment }
    }
}

// SAFETY: the memory is aligned to 2 bytes, and so is every offset; the end is checked.
unsafe impl Frame for Bytes<'_> {
    fn at<T>(&self, offset: usize) -> Option<*const T> {
        assert!(align_of::<T>() <= 2 && offset.is_multiple_of(2));
        let is_there = offset + size_of::<T>() <= self.all.len();
        is_there.then(|| self.words[offset / 2..].as_ptr().cast())
    }

    fn length(&self) -> u32 {
        self.all.len() as u32
    }

    fn segment(&self) -> u32 {
        self.segment
    }
}

/// An IP packet as the other reader sees it.
struct Seen<'a> {
    tos: u8,
    ttl: u8,
    /// `ICMPv6` is ICMP.
    protocol: u8,
    source: IpAddr,
    destination: IpAddr,
    /// Length of IP's header, and of a fragment's behind it.
    header: usize,
    /// What the header says that there is, as far as it is.
    payload: Option<&'a [u8]>,
    fragment: Option<Piece>,
}

fn see_v4(bytes: &[u8]) -> Option<Seen<'_>> {
    let ip = Ipv4HeaderSlice::from_slice(bytes.get(IP..)?).ok()?;
    if ip.ihl() != 5 {
        return None;
    }
    let fragment = ip.is_fragmenting_payload().then(|| Piece {
        id: ip.identification().into(),
        offset: ip.fragments_offset().byte_offset().into(),
        length: u32::from(ip.total_len()).saturating_sub(20),
        more: ip.more_fragments(),
    });
    Some(Seen {
        tos: ip.dcp().value() << 2 | ip.ecn().value(),
        ttl: ip.ttl(),
        protocol: ip.protocol().0,
        source: ip.source_addr().into(),
        destination: ip.destination_addr().into(),
        header: 20,
        payload: bytes.get(IP + 20..IP + usize::from(ip.total_len())),
        fragment,
    })
}

fn see_v6(bytes: &[u8]) -> Option<Seen<'_>> {
    let ip = Ipv6HeaderSlice::from_slice(bytes.get(IP..)?).ok()?;
    let length = usize::from(ip.payload_length());
    let mut seen = Seen {
        tos: ip.traffic_class(),
        ttl: ip.hop_limit(),
        protocol: ip.next_header().0,
        source: ip.source_addr().into(),
        destination: ip.destination_addr().into(),
        header: 40,
        payload: bytes.get(IP + 40..IP + 40 + length),
        fragment: None,
    };
    if seen.protocol == FRAGMENT {
        let header = Ipv6FragmentHeaderSlice::from_slice(bytes.get(IP + 40..)?).ok()?;
        seen.protocol = header.next_header().0;
        seen.header += 8;
        seen.payload = bytes.get(IP + 48..(IP + 40 + length).max(IP + 48));
        seen.fragment = Some(Piece {
            id: header.identification(),
            offset: header.fragment_offset().byte_offset().into(),
            length: (length as u32).saturating_sub(8),
            more: header.more_fragments(),
        });
    }
    seen.protocol = match seen.protocol {
        ICMPV6 => ICMP,
        // It is none of IPv6's.
        ICMP => 255,
        protocol => protocol,
    };
    Some(seen)
}

/// What a packet must be read as.
#[derive(Debug, PartialEq)]
struct Read {
    tos: u8,
    ttl: u8,
    protocol: u8,
    source: IpAddr,
    destination: IpAddr,
    ports: (u16, u16),
    flags: u8,
    numbers: (u32, u32),
    unchecked: bool,
    is_error: bool,
    header_length: u32,
    traffic: Traffic,
}

/// None: it is not one that is translated.
fn expected(seen: &Seen<'_>, direction: Direction, segment: u32, is_v6: bool) -> Option<Read> {
    let payload = seen.payload?;
    let towards = |source, destination| match direction {
        Direction::Out => (source, destination),
        Direction::In => (destination, source),
    };
    let mut read = Read {
        tos: seen.tos,
        ttl: seen.ttl,
        protocol: seen.protocol,
        source: seen.source,
        destination: seen.destination,
        ports: (0, 0),
        flags: 0,
        numbers: (0, 0),
        unchecked: false,
        is_error: false,
        header_length: seen.header as u32 + 8,
        traffic: Traffic::NONE,
    };
    match seen.protocol {
        TCP => {
            let tcp = TcpHeaderSlice::from_slice(payload).ok()?;
            let flags = [
                tcp.fin(),
                tcp.syn(),
                tcp.rst(),
                tcp.psh(),
                tcp.ack(),
                tcp.urg(),
                tcp.ece(),
                tcp.cwr(),
            ];
            read.flags = (0..8).map(|bit| u8::from(flags[bit]) << bit).sum();
            let header = usize::from(tcp.data_offset()) * 4;
            read.header_length = (seen.header + header) as u32;
            let data = (payload.len() - header) as u32 + u32::from(tcp.fin());
            read.numbers = (tcp.sequence_number().wrapping_add(data), tcp.acknowledgment_number());
            read.ports = towards(tcp.source_port(), tcp.destination_port());
        }
        UDP => {
            let udp = UdpHeaderSlice::from_slice(payload).ok()?;
            read.unchecked = udp.checksum() == 0;
            if is_v6 && read.unchecked {
                return None;
            }
            read.ports = towards(udp.source_port(), udp.destination_port());
        }
        ICMP => {
            let (&[kind, _, _, _, high, low, _, _], _) = payload.split_first_chunk()?;
            let query = match (is_v6, direction) {
                (false, Direction::Out) => 8,
                (false, Direction::In) => 0,
                (true, Direction::Out) => 128,
                (true, Direction::In) => 129,
            };
            let errors: &[u8] = if is_v6 { &[1, 2, 3, 4] } else { &[3, 11, 12] };
            read.is_error = errors.contains(&kind);
            if kind == query {
                read.ports.0 = u16::from_be_bytes([high, low]);
            } else if !read.is_error {
                return None;
            }
        }
        _ => return None,
    }
    let length = (seen.header + payload.len()) as u64;
    let headers = u64::from(read.header_length);
    let packets = match segment {
        0 => 1,
        segment => (length - headers).div_ceil(segment.into()).max(1),
    };
    read.traffic = Traffic { packets, bytes: length + (packets - 1) * headers };
    Some(read)
}

fn read<F: Family>(packet: &Packet<F>) -> Read {
    let port = |Be16(port): Be16| u16::from_be(port);
    Read {
        tos: packet.tos,
        ttl: packet.ttl,
        protocol: packet.protocol,
        source: F::ip(packet.source).into(),
        destination: F::ip(packet.destination).into(),
        ports: (port(packet.local_port), port(packet.peer_port)),
        flags: packet.flags,
        numbers: (packet.next, packet.acknowledged),
        unchecked: packet.unchecked,
        is_error: packet.is_error,
        header_length: packet.header_length,
        traffic: packet.traffic,
    }
}

/// Reads a frame as either family and direction, and compares.
pub fn check(bytes: &[u8], segment: u32) {
    let frame = Bytes::new(bytes, segment);
    for direction in [Direction::Out, Direction::In] {
        check_family::<V4>(&frame, direction, see_v4(bytes).as_ref(), false);
        check_family::<V6>(&frame, direction, see_v6(bytes).as_ref(), true);
        let ip = bytes.get(IP..).and_then(|ip| Ipv4HeaderSlice::from_slice(ip).ok());
        if ip.is_some_and(|ip| ip.ihl() > 5) && bytes.len() >= IP + 28 {
            let read = Packet::<V4>::read(&frame, direction);
            assert_eq!(read.err(), Some(Drop::BadHeader), "IP options: {bytes:02x?}");
        }
    }
}

fn check_family<F: Fragmented>(
    frame: &Bytes<'_>,
    direction: Direction,
    seen: Option<&Seen<'_>>,
    is_v6: bool,
) {
    let whole = Packet::<F>::read(frame, direction);
    let first = Packet::<First<F>>::read(frame, direction);
    let is_first = |seen: &&Seen<'_>| seen.fragment.is_some_and(|piece| piece.offset == 0);
    let expect = |seen: &Seen<'_>| expected(seen, direction, frame.segment, is_v6);
    let wanted = seen.filter(|seen| seen.fragment.is_none()).and_then(expect);
    assert_eq!(whole.as_ref().map(read).ok(), wanted, "{:02x?}", frame.all);
    let wanted = seen.filter(is_first).and_then(expect);
    assert_eq!(first.as_ref().map(read).ok(), wanted, "{:02x?}", frame.all);
    if let Some(Seen { fragment: Some(_), .. }) = seen {
        assert_eq!(whole.err(), Some(Drop::Fragment), "{:02x?}", frame.all);
    }
    check_piece::<F>(frame, seen);
}

/// What a fragment's header says of it.
fn check_piece<F: Fragmented>(frame: &Bytes<'_>, seen: Option<&Seen<'_>>) {
    let Some(header) = frame.at::<F::Fragment>(IP) else { return };
    // SAFETY: `Frame::at`; every bit pattern is a value.
    let found = F::piece(unsafe { &*header });
    match seen {
        None => assert_eq!(found.err(), Some(Drop::BadHeader)),
        Some(Seen { fragment: None, .. }) => assert!(found.is_ok_and(|piece| piece.is_none())),
        Some(Seen { fragment: Some(piece), protocol, source, .. }) => match found {
            Ok(Some((found, fields))) => {
                assert_eq!((found, fields.protocol), (*piece, *protocol));
                assert!([TCP, UDP, ICMP].contains(protocol));
                assert_eq!(
                    found.check::<F>(*protocol).is_ok(),
                    is_whole(piece, *protocol, source.is_ipv4())
                );
            }
            Ok(None) => panic!("it is a fragment"),
            Err(reason) => {
                assert!(matches!(reason, Drop::UnsupportedProtocol | Drop::ExtensionHeader));
                assert!(![TCP, UDP, ICMP].contains(protocol));
            }
        },
    }
}

/// Whether the other reader takes the fragment for one of a datagram, which with its header is no
/// longer than IP's can be, and it is not that short that a transport's header would be divided
/// (RFC 1858, RFC 3128) or nothing is carried.
fn is_whole(piece: &Piece, protocol: u8, is_v4: bool) -> bool {
    let Piece { offset, length, more, .. } = *piece;
    let offset = IpFragOffset::try_new((offset / 8) as u16).expect("13 bits");
    let mut datagram = IpDefragBuf::new(IpNumber(protocol), Vec::new(), Vec::new());
    let is_taken = datagram.add(offset, more, &vec![0; length as usize]).is_ok();
    let header = if protocol == TCP { 20 } else { 8 };
    let divides = if piece.offset == 0 { length < header } else { piece.offset < header };
    let is_short = piece.offset + length + if is_v4 { 20 } else { 0 } <= 0xffff;
    is_taken && is_short && length > 0 && !divides
}

const _: () = assert!(align_of::<IpHeader>() <= 2 && align_of::<Ip6Fragment>() <= 2);
