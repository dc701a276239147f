//! What the programs of fragments do with whatever comes to their device: it goes on as what it is,
//! or waits, or is dropped; nothing reaches the kernel's own stack.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use warren_abi::drop::Drop;
use warren_abi::fragment::{Tag, origin};
use warren_abi::maps::programs;
use warren_abi::wire::GATEWAY_MAC;

use crate::frames::{Way, exhaustive, is_left, malformed};
use crate::run::{
    HOST, IFINDEX, PEER, PORT, PROXY, Programs, REDIRECT, Run, SHARED, SHARED_V6, SHOT, VNI,
    VPC_MAC, guest_address, guest_mac,
};
use crate::v6;

/// Left to the program behind (`TCX_NEXT` of `linux/bpf.h`).
const NEXT: i32 = -1;

/// Frames as fragments: the first, and a later one.
fn fragments(frames: Vec<Vec<u8>>, tag: Tag) -> Vec<Vec<u8>> {
    let mut fragments = Vec::new();
    for frame in frames {
        for is_later in [false, true] {
            let mut frame = match frame[12..14] {
                [0x86, 0xdd] => piece_v6(&frame, is_later),
                _ => piece(&frame, is_later),
            };
            if tag.origin == origin::HOST {
                // The tunnel's other end.
                frame.splice(14..14, [vec![0; 10], vec![0xff; 2], HOST.to_vec()].concat());
            }
            tag.write(&mut frame);
            fragments.push(frame);
        }
    }
    fragments
}

/// A payload of a multiple of 8 bytes.
fn padded(payload: &[u8]) -> Vec<u8> {
    let mut payload = payload.to_vec();
    payload.resize(payload.len().next_multiple_of(8), 0);
    payload
}

fn piece(frame: &[u8], is_later: bool) -> Vec<u8> {
    let payload = padded(&frame[34..]);
    let mut frame = frame[..34].to_vec();
    frame[20..22].copy_from_slice(if is_later { &[0, 4] } else { &[0x20, 0] });
    frame[16..18].copy_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    frame.extend(payload);
    frame
}

fn piece_v6(frame: &[u8], is_later: bool) -> Vec<u8> {
    let payload = padded(&frame[54..]);
    let mut frame = frame[..54].to_vec();
    frame[18..20].copy_from_slice(&(8 + payload.len() as u16).to_be_bytes());
    let protocol = std::mem::replace(&mut frame[20], 44);
    frame.extend([protocol, 0, 0, if is_later { 32 } else { 1 }, 0, 0, 0, 1]);
    frame.extend(payload);
    frame
}

/// Whether it has an offset.
fn is_later(frame: &[u8]) -> bool {
    match frame[12..14] {
        [0x86, 0xdd] => frame.len() >= 58 && u16::from_be_bytes([frame[56], frame[57]]) >= 8,
        _ => u16::from_be_bytes([frame[20], frame[21]]) & 0x1fff != 0,
    }
}

/// Runs a program on fragments of a way, as they are and as they are not.
fn run(program: &'static str, frames: Vec<Vec<u8>>, tag: Tag, goes_on: impl Fn(&Run) -> bool) {
    let check = |frame: &[u8], run: &Run| {
        prop_assert!(run.drops.len() <= 1, "one reason each: {run:?}");
        match run.action {
            SHOT => prop_assert_eq!(run.drops.len(), 1),
            REDIRECT => {
                // A datagram gave way to this one.
                let is_full = |(_, reason): &(u32, Drop)| *reason == Drop::FragmentsExhausted;
                prop_assert!(run.drops.iter().all(is_full), "{run:?}");
                // For the first time, or as the daemon sent it, to be divided.
                let waits = run.tag(frame).is_some() || is_left(frame, &run.frame);
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
    let valid = fragments(frames, tag);
    for frame in exhaustive(&valid) {
        let mut tagged = frame.clone();
        tag.write(&mut tagged);
        for frame in [frame, tagged] {
            let run = programs.run(program, &frame);
            check(&frame, &run).unwrap_or_else(|error| panic!("{frame:02x?}: {error}"));
        }
    }
    let programs = std::cell::RefCell::new(programs);
    let config = Config { cases: 4000, failure_persistence: None, ..Config::default() };
    let any_tag = |mut frame: Vec<u8>, is_valid: bool| {
        if is_valid {
            tag.write(&mut frame);
        }
        let run = programs.borrow_mut().run(program, &frame);
        check(&frame, &run)
    };
    let strategy = (malformed(valid), any::<bool>());
    TestRunner::new(config)
        .run(&strategy, |(frame, is_valid)| any_tag(frame, is_valid))
        .expect("nothing passes");
}

/// The frame is in a tunnel to the proxy.
fn to_proxy(run: &Run) -> bool {
    run.frame[30..34] == PROXY && run.frame[26..30] == HOST
}

/// The frame is in a tunnel to the host.
fn to_host(run: &Run) -> bool {
    run.frame[30..34] == HOST
}

fn to_guest(run: &Run) -> bool {
    run.frame[..6] == guest_mac()
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
    let tag = Tag::new(origin::SLOT, IFINDEX, 1);
    for frames in [way.frames(), v6::Way::out().frames()] {
        run(programs::FRAGMENTS_FIRST, frames.clone(), tag, to_proxy);
        run(programs::FRAGMENTS_REST, frames, tag, to_proxy);
    }
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
    for frames in [inward().frames(), v6::Way::back().frames()] {
        run(programs::FRAGMENTS_REST, frames, Tag::new(origin::PROXY, VNI, 0), to_guest);
    }
}

#[test]
fn nothing_malformed_of_a_vpc_s_fragments_passes() {
    for frames in [inward().frames(), v6::Way::back().frames()] {
        run(programs::FRAGMENTS_PROXY, frames, Tag::new(origin::VPC, VNI, 0), to_host);
    }
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
    // The frame is the VPC's own: from the shared address.
    let into_the_vpc = |run: &Run| match run.frame[12..14] {
        [0x86, 0xdd] => run.frame[22..38] == SHARED_V6.octets(),
        _ => run.frame[26..30] == SHARED,
    };
    for frames in [way.frames(), v6::Way::translated().frames()] {
        run(programs::FRAGMENTS_PROXY, frames, Tag::new(origin::HOST, VNI, 0), into_the_vpc);
    }
}
