//! What a guest can reach of its host: nothing but the services, and no kernel.

use std::collections::BTreeSet;
use std::net::TcpListener;

use warren_dataplane::datapath::DropReason;
use warren_netns::netns::Namespace;
use warren_netns::topology::HOST;

use super::{DNS, METADATA, Served};
use crate::bed::VNI_A;
use crate::guest::{KernelGuest, RawGuest};

/// Runs nmap in a guest; what it found to be open or closed, which is what was answered for.
fn scan(guest: &Namespace, words: &str, targets: &[String]) -> BTreeSet<String> {
    let output = guest
        .command("nmap")
        .args(["-Pn", "-n", "-T5", "--max-retries", "0", "--min-rate", "20000", "-oG", "-"])
        .args(words.split_whitespace())
        .args(targets)
        .output()
        .expect("nmap runs (package nmap)");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("# Nmap done") && output.status.success(), "{text}");
    let mut found = BTreeSet::new();
    for line in text.lines().filter(|line| line.contains("Ports: ")) {
        let (host, ports) = line.split_once("Ports: ").expect("it is there");
        let host = host.split_whitespace().nth(1).expect("its address is there");
        for port in ports.split('\t').next().unwrap_or_default().split(", ") {
            let mut fields = port.trim().split('/');
            let (number, state) = (fields.next().unwrap_or_default(), fields.next());
            let protocol = fields.next().unwrap_or_default();
            if state == Some("open") || state == Some("closed") {
                found.insert(format!("{host} {number}/{protocol} {}", state.unwrap_or_default()));
            }
        }
        // "Ignored State: closed (n)" are those that are not listed.
        assert!(!line.contains("Ignored State: closed"), "{line}");
    }
    found
}

/// What the kernel of a namespace counted as received, of whatever protocol; first, IP packets.
fn received(namespace: &Namespace) -> Vec<(String, u64)> {
    let text = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"));
    let text = text.expect("it can be read");
    let mut lines = text.lines();
    let mut counters = Vec::new();
    while let (Some(names), Some(values)) = (lines.next(), lines.next()) {
        let protocol = names.split(':').next().unwrap_or_default();
        for (name, value) in names.split(' ').zip(values.split(' ')) {
            let wanted = ["InSegs", "InDatagrams", "NoPorts", "InMsgs", "InReceives"];
            if wanted.contains(&name) {
                counters.push((format!("{protocol} {name}"), value.parse().unwrap_or_default()));
            }
        }
    }
    assert_eq!(counters.len(), 7, "{counters:?}");
    counters
}

#[test]
fn a_guest_reaches_the_services_and_no_kernel() {
    let served = Served::new();
    let guest = KernelGuest::plug(&served.bed, 1);
    // Without a resolver, nothing comes from the VPC in the meantime.
    served.name(VNI_A, None, None);
    let neighbour = RawGuest::open(&served.bed, 2);
    served.attach(1, VNI_A);
    served.attach(2, VNI_A);
    // The host's kernel would answer on these, if it were reached.
    let host = &served.bed.topology.host;
    let listeners = host.run(|| [22, 53, 80].map(|port| TcpListener::bind(("0.0.0.0", port))));
    let listeners = listeners.map(|listener| {
        let listener = listener.expect("the port is free");
        listener.set_nonblocking(true).expect("it can be");
        listener
    });
    let targets =
        [METADATA, DNS, "169.254.1.1".parse().expect("it is one"), neighbour.address, HOST]
            .map(|address| address.to_string());
    let before = received(host);

    let open = [
        format!("{DNS} 53/tcp open"),
        format!("{DNS} 53/udp open"),
        format!("{METADATA} 80/tcp open"),
    ];
    let both = scan(&guest.namespace, "-sS -sU -p T:22,53,80,U:53,80", &targets);
    assert_eq!(both.into_iter().collect::<Vec<_>>(), open);
    // All of them: at this rate an answer may be missed, but none is made up.
    for words in ["-sS -p 1-65535", "-sU -p 1-65535"] {
        let found = scan(&guest.namespace, words, &targets);
        assert!(found.iter().all(|port| open.contains(port)), "{words}: {found:?}");
    }

    // The programs saw them, or most of them: a wire between namespaces loses some at this rate.
    assert!(served.bed.host_drops(1, DropReason::NoService) > 65_536);
    assert!(served.bed.host_drops(1, DropReason::BadDestination) > 65_536);
    let after = received(host);
    assert_eq!(after[1..], before[1..]);
    // Machines on the underlay tell each other of groups (IGMP): a few packets, no guest's.
    assert!(after[0].1 - before[0].1 < 10, "{before:?} {after:?}");
    assert!(listeners.iter().all(|listener| listener.accept().is_err()));
    assert_eq!(neighbour.receive(crate::guest::SILENCE), None);
}
