//! Packets divided into fragments (RFC 791, section 3.2).

use etherparse::{IpFragOffset, Ipv4Header};

/// Length of an Ethernet header.
const ETHERNET: usize = 14;

/// Divides the IPv4 packet in a frame, or the fragment, into fragments of at most `mtu` bytes, each
/// in a frame of its own with the same Ethernet header. None: it is no such packet, or must not be
/// divided.
pub fn divide(frame: &[u8], mtu: u16) -> Option<Vec<Vec<u8>>> {
    let (ethernet, packet) = frame.split_at_checked(ETHERNET)?;
    if ethernet[12..] != [8, 0] {
        return None;
    }
    let (header, _) = Ipv4Header::from_slice(packet).ok()?;
    let payload = packet.get(header.header_len()..usize::from(header.total_len))?;
    // Options may have to be copied or not; the programs take no packets with any.
    if header.dont_fragment || !header.options.is_empty() {
        return None;
    }
    let room = usize::from(mtu).checked_sub(header.header_len())? & !7;
    if room == 0 {
        return None;
    }
    let mut parts = Vec::new();
    for (index, part) in payload.chunks(room).enumerate() {
        let offset = usize::from(header.fragment_offset.value()) + index * room / 8;
        let mut header = header.clone();
        header.fragment_offset = IpFragOffset::try_new(offset.try_into().ok()?).ok()?;
        header.more_fragments |= (index + 1) * room < payload.len();
        header.set_payload_len(part.len()).ok()?;
        header.header_checksum = header.calc_header_checksum();
        let mut frame = ethernet.to_vec();
        header.write(&mut frame).ok()?;
        frame.extend_from_slice(part);
        parts.push(frame);
    }
    Some(parts)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    /// Puts fragments together.
    fn assemble(parts: &[Vec<u8>]) -> Vec<u8> {
        let mut whole = Vec::new();
        for part in parts {
            let (header, rest) = Ipv4Header::from_slice(&part[ETHERNET..]).unwrap();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            assert_eq!(rest.len() + 20, usize::from(header.total_len));
            assert_eq!(usize::from(header.fragment_offset.byte_offset()), whole.len());
            whole.extend_from_slice(rest);
        }
        whole
    }

    fn datagram(length: usize) -> Vec<u8> {
        let payload: Vec<u8> = (0..length).map(|index| index as u8).collect();
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ip(etherparse::IpHeaders::Ipv4(
                Ipv4Header {
                    source: Ipv4Addr::new(10, 0, 0, 1).octets(),
                    destination: Ipv4Addr::new(10, 0, 0, 2).octets(),
                    time_to_live: 64,
                    identification: 77,
                    dont_fragment: false,
                    ..Ipv4Header::default()
                },
                etherparse::Ipv4Extensions::default(),
            ))
            .udp(1, 2)
            .write(&mut frame, &payload)
            .unwrap();
        frame
    }

    proptest! {
        #[test]
        fn parts_fit_and_make_the_whole_also_if_they_are_divided_again(
            length in 100usize..9000,
            first in 68u16..2000,
            second in 68u16..2000,
        ) {
            let frame = datagram(length);
            let parts = divide(&frame, first).unwrap();
            prop_assert_eq!(&assemble(&parts), &frame[34..]);
            let again: Vec<_> =
                parts.iter().flat_map(|part| divide(part, second).unwrap()).collect();
            prop_assert_eq!(&assemble(&again), &frame[34..]);
            for (index, part) in again.iter().enumerate() {
                let (header, _) = Ipv4Header::from_slice(&part[ETHERNET..]).unwrap();
                prop_assert!(header.total_len <= second && header.identification == 77);
                prop_assert_eq!(header.more_fragments, index + 1 < again.len());
            }
        }

        #[test]
        fn whatever_comes_is_divided_or_refused(frame in prop::collection::vec(any::<u8>(), 0..200), mtu: u16) {
            for part in divide(&frame, mtu).unwrap_or_default() {
                prop_assert!(part.len() <= ETHERNET + usize::from(mtu));
            }
        }
    }

    #[test]
    fn what_must_not_be_divided_is_refused() {
        let mut frame = datagram(2000);
        frame[20] |= 0x40;
        assert_eq!(divide(&frame, 1500), None);
        assert_eq!(divide(&datagram(2000)[..1000], 1500), None);
    }
}
