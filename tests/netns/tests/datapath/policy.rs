//! Security groups: which flows a guest may have.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};

use nix::sys::time::{TimeSpec, TimeValLike};
use nix::time::{ClockId, clock_gettime};
use warren_abi::flow::tick;
use warren_abi::icmp::UNREACHABLE;
use warren_abi::maps::{Flow, OutKey};
use warren_dataplane::datapath::{
    DropReason, Error, HostDatapath, OTHERWISE, Policy, PolicyId, Restrictions,
};
use warren_netns::servers::{udp, udp_at, udp_echo, udp_echo_at};
use warren_netns::topology::{SERVER, SERVER_V6, SHARED};
use warren_proto::policy::Action;

use crate::bed::{Bed, VNI_A, VNI_B, eventually};
use crate::guest::{KernelGuest, PATIENCE, RawGuest, SILENCE, frame};
use crate::traffic::udp_round_trip;
use crate::v6;

const PORT: u16 = 7000;
/// An address of the VPC that no machine has.
const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 77);

/// Adds a policy of these rules, which are numbered from 1.
fn policy(host: &HostDatapath, rules: &[&str], otherwise: Action) -> PolicyId {
    let rules = rules.iter().map(|rule| rule.parse().expect("it is a rule"));
    let policy = Policy { vni: VNI_A, rules: (1..).zip(rules).collect(), otherwise };
    host.add_policy(&policy).expect("there is room")
}

fn with(policy: PolicyId) -> Restrictions {
    Restrictions { policy: Some(policy), ..Restrictions::default() }
}

/// Puts these rules in the place of a slot's present ones.
pub fn restrict(bed: &Bed, slot: u32, rules: &[&str], otherwise: Action) {
    let id = policy(bed.host(), rules, otherwise);
    bed.host().restrict(slot, &with(id)).expect("the slot is attached");
    bed.host().retain_policies(&[]).expect("the former one can be removed");
}

/// The stages of a slot's flows, as they are told to people.
fn stages(bed: &Bed, slot: u32) -> Vec<&'static str> {
    let ifindex = bed.host().slots()[slot as usize - 1].ifindex;
    let of_slot = |key: &OutKey, _: &Flow| key.ifindex == ifindex && !key.is_mapping();
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("there is one");
    let now = tick(TimeSpec::num_nanoseconds(&now) as u64);
    let flows = bed.host().live_flows(of_slot).expect("flows can be read");
    flows.iter().map(|flow| flow.stage(bed.host().timers(), now)).collect()
}

fn hits(bed: &Bed, rule: u32) -> u64 {
    let hits = bed.host().rule_hits(VNI_A).expect("counters can be read");
    hits.get(&rule).copied().unwrap_or(0)
}

