//! Packets are read as another reader reads them, whole, cut short, and changed.

#[path = "model/packet.rs"]
mod model;

use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, icmpv4, icmpv6};
use proptest::prelude::*;

use model::check;

/// A frame of each kind that is told apart, of both families.
fn frames(payload: &[u8]) -> Vec<Vec<u8>> {
    let v4 = || PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
    let v6 = || PacketBuilder::ethernet2([2; 6], [4; 6]).ipv6([0x20; 16], [0x21; 16], 64);
    let port = icmpv4::DestUnreachableHeader::Port;
    let port_v6 = icmpv6::DestUnreachableCode::Port;
    let mut frames = Vec::new();
    let mut push =
        |write: &dyn Fn(&mut Vec<u8>) -> Result<(), etherparse::err::packet::BuildWriteError>| {
            let mut frame = Vec::new();
            write(&mut frame).expect("a vector takes everything");
            frames.push(frame);
        };
    push(&|frame| v4().udp(1000, 53).write(frame, payload));
    push(&|frame| v6().udp(1000, 53).write(frame, payload));
    push(&|frame| v4().tcp(1000, 80, 7, 512).ack(9).write(frame, payload));
    push(&|frame| v6().tcp(1000, 80, 7, 512).fin().ack(9).write(frame, payload));
    push(&|frame| v4().icmpv4_echo_request(5, 6).write(frame, payload));
    push(&|frame| v4().icmpv4_echo_reply(5, 6).write(frame, payload));
    push(&|frame| v6().icmpv6_echo_request(5, 6).write(frame, payload));
    push(&|frame| v6().icmpv6_echo_reply(5, 6).write(frame, payload));
    push(&|frame| {
        v4().icmpv4(Icmpv4Type::DestinationUnreachable(port.clone())).write(frame, payload)
    });
    push(&|frame| v6().icmpv6(Icmpv6Type::DestinationUnreachable(port_v6)).write(frame, payload));
    let fragments: Vec<_> = frames.iter().flat_map(|frame| fragments(frame)).collect();
    frames.extend(fragments);
    frames
}

/// The same as a first fragment, a later one, and one that is all there is.
fn fragments(frame: &[u8]) -> [Vec<u8>; 3] {
    [([0x20, 0], 1), ([0, 4], 32), ([0, 0], 0)].map(|(v4, v6)| {
        let mut frame = frame.to_vec();
        if frame[12] == 8 {
            frame[20..22].copy_from_slice(&v4);
        } else {
            let protocol = std::mem::replace(&mut frame[20], 44);
            frame.splice(54..54, [protocol, 0, 0, v6, 0, 0, 0, 9]);
            let length = (frame.len() - 54) as u16;
            frame[18..20].copy_from_slice(&length.to_be_bytes());
        }
        frame
    })
}

#[test]
fn packets_of_every_kind_and_length_are_read_as_etherparse_reads_them() {
    for payload in [&b""[..], b"x", b"a payload that is longer"] {
        for frame in frames(payload) {
            for length in 0..=frame.len() {
                check(&frame[..length], 0);
            }
            // Longer than it says.
            check(&[&frame[..], b"trailer"].concat(), 5);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn changed_packets_are_read_as_etherparse_reads_them(
        payload in prop::collection::vec(any::<u8>(), 0..64),
        which: prop::sample::Index,
        changes in prop::collection::vec((12usize..74, any::<u8>()), 0..4),
        length: prop::sample::Index,
        is_cut: bool,
        segment in prop::option::of(1u32..40),
    ) {
        let mut frame = which.get(&frames(&payload)).clone();
        for (at, byte) in changes {
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        if is_cut {
            frame.truncate(length.index(frame.len() + 1));
        }
        check(&frame, segment.unwrap_or(0));
    }

    #[test]
    fn any_bytes_are_read_as_etherparse_reads_them(
        frame in prop::collection::vec(any::<u8>(), 0..128),
        segment: u16,
    ) {
        check(&frame, segment.into());
    }
}
