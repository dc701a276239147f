//! The decisions about flows, over plain tables: random traffic against a simple model, and threads
//! that compete for ports.

mod model;

use std::sync::atomic::Ordering;

use proptest::prelude::*;
use warren_abi::conntrack::{Ports, Segment, Verdict, end, inward, outward};
use warren_abi::drop::Drop;
use warren_abi::flow::{Timers, tcp};
use warren_abi::flowlog::What;
use warren_abi::maps::OutKey;
use warren_abi::wire::{Be16, ICMP, Ip, TCP, UDP};

use model::acts::{Act, Model};
use model::{PORTS, Plain, VNI, check, held, segment, sweep};

/// A connection that opens and closes, all of it acknowledged. [`Drop::StaleFlow`]: what was sent
/// to its port reached another.
fn connect_and_close(tables: &Plain, guest: u32, port: u16) -> Result<Be16, Drop> {
    let slot = Plain::slot(tables, guest);
    let out = |flags| outward(tables, &slot, PORTS, &segment(TCP, 1, Be16(port), flags));
    let external = out(tcp::SYN)?;
    let back = |flags| {
        let found = inward(tables, VNI, &segment(TCP, 1, external, flags)).map_err(|(_, why)| why);
        let to = found?;
        let is_own = (to.slot.number, to.port) == (guest, Be16(port));
        if is_own { Ok(()) } else { Err(Drop::StaleFlow) }
    };
    back(tcp::SYN | tcp::ACK)?;
    out(tcp::ACK)?;
    out(tcp::FIN | tcp::ACK)?;
    back(tcp::FIN | tcp::ACK)?;
    out(tcp::ACK)?;
    Ok(external)
}

#[test]
fn short_connections_to_one_server_never_want_for_a_port() {
    let tables = Plain::default();
    for connection in 0..5000u16 {
        let result = connect_and_close(&tables, u32::from(connection % 3) + 1, 1000 + connection);
        assert!(result.is_ok(), "{connection}: {result:?}");
    }
    check(&tables);
    assert_eq!(tables.lock().flows.len(), 64);
}

/// The ports are those that the host had when the control plane was last heard of.
#[test]
fn for_an_hour_on_one_block_flows_go_on_and_new_ones_begin() {
    let tables = Plain::default();
    let connection = Plain::slot(&tables, 4);
    let send = |protocol, flags| {
        outward(&tables, &connection, PORTS, &segment(protocol, 1, Be16(9), flags))
    };
    let open = send(TCP, tcp::SYN).expect("there is a port");
    let answer = |port, protocol, flags| {
        let reply = Segment { local_port: port, ..segment(protocol, 1, Be16(0), flags) };
        inward(&tables, VNI, &reply).map(|to| (to.slot.number, to.port))
    };
    assert_eq!(answer(open, TCP, tcp::SYN | tcp::ACK), Ok((4, Be16(9))));
    assert_eq!(send(TCP, tcp::ACK), Ok(open));
    let talk = send(UDP, 0).expect("there is a port");
    let mut begun = 0;
    for now in 1..=3600 {
        tables.clock.store(now, Ordering::SeqCst);
        sweep(&tables);
        if now % 300 == 0 {
            assert_eq!(send(TCP, tcp::ACK), Ok(open), "after {now} s");
            assert_eq!(answer(open, TCP, tcp::ACK), Ok((4, Be16(9))), "after {now} s");
        }
        if now % 20 == 0 {
            assert_eq!(send(UDP, 0), Ok(talk), "after {now} s");
            assert_eq!(answer(talk, UDP, 0), Ok((4, Be16(9))), "after {now} s");
        }
        for guest in 1..=3 {
            begun += 1;
            let port = connect_and_close(&tables, guest, 1000 + begun % 30_000);
            assert!(port.is_ok_and(|port| PORTS.contains(port)), "after {now} s: {port:?}");
        }
    }
    check(&tables);
}