#[test]
fn rules_decide_by_peer_protocol_port_and_priority() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let mut source = 1000;
    // What came of a packet that would begin a flow.
    let mut passes = |sent: &str, to: Ipv4Addr, port: u16| {
        source += 1;
        let before = bed.host_drops(1, DropReason::Denied);
        let packet = guest.packet(to, 64);
        guest.send(&match sent {
            "tcp" => frame(packet.tcp(source, port, 1, 512).syn(), b""),
            "udp" => frame(packet.udp(source, port), b""),
            _ => frame(packet.icmpv4_echo_request(source, 1), b""),
        });
        bed.host_drops(1, DropReason::Denied) == before
    };
    let (allow, deny) = (Action::Allow, Action::Deny);
    assert!(passes("tcp", SERVER, 80), "without a policy, everything does");

    restrict(&bed, 1, &[], deny);
    assert!(!passes("tcp", SERVER, 80) && !passes("udp", SERVER, 80) && !passes("icmp", SERVER, 0));
    assert_eq!(hits(&bed, OTHERWISE), 3);

    restrict(&bed, 1, &["1 allow tcp 80-90", "2 allow icmp"], deny);
    assert!(passes("tcp", SERVER, 80) && passes("tcp", NOBODY, 90) && passes("icmp", SERVER, 0));
    assert!(!passes("tcp", SERVER, 79) && !passes("tcp", SERVER, 91) && !passes("udp", SERVER, 80));
    assert_eq!([1, 2, OTHERWISE].map(|rule| hits(&bed, rule)), [2, 1, 6], "a rule's counter stays");

    // The longest prefix says nothing: the lowest priority does, and of two alike, the denial.
    let here = "2 deny any to 10.0.0.10/32";
    restrict(&bed, 1, &["1 allow udp 53 to 10.0.0.0/24", here, "3 deny udp", "3 allow any"], deny);
    assert!(passes("udp", SERVER, 53) && !passes("tcp", SERVER, 53) && passes("tcp", NOBODY, 53));
    assert!(!passes("udp", NOBODY, 54));
    // What is of the other family concerns nobody here.
    restrict(&bed, 1, &["1 deny any to ::/0", "1 deny any to fd00::/8"], allow);
    assert!(passes("udp", SERVER, 53));
    let many: Vec<_> = (1..=127).map(|port| format!("1 deny udp {port}")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).chain(["2 deny tcp 9"]).collect();
    restrict(&bed, 1, &many, allow);
    assert!(!passes("udp", SERVER, 127) && passes("udp", SERVER, 128) && !passes("tcp", SERVER, 9));
    assert_eq!([127, 128].map(|rule| hits(&bed, rule)), [1, 1]);
}

#[test]
fn a_guest_is_told_that_it_may_not_and_no_port_is_lost() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    let none = with(policy(bed.host(), &["9 deny tcp"], Action::Allow));
    bed.host().attach_restricted(1, VNI_A, &none).expect("the slot is free");
    for port in 1..100 {
        guest.send(&frame(guest.packet(SERVER, 64).tcp(port, PORT, 1, 512).syn(), b""));
        let answer = guest.receive(PATIENCE).expect("the answer comes");
        assert_eq!(answer[34..36], [UNREACHABLE, 13]);
    }
    assert_eq!(bed.host().flows().expect("flows can be counted"), 0);
    assert_eq!((hits(&bed, 1), bed.host_drops(1, DropReason::Denied)), (99, 99));
    // Its neighbour and the slot's next tenant know nothing of it.
    bed.host().detach(1).expect("it is attached");
    bed.host().attach(1, VNI_B).expect("the slot is free");
    guest.send(&frame(guest.packet(SERVER, 64).tcp(1, PORT, 1, 512).syn(), b""));
    assert_eq!(bed.host_drops(1, DropReason::Denied), 99);
}

#[test]
fn a_live_connection_is_judged_again_at_once_and_goes_on_if_it_may_in_time() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let listener = bed.topology.vpcs[0].run(|| TcpListener::bind((SERVER, PORT)));
    let listener = listener.expect("the port is free");
    let mut client = guest.namespace.run(|| TcpStream::connect((SERVER, PORT))).expect("it may be");
    let (mut server, _) = listener.accept().expect("it came");
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(SILENCE)).expect("it is not zero");
    }
    let mut byte = [0];
    client.write_all(b"a").expect("it stands");
    server.read_exact(&mut byte).expect("it arrives");

    restrict(&bed, 1, &["1 deny tcp 7000"], Action::Allow);
    let denied = || bed.host_drops(1, DropReason::Denied);
    // What the peer sends meets it first, then what the guest sends.
    server.write_all(b"b").expect("the kernel takes it");
    assert!(client.read(&mut byte).is_err(), "nothing arrives");
    assert!(denied() > 0);
    let before = denied();
    client.write_all(b"c").expect("the kernel takes it");
    assert!(server.read(&mut byte).is_err(), "nothing arrives");
    assert!(denied() > before);
    assert_eq!(hits(&bed, 1), denied(), "each packet counts");

    restrict(&bed, 1, &["1 allow tcp 7000"], Action::Deny);
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    }
    server.read_exact(&mut byte).expect("it is sent again");
    client.read_exact(&mut byte).expect("it is sent again");
    assert_eq!(&byte, b"b");
    client.write_all(b"d").expect("it stands");
    server.read_exact(&mut byte).expect("it arrives");
}

