//! What the proxy's program does with whatever comes from a VPC.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use warren_abi::drop::Drop;
use warren_abi::fragment::{Tag, origin};
use warren_abi::maps::programs;

use crate::frames::{Packet, Way, exhaustive, is_left, malformed};
use crate::run::{
    HOST, OK, PEER, PORT, Programs, REDIRECT, Run, SCOPE, SHARED, SHOT, VNI, VPC_MAC,
};

fn way() -> Way {
    Way {
        source_mac: [2, 0, 0, 0, 0, 9],
        destination_mac: VPC_MAC,
        source: PEER,
        destination: SHARED,
        source_port: 7000,
        destination_port: PORT,
    }
}

/// Checks what became of a frame from the VPC.
fn check(frame: &[u8], run: &Run) -> Result<(), TestCaseError> {
    if run.drops == [(SCOPE, Drop::TooBig), (SCOPE, Drop::AnswerRate)] {
        prop_assert_eq!(run.action, SHOT);
        return Ok(());
    }
    prop_assert!(run.drops.len() <= 1, "one reason each: {run:?}");
    // What a switch floods is another's.
    let is_others = frame[0] & 1 == 0 && frame[..6] != VPC_MAC;
    prop_assert!(!is_others || run.action == SHOT, "{run:?}");
    match (run.action, run.drops.first()) {
        (SHOT, reason) => prop_assert_eq!(reason.map(|(scope, _)| *scope), Some(SCOPE)),
        // An answer to the kernel's own question, for whose sake alone it hears anything.
        (OK, None) => {
            prop_assert_eq!(&frame[12..14], &[8, 6]);
            prop_assert_eq!(&frame[20..22], &[0, 2]);
            prop_assert!(frame[38..42] == SHARED || frame[38..42] == [0; 4]);
        }
        (REDIRECT, Some((_, reason))) => {
            prop_assert_eq!(*reason, Drop::TooBig);
            let answer = Packet::new(&run.frame).expect("it is a packet");
            prop_assert_eq!(&run.frame[..6], &frame[6..12]);
            prop_assert!(answer.icmp().is_some_and(warren_abi::icmp::is_error));
        }
        (REDIRECT, None) if run.tag(frame).is_some() => {
            prop_assert_eq!(run.tag(frame), Some(Tag::new(origin::VPC, VNI, 0)));
            prop_assert!(is_left(frame, &run.frame), "{frame:02x?}");
        }
        (REDIRECT, None) if frame[12..14] == [8, 6] => {
            prop_assert_eq!(&run.frame[20..22], &[0, 2], "a reply");
            prop_assert_eq!(&run.frame[22..28], &VPC_MAC[..]);
        }
        (REDIRECT, None) => {
            let packet = Packet::new(frame);
            prop_assert!(packet.is_some(), "passed: {frame:02x?}");
            let packet = packet.expect("it was looked at");
            prop_assert_eq!(packet.destination(), &SHARED[..]);
            prop_assert!(packet.icmp().is_none_or(|kind| [0, 3, 11, 12].contains(&kind)));
            let port = packet.destination_port();
            prop_assert!(packet.icmp().is_some() || (PORT..PORT + 1024).contains(&port));
            // Into the tunnel, to who holds the port, and nowhere else.
            prop_assert_eq!(&run.frame[30..34], &HOST[..]);
            prop_assert_eq!(&run.frame[36..38], &4789u16.to_be_bytes()[..]);
        }
        (action, reason) => prop_assert!(false, "{action} {reason:?}"),
    }
    Ok(())
}

#[test]
fn nothing_malformed_from_a_vpc_passes() {
    let mut programs = Programs::load();
    let mut valid = way().frames();
    valid.push(way().arp(2));
    // In: UDP, TCP, echo reply, error; ARP is answered, or awaited by the kernel.
    let pass = [true, true, true, false, true, true, true, true];
    for (index, passes) in pass.into_iter().enumerate() {
        let run = programs.run(programs::VPC, &valid[index]);
        assert_eq!(run.drops.is_empty(), passes, "{index}: {run:?}");
        check(&valid[index], &run).expect("it is right");
    }
    for frame in exhaustive(&valid) {
        let run = programs.run(programs::VPC, &frame);
        check(&frame, &run).unwrap_or_else(|error| panic!("{frame:02x?}: {error}"));
    }
    let programs = std::cell::RefCell::new(programs);
    let config = Config { cases: 4000, failure_persistence: None, ..Config::default() };
    let run = |frame: Vec<u8>| {
        let run = programs.borrow_mut().run(programs::VPC, &frame);
        check(&frame, &run)
    };
    TestRunner::new(config).run(&malformed(valid), run).expect("nothing passes");
}
