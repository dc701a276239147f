//! Who owns a VPC's shared address when proxies fail, and that traffic follows.

use std::net::{Ipv4Addr, UdpSocket};

use warren_abi::claim::{self, Entry, Header, kind};
use warren_abi::drop::Drop as DropReason;
use warren_netns::cluster::{Cluster, VNIS};
use warren_netns::grid::Machine;
use warren_netns::guest::KernelGuest;
use warren_netns::servers::{Server, udp_echo, udp_echo_at};
use warren_netns::topology::{SERVER, UNDERLAY};
use warren_proto::v1::apply_vpc_request::Role;

use crate::bed::eventually;
use crate::traffic::udp_round_trip;

const PORT: u16 = 7000;
const VNI_A: u32 = VNIS[0];
const VNI_B: u32 = VNIS[1];
/// VNI of the public address of the first VPC, and a server that is reached from there.
const PUBLIC: u32 = 300;
const AWAY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// Three proxies, a host, and a server in each VPC that sends datagrams back.
fn cluster() -> (Cluster, Vec<Server>) {
    let cluster = Cluster::new(1, 3).expect("it starts");
    let echo = |vpc| udp_echo(vpc, PORT).expect("the server starts");
    let servers = cluster.grid.vpcs.iter().map(echo).collect();
    (cluster, servers)
}

fn guest(cluster: &Cluster, slot: u32, vni: u32) -> KernelGuest {
    cluster.guest(0, slot, vni).expect("the slot is free")
}

fn owner(cluster: &Cluster, vni: u32) -> usize {
    cluster.owner(vni).expect("it is known")
}

#[track_caller]
fn is_owned_by(cluster: &Cluster, vni: u32, index: usize) {
    eventually(|| owner(cluster, vni) == index);
}

/// Whether an echo comes back, now or in a moment.
#[track_caller]
fn reaches(guest: &KernelGuest) {
    eventually(|| udp_round_trip(&guest.namespace, (SERVER, PORT)));
}

#[test]
fn when_a_proxy_dies_the_next_one_owns_the_address_and_hosts_follow() {
    let (cluster, _echo) = cluster();
    let guests = [guest(&cluster, 1, VNI_A), guest(&cluster, 2, VNI_B)];
    guests.iter().for_each(reaches);
    is_owned_by(&cluster, VNI_A, 0);
    // One flow over all that becomes of proxies: to its peer, nothing changes.
    let socket = guests[0].namespace.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("there is a port");
        socket.connect((SERVER, PORT)).expect("there is a route");
        socket.set_read_timeout(Some(crate::guest::SILENCE)).expect("it is not zero");
        socket
    });
    let comes_back = || {
        eventually(|| socket.send(b"ping").is_ok() && socket.recv(&mut [0; 16]).is_ok());
    };
    comes_back();
    for dead in [0, 1] {
        let cables = &cluster.grid.proxies[dead].cables;
        cluster.grid.cut(cables).expect("they can be cut");
        let owners = || [VNI_A, VNI_B].map(|vni| owner(&cluster, vni));
        eventually(|| !owners().contains(&dead));
        let next = owners();
        comes_back();
        guests.iter().for_each(reaches);
        cluster.grid.mend(cables).expect("they can be mended");
        // Who comes back claims nothing.
        std::thread::sleep(crate::guest::SILENCE);
        assert_eq!(owners(), next, "{}", cluster.logs());
        comes_back();
    }
    assert_eq!(cluster.host(0).drops().expect("they can be read"), []);
}

#[test]
fn a_proxy_that_cannot_be_heard_or_cannot_hear_is_replaced() {
    let (cluster, _echo) = cluster();
    let guest = guest(&cluster, 1, VNI_A);
    reaches(&guest);
    for hook in ["ingress", "egress"] {
        let before = owner(&cluster, VNI_A);
        let cable = &cluster.grid.proxies[before].cables[0];
        cluster.grid.block(cable, &[hook]).expect("it can be blocked");
        eventually(|| owner(&cluster, VNI_A) != before);
        reaches(&guest);
        cluster.grid.unblock(cable, &[hook]).expect("it can be unblocked");
        reaches(&guest);
    }
}

