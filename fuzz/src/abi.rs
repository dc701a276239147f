//! Packets and messages that cross the boundaries of guests.

use warren_abi::checksum::fold;
use warren_abi::flow::Direction;
use warren_abi::icmp::{IcmpError, IcmpErrorTcp};
use warren_abi::mss::{OPTIONS_ROOM, find};
use warren_abi::probe::{Reply, Request, decode, encode};
use warren_abi::wire::{Be16, Ipv4, TCP};

/// A direction, a new address and port, and an ICMP error: its subject is found and translated,
/// and the checksums that were right stay so.
pub fn icmp_error(data: &[u8]) {
    const LENGTH: usize = size_of::<IcmpErrorTcp>();
    let Some((&[way, a, b, c, d, high, low], rest)) = data.split_first_chunk() else { return };
    let Some(bytes) = rest.first_chunk::<LENGTH>() else { return };
    // SAFETY: both are as long, and any bytes are a value.
    let mut whole = unsafe { std::mem::transmute::<[u8; LENGTH], IcmpErrorTcp>(*bytes) };
    let mut error: IcmpError = whole.error;
    let direction = if way & 1 == 0 { Direction::In } else { Direction::Out };
    let Ok(subject) = error.subject(direction) else { return };

    let (address, port) = (Ipv4::new([a, b, c, d]), Be16(u16::from_ne_bytes([high, low])));
    let mut tcp = whole.checksum;
    let embeds_checksum = subject.protocol == TCP && way & 2 == 0;
    error.translate(&subject, direction, address, port, embeds_checksum.then_some(&mut tcp));
    whole.error = error;
    whole.checksum = tcp;

    // Found again under the new address, and nothing else changed.
    let again = error.subject(direction).expect("the embedded header's checksum is right");
    assert_eq!((again.local, again.local_port), (address, port));
    assert_eq!((again.peer, again.peer_port), (subject.peer, subject.peer_port));
    // SAFETY: both are as long, without padding.
    let after = unsafe { std::mem::transmute::<IcmpErrorTcp, [u8; LENGTH]>(whole) };
    assert_eq!(sum(bytes), sum(&after), "the message's checksum is as right as before");
}

/// The sum over a message; both zeroes of the one's complement are one.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.as_chunks::<2>().0.iter().map(|&word| u32::from(u16::from_ne_bytes(word)));
    fold(words.sum()) % 0xffff
}

/// A segment's length, and a frame: it is read as another reader reads it.
pub fn packet(data: &[u8]) {
    if let Some((&segment, frame)) = data.split_first_chunk() {
        crate::packet::check(frame, u16::from_le_bytes(segment).into());
    }
}

/// TCP's options: what is found is an MSS, and the first that walking the list meets.
pub fn mss(data: &[u8]) {
    let options = &data[..data.len().min(40)];
    let mut room = [0; OPTIONS_ROOM];
    room[..options.len()].copy_from_slice(options);
    let found = find(&room, options.len());
    assert_eq!(found.map(|mss| mss.at), walk(options));
}

/// Option by option (RFC 9293, section 3.1).
fn walk(options: &[u8]) -> Option<usize> {
    let mut at = 0;
    while at < options.len() {
        match (options[at], *options.get(at + 1).unwrap_or(&0)) {
            (1, _) => at += 1,
            (0, _) | (_, 0 | 1) => return None,
            (2, 4) if at + 4 <= options.len() => return Some(at + 2),
            (_, size) => at += usize::from(size),
        }
    }
    None
}

/// Messages of the invocation channel: any bytes are refused, or a message that reads back.
pub fn probe(data: &[u8]) {
    if let Ok(request) = decode::<Request>(data) {
        assert_eq!(decode::<Request>(&encode(&request)).ok(), Some(request));
    }
    if let Ok(reply) = decode::<Reply>(data) {
        assert_eq!(decode::<Reply>(&encode(&reply)).ok(), Some(reply));
    }
}
