//! Checksums, and the translation of ICMP errors.

use proptest::prelude::*;
use warren_abi::checksum::{fold, settled, update};
use warren_abi::drop::Drop;
use warren_abi::flow::Direction;
use warren_abi::icmp::{ECHO_REPLY, ECHO_REQUEST, IcmpError, IcmpErrorTcp, UNREACHABLE};
use warren_abi::wire::{Be16, ICMP, IpHeader, Ipv4, TCP, UDP};

/// The words of a value without padding.
fn words<T: Copy>(value: &T) -> Vec<u16> {
    let start = (&raw const *value).cast::<u16>();
    // SAFETY: integers only, without padding, aligned to 2 and of an even size.
    (0..size_of::<T>() / 2).map(|index| unsafe { start.add(index).read() }).collect()
}

fn sum(words: &[u16]) -> u16 {
    fold(words.iter().map(|&word| u32::from(word)).sum())
}

/// An error that embeds a whole packet of `IP` and 18 bytes, with all checksums right.
fn error(direction: Direction, protocol: u8, numbers: [u32; 6]) -> IcmpErrorTcp {
    let half = |number: u32| Be16(number as u16);
    let mut ip = IpHeader {
        version_length: IpHeader::PLAIN,
        tos: numbers[2] as u8,
        total_length: Be16::new(38),
        identification: half(numbers[3]),
        fragment: IpHeader::DF,
        ttl: (numbers[2] >> 8) as u8,
        protocol,
        checksum: 0,
        source: Ipv4(numbers[0]),
        destination: Ipv4(numbers[1]),
    };
    ip.checksum = !fold(ip.sum());
    let high = |number: u32| Be16((number >> 16) as u16);
    let mut error = IcmpErrorTcp {
        error: IcmpError {
            kind: [UNREACHABLE, 1],
            checksum: 0,
            rest: [Be16(0); 2],
            ip,
            l4: [half(numbers[4]), high(numbers[4]), half(numbers[5]), high(numbers[5])],
        },
        l4: [half(numbers[2]), high(numbers[2]), half(numbers[3]), high(numbers[3])],
        checksum: 0,
    };
    let index = match protocol {
        ICMP => {
            let kind = if direction == Direction::In { ECHO_REQUEST } else { ECHO_REPLY };
            error.error.l4[0] = Be16(u16::from_ne_bytes([kind, 0]));
            1
        }
        _ => 3,
    };
    if protocol != TCP {
        error.error.l4[index] = Be16(0);
    }
    match !covered(&error, protocol) {
        sum if protocol == TCP => error.checksum = sum,
        0 if protocol == UDP => error.error.l4[index] = Be16(0xffff),
        sum => error.error.l4[index] = Be16(sum),
    }
    error.error.checksum = !sum(&words(&error));
    error
}

/// The sum of what the embedded transport's checksum covers: 0xffff if it is right.
fn covered(error: &IcmpErrorTcp, protocol: u8) -> u16 {
    let ip = error.error.ip;
    let all = words(error);
    let mut summed = all[4 + 10..].to_vec();
    if protocol != ICMP {
        summed.extend(words(&{ ip.source }));
        summed.extend(words(&{ ip.destination }));
        summed.extend([u16::from_ne_bytes([0, protocol]), Be16::new(18).0]);
    }
    sum(&summed)
}

proptest! {
    #[test]
    fn an_updated_checksum_is_the_one_made_anew(
        before: [u16; 3],
        after: [u16; 3],
        rest in prop::collection::vec(1u16.., 1..20),
    ) {
        let anew = |changing: [u16; 3]| !sum(&[&changing[..], &rest].concat());
        prop_assert_eq!(update(anew(before), before, after), anew(after));
    }

    #[test]
    fn a_translated_error_is_right_in_all_its_checksums(
        inward: bool,
        protocol in prop::sample::select(vec![TCP, UDP, ICMP]),
        numbers: [u32; 6],
        address: u32,
        port: u16,
    ) {
        let direction = if inward { Direction::In } else { Direction::Out };
        let mut error = error(direction, protocol, numbers);
        let subject = error.error.subject(direction).expect("it is about a flow");
        let before = error;
        {
            let mut tcp = error.checksum;
            let (address, port) = (Ipv4(address), Be16(port));
            let mut inner = error.error;
            inner.translate(&subject, direction, address, port, Some(&mut tcp));
            error.error = inner;
            error.checksum = tcp;
        }
        prop_assert_eq!(fold({ error.error.ip }.sum()), 0xffff);
        prop_assert_eq!(covered(&error, protocol), 0xffff);
        prop_assert_eq!(sum(&words(&error)), 0xffff);
        let after = error.error.subject(direction).expect("it is about a flow");
        prop_assert_eq!((after.local, after.local_port), (Ipv4(address), Be16(port)));
        prop_assert_eq!((after.peer, after.peer_port), (subject.peer, subject.peer_port));

        // And back: what the other side would have got.
        let (mut tcp, mut inner) = (error.checksum, error.error);
        inner.translate(&after, direction, subject.local, subject.local_port, Some(&mut tcp));
        let (back, first) = (IcmpErrorTcp { error: inner, checksum: tcp, ..error }, words(&before));
        prop_assert_eq!(sum(&words(&back)), 0xffff);
        prop_assert_eq!(&words(&back)[14..], &first[14..]);
    }

    #[test]
    fn an_embedded_header_that_is_damaged_is_refused(numbers: [u32; 6], bit in 0u32..16) {
        let mut error = error(Direction::In, TCP, numbers).error;
        error.ip.identification.0 ^= 1 << bit;
        prop_assert_eq!(error.subject(Direction::In), Err(Drop::BadChecksum));
    }

    #[test]
    fn a_udp_packet_without_a_checksum_stays_so(numbers: [u32; 6], address: u32, port: u16) {
        let mut error = error(Direction::In, UDP, numbers).error;
        error.l4[3] = Be16(0);
        let subject = error.subject(Direction::In).expect("it is about a flow");
        error.translate(&subject, Direction::In, Ipv4(address), Be16(port), None);
        prop_assert_eq!(error.l4[3], Be16(0));
    }
}

proptest! {
    #[test]
    fn a_settled_checksum_stays_when_it_is_filled_in(
        words in prop::collection::vec(any::<u16>(), 1..20),
    ) {
        let checksum = settled(sum(&words));
        let filled_in = match !sum(&[&words[..], &[checksum]].concat()) {
            0 => 0xffff,
            filled_in => filled_in,
        };
        prop_assert_eq!(filled_in, checksum);
    }
}
