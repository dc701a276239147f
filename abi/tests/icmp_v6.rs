//! The translation of ICMP errors, in IPv6.

use proptest::prelude::*;
use warren_abi::checksum::fold;
use warren_abi::family::{Answering, Family, V6};
use warren_abi::flow::Direction;
use warren_abi::icmp::{IcmpError, IcmpErrorTcp, v6};
use warren_abi::wire::{Be16, ICMPV6, Ip, Ip6Header, TCP, UDP};

/// The sum of a value's words: integers only, without padding, aligned to 2 and of an even size.
fn sum<T: Copy>(value: &T) -> u32 {
    let start = (&raw const *value).cast::<u16>();
    // SAFETY: as above.
    (0..size_of::<T>() / 2).map(|index| u32::from(unsafe { start.add(index).read() })).sum()
}

/// The outer header of a message to or from the guest's side.
fn outer(direction: Direction, local: Ip, router: Ip) -> Ip6Header {
    let (source, destination) = match direction {
        Direction::In => (router, local),
        Direction::Out => (local, router),
    };
    V6::answer(source, destination, size_of::<IcmpErrorTcp<V6>>() as u16)
}

/// The sum of what the embedded transport's checksum covers, folded: 0xffff if it is right.
fn covered(error: &IcmpErrorTcp<V6>) -> u16 {
    let inner = error.error;
    fold(
        V6::pseudo_sum(&{ inner.ip })
            + sum(&{ inner.l4 })
            + sum(&{ error.l4 })
            + u32::from(error.checksum),
    )
}

proptest! {
    #[test]
    fn a_translated_error_is_right_in_all_its_checksums(
        inward: bool,
        protocol in prop::sample::select(vec![TCP, UDP, ICMPV6]),
        addresses: [[u32; 4]; 4],
        l4: [u16; 8],
        port: u16,
    ) {
        let direction = if inward { Direction::In } else { Direction::Out };
        let [local, peer, router, address] = addresses.map(Ip);
        let (source, destination) = if inward { (local, peer) } else { (peer, local) };
        let mut ip = V6::answer(source, destination, 18);
        ip.next_header = protocol;
        let mut error = IcmpErrorTcp::<V6> {
            error: IcmpError {
                kind: [v6::UNREACHABLE, 4],
                checksum: 0,
                rest: [Be16(0); 2],
                ip,
                l4: [Be16(l4[0]), Be16(l4[1]), Be16(l4[2]), Be16(l4[3])],
            },
            l4: [Be16(l4[4]), Be16(l4[5]), Be16(l4[6]), Be16(l4[7])],
            checksum: 0,
        };
        let index = if protocol == ICMPV6 { 1 } else { 3 };
        if protocol == ICMPV6 {
            let kind = if inward { v6::ECHO_REQUEST } else { v6::ECHO_REPLY };
            error.error.l4[0] = Be16(u16::from_ne_bytes([kind, 0]));
        }
        if protocol == TCP {
            error.checksum = !covered(&error);
        } else {
            error.error.l4[index] = Be16(0);
            error.error.l4[index] = match !covered(&error) {
                0 if protocol == UDP => Be16(0xffff),
                sum => Be16(sum),
            };
        }
        error.error.checksum =
            !fold(V6::pseudo_sum(&outer(direction, local, router)) + sum(&error));

        let (mut inner, mut tcp) = (error.error, error.checksum);
        let subject = inner.subject(direction).expect("it is about a flow");
        prop_assert_eq!((subject.local, subject.peer), (local, peer));
        inner.translate(&subject, direction, address, Be16(port), Some(&mut tcp));
        (error.error, error.checksum) = (inner, tcp);
        prop_assert_eq!(covered(&error), 0xffff);
        let whole = V6::pseudo_sum(&outer(direction, address, router)) + sum(&error);
        prop_assert_eq!(fold(whole), 0xffff);
        let after = error.error.subject(direction).expect("it is about a flow");
        prop_assert_eq!((after.local, after.local_port), (address, Be16(port)));
        prop_assert_eq!((after.peer, after.peer_port), (peer, subject.peer_port));
    }
}