#[test]
fn a_flow_that_lives_is_never_displaced() {
    let tables = Plain::default();
    let slot = Plain::slot(&tables, 1);
    let syn = |port| outward(&tables, &slot, PORTS, &segment(TCP, 1, Be16(port), tcp::SYN));
    let ports: Vec<Be16> = (0..64).map(|port| syn(port).expect("there is one left")).collect();
    assert_eq!(syn(64), Err(Drop::PortsExhausted));
    // Both FINs were seen, but the guest's is not acknowledged: data may still be on its way.
    let packet = |flags, acknowledged| Segment { acknowledged, ..segment(TCP, 1, Be16(0), flags) };
    let reply =
        |flags, acknowledged| Segment { local_port: ports[0], ..packet(flags, acknowledged) };
    inward(&tables, VNI, &reply(tcp::SYN | tcp::ACK, 1)).expect("it is the flow's");
    outward(&tables, &slot, PORTS, &packet(tcp::FIN | tcp::ACK, 1)).expect("it is the flow's");
    inward(&tables, VNI, &reply(tcp::FIN | tcp::ACK, 1)).expect("it is the flow's");
    outward(&tables, &slot, PORTS, &packet(tcp::ACK, 101)).expect("it is the flow's");
    assert_eq!(syn(64), Err(Drop::PortsExhausted));
    inward(&tables, VNI, &reply(tcp::ACK, 101)).expect("it is the flow's");
    assert_eq!(syn(64), Ok(ports[0]));
    check(&tables);
}

#[test]
fn a_mapping_whose_port_the_host_lost_is_replaced_and_its_flows_go_on() {
    let tables = Plain::default();
    let slot = Plain::slot(&tables, 1);
    let datagram = |peer| segment(UDP, peer, Be16(9), 0);
    let first = outward(&tables, &slot, PORTS, &datagram(1)).expect("there is a port");
    let others = Ports { base: 8192, count: 64 };
    assert_eq!(outward(&tables, &slot, others, &datagram(1)), Ok(first));
    let second = outward(&tables, &slot, others, &datagram(2)).expect("there is a port");
    assert!((8192..8256).contains(&second.get()));
    assert_eq!(outward(&tables, &slot, others, &datagram(3)), Ok(second));
    assert_eq!(outward(&tables, &slot, others, &datagram(1)), Ok(first));
    check(&tables);
}

#[test]
fn a_port_rests_before_another_guest_gets_it_unless_there_is_no_other() {
    let tables = Plain::default();
    let datagram = |guest, port| {
        let slot = Plain::slot(&tables, guest);
        outward(&tables, &slot, PORTS, &segment(UDP, 1, Be16(port), 0))
    };
    let first = datagram(1, 1).expect("there is a port");
    let Timers { udp, .. } = Timers::DEFAULT;
    tables.clock.store(udp + 2 * Timers::DEFAULT.grain(UDP) + 1, Ordering::SeqCst);
    sweep(&tables);
    // Nothing comes in any more; the port is taken nevertheless, and its guest's if that returns.
    let reply = segment(UDP, 1, first, 0);
    assert_eq!(inward(&tables, VNI, &reply).map(|to| to.port), Err((1, Drop::NoFlow)));
    for port in 1..64 {
        assert_ne!(datagram(2, port).expect("there are others"), first);
    }
    assert_eq!(datagram(2, 64), Ok(first), "all others live");
    assert_eq!(datagram(2, 65), Err(Drop::PortsExhausted));
    check(&tables);
}

#[test]
fn what_only_receives_lives_on_and_so_does_its_mapping() {
    let tables = Plain::default();
    let slot = Plain::slot(&tables, 1);
    let datagram = |peer| segment(UDP, peer, Be16(9), 0);
    let port = outward(&tables, &slot, PORTS, &datagram(1)).expect("there is a port");
    let Timers { udp, .. } = Timers::DEFAULT;
    for now in 1..3 * udp {
        tables.clock.store(now, Ordering::SeqCst);
        sweep(&tables);
        let reply = Segment { local_port: port, ..datagram(1) };
        let to = inward(&tables, VNI, &reply).map(|to| to.port);
        assert_eq!(to, Ok(Be16(9)), "after {now} ticks");
    }
    // It was refreshed by the last reply, not a grain before.
    tables.clock.store(4 * udp - 1, Ordering::SeqCst);
    sweep(&tables);
    let reply = Segment { local_port: port, ..datagram(1) };
    assert_eq!(inward(&tables, VNI, &reply).map(|to| to.port), Ok(Be16(9)));
    assert_eq!(outward(&tables, &slot, PORTS, &datagram(2)), Ok(port), "the mapping is there");
    check(&tables);
}

