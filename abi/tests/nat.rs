//! The order of ports.

use std::collections::HashSet;
use std::num::NonZeroU32;

use proptest::prelude::*;
use warren_abi::nat::{BLOCK_PORTS, MAX_PROBES, block_of, probe_port, tunnel_port};

proptest! {
    #[test]
    fn a_probed_port_is_in_the_range(
        base in 16u32..1023,
        blocks in 1u32..1024,
        random: u32,
        probe in 0..MAX_PROBES,
    ) {
        let base = base * BLOCK_PORTS;
        let count = (blocks * BLOCK_PORTS).min((1 << 16) - base);
        let count = NonZeroU32::new(count).expect("a block has ports");
        let port = u32::from(probe_port(base, count, random, probe));
        prop_assert!(port >= base && port < base + count.get());
        prop_assert!(block_of(port as u16) >= base / BLOCK_PORTS);
    }

    #[test]
    fn a_range_of_a_power_of_two_is_probed_port_by_port(power in 6u32..15, random: u32) {
        let count = NonZeroU32::new(1 << power).expect("it is not zero");
        let ports: HashSet<u16> =
            (0..count.get()).map(|probe| probe_port(1 << 15, count, random, probe)).collect();
        prop_assert_eq!(ports.len() as u32, count.get());
    }

    #[test]
    fn a_tunnel_s_source_port_is_dynamic(addresses: u32, ports: u32, protocol: u8) {
        prop_assert!(tunnel_port(addresses, ports, protocol) >= 49152);
    }
}

#[test]
fn flows_spread_over_the_tunnel_s_source_ports() {
    let ports: HashSet<u16> = (0..4096).map(|port| tunnel_port(0x0a00_000a, port, 6)).collect();
    assert!(ports.len() > 3000, "{}", ports.len());
}
