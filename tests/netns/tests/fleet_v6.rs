//! VPCs with IPv6, from the command line to servers in them.

use std::net::SocketAddr;
use std::time::Duration;

use etherparse::PacketBuilder;
use warren_abi::probe::{Operation, Outcome};
use warren_abi::wire::{GATEWAY_MAC, Ip, slot_address_v6};
use warren_netns::fleet::{Fleet, FleetOptions, GUEST, VPCS, kvm_or_skip};
use warren_netns::servers;
use warren_netns::topology::{CIDR, CIDR_V6, SERVER_V6, SHARED, SHARED_V6, VPC_INTERFACES};
use warren_proto::v1::Instance;

const PORT: u16 = 7000;

/// A datagram over IPv6 from an instance to the server.
fn datagram(from: &Instance, payload: &[u8]) -> Operation {
    let mac: Vec<_> = from.mac.split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
    let Ip(source) = slot_address_v6(from.slot);
    let source: Vec<_> = source.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let builder = PacketBuilder::ethernet2(mac.try_into().unwrap(), GATEWAY_MAC.octets())
        .ipv6(source.try_into().unwrap(), SERVER_V6.octets(), 64)
        .udp(PORT, PORT);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, payload).unwrap();
    Operation::SendFrame { frame }
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_with_one_ipv6_cidr_reach_their_own_server_from_their_shared_address() {
    if !kvm_or_skip("tenants_with_one_ipv6_cidr_reach_their_own_server") {
        return;
    }
    let options = FleetOptions { slots: 4, parked: 2, guest: GUEST };
    let fleet = Fleet::without_vpcs(options).await.unwrap();
    fleet.topology.enable_v6().unwrap();
    for (vpc, interface) in VPCS.iter().zip(VPC_INTERFACES) {
        let line = format!(
            "vpc create {vpc} --cidr {CIDR} --shared-address {SHARED} --interface {interface} \
             --cidr-v6 {CIDR_V6} --shared-address-v6 {SHARED_V6}"
        );
        fleet.warren(&line).unwrap();
    }
    for (vpc, namespace) in VPCS.iter().zip(&fleet.topology.vpcs) {
        let server = servers::udp_at(namespace, (SERVER_V6, PORT)).unwrap();
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let (started, _) = fleet.run(vpc, None).await.unwrap();
        let instance = started.instance.unwrap();
        let operation = datagram(&instance, vpc.as_bytes());
        let reply = fleet.probe(&instance.id, operation).await.unwrap();
        assert_eq!(reply.outcome, Ok(Outcome::Done));
        let mut buffer = [0; 64];
        let (length, SocketAddr::V6(from)) = server.recv_from(&mut buffer).unwrap() else {
            panic!("over IPv4")
        };
        assert_eq!((&buffer[..length], *from.ip()), (vpc.as_bytes(), SHARED_V6));
        assert!((32768..32832).contains(&from.port()), "{from} has a port of the host's");
    }
}