#[test]
fn threads_that_compete_for_ports_share_none() {
    let tables = Plain::default();
    std::thread::scope(|scope| {
        for guest in 1..=4u32 {
            let tables = &tables;
            scope.spawn(move || {
                for turn in 0..2000u16 {
                    // Two threads speak for the second guest, and so for the same flows.
                    let (guest, port) = (guest / 2 + 1, turn % 90);
                    let result = connect_and_close(tables, guest, port);
                    // What the other thread has closed may be another's when this one goes on.
                    let is_alone = guest != 2;
                    assert!(!is_alone || result != Err(Drop::StaleFlow), "{guest} lost {port}");
                    let slot = Plain::slot(tables, guest);
                    let datagram = segment(UDP, u32::from(turn % 3), Be16(turn % 20), 0);
                    let sent = outward(tables, &slot, PORTS, &datagram);
                    assert!(
                        matches!(sent, Ok(_) | Err(Drop::NoFlow | Drop::PortsExhausted)),
                        "{sent:?}"
                    );
                    if turn % 100 == 0 {
                        tables.clock.fetch_add(1, Ordering::SeqCst);
                    }
                }
            });
        }
    });
    check(&tables);
}

#[test]
fn two_cpus_that_begin_one_udp_flow_lose_no_datagram() {
    for _ in 0..200 {
        let tables = Plain::default();
        let slot = Plain::slot(&tables, 1);
        let send = || outward(&tables, &slot, PORTS, &segment(UDP, 1, Be16(5), 0));
        let (one, other) = std::thread::scope(|scope| {
            let (one, other) = (scope.spawn(send), scope.spawn(send));
            (one.join().expect("it ends"), other.join().expect("it ends"))
        });
        assert!(one.is_ok(), "{one:?}");
        assert_eq!(one, other);
        check(&tables);
    }
}

#[test]
fn each_end_is_told_with_its_reason() {
    let tables = Plain::default();
    let told = || {
        let ends = std::mem::take(&mut tables.lock().ends);
        ends.into_iter().map(|(_, why)| why).collect::<Vec<_>>()
    };
    let slot = Plain::slot(&tables, 1);
    let send = |protocol, port, flags| {
        let segment = segment(protocol, 1, Be16(port), flags);
        outward(&tables, &slot, PORTS, &segment).expect("there is a port")
    };
    connect_and_close(&tables, 1, 1).expect("there is a port");
    send(TCP, 2, tcp::SYN);
    send(TCP, 2, tcp::RST);
    send(TCP, 3, tcp::SYN);
    send(UDP, 4, 0);
    assert_eq!(told(), []);
    tables.clock.fetch_add(100_000, Ordering::SeqCst);
    sweep(&tables);
    let mut ends = told();
    ends.sort_by_key(|why| *why as u8);
    let (expired, all) = (What::Expired, [What::Expired, What::Closed, What::Reset]);
    assert_eq!(ends, [&[expired; 2][..], &all].concat(), "the mapping, too");

    // The last port of all is taken from a closed flow; and a mapping whose port is gone.
    let one = Ports { base: 4096, count: 1 };
    let syn = |port| outward(&tables, &slot, one, &segment(TCP, 1, Be16(port), tcp::SYN));
    syn(1).expect("it is free");
    outward(&tables, &slot, one, &segment(TCP, 1, Be16(1), tcp::RST)).expect("it is there");
    syn(2).expect("the other is over");
    assert_eq!(told(), [What::TakenOver]);
    send(UDP, 5, 0);
    let elsewhere = Ports { base: 8192, count: 64 };
    outward(&tables, &slot, elsewhere, &segment(UDP, 2, Be16(5), 0)).expect("there is a port");
    assert_eq!(told(), [What::Withdrawn]);

    tables.generation.fetch_add(1, Ordering::SeqCst);
    tables.clock.fetch_add(Timers::DEFAULT.rest + 1, Ordering::SeqCst);
    sweep(&tables);
    let ends = told();
    assert!(ends.len() == 4 && ends.iter().all(|why| *why == What::Detached), "{ends:?}");
}

