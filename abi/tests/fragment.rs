//! Fragments.

use proptest::prelude::*;
use warren_abi::drop::Drop;
use warren_abi::family::{Family, V4};
use warren_abi::fragment::{
    CELLS, Datagram, DatagramKey, First, Fragmented, LIFE, Piece, Tag, origin,
};
use warren_abi::wire::{Be16, ICMP, Ip, IpHeader, Ipv4, TCP, UDP};

fn header(fragment: u16, length: u16, protocol: u8) -> IpHeader {
    IpHeader {
        version_length: IpHeader::PLAIN,
        tos: 0,
        total_length: Be16::new(20 + length),
        identification: Be16::new(0x1234),
        fragment: Be16::new(fragment),
        ttl: 64,
        protocol,
        checksum: 0,
        source: Ipv4::new([10, 0, 0, 1]),
        destination: Ipv4::new([10, 0, 0, 2]),
    }
}

fn key(id: u32) -> DatagramKey {
    let origin = u32::from(origin::VPC);
    DatagramKey {
        origin,
        owner: 7,
        mark: 0,
        remote: Ip::UNSPECIFIED,
        peer: Ip::UNSPECIFIED,
        id,
        protocol: 17,
    }
}

fn datagram(first: u32, began: u32) -> Datagram {
    Datagram {
        key: key(1),
        began,
        first,
        seen: first as i32,
        id: 0,
        ifindex: 0,
        generation: 0,
        host: Ip::UNSPECIFIED,
        local_port: Be16(0),
        peer_port: Be16(0),
    }
}

#[test]
fn a_header_tells_of_its_fragment() {
    assert!(V4::piece(&header(0x4000, 100, UDP)).is_ok_and(|piece| piece.is_none()));
    let (piece, fields) = V4::piece(&header(0x2000, 96, UDP)).unwrap().unwrap();
    assert_eq!(piece, Piece { id: 0x1234, offset: 0, length: 96, more: true });
    assert_eq!((fields.protocol, fields.length), (UDP, 116));
    let (piece, _) = V4::piece(&header(12, 5, TCP)).unwrap().unwrap();
    assert_eq!(piece, Piece { id: 0x1234, offset: 96, length: 5, more: false });
    assert_eq!(V4::piece(&header(0x2000, 96, 132)).err(), Some(Drop::UnsupportedProtocol));
    // The first one is read as a packet; no other is, nor is a whole one.
    assert!(First::<V4>::fields(&header(0x2000, 96, UDP)).is_ok());
    for fragment in [0, 0x4000, 12, 0x200c] {
        let refused = First::<V4>::fields(&header(fragment, 96, UDP)).err();
        assert_eq!(refused, Some(Drop::BadFragment), "{fragment:x}");
    }
}

#[test]
fn what_hides_a_header_or_cannot_be_put_together_is_refused() {
    let check = |protocol, offset, length, more| {
        Piece { id: 1, offset, length, more }.check::<V4>(protocol).is_ok()
    };
    for (protocol, least) in [(TCP, 24), (UDP, 8), (ICMP, 8)] {
        for length in (0..64).step_by(8) {
            assert_eq!(check(protocol, 0, length, true), length >= least, "{protocol} {length}");
            assert_eq!(
                check(protocol, length, 8, false),
                length == 0 && least == 8 || length >= least
            );
        }
    }
    assert!(!check(UDP, 8, 9, true) && check(UDP, 8, 9, false));
    assert!(!check(UDP, 64, 0, false));
    // 65,535 bytes in all.
    assert!(check(UDP, 65_512, 3, false) && !check(UDP, 65_512, 4, false));
}

#[test]
fn a_datagram_is_known_until_it_is_complete_or_too_old() {
    let piece = |offset, length, more| Piece { id: 1, offset, length, more };
    for order in [[1, 2], [2, 1]] {
        let mut known = datagram(1408, 5);
        for index in order {
            assert!(known.is_of(&key(1), 5));
            let part = [piece(0, 0, true), piece(1408, 1408, true), piece(2816, 5, false)][index];
            known.enter(&part).unwrap();
        }
        assert!(!known.is_of(&key(1), 5), "{order:?}");
    }
    let mut known = datagram(1408, 5);
    assert_eq!(known.enter(&piece(1400, 8, true)), Err(Drop::BadFragment));
    assert!(known.is_of(&key(1), 5 + LIFE) && !known.is_of(&key(1), 6 + LIFE));
    assert!(known.is_of(&key(1), 4), "another CPU's clock");
    assert!(!known.is_of(&key(2), 5));
}

#[test]
fn datagrams_that_follow_each_other_have_places_of_their_own() {
    let mut cells: Vec<_> = (1000..1000 + CELLS).map(|id| key(id).cell().number).collect();
    let other = DatagramKey { origin: u32::from(origin::HOST), ..key(1000) };
    cells.push(other.cell().number);
    cells.sort_unstable();
    cells.dedup();
    assert_eq!(cells.len() as u32, CELLS + 1);
}

proptest! {
    #[test]
    fn a_tag_reads_back(origin: u8, attempt: u8, owner: u32, mark: u32, rest in prop::collection::vec(any::<u8>(), 0..9)) {
        let tag = Tag { attempt, ..Tag::new(origin, owner, mark) };
        let (destination, source) = tag.to_macs();
        prop_assert_eq!(Tag::from_macs(destination, source), Some(tag));
        let mut frame = vec![0; 12];
        frame.extend(&rest);
        tag.write(&mut frame);
        prop_assert_eq!(Tag::of_frame(&frame), Some(tag));
        prop_assert_eq!(&frame[12..], &rest[..]);
        prop_assert_eq!(Tag::of_frame(&frame[..11]), None);
        prop_assert_eq!(Tag::of_frame(&[0; 14]), None);
    }

    #[test]
    fn keys_that_differ_are_told_apart(a in any::<[u32; 6]>(), b in any::<[u32; 6]>(), same: bool) {
        let of = |[owner, mark, id, protocol, peer, remote]: [u32; 6]| {
            let [peer, remote] = [peer, remote].map(|address| Ip::v4(Ipv4(address)));
            DatagramKey { origin: 1, owner, mark, remote, peer, id, protocol }
        };
        let b = if same { a } else { b };
        prop_assert_eq!(of(a).is(&of(b)), a == b);
    }
}
