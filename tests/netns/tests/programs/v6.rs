//! What the programs do with whatever comes of IPv6.

use std::net::Ipv6Addr;

use etherparse::{Icmpv6Type, PacketBuilder, icmpv6::DestUnreachableCode};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use warren_abi::maps::programs;
use warren_abi::wire::{GATEWAY_MAC, GATEWAY_V6, slot_address_v6};

use crate::frames::{exhaustive, malformed};
use crate::run::{
    HOST, MTU, OK, PEER_V6, PORT, PROXY, Programs, REDIRECT, Run, SCOPE, SHARED_V6, SHOT, VPC_MAC,
    guest_mac,
};

/// It begins as tags do, which an address may.
const PEER_MAC: [u8; 6] = [2, b'f', 0, 0, 0, 9];

/// Who sends to whom.
pub struct Way {
    macs: ([u8; 6], [u8; 6]),
    source: Ipv6Addr,
    destination: Ipv6Addr,
    ports: (u16, u16),
    /// Whom it asks for.
    target: Ipv6Addr,
}

impl Way {
    pub fn out() -> Self {
        let (source, target) = (slot_address_v6(SCOPE).into(), GATEWAY_V6.into());
        let macs = (guest_mac(), GATEWAY_MAC.octets());
        Self { macs, source, destination: PEER_V6, ports: (1000, 7000), target }
    }

    pub fn back() -> Self {
        let macs = (PEER_MAC, VPC_MAC);
        let (source, destination, target) = (PEER_V6, SHARED_V6, SHARED_V6);
        Self { macs, source, destination, ports: (7000, PORT), target }
    }

    /// As a host sends it to the proxy.
    pub fn translated() -> Self {
        let (source, destination, target) = (SHARED_V6, PEER_V6, PEER_V6);
        Self { macs: (PEER_MAC, VPC_MAC), source, destination, ports: (PORT, 7000), target }
    }

    /// A frame of each kind that the programs tell apart, whole and right: UDP, SYN, data, echo
    /// request, echo reply, an error, a solicitation and an advertisement.
    pub fn frames(&self) -> Vec<Vec<u8>> {
        let (source, destination) = (self.source.octets(), self.destination.octets());
        let ip = |hops| {
            PacketBuilder::ethernet2(self.macs.0, self.macs.1).ipv6(source, destination, hops)
        };
        let (from, to) = self.ports;
        let mut frames = vec![Vec::new(); 8];
        let whole = "a vector takes everything";
        ip(64).udp(from, to).write(&mut frames[0], b"payload").expect(whole);
        let options = [etherparse::TcpOptionElement::MaximumSegmentSize(1440)];
        let syn = ip(64).tcp(from, to, 1, 64_000).syn().options(&options).expect("they fit");
        syn.write(&mut frames[1], &[]).expect(whole);
        ip(64).tcp(from, to, 1, 64_000).ack(1).write(&mut frames[2], b"data").expect(whole);
        ip(64).icmpv6_echo_request(from, 1).write(&mut frames[3], b"ping").expect(whole);
        ip(64).icmpv6_echo_reply(to, 1).write(&mut frames[4], b"pong").expect(whole);
        let mut about = Vec::new();
        let embedded = PacketBuilder::ipv6(destination, source, 60).udp(to, from);
        embedded.write(&mut about, b"").expect(whole);
        let port = Icmpv6Type::DestinationUnreachable(DestUnreachableCode::Port);
        ip(64).icmpv6(port).write(&mut frames[5], &about).expect(whole);
        for (frame, type_u8, option) in [(6, 135, 1), (7, 136, 2)] {
            let mut message = self.target.octets().to_vec();
            message.extend([option, 1]);
            message.extend(self.macs.0);
            let kind = Icmpv6Type::Unknown { type_u8, code_u8: 0, bytes5to8: [0; 4] };
            ip(255).icmpv6(kind).write(&mut frames[frame], &message).expect(whole);
        }
        frames
    }
}

/// The least that must hold of a frame that is translated, behind an Ethernet header.
fn is_packet(frame: &[u8]) -> bool {
    let length = usize::from(u16::from_be_bytes([frame[18], frame[19]]));
    let headers = match frame[20] {
        6 => usize::from(*frame.get(66).unwrap_or(&0) >> 4) * 4,
        17 | 58 => 8,
        _ => return false,
    };
    let is_checked = frame[20] != 17 || frame[60..62] != [0, 0];
    let fits = length + 54 <= frame.len() && length >= headers && headers >= 8;
    frame[14] >> 4 == 6 && fits && is_checked && (frame[20] != 6 || headers >= 20)
}