#[test]
fn a_change_of_rules_concerns_flows_that_live_both_ways_at_once() {
    let tables = Plain::default();
    for (protocol, flags) in [(TCP, tcp::SYN), (UDP, 0), (ICMP, 0)] {
        let send = |peer, flags| {
            let slot = Plain::slot(&tables, 1);
            outward(&tables, &slot, PORTS, &segment(protocol, peer, Be16(5), flags))
        };
        let more = if protocol == TCP { tcp::ACK } else { 0 };
        let reply = |peer, port| inward(&tables, VNI, &segment(protocol, peer, port, more));
        let (good, bad) = (send(1, flags), send(2, flags));
        let (good, bad) = (good.expect("it may be"), bad.expect("it may be"));
        reply(1, good).expect("it is the flow's");
        reply(2, bad).expect("it is the flow's");

        // The guest's packet and the peer's meet it first, in turn.
        tables.deny(&[2]);
        assert_eq!(send(2, more), Err(Drop::Denied));
        assert_eq!(reply(2, bad), Err((1, Drop::NoFlow)));
        assert_eq!(send(1, more), Ok(good));
        reply(1, good).expect("it is the flow's");
        tables.deny(&[]);
        assert_eq!(send(2, more), Ok(bad), "it goes on if it may in time");
        reply(2, bad).expect("it is the flow's");
        tables.deny(&[2, 3]);
        assert_eq!(reply(2, bad), Err((1, Drop::Denied)));
        assert_eq!(reply(2, bad), Err((1, Drop::NoFlow)));
        assert_eq!(send(2, more), Err(Drop::Denied));
        reply(1, good).expect("it is the flow's");

        // One that may not begin has no port.
        let before = tables.lock().claims.len();
        assert_eq!(send(3, flags), Err(Drop::Denied));
        assert_eq!(tables.lock().claims.len(), before);
        check(&tables);
        tables.deny(&[]);
    }
}

#[test]
fn a_slot_holds_no_more_than_it_may_and_what_ended_does_not_count() {
    let tables = Plain::default();
    let slot = Plain::slot(&tables, 1);
    tables.most[0].store(3, Ordering::SeqCst);
    let syn = |port| outward(&tables, &slot, PORTS, &segment(TCP, 1, Be16(port), tcp::SYN));
    for port in 0..50 {
        connect_and_close(&tables, 1, port).expect("the others are closed");
    }
    check(&tables);
    for port in 100..103 {
        syn(port).expect("it may have as many");
    }
    assert_eq!(syn(103), Err(Drop::FlowLimit));
    assert_eq!(syn(0), Err(Drop::FlowLimit), "one that is closed is not opened anew");
    outward(&tables, &slot, PORTS, &segment(TCP, 1, Be16(100), tcp::RST)).expect("it is there");
    syn(0).expect("there is one less");
    assert_eq!(held(&tables, 1), [[3, 3]; 2]);

    // Of UDP, ports are what counts, whatever the peers; and what expired does not, once swept.
    tables.most[0].store(0, Ordering::SeqCst);
    tables.most[1].store(5, Ordering::SeqCst);
    let send = |peer, port| outward(&tables, &slot, PORTS, &segment(UDP, peer, Be16(port), 0));
    for peer in 0..10 {
        send(peer, 1).expect("it is one port");
    }
    send(1, 2).expect("there is one more");
    assert_eq!(send(1, 3), Err(Drop::PortLimit));
    assert_eq!(held(&tables, 1), [[14, 5]; 2]);
    let expired = Timers::DEFAULT.udp + 2 * Timers::DEFAULT.grain(UDP) + 1;
    tables.clock.fetch_add(expired, Ordering::SeqCst);
    sweep(&tables);
    assert!(tables.lock().flows.len() > 10, "their ports rest");
    check(&tables);
    send(1, 3).expect("there is room");
    send(1, 1).expect("it goes on");
    check(&tables);
}

