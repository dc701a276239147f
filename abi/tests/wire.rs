//! Slots' addresses.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use warren_abi::wire::{
    Be16, GATEWAY, GATEWAY_MAC, Ipv4, MAX_SLOTS, Mac, TUNNEL_MAC, slot_address, slot_mac,
};

#[test]
fn every_slot_has_an_address_and_a_mac_of_its_own() {
    let mut addresses = HashSet::new();
    let mut macs = HashSet::new();
    for slot in 1..=MAX_SLOTS {
        let address = slot_address(slot).expect("there is one for each");
        assert!(address.is_link_local(), "{address}");
        assert!(addresses.insert(address), "{address} twice");
        let mac = slot_mac(slot).octets();
        assert_eq!(mac[0] & 0b11, 0b10, "locally administered and unicast");
        assert!(macs.insert(mac));
    }
    for taken in [
        GATEWAY,
        Ipv4Addr::new(169, 254, 0, 0),
        Ipv4Addr::new(169, 254, 255, 255),
        Ipv4Addr::new(169, 254, 169, 253),
        Ipv4Addr::new(169, 254, 169, 254),
    ] {
        assert!(!addresses.contains(&taken), "{taken}");
    }
    assert!(addresses.iter().all(|address| address.octets()[2] != 169));
    assert!(!macs.contains(&GATEWAY_MAC.octets()));
    assert!(!macs.contains(&TUNNEL_MAC.octets()));
}

#[test]
fn there_are_no_slots_beyond() {
    assert_eq!(slot_address(0), None);
    assert_eq!(slot_address(MAX_SLOTS + 1), None);
    assert_eq!(slot_address(u32::MAX), None);
    assert_eq!(slot_address(1), Some(Ipv4Addr::new(169, 254, 0, 1)));
    assert_eq!(slot_address(MAX_SLOTS), Some(Ipv4Addr::new(169, 254, 255, 254)));
}

#[test]
fn numbers_are_in_memory_as_on_the_wire() {
    let address = Ipv4Addr::new(10, 1, 2, 3);
    assert_eq!(Ipv4::from(address).0.to_ne_bytes(), [10, 1, 2, 3]);
    assert_eq!(Ipv4Addr::from(Ipv4::from(address)), address);
    assert_eq!(Ipv4::from(address).to_bits(), address.to_bits());
    assert_eq!(Be16::new(0x1234).0.to_ne_bytes(), [0x12, 0x34]);
    assert_eq!(Be16::new(0x1234).get(), 0x1234);
    assert_eq!(Mac::new([1, 2, 3, 4, 5, 6]).octets(), [1, 2, 3, 4, 5, 6]);
}

#[test]
fn an_address_is_in_the_networks_that_its_prefix_names() {
    let network = Ipv4::new([10, 0, 0, 0]);
    let mask = Ipv4::new([255, 255, 255, 0]);
    assert!(Ipv4::new([10, 0, 0, 255]).is_in(network, mask));
    assert!(!Ipv4::new([10, 0, 1, 0]).is_in(network, mask));
    assert!(Ipv4::new([8, 8, 8, 8]).is_in(Ipv4(0), Ipv4(0)));
}
