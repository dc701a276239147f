//! The life of a flow.

use proptest::prelude::*;
use warren_abi::flow::{Direction, FlowState, Timers, tcp};
use warren_abi::wire::{ICMP, TCP, UDP};

use Direction::{In, Out};

/// The state after a SYN of the guest and these packets, each at the tick given.
fn played(packets: &[(Direction, u8, u32)]) -> FlowState {
    packets.iter().fold(FlowState::begin(TCP, 0, 0), |state, &(direction, flags, now)| {
        state.after(direction, flags, false, now)
    })
}

const OPEN: [(Direction, u8, u32); 2] = [(In, tcp::SYN | tcp::ACK, 1), (Out, tcp::ACK, 2)];

fn timeout(packets: &[(Direction, u8, u32)]) -> u32 {
    played(packets).timeout(TCP, &Timers::DEFAULT)
}

#[test]
fn tcp_has_a_time_out_for_each_stage() {
    let timers = Timers::DEFAULT;
    let with = |more: &[_]| timeout(&[&OPEN[..], more].concat());
    assert_eq!(timeout(&[]), timers.tcp_opening);
    assert_eq!(timeout(&OPEN[..1]), timers.tcp_opening);
    assert_eq!(with(&[]), timers.tcp_established);
    assert_eq!(with(&[(Out, tcp::FIN | tcp::ACK, 3)]), timers.tcp_closing);
    assert_eq!(with(&[(In, tcp::FIN | tcp::ACK, 3)]), timers.tcp_closing);
    assert_eq!(with(&[(Out, tcp::FIN, 3), (In, tcp::FIN, 3)]), timers.tcp_closed);
    assert_eq!(with(&[(Out, tcp::RST, 3)]), timers.tcp_closed);
    // It may be forged.
    assert_eq!(with(&[(In, tcp::RST, 3)]), timers.tcp_closing);
    assert_eq!(timeout(&[(In, tcp::RST | tcp::ACK, 1)]), timers.tcp_closed);
    // Both open at the same time (RFC 9293, figure 8).
    assert_eq!(
        timeout(&[(In, tcp::SYN, 1), (Out, tcp::SYN | tcp::ACK, 1)]),
        timers.tcp_established
    );
}

#[test]
fn the_standards_minima_are_kept() {
    let seconds = |ticks: u32| u64::from(ticks) * warren_abi::flow::TICK_NS / 1_000_000_000;
    let timers = Timers::DEFAULT;
    assert!(seconds(timers.udp) >= 300);
    assert!(seconds(timers.icmp) >= 60);
    assert!(seconds(timers.tcp_opening) >= 240);
    assert!(seconds(timers.tcp_closing) >= 240);
    assert!(seconds(timers.tcp_closed) >= 240);
    assert!(seconds(timers.rest) >= 120);
    assert!(seconds(timers.tcp_established) >= 2 * 3600 + 4 * 60);
    assert_eq!(FlowState::begin(UDP, 0, 0).timeout(UDP, &timers), timers.udp);
    assert_eq!(FlowState::begin(ICMP, 0, 0).timeout(ICMP, &timers), timers.icmp);
}

#[test]
fn a_syn_opens_a_closed_flow_anew() {
    let closed = played(&[OPEN[0], OPEN[1], (Out, tcp::FIN, 3), (In, tcp::FIN, 3)]);
    let again = closed.after(Out, tcp::SYN, false, 9);
    assert_eq!(again, FlowState::begin(TCP, 9, 0));
}

#[test]
fn the_peer_does_not_keep_a_closed_flow_alive() {
    let closed = played(&[OPEN[0], OPEN[1], (Out, tcp::FIN, 3), (In, tcp::FIN, 4)]);
    assert_eq!(closed.after(In, tcp::ACK, false, 9), closed);
    assert_eq!(closed.after(Out, tcp::ACK, false, 9).last_tick(), 9);
}

#[test]
fn only_a_syn_begins_a_tcp_flow() {
    assert!(FlowState::can_begin(TCP, tcp::SYN));
    // With ECN set up (RFC 3168).
    assert!(FlowState::can_begin(TCP, tcp::SYN | 0xc0));
    for flags in [0, tcp::ACK, tcp::SYN | tcp::ACK, tcp::RST, tcp::SYN | tcp::FIN] {
        assert!(!FlowState::can_begin(TCP, flags), "{flags:#x}");
    }
    assert!(FlowState::can_begin(UDP, 0));
    assert!(FlowState::can_begin(ICMP, 0));
}

proptest! {
    /// Whatever comes, a flow expires if nothing follows, and not before its time.
    #[test]
    fn every_flow_expires_when_it_was_idle(
        packets in prop::collection::vec((prop::bool::ANY, any::<u8>(), 0u32..100), 0..20),
        idle in 1u32..10_000,
    ) {
        let mut now = 0;
        let mut state = FlowState::begin(TCP, now, 0);
        for (out, flags, later) in packets {
            now += later;
            state = state.after(if out { Out } else { In }, flags, false, now);
            prop_assert!(!state.is_ended());
            prop_assert!(state.last_tick() <= now);
        }
        let last = state.last_tick();
        let timers = Timers::DEFAULT;
        let limit = state.timeout(TCP, &timers) + timers.grain(TCP);
        prop_assert_eq!(state.is_expired(TCP, &timers, last + idle), idle > limit);
        prop_assert!(state.ended().is_ended());
    }

    /// A second packet of the same tick changes nothing: it needs no write.
    #[test]
    fn a_packet_is_entered_once_a_tick(out: bool, flags: u8, now: u32) {
        let direction = if out { Out } else { In };
        let flags = flags & !tcp::SYN;
        let once = FlowState::begin(TCP, now, 0).after(direction, flags, false, now);
        prop_assert_eq!(once.after(direction, flags, false, now), once);
    }

    /// A packet that another CPU stamped after the sweep began does not look ages old.
    #[test]
    fn the_future_is_not_the_past(now: u32, ahead in 0u32..1000) {
        let state = FlowState::begin(UDP, now.wrapping_add(ahead), 0);
        let timers = Timers { udp: 0, ..Timers::DEFAULT };
        prop_assert!(!state.is_expired(UDP, &timers, now));
    }
}