#[test]
fn a_flow_that_is_denied_gives_its_port_back() {
    let tables = Plain::default();
    let syn = |port, peer| {
        let slot = Plain::slot(&tables, 1);
        outward(&tables, &slot, PORTS, &segment(TCP, peer, Be16(port), tcp::SYN))
    };
    let ports: Vec<Be16> = (0..64).map(|port| syn(port, 1).expect("there is one left")).collect();
    assert_eq!(syn(64, 1), Err(Drop::PortsExhausted));
    // Guests that have none of it are refused, and what one has is taken if there is no other.
    tables.deny(&[1]);
    assert_eq!(syn(7, 1), Err(Drop::Denied));
    tables.deny(&[]);
    assert_eq!(syn(64, 1), Ok(ports[7]));
    // Otherwise it rests, and is swept.
    tables.deny(&[1]);
    for port in 0..65 {
        assert_eq!(syn(port, 1), Err(Drop::Denied));
    }
    sweep(&tables);
    assert_eq!(tables.lock().flows.len(), 64);
    // One is let go on, and is idle for too long afterwards.
    tables.deny(&[]);
    assert_eq!(syn(3, 1), Ok(ports[3]));
    tables.clock.fetch_add(Timers::DEFAULT.rest + 1, Ordering::SeqCst);
    sweep(&tables);
    assert_eq!(tables.lock().flows.len(), 1);
    tables.clock.fetch_add(1000, Ordering::SeqCst);
    sweep(&tables);
    let ends: Vec<What> = tables.lock().ends.iter().map(|(_, why)| *why).collect();
    assert_eq!(ends, [&[What::TakenOver][..], &[What::Denied; 63], &[What::Expired]].concat());
    check(&tables);
}

fn act() -> impl Strategy<Value = Act> {
    let flags = prop::sample::select(vec![
        tcp::SYN,
        tcp::SYN | tcp::ACK,
        tcp::ACK,
        tcp::FIN | tcp::ACK,
        tcp::RST,
    ]);
    let protocol = prop::sample::select(vec![UDP, TCP, ICMP]);
    prop_oneof![
        8 => (1u32..4, protocol, 1u32..3, 0u16..40, flags.clone(), any::<bool>()).prop_map(
            |(guest, protocol, peer, port, flags, acknowledges)| {
                Act::Send { guest, protocol, peer, port, flags, acknowledges }
            }
        ),
        8 => (any::<prop::sample::Index>(), flags, any::<bool>()).prop_map(
            |(of, flags, acknowledges)| Act::Reply { of: of.index(1 << 16), flags, acknowledges }
        ),
        1 => any::<prop::sample::Index>().prop_map(|of| Act::Error { of: of.index(1 << 16) }),
        1 => prop::sample::subsequence(vec![1, 2], 0..=2).prop_map(Act::Deny),
        2 => (0u32..400).prop_map(Act::Wait),
        1 => Just(Act::Sweep),
        1 => Just(Act::Reattach),
        1 => (0u32..3, 0u32..7).prop_map(|(block, power)| {
            Act::Ports(Ports { base: 4096 + 64 * block, count: 1 << power })
        }),
    ]
}

/// Timers as they are, and some that run out at once.
fn timers() -> impl Strategy<Value = Timers> {
    let short = (0u32..9).prop_map(|ticks| Timers {
        udp: ticks,
        icmp: ticks / 2,
        tcp_opening: ticks,
        tcp_established: 4 * ticks,
        tcp_closing: 2 * ticks,
        tcp_closed: ticks,
        rest: ticks / 3,
    });
    prop_oneof![2 => Just(Timers::DEFAULT), 1 => short]
}

proptest! {
    #[test]
    fn traffic_of_all_kinds_keeps_to_the_model(
        acts in prop::collection::vec(act(), 1..300),
        timers in timers(),
        most in prop::option::of((1u32..40, 1u32..40)),
    ) {
        let (flows, ports) = most.unwrap_or_default();
        let mut model = Model::new(timers, [flows, ports]);
        for act in acts {
            model.apply(act);
        }
        model.finish();
    }
}

#[test]
fn what_is_not_there_is_not_removed() {
    let key = OutKey {
        ifindex: 1,
        generation: 0,
        peer: Ip::UNSPECIFIED,
        guest_port: Be16(0),
        peer_port: Be16(0),
        protocol: 6,
    };
    assert_eq!(end(&Plain::default(), key, &Timers::DEFAULT, 0), Verdict::Stays);
}
