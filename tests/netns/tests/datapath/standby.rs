//! Who answers for a shared address, and how a VPC learns that it moved.

use std::net::{IpAddr, UdpSocket};

use warren_abi::drop::Drop as DropReason;
use warren_dataplane::announce::Announcer;
use warren_dataplane::datapath::{ProxyVpc, ProxyVpcV6};
use warren_netns::netns::Namespace;
use warren_netns::topology::{CIDR_V6, HOST, SHARED, SHARED_V6};

use crate::bed::{Bed, PORTS, VNI_A, eventually, proxy_vpc};

/// The MAC address that the VPC's server has for the shared address.
fn neighbour(vpc: &Namespace, address: IpAddr) -> Option<String> {
    let lines = vpc.ip_lines(&format!("neigh show {address} dev eth0")).expect("ip can list them");
    let words: Vec<_> = lines.first()?.split_whitespace().map(str::to_owned).collect();
    let place = words.iter().position(|word| word == "lladdr")?;
    words.get(place + 1).cloned()
}

#[test]
fn a_proxy_on_standby_answers_nobody_and_announces_the_address_when_it_is_its_own() {
    let bed = Bed::dual();
    let vpc = &bed.topology.vpcs[0];
    let apply = |claim| {
        let v6 = Some(ProxyVpcV6 {
            shared_address: SHARED_V6,
            cidr: CIDR_V6.parse().expect("it is a CIDR"),
            gateway: None,
        });
        let definition =
            ProxyVpc { claim, v6, ..proxy_vpc(VNI_A, vec![(PORTS, IpAddr::from(HOST))]) };
        let apply = || bed.proxy().apply_vpc(&definition);
        bed.topology.proxy.run(apply).expect("the proxy takes the VPC");
    };
    let addresses = [IpAddr::from(SHARED), IpAddr::from(SHARED_V6)];
    apply(None);
    assert_eq!(bed.proxy().announcement(VNI_A).expect("it is known"), None);
    let before = bed.proxy_drops(VNI_A, DropReason::Standby);
    for address in addresses {
        vpc.ip(&format!("neigh flush to {address} dev eth0")).expect("ip can flush");
        vpc.run(|| UdpSocket::bind((if address.is_ipv4() { "0.0.0.0" } else { "::" }, 0)))
            .and_then(|socket| socket.send_to(b"who has it?", (address, 9)))
            .expect("it can be sent");
    }
    eventually(|| bed.proxy_drops(VNI_A, DropReason::Standby) >= before + 2);
    assert_eq!(addresses.map(|address| neighbour(vpc, address)), [None, None]);

    // As when another proxy had it until now.
    for address in addresses {
        let words = format!("neigh replace {address} lladdr 02:00:00:00:00:99 dev eth0 nud stale");
        vpc.ip(&words).expect("ip can set it");
    }
    apply(Some(1));
    let announcement = bed.proxy().announcement(VNI_A).expect("it is known");
    let announcement = announcement.expect("it is the owner");
    assert_eq!(announcement.addresses, addresses);
    let mac = announcement.mac.map(|octet| format!("{octet:02x}")).join(":");
    let send = || Announcer::open()?.send(&announcement);
    bed.topology.proxy.run(send).expect("it can be sent");
    for address in addresses {
        eventually(|| neighbour(vpc, address).as_deref() == Some(mac.as_str()));
    }
}