/// Has the first VPC leave by an address in the network of the second one, whatever proxies fail; a
/// server there.
fn leave(cluster: &Cluster) -> Server {
    let gateway = &cluster.grid.vpcs[1];
    for words in ["addr add 203.0.113.1/24 dev eth0", &format!("addr add {AWAY}/32 dev lo")] {
        gateway.ip(words).expect("it can have an address");
    }
    let order = [0, 1, 2];
    for index in order {
        let request = |vni, order| cluster.request(vni, order).expect("it is known");
        // By itself, it would be another proxy's.
        let (mut public, mut vpc) = (request(VNI_B, &[2, 1, 0]), request(VNI_A, &order));
        (public.vni, public.shared_address) = (PUBLIC, "203.0.113.7".into());
        let Some(Role::Proxy(of_public)) = &mut public.role else { panic!("it is a proxy's") };
        of_public.cidr = "203.0.113.0/24".into();
        of_public.gateway = "203.0.113.1".into();
        of_public.holders.clear();
        let Some(Role::Proxy(of_vpc)) = &mut vpc.role else { panic!("it is a proxy's") };
        of_vpc.public_vni = PUBLIC;
        for request in [public, vpc] {
            cluster.send(index, request).expect("the proxy takes it");
        }
    }
    udp_echo_at(gateway, (AWAY, PORT + 1)).expect("the server starts")
}

/// The proxy that has the public address, as its network knows.
fn holder_of_public(cluster: &Cluster) -> Option<usize> {
    let known = cluster.grid.vpcs[1].ip_lines("neigh show 203.0.113.7").expect("it is shown");
    let mac_of = |proxy: &Machine| {
        let shown = proxy.namespace.ip_lines("link show vpc-b").expect("it is shown");
        let mac = shown[0].split("link/ether ").nth(1).expect("it is Ethernet");
        mac.split(' ').next().expect("it has a MAC address").to_owned()
    };
    let macs: Vec<_> = cluster.grid.proxies.iter().map(mac_of).collect();
    macs.iter().position(|mac| known.iter().any(|line| line.contains(mac)))
}

#[test]
fn what_leaves_by_a_public_address_does_so_whatever_proxy_fails() {
    let (cluster, _echo) = cluster();
    let guest = guest(&cluster, 1, VNI_A);
    let _away = leave(&cluster);
    let leaves = || {
        eventually(|| udp_round_trip(&guest.namespace, (AWAY, PORT + 1)));
        // A cloud's network card drops what comes from an address that is another's.
        eventually(|| holder_of_public(&cluster) == Some(owner(&cluster, VNI_A)));
    };
    leaves();
    for dead in [0, 1] {
        let cables = &cluster.grid.proxies[dead].cables;
        cluster.grid.cut(cables).expect("they can be cut");
        eventually(|| owner(&cluster, VNI_A) != dead);
        leaves();
        reaches(&guest);
        cluster.grid.mend(cables).expect("they can be mended");
    }
    // Who reaches the VPC and not the public network is of no use for it.
    let before = owner(&cluster, VNI_A);
    cluster.grid.cut(&cluster.grid.proxies[before].cables[2..]).expect("it can be cut");
    eventually(|| owner(&cluster, VNI_A) != before);
    leaves();
    reaches(&guest);
}

#[test]
fn a_proxy_that_lost_one_vpc_loses_its_address_and_no_other() {
    let (cluster, _echo) = cluster();
    let guest = guest(&cluster, 1, VNI_B);
    reaches(&guest);
    let cable = &cluster.grid.proxies[0].cables[2..];
    cluster.grid.cut(cable).expect("it can be cut");
    is_owned_by(&cluster, VNI_B, 1);
    reaches(&guest);
    assert_eq!(owner(&cluster, VNI_A), 0);
    // The next to take over is again the first that can.
    cluster.grid.cut(&cluster.grid.proxies[1].cables[2..]).expect("it can be cut");
    is_owned_by(&cluster, VNI_B, 2);
    cluster.grid.mend(cable).expect("it can be mended");
    cluster.grid.cut(&cluster.grid.proxies[2].cables[2..]).expect("it can be cut");
    is_owned_by(&cluster, VNI_B, 0);
    reaches(&guest);
}

#[test]
fn a_proxy_whose_vpc_falls_silent_loses_its_address_and_no_other() {
    let (cluster, _echo) = cluster();
    let guests = [guest(&cluster, 1, VNI_A), guest(&cluster, 2, VNI_B)];
    guests.iter().for_each(reaches);
    let others = owner(&cluster, VNI_A);
    // The link stays up: a switch behind it forwards no more, in either direction.
    for hook in ["ingress", "egress"] {
        let before = owner(&cluster, VNI_B);
        let cable = &cluster.grid.proxies[before].cables[2];
        cluster.grid.block(cable, &[hook]).expect("it can be blocked");
        eventually(|| owner(&cluster, VNI_B) != before);
        guests.iter().for_each(reaches);
        assert_eq!(owner(&cluster, VNI_A), others);
        cluster.grid.unblock(cable, &[hook]).expect("it can be unblocked");
    }
}

