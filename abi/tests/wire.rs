//! Addresses on the wire.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use warren_abi::wire::{Ip, Ipv4};

proptest! {
    #[test]
    fn an_address_of_either_family_is_the_same_after_a_round_trip(bits: u128, short: u32) {
        for address in [Ipv6Addr::from(bits).to_canonical(), Ipv4Addr::from(short).into()] {
            let ip = Ip::from(address);
            prop_assert_eq!(IpAddr::from(ip), address);
            let v4 = match address {
                IpAddr::V4(v4) => Some(Ipv4::from(v4)),
                IpAddr::V6(_) => None,
            };
            prop_assert_eq!(ip.to_v4(), v4);
        }
    }
}

#[test]
fn octets_are_in_memory_as_on_the_wire() {
    let ip = Ip::from(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
    let octets: Vec<u8> = ip.0.iter().flat_map(|word| word.to_ne_bytes()).collect();
    assert_eq!(octets, [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert!(Ip::from(Ipv6Addr::UNSPECIFIED).is_unspecified());
    assert!(!Ip::from(Ipv4Addr::UNSPECIFIED).is_unspecified());
}