#[test]
fn replies_of_a_udp_flow_stop_at_once() {
    let bed = Bed::new();
    let guests = [RawGuest::open(&bed, 1), RawGuest::open(&bed, 2)];
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    let send = |guest: &RawGuest| guest.send(&frame(guest.packet(SERVER, 64).udp(9, PORT), b"x"));
    let seen = [0, 1].map(|index| {
        bed.host().attach(index as u32 + 1, VNI_A).expect("the slot is free");
        send(&guests[index]);
        server.recv_from(&mut [0; 8]).expect("the server is reached").1
    });
    let reply = |index: usize| {
        server.send_to(b"y", seen[index]).expect("there is a route");
        guests[index].receive(SILENCE).is_some()
    };
    assert!(reply(0) && reply(1));
    restrict(&bed, 1, &["1 deny udp to 10.0.0.0/8"], Action::Allow);
    // In the same tick, before the guest sent anything.
    assert!(!reply(0) && reply(1));
    assert_eq!(bed.host_drops(1, DropReason::Denied), 1);
    assert_eq!(hits(&bed, 1), 1);
    assert_eq!([1, 2].map(|slot| stages(&bed, slot)), [["denied"], ["active"]]);
    // The flow is as one that expired: another change lets the guest go on, not the peer.
    restrict(&bed, 1, &[], Action::Allow);
    assert!(!reply(0));
    send(&guests[0]);
    let (_, from) = server.recv_from(&mut [0; 8]).expect("the server is reached");
    assert_eq!(from, seen[0]);
    assert!(reply(0));
    assert_eq!(stages(&bed, 1), ["active"]);
}

#[test]
fn rules_of_one_family_do_not_concern_the_other() {
    let bed = Bed::dual();
    let guest = v6::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let _echo = udp_echo_at(&bed.topology.vpcs[0], (Ipv6Addr::UNSPECIFIED, PORT))
        .expect("the server starts");
    let passes = || {
        let v6 = v6::round_trip(&guest.namespace, (SERVER_V6, PORT));
        [udp_round_trip(&guest.namespace, (SERVER, PORT)), v6]
    };
    assert_eq!(passes(), [true, true]);
    // A flow that lives.
    let socket = udp_at(&guest.namespace, (Ipv6Addr::UNSPECIFIED, 0)).expect("there is a port");
    socket.set_read_timeout(Some(SILENCE)).expect("it is not zero");
    let answers = || {
        socket.send_to(b"x", (SERVER_V6, PORT)).ok();
        // An error that came meanwhile is told first.
        socket.recv(&mut [0; 8]).or_else(|_| socket.recv(&mut [0; 8])).is_ok()
    };
    assert!(answers());
    let rule = format!("1 deny udp 6000-7000 to {SERVER_V6}/128");
    restrict(&bed, 1, &[&rule], Action::Allow);
    assert!(!answers());
    assert_eq!(passes(), [true, false]);
    assert!(hits(&bed, 1) >= 2);
    restrict(&bed, 1, &["1 deny udp to 10.0.0.0/8"], Action::Allow);
    assert!(answers());
    assert_eq!(passes(), [false, true]);
    restrict(&bed, 1, &["1 allow udp to ::/0"], Action::Deny);
    assert_eq!(passes(), [false, true]);
}

