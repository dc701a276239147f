//! Link-local services.

use std::net::Ipv4Addr;

use proptest::prelude::*;
use warren_abi::checksum::fold;
use warren_abi::services::{DNS, METADATA, address_in, attachment_in, is_address, is_open, vpc_of};
use warren_abi::wire::{
    Be16, GATEWAY, ICMP, IpHeader, Ipv4, MAX_SLOTS, TCP, UDP, slot_address, slot_number,
};

#[test]
fn there_are_three_ports() {
    let mut open = Vec::new();
    for address in [METADATA, DNS, GATEWAY] {
        for protocol in [ICMP, TCP, UDP] {
            for port in 0..=u16::MAX {
                if is_open(address.into(), protocol, Be16::new(port)) {
                    assert!(is_address(address.into()));
                    open.push((address, protocol, port));
                }
            }
        }
    }
    assert_eq!(open, [(METADATA, TCP, 80), (DNS, TCP, 53), (DNS, UDP, 53)]);
}

proptest! {
    #[test]
    fn the_daemon_has_one_address_in_each_vpc(vni in 1u32..1 << 24) {
        let address = address_in(vni);
        prop_assert_eq!(Ipv4Addr::from(address).octets()[0], 0);
        prop_assert_eq!(vpc_of(address), Some(vni));
        prop_assert_eq!(attachment_in(vni).vni(), vni);
    }

    #[test]
    fn other_addresses_are_not_the_daemon_s(bits in 1u32 << 24..) {
        prop_assert_eq!(vpc_of(Ipv4(bits.to_be())), None);
    }

    #[test]
    fn a_stamp_leaves_the_header_right(words: [u16; 3], addresses: [u32; 2], stamp: u16) {
        let [total_length, identification, fragment] = words.map(Be16);
        let [source, destination] = addresses.map(Ipv4);
        let mut header = IpHeader {
            version_length: IpHeader::PLAIN,
            tos: 0,
            total_length,
            identification,
            fragment,
            ttl: 64,
            protocol: TCP,
            checksum: 0,
            source,
            destination,
        };
        header.checksum = !fold(header.sum());
        header.identify(Be16::new(stamp));
        prop_assert_eq!({ header.identification }.get(), stamp);
        prop_assert_eq!(fold(header.sum()), 0xffff);
    }
}

#[test]
fn a_slot_is_known_by_its_address_and_by_no_other() {
    let mut found = 0;
    for host in 0..=u16::MAX {
        let address = Ipv4Addr::from_bits(0xa9fe_0000 | u32::from(host));
        if let Some(slot) = slot_number(address) {
            assert_eq!(slot_address(slot), Some(address));
            found += 1;
        }
    }
    assert_eq!(found, MAX_SLOTS);
    assert_eq!(slot_number(Ipv4Addr::new(10, 0, 0, 1)), None);
}
