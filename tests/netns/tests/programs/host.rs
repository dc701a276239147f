//! What the host's programs do with whatever comes.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use warren_abi::drop::Drop;
use warren_abi::fragment::{Tag, origin};
use warren_abi::maps::{Flow, InFlow, InKey, OutKey, Sweep, names, programs};
use warren_abi::wire::GATEWAY_MAC;

use crate::frames::{Packet, SHORTEST, Way, exhaustive, is_left, malformed};
use crate::run::{
    HOST, IFINDEX, MTU, OK, PEER, PROXY, Programs, REDIRECT, Run, SCOPE, SHOT, guest_address,
    guest_mac,
};

fn way() -> Way {
    Way {
        source_mac: guest_mac(),
        destination_mac: GATEWAY_MAC.octets(),
        source: guest_address(),
        destination: PEER,
        source_port: 1000,
        destination_port: 7000,
    }
}

/// Checks what became of a frame of the guest's.
fn check_tap(frame: &[u8], run: &Run) -> Result<(), TestCaseError> {
    let told = [Drop::TooBig, Drop::TtlExceeded, Drop::PortsExhausted, Drop::FlowsExhausted];
    let is_told = |reason: &Drop| told.contains(reason);
    if let [(SCOPE, reason), (SCOPE, Drop::AnswerRate)] = &run.drops[..] {
        // It would have been told, were it not too many.
        prop_assert!(run.action == SHOT && is_told(reason), "{run:?}");
        return Ok(());
    }
    prop_assert!(run.drops.len() <= 1, "one reason each: {run:?}");
    if run.action == SHOT {
        prop_assert_eq!(run.drops.len(), 1);
        prop_assert_eq!(run.drops[0].0, SCOPE, "the slot is known from the first byte on");
        return Ok(());
    }
    // Never on to the host's own network stack.
    prop_assert_eq!(run.action, REDIRECT);
    match run.drops.first() {
        // Dropped, and the guest is told why.
        Some((_, reason)) => {
            prop_assert!(is_told(reason), "{reason}");
            let answer = Packet::new(&run.frame).expect("it is a packet");
            prop_assert_eq!(&run.frame[..6], &frame[6..12]);
            prop_assert_eq!(answer.destination(), &guest_address()[..]);
            prop_assert!(answer.icmp().is_some_and(warren_abi::icmp::is_error));
        }
        None if run.tag(frame).is_some() => {
            prop_assert_eq!(run.tag(frame), Some(Tag::new(origin::SLOT, IFINDEX, 1)));
            prop_assert!(is_left(frame, &run.frame), "{frame:02x?}");
            prop_assert_eq!(&frame[6..12], &guest_mac()[..]);
        }
        None if frame[12..14] == [8, 6] => {
            prop_assert_eq!(&run.frame[..6], &guest_mac()[..]);
            prop_assert_eq!(&run.frame[20..22], &[0, 2], "a reply");
            prop_assert_eq!(&frame[22..28], &guest_mac()[..], "of who asked as itself");
        }
        None => {
            let packet = Packet::new(frame);
            prop_assert!(packet.is_some(), "passed: {frame:02x?}");
            let packet = packet.expect("it was looked at");
            prop_assert_eq!(packet.source_mac(), &guest_mac()[..]);
            prop_assert_eq!(packet.source(), &guest_address()[..]);
            prop_assert!(packet.ttl() > 1);
            prop_assert!(packet.total() <= MTU);
            prop_assert!(packet.icmp().is_none_or(|kind| [3, 8, 11, 12].contains(&kind)));
            let first = packet.destination()[0];
            prop_assert!(first != 0 && first != 127 && first < 224);
            // Into the tunnel, to the proxy, and nowhere else.
            prop_assert_eq!(&run.frame[26..30], &HOST[..]);
            prop_assert_eq!(&run.frame[30..34], &PROXY[..]);
            prop_assert_eq!(&run.frame[36..38], &4789u16.to_be_bytes()[..]);
        }
    }
    Ok(())
}

#[test]
fn nothing_malformed_of_a_guest_passes() {
    let mut programs = Programs::load();
    let valid = way().frames();
    // An echo reply answers nothing that a peer could have asked.
    for (index, passes) in [true, true, true, true, false, true, true].into_iter().enumerate() {
        let run = programs.run(programs::TAP, &valid[index]);
        assert_eq!(run.drops.is_empty(), passes, "{index}: {run:?}");
        check_tap(&valid[index], &run).expect("it is right");
    }
    for frame in exhaustive(&valid) {
        let run = programs.run(programs::TAP, &frame);
        check_tap(&frame, &run).unwrap_or_else(|error| panic!("{frame:02x?}: {error}"));
    }
    let programs = std::cell::RefCell::new(programs);
    let config = Config { cases: 4000, failure_persistence: None, ..Config::default() };
    let run = |frame: Vec<u8>| {
        let run = programs.borrow_mut().run(programs::TAP, &frame);
        check_tap(&frame, &run)
    };
    TestRunner::new(config).run(&malformed(valid), run).expect("nothing passes");
}

#[test]
fn what_came_through_no_tunnel_goes_nowhere() {
    let mut programs = Programs::load();
    for name in [programs::TUNNEL_HOST, programs::TUNNEL_PROXY] {
        for frame in exhaustive(&way().frames()) {
            let run = programs.run(name, &frame);
            assert_eq!((run.action, &run.drops[..]), (SHOT, &[(0, Drop::Internal)][..]));
        }
    }
}

#[test]
fn a_malformed_sweep_removes_no_flow() {
    let mut programs = Programs::load();
    for port in 1000..1020 {
        let way = Way { source_port: port, ..way() };
        assert!(programs.run(programs::TAP, &way.frames()[0]).drops.is_empty());
    }
    let flows = |programs: &Programs| {
        let out = programs.count::<OutKey, Flow>(names::CT_OUT);
        (out, programs.count::<InKey, InFlow>(names::CT_IN))
    };
    let before = flows(&programs);
    assert!(before.1 >= 20);
    let order = Sweep { count: u32::MAX, ..Sweep::EMPTY };
    let bytes = order.to_bytes();
    for length in SHORTEST..bytes.len() {
        let run = programs.run(programs::SWEEP, &bytes[..length]);
        assert_eq!((run.action, run.drops.len()), (SHOT, 0));
    }
    assert_eq!(programs.run(programs::SWEEP, &bytes).action, OK);
    let size = bytes.len();
    let programs = std::cell::RefCell::new(programs);
    let config = Config { cases: 1000, failure_persistence: None, ..Config::default() };
    let run = |bytes: Vec<u8>| {
        let run = programs.borrow_mut().run(programs::SWEEP, &bytes);
        prop_assert_eq!(run.action, if bytes.len() < size { SHOT } else { OK });
        prop_assert_eq!(run.drops.len(), 0);
        Ok(())
    };
    let bytes = prop::collection::vec(any::<u8>(), SHORTEST..size + 64);
    TestRunner::new(config).run(&bytes, run).expect("it does nothing");
    assert_eq!(flows(&programs.borrow()), before);
}
