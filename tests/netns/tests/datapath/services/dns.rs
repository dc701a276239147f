//! The DNS service, with real resolvers and a real client.

use std::net::UdpSocket;

use warren_netns::netns::Namespace;
use warren_netns::process::Process;
use warren_netns::servers::unbound;

use super::{DNS, Served};
use crate::bed::{VNI_A, VNI_B, eventually};
use crate::guest::KernelGuest;

const ZONE: &str = "corp.internal.";
const SOA: &str = "corp.internal. 300 SOA ns.corp.internal. admin.corp.internal. 1 60 60 60 60";

/// Starts the resolver of a VPC, where `db` has this address.
fn resolver(served: &Served, vpc: usize, db: &str) -> Process {
    let mut records = vec![SOA.to_owned(), format!("db.corp.internal. 300 A {db}")];
    // More than a datagram holds.
    let long = |n| format!("long.corp.internal. 300 TXT \"{n:03} {}\"", "x".repeat(200));
    records.extend((0..20).map(long));
    let records: Vec<&str> = records.iter().map(String::as_str).collect();
    let namespace = &served.bed.topology.vpcs[vpc];
    unbound(namespace, served.bed.run.path(), ZONE, &records).expect("the resolver starts")
}

/// How often the resolver was asked for a name.
fn asked(resolver: &Process, name: &str) -> usize {
    resolver.log().lines().filter(|line| line.contains(&format!(" {name} "))).count()
}