#[test]
fn policies_outlive_the_daemon_and_their_places_are_used_again() {
    let mut bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    let _echo = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    let denied = policy(bed.host(), &["1 deny udp 7000"], Action::Allow);
    bed.host().attach_restricted(1, VNI_A, &with(denied)).expect("the slot is free");
    assert!(!udp_round_trip(&guest.namespace, (SERVER, PORT)));
    let before = hits(&bed, 1);
    assert!(before > 0);
    bed.reopen_host();
    assert!(!udp_round_trip(&guest.namespace, (SERVER, PORT)));
    assert!(hits(&bed, 1) > before);

    // More changes than there are places.
    for turn in 0..1500 {
        let action = if turn % 2 == 0 { Action::Deny } else { Action::Allow };
        restrict(&bed, 1, &["1 allow tcp"], action);
    }
    assert!(udp_round_trip(&guest.namespace, (SERVER, PORT)));
    bed.host().detach(1).expect("it is attached");
    bed.host().retain_policies(&[]).expect("it can be removed");
    assert!(bed.host().rule_hits(VNI_A).expect("counters can be read").is_empty());
    let gone = bed.host().attach_restricted(1, VNI_A, &with(denied));
    assert!(matches!(gone, Err(Error::UnknownPolicy(1))), "{gone:?}");
}

#[test]
fn what_is_no_policy_is_refused() {
    let bed = Bed::new();
    let rule = |text: &str| text.parse().expect("it is a rule");
    let add =
        |rules| bed.host().add_policy(&Policy { vni: VNI_A, rules, otherwise: Action::Allow });
    let many = (1..=129).map(|id| (id, rule("1 allow any"))).collect();
    assert!(matches!(add(many), Err(Error::Invalid { what: "number of rules", .. })));
    let unnumbered = vec![(OTHERWISE, rule("1 allow any"))];
    assert!(matches!(add(unnumbered), Err(Error::Invalid { what: "number of a rule", .. })));
    let restricted = bed.host().restrict(1, &Restrictions::default());
    assert!(matches!(restricted, Err(Error::Detached(1))));
    // As many as there are places, and no more; others can have them again.
    let first = add(vec![]).expect("there is room");
    for _ in 1..1024 {
        add(vec![]).expect("there is room");
    }
    assert!(matches!(add(vec![]), Err(Error::Invalid { what: "number of policies", .. })));
    bed.host().retain_policies(&[first]).expect("the others can be removed");
    bed.host().attach_restricted(1, VNI_A, &with(first)).expect("it is there");
    add(vec![]).expect("there is room");
}

#[test]
fn errors_about_a_flow_that_is_denied_do_not_pass() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    guest.send(&frame(guest.packet(SERVER, 64).udp(9, PORT), b"x"));
    let (_, seen) = server.recv_from(&mut [0; 8]).expect("the server is reached");
    server.send_to(b"y", seen).expect("there is a route");
    let reply = guest.receive(PATIENCE).expect("it comes");
    let error = |to: &RawGuest| {
        let macs = (to.mac, warren_abi::wire::GATEWAY_MAC.octets());
        crate::icmp::error(macs, (to.address, SERVER), [UNREACHABLE, 3], &reply, 28)
    };
    // The server's kernel takes it for a refusal.
    server.connect(seen).expect("there is a route");
    guest.send(&error(&guest));
    let told = || server.take_error().expect("it can be asked").is_some();
    eventually(told);
    restrict(&bed, 1, &["1 deny udp"], Action::Allow);
    guest.send(&error(&guest));
    assert_eq!(bed.host_drops(1, DropReason::Denied), 1);
    assert!(!told());
    assert_eq!(seen.ip(), SHARED);
}

#[test]
fn a_neighbour_with_other_rules_is_not_concerned() {
    let bed = Bed::new();
    let guests = [KernelGuest::plug(&bed, 1), KernelGuest::plug(&bed, 2)];
    let _echo = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    let allowed = policy(bed.host(), &["1 allow udp 7000"], Action::Deny);
    let denied = policy(bed.host(), &["2 deny udp 7000"], Action::Allow);
    bed.host().attach_restricted(1, VNI_A, &with(allowed)).expect("the slot is free");
    bed.host().attach_restricted(2, VNI_A, &with(denied)).expect("the slot is free");
    for _ in 0..3 {
        assert!(udp_round_trip(&guests[0].namespace, (SERVER, PORT)));
        assert!(!udp_round_trip(&guests[1].namespace, (SERVER, PORT)));
    }
    assert_eq!(bed.host_drops(1, DropReason::Denied), 0);
}
