//! What the programs of fragments do with whatever comes to their device: it goes on as what it is,
//! or waits, or is dropped; nothing reaches the kernel's own stack.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use warren_abi::drop::Drop;
use warren_abi::fragment::{Tag, origin};
use warren_abi::maps::programs;
use warren_abi::wire::GATEWAY_MAC;

use crate::frames::{Way, exhaustive, malformed};
use crate::run::{
    HOST, IFINDEX, PEER, PORT, PROXY, Programs, REDIRECT, Run, SHARED, SHOT, VNI, VPC_MAC,
    guest_address, guest_mac,
};

/// Left to the program behind (`TCX_NEXT` of `linux/bpf.h`).
const NEXT: i32 = -1;

/// Valid frames, as fragments: the first, and a later one.
fn fragments(way: Way, tag: Tag) -> Vec<Vec<u8>> {
    let mut fragments = Vec::new();
    for frame in way.frames() {
        for fragment in [[0x20, 0], [0, 4]] {
            let mut frame = frame.clone();
            frame[20..22].copy_from_slice(&fragment);
            // A multiple of 8 bytes.
            let length = (frame.len() - 34).next_multiple_of(8);
            frame.resize(34 + length, 0);
            frame[16..18].copy_from_slice(&(20 + length as u16).to_be_bytes());
            tag.write(&mut frame);
            fragments.push(frame);
        }
    }
    fragments
}

/// Whether it has an offset.
fn is_later(frame: &[u8]) -> bool {
    u16::from_be_bytes([frame[20], frame[21]]) & 0x1fff != 0
}

/// Runs a program on fragments of a way, as they are and as they are not.
fn run(program: &'static str, way: Way, tag: Tag, goes_on: impl Fn(&Run) -> bool) {
    let check = |run: &Run| {
        prop_assert!(run.drops.len() <= 1, "one reason each: {run:?}");
        match run.action {
            SHOT => prop_assert_eq!(run.drops.len(), 1),
            REDIRECT => {
                // A datagram gave way to this one.
                let is_full = |(_, reason): &(u32, Drop)| *reason == Drop::FragmentsExhausted;
                prop_assert!(run.drops.iter().all(is_full), "{run:?}");
                let waits = Tag::of_frame(&run.frame).is_some();
                prop_assert!(waits || goes_on(run), "{:02x?}", run.frame);
            }
            action => {
                let tag = Tag::of_frame(&run.frame);
                prop_assert_eq!(action, NEXT);
                prop_assert_eq!(program, programs::FRAGMENTS_FIRST);
                let is_others = |tag: Tag| tag.origin != origin::SLOT || tag.owner != IFINDEX;
                prop_assert!(tag.is_none_or(is_others) || is_later(&run.frame));
            }
        }
        Ok(())
    };
    let mut programs = Programs::load();
    let valid = fragments(way, tag);
    for frame in exhaustive(&valid) {
        let mut tagged = frame.clone();
        tag.write(&mut tagged);
        for frame in [frame, tagged] {
            let run = programs.run(program, &frame);
            check(&run).unwrap_or_else(|error| panic!("{frame:02x?}: {error}"));
        }
    }
    let programs = std::cell::RefCell::new(programs);
    let config = Config { cases: 4000, failure_persistence: None, ..Config::default() };
    let any_tag = |mut frame: Vec<u8>, is_valid: bool| {
        if is_valid {
            tag.write(&mut frame);
        }
        check(&programs.borrow_mut().run(program, &frame))
    };
    let strategy = (malformed(valid), any::<bool>());
    TestRunner::new(config)
        .run(&strategy, |(frame, is_valid)| any_tag(frame, is_valid))
        .expect("nothing passes");
}

#[test]
fn nothing_malformed_of_a_guest_s_fragments_passes() {
    let way = Way {
        source_mac: guest_mac(),
        destination_mac: GATEWAY_MAC.octets(),
        source: guest_address(),
        destination: PEER,
        source_port: 1000,
        destination_port: 7000,
    };
    let into_the_tunnel = |run: &Run| run.frame[30..34] == PROXY && run.frame[26..30] == HOST;
    run(programs::FRAGMENTS_FIRST, way, Tag::new(origin::SLOT, IFINDEX, 1), into_the_tunnel);
}

fn inward() -> Way {
    Way {
        source_mac: [2, 0, 0, 0, 0, 9],
        destination_mac: VPC_MAC,
        source: PEER,
        destination: SHARED,
        source_port: 7000,
        destination_port: PORT,
    }
}

#[test]
fn nothing_malformed_of_fragments_for_guests_passes() {
    let to_the_guest = |run: &Run| run.frame[..6] == guest_mac();
    run(programs::FRAGMENTS_REST, inward(), Tag::new(origin::PROXY, VNI, 0), to_the_guest);
}

#[test]
fn nothing_malformed_of_a_vpc_s_fragments_passes() {
    let into_the_tunnel = |run: &Run| run.frame[30..34] == HOST;
    run(programs::FRAGMENTS_PROXY, inward(), Tag::new(origin::VPC, IFINDEX, 0), into_the_tunnel);
}

#[test]
fn nothing_malformed_of_a_host_s_fragments_passes() {
    let way = Way {
        source: SHARED,
        destination: PEER,
        source_port: PORT,
        destination_port: 7000,
        ..inward()
    };
    let host = u32::from_ne_bytes(HOST);
    // The frame is the VPC's own: from the shared address.
    let into_the_vpc = |run: &Run| run.frame[26..30] == SHARED;
    run(programs::FRAGMENTS_PROXY, way, Tag::new(origin::HOST, VNI, host), into_the_vpc);
}