#[test]
fn a_daemon_that_is_not_there_takes_nothing_over_and_loses_nothing() {
    let (mut cluster, _echo) = cluster();
    let guest = guest(&cluster, 1, VNI_A);
    reaches(&guest);
    // Neither the owner's nor the next one's daemon.
    cluster.kill_proxy(0).expect("it can be");
    cluster.kill_proxy(1).expect("it can be");
    std::thread::sleep(crate::guest::SILENCE);
    assert_eq!(owner(&cluster, VNI_A), 0);
    reaches(&guest);
    // Nor the host's.
    cluster.close_host(0);
    cluster.grid.cut(&cluster.grid.proxies[0].cables).expect("they can be cut");
    reaches(&guest);
    cluster.open_host(0).expect("it opens");
    assert_eq!(owner(&cluster, VNI_A), 2);
    reaches(&guest);
    // Those that come back find it out, and know who they are without being told.
    cluster.grid.mend(&cluster.grid.proxies[0].cables).expect("they can be mended");
    cluster.start_proxy(0).expect("it can be");
    cluster.start_proxy(1).expect("it can be");
    std::thread::sleep(crate::guest::SILENCE);
    assert_eq!(owner(&cluster, VNI_A), 2);
    reaches(&guest);
    cluster.grid.cut(&cluster.grid.proxies[2].cables).expect("they can be cut");
    is_owned_by(&cluster, VNI_A, 0);
    reaches(&guest);
}

#[test]
fn an_owner_that_is_to_go_leaves_without_losing_a_packet() {
    let (cluster, _echo) = cluster();
    let guest = guest(&cluster, 1, VNI_A);
    reaches(&guest);
    is_owned_by(&cluster, VNI_A, 0);
    let socket = guest.namespace.run(|| UdpSocket::bind("0.0.0.0:0")).expect("there is a port");
    socket.connect((SERVER, PORT)).expect("there is a route");
    socket.set_read_timeout(Some(crate::guest::PATIENCE)).expect("it is not zero");
    let mut lost = 0;
    // Nobody takes an address from one that is still wanted.
    for (order, next) in [(&[1, 2][..], 1), (&[2, 0], 2), (&[0, 1, 2], 2)] {
        cluster.apply(VNI_A, order).expect("they take it");
        for number in 0..200u32 {
            socket.send(&number.to_be_bytes()).expect("it can be sent");
            let mut bytes = [0; 4];
            let is_back = socket.recv(&mut bytes).is_ok() && u32::from_be_bytes(bytes) == number;
            lost += u32::from(!is_back);
        }
        is_owned_by(&cluster, VNI_A, next);
    }
    assert_eq!(lost, 0);
}

#[test]
fn nobody_but_a_proxy_of_the_vpc_claims_its_address() {
    let (cluster, _echo) = cluster();
    is_owned_by(&cluster, VNI_A, 0);
    let stranger = Ipv4Addr::new(192, 0, 2, 66);
    let machine = &cluster.grid.proxies[2];
    machine.namespace.ip(&format!("addr add {stranger}/24 dev {UNDERLAY}")).expect("it can");
    let host = cluster.grid.hosts[0].address;
    let dropped = || {
        let drops = cluster.host(0).drops().expect("they can be read");
        let found = drops.iter().find(|drop| drop.reason == DropReason::NotFromProxy);
        found.map_or(0, |drop| drop.packets)
    };
    let claim = |count: u16, vni: u32, sequence: u32| {
        let entry = Entry::new(vni, sequence, Entry::OWNER);
        let mut bytes = vec![Header::VERSION, kind::CLAIMS, 0, count as u8, entry.flags];
        bytes.extend(entry.vni);
        bytes.extend(sequence.to_be_bytes());
        bytes
    };
    let socket = machine.namespace.run(|| UdpSocket::bind((stranger, 0))).expect("it is free");
    socket.send_to(&claim(1, VNI_A, u32::MAX / 2), (host, claim::PORT)).expect("it can be sent");
    eventually(|| dropped() == 1);
    // A proxy, of a VPC that is none; then one that says more than it holds.
    let own = machine.address;
    let socket = machine.namespace.run(|| UdpSocket::bind((own, 0))).expect("it is free");
    socket.send_to(&claim(1, 999, 5), (host, claim::PORT)).expect("it can be sent");
    eventually(|| dropped() == 2);
    socket.send_to(&claim(9, VNI_A, 5), (host, claim::PORT)).expect("it can be sent");
    socket.send_to(b"\x01", (host, claim::PORT)).expect("it can be sent");
    std::thread::sleep(crate::guest::SILENCE);
    assert_eq!((owner(&cluster, VNI_A), dropped()), (0, 2));
}