/// Checks what is the same for both: whether the frame passed to where such go.
fn passed(frame: &[u8], run: &Run) -> Result<bool, TestCaseError> {
    if frame[12..14] != [0x86, 0xdd] {
        return Ok(false);
    }
    if run.action == SHOT {
        prop_assert!((1..=2).contains(&run.drops.len()), "{run:?}");
        prop_assert_eq!(run.drops[0].0, SCOPE);
        return Ok(false);
    }
    if !run.drops.is_empty() {
        // Dropped, and the sender is told why.
        prop_assert_eq!(run.action, REDIRECT);
        prop_assert_eq!(&run.frame[..6], &frame[6..12]);
        prop_assert_eq!((run.frame[20], run.frame[54] < 128), (58, true));
        return Ok(false);
    }
    if run.tag(frame).is_some() {
        // To the programs of fragments.
        prop_assert_eq!((run.action, frame[20]), (REDIRECT, 44));
        return Ok(false);
    }
    Ok(true)
}

fn check_tap(frame: &[u8], run: &Run) -> Result<(), TestCaseError> {
    if !passed(frame, run)? {
        return Ok(());
    }
    prop_assert_eq!(run.action, REDIRECT, "never on to the host's own network stack");
    prop_assert_eq!(&frame[6..12], &guest_mac()[..]);
    if frame[20] == 58 && frame[54] == 135 {
        prop_assert_eq!((run.frame[54], run.frame.len()), (136, 86));
        prop_assert_eq!(frame[21], 255);
        return Ok(());
    }
    prop_assert!(is_packet(frame), "passed: {frame:02x?}");
    prop_assert_eq!(&frame[22..38], &Way::out().source.octets()[..]);
    prop_assert!(frame[21] > 1 && frame.len() - 14 <= usize::from(MTU));
    prop_assert!(frame[20] != 58 || [1, 2, 3, 4, 128].contains(&frame[54]));
    prop_assert!(frame[38] != 0xff && frame[38..40] != [0xfe, 0x80] && frame[38..46] != [0; 8]);
    // Into the tunnel, to the proxy, and nowhere else.
    prop_assert_eq!(&run.frame[26..34], &[HOST, PROXY].concat()[..]);
    prop_assert_eq!(&run.frame[36..38], &4789u16.to_be_bytes()[..]);
    prop_assert_eq!(&run.frame[62..64], &[0x86, 0xdd]);
    // As the VPC's shared address.
    prop_assert_eq!(&run.frame[72..88], &SHARED_V6.octets()[..]);
    Ok(())
}

fn check_vpc(frame: &[u8], run: &Run) -> Result<(), TestCaseError> {
    if !passed(frame, run)? {
        return Ok(());
    }
    let kind = (frame[20] == 58).then(|| frame[54]);
    if run.action == OK {
        // An answer to the kernel's own question, for whose sake alone it hears anything.
        prop_assert_eq!((kind, frame[21]), (Some(136), 255));
        return Ok(());
    }
    prop_assert_eq!(run.action, REDIRECT);
    if kind == Some(135) {
        prop_assert_eq!((run.frame[54], run.frame.len()), (136, 86));
        prop_assert_eq!(&run.frame[6..12], &VPC_MAC[..]);
        return Ok(());
    }
    prop_assert!(is_packet(frame), "passed: {frame:02x?}");
    prop_assert_eq!(&frame[38..54], &SHARED_V6.octets()[..]);
    prop_assert!(kind.is_none_or(|kind| [1, 2, 3, 4, 129].contains(&kind)));
    prop_assert_eq!(&run.frame[30..34], &HOST[..]);
    prop_assert_eq!(&run.frame[36..38], &4789u16.to_be_bytes()[..]);
    Ok(())
}

fn run_all(
    program: &'static str,
    valid: &[Vec<u8>],
    pass: [bool; 8],
    check: impl Fn(&[u8], &Run) -> Result<(), TestCaseError>,
) {
    let mut programs = Programs::load();
    for (index, passes) in pass.into_iter().enumerate() {
        let run = programs.run(program, &valid[index]);
        assert_eq!(run.drops.is_empty(), passes, "{index}: {run:?}");
        check(&valid[index], &run).expect("it is right");
    }
    for frame in exhaustive(valid) {
        let run = programs.run(program, &frame);
        check(&frame, &run).unwrap_or_else(|error| panic!("{frame:02x?}: {error}"));
    }
    let programs = std::cell::RefCell::new(programs);
    let config = Config { cases: 4000, failure_persistence: None, ..Config::default() };
    let run = |frame: Vec<u8>| {
        let run = programs.borrow_mut().run(program, &frame);
        check(&frame, &run)
    };
    TestRunner::new(config).run(&malformed(valid.to_vec()), run).expect("nothing passes");
}

#[test]
fn nothing_malformed_of_a_guest_passes() {
    // An echo reply answers nothing that a peer could have asked, and nobody asks a guest.
    let pass = [true, true, true, true, false, true, true, false];
    run_all(programs::TAP, &Way::out().frames(), pass, check_tap);
}

#[test]
fn nothing_malformed_from_a_vpc_passes() {
    let pass = [true, true, true, false, true, true, true, true];
    run_all(programs::VPC, &Way::back().frames(), pass, check_vpc);
}