/// Asks the service by `dig`; returns what it prints: status, flags and answers.
fn dig(guest: &Namespace, words: &str) -> String {
    let server = format!("@{DNS}");
    let output = guest
        .command("dig")
        .args([server.as_str(), "+noall", "+comments", "+answer", "+tries=2"])
        .args(words.split_whitespace())
        .output()
        .expect("dig runs (package bind9-dnsutils)");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The values of the answers of this type.
fn values(output: &str, kind: &str) -> Vec<String> {
    let lines = output.lines().filter(|line| !line.starts_with(';'));
    let words = lines.map(|line| line.split_whitespace().collect::<Vec<_>>());
    words.filter(|words| words.get(3) == Some(&kind)).map(|words| words[4..].join(" ")).collect()
}

#[test]
fn names_are_those_of_the_guest_s_own_vpc() {
    let served = Served::new();
    let (a, b) = (KernelGuest::plug(&served.bed, 1), KernelGuest::plug(&served.bed, 2));
    served.attach(1, VNI_A);
    served.attach(2, VNI_B);
    let in_a = resolver(&served, 0, "10.0.0.77");
    let in_b = resolver(&served, 1, "10.0.0.88");
    for _ in 0..2 {
        for (guest, address) in [(&a, "10.0.0.77"), (&b, "10.0.0.88")] {
            let output = dig(&guest.namespace, "db.corp.internal A");
            assert!(output.contains("status: NOERROR"), "{output}");
            assert_eq!(values(&output, "A"), [address], "{output}");
        }
    }
    // The second time, from what is kept.
    assert_eq!((asked(&in_a, "db.corp.internal."), asked(&in_b, "db.corp.internal.")), (1, 1));
    // Over TCP as well, and in any case.
    let output = dig(&a.namespace, "+tcp DB.corp.internal A");
    assert_eq!(values(&output, "A"), ["10.0.0.77"], "{output}");
    assert_eq!(asked(&in_a, "db.corp.internal."), 1);
    assert_eq!(served.bed.host().drops().expect("counters can be read"), []);
}

#[test]
fn a_name_of_one_label_is_looked_for_in_the_search_domain() {
    let served = Served::new();
    let guest = KernelGuest::plug(&served.bed, 1);
    served.attach(1, VNI_A);
    let resolver = resolver(&served, 0, "10.0.0.77");
    let output = dig(&guest.namespace, "db A");
    assert_eq!(values(&output, "CNAME"), ["db.corp.internal."], "{output}");
    assert_eq!(values(&output, "A"), ["10.0.0.77"], "{output}");
    assert_eq!(asked(&resolver, "db."), 0);
    // It exists, but has no address of the other family: that is the answer.
    let output = dig(&guest.namespace, "db AAAA");
    assert!(output.contains("status: NOERROR"), "{output}");
    served.name(VNI_A, Some(warren_netns::topology::SERVER), None);
    let output = dig(&guest.namespace, "db A");
    assert!(!output.contains("status: NOERROR"), "{output}");
}

#[test]
fn that_there_is_no_such_name_is_remembered() {
    let served = Served::new();
    let guest = KernelGuest::plug(&served.bed, 1);
    served.attach(1, VNI_A);
    let resolver = resolver(&served, 0, "10.0.0.77");
    for _ in 0..3 {
        let output = dig(&guest.namespace, "nowhere.corp.internal A");
        assert!(output.contains("status: NXDOMAIN"), "{output}");
    }
    assert_eq!(asked(&resolver, "nowhere.corp.internal."), 1);
}

#[test]
fn what_is_too_long_for_a_datagram_comes_by_tcp() {
    let served = Served::new();
    let guest = KernelGuest::plug(&served.bed, 1);
    served.attach(1, VNI_A);
    let resolver = resolver(&served, 0, "10.0.0.77");
    let output = dig(&guest.namespace, "+ignore long.corp.internal TXT");
    let flags = output.lines().find(|line| line.starts_with(";; flags:"));
    assert!(flags.is_some_and(|line| line.contains(" tc")), "{output}");
    let output = dig(&guest.namespace, "long.corp.internal TXT");
    assert_eq!(values(&output, "TXT").len(), 20, "{output}");
    // By UDP, which was not enough, and by TCP.
    assert_eq!(asked(&resolver, "long.corp.internal."), 2);
}

#[test]
fn without_a_resolver_questions_are_refused_and_without_an_answer_they_fail() {
    let served = Served::new();
    let guest = KernelGuest::plug(&served.bed, 1);
    served.attach(1, VNI_A);
    served.name(VNI_A, None, None);
    let output = dig(&guest.namespace, "db.corp.internal A");
    assert!(output.contains("status: REFUSED"), "{output}");
    // Nobody has this address.
    served.name(VNI_A, Some([10, 0, 0, 99].into()), None);
    let output = dig(&guest.namespace, "+timeout=15 db.corp.internal A");
    assert!(output.contains("status: SERVFAIL"), "{output}");
}

#[test]
fn only_the_resolver_s_own_answer_is_taken() {
    let served = Served::new();
    let guest = KernelGuest::plug(&served.bed, 1);
    served.attach(1, VNI_A);
    // It answers each query with what is no answer to it, under the right id: another question.
    let bound = served.bed.topology.vpcs[0].run(|| UdpSocket::bind("0.0.0.0:53"));
    let socket = bound.expect("the port is free");
    socket.set_read_timeout(Some(crate::guest::PATIENCE)).expect("it is not zero");
    let forger = std::thread::spawn(move || {
        let mut query = [0; 1500];
        let mut asked = 0;
        while asked < 2 {
            let (length, from) = socket.recv_from(&mut query).expect("it is asked");
            asked += 1;
            query[2] |= 0x80;
            query[13] ^= 1;
            socket.send_to(&query[..length], from).expect("it can be sent");
        }
    });
    let output = dig(&guest.namespace, "+timeout=15 db.corp.internal A");
    assert!(output.contains("status: SERVFAIL"), "{output}");
    forger.join().expect("it was asked again");
}

#[test]
fn malformed_queries_are_answered_as_such_or_not_at_all() {
    let served = Served::new();
    let guest = KernelGuest::plug(&served.bed, 1);
    served.attach(1, VNI_A);
    let _resolver = resolver(&served, 0, "10.0.0.77");
    let socket = guest.namespace.run(|| UdpSocket::bind("0.0.0.0:0")).expect("there is a port");
    socket.connect((DNS, 53)).expect("there is a route");
    // A response, half a header, nothing: no answer. A header that promises a question: FORMERR.
    for bytes in [&[0, 1, 0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &[0, 2, 0, 0], &[]] {
        socket.send(bytes).expect("it can be sent");
    }
    socket.send(&[0, 3, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]).expect("it can be sent");
    socket.set_read_timeout(Some(crate::guest::PATIENCE)).expect("it is not zero");
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer).expect("one is answered");
    assert_eq!((&answer[..2], answer[3] & 0xf), (&[0, 3][..], 1), "{:?}", &answer[..length]);
    assert!(values(&dig(&guest.namespace, "db A"), "A") == ["10.0.0.77"]);
}

#[test]
fn names_are_resolved_again_when_the_daemon_is_back_and_its_flows_end() {
    let mut served = Served::new();
    let guest = KernelGuest::plug(&served.bed, 1);
    served.attach(1, VNI_A);
    let resolver = resolver(&served, 0, "10.0.0.77");
    assert_eq!(values(&dig(&guest.namespace, "db A"), "A"), ["10.0.0.77"]);
    // The daemon's own flow is one like any: live now, and gone when it is idle for too long.
    let report = served.bed.host().sweep().expect("it sweeps");
    assert_eq!((report.live, report.stale), (1, 0));
    served.stop();
    served.bed.reopen_host();
    served.start();
    assert_eq!(values(&dig(&guest.namespace, "db A"), "A"), ["10.0.0.77"]);
    assert_eq!(asked(&resolver, "db.corp.internal."), 2, "what was kept went with the daemon");
    let mut timers = warren_abi::flow::Timers::DEFAULT;
    timers.udp = 0;
    eventually(|| served.bed.host().sweep_with(&timers).expect("it sweeps").live == 0);
}
