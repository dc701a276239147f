//! The decisions about flows, over plain tables: random traffic against a simple model, and threads
//! that compete for ports.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use warren_abi::conntrack::{
    Ports, Refused, Search, Segment, Tables, Verdict, end, inward, outward, step,
};
use warren_abi::drop::Drop;
use warren_abi::flow::{Direction, FlowState, Timers, tcp};
use warren_abi::flowlog::What;
use warren_abi::limit::{Share, Tally};
use warren_abi::maps::{Attachment, Flow, Guard, InFlow, InKey, OutKey, Slot, Traffic};
use warren_abi::nat::MAX_PROBES;
use warren_abi::wire::{Be16, ICMP, Ip, Ipv4, Mac, TCP, UDP};

const VNI: u32 = 7;
const PORTS: Ports = Ports { base: 4096, count: 64 };

/// Keys by their bytes: they have no `Hash`, which programs do not need.
type FlowId = (u32, u32, [u32; 4], u16, u16, u32);
type ClaimId = (u32, [u32; 4], u16, u16, u32);

fn flow_id(key: &OutKey) -> FlowId {
    let &OutKey { ifindex, generation, peer, guest_port, peer_port, protocol } = key;
    (ifindex, generation, peer.0, guest_port.0, peer_port.0, protocol)
}

fn claim_id(key: &InKey) -> ClaimId {
    let &InKey { vni, peer, peer_port, port, protocol } = key;
    (vni, peer.0, peer_port.0, port.0, protocol)
}

/// Tables as BPF's are: every method is atomic, and memory of removed entries is used again at
/// once.
#[derive(Default)]
struct Plain {
    memory: Mutex<Memory>,
    clock: AtomicU32,
    dice: AtomicU32,
    generation: AtomicU32,
    /// The policy of all slots, which changes with its epoch: peers that no flow may have.
    epoch: AtomicU32,
    /// Most flows and ports of a slot; 0: there is no limit.
    most: [AtomicU32; 2],
    held: Mutex<HashMap<u32, [Tally; 2]>>,
    denied: Mutex<HashSet<[u32; 4]>>,
}

#[derive(Default)]
struct Memory {
    flows: HashMap<FlowId, usize>,
    flow_slots: Vec<(OutKey, Flow)>,
    free_flows: Vec<usize>,
    claims: HashMap<ClaimId, usize>,
    claim_slots: Vec<InFlow>,
    free_claims: Vec<usize>,
    ends: Vec<(FlowId, What)>,
}

fn put<T>(memory: &mut Vec<T>, free: &mut Vec<usize>, value: T) -> usize {
    if let Some(index) = free.pop() {
        memory[index] = value;
        return index;
    }
    memory.push(value);
    memory.len() - 1
}

impl Plain {
    fn lock(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().expect("nobody panics with it")
    }

    /// Changes the policy.
    fn deny(&self, peers: &[u32]) {
        let peers = peers.iter().map(|&peer| Ip::v4(Ipv4(peer)).0).collect();
        *self.denied.lock().expect("nobody panics with it") = peers;
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    fn slot(&self, number: u32) -> Slot {
        let generation = self.generation.load(Ordering::SeqCst);
        Slot {
            attachment: Attachment::new(VNI, generation),
            ifindex: number,
            number,
            address: Ipv4(number),
            mac: Mac::default(),
            guard: Guard::NONE,
            epoch: self.epoch.load(Ordering::SeqCst),
        }
    }
}

impl Tables for Plain {
    type Flow = usize;
    type Claim = usize;

    fn now(&self) -> u32 {
        self.clock.load(Ordering::SeqCst)
    }
    fn random(&self) -> u32 {
        let next = self.dice.fetch_add(1, Ordering::SeqCst).wrapping_mul(0x9e37_79b9);
        (next ^ next >> 15).wrapping_mul(0x85eb_ca6b)
    }
    fn timers(&self) -> &Timers {
        &Timers::DEFAULT
    }
    fn slot(&self, _: u32, ifindex: u32) -> Option<Slot> {
        Some(Self::slot(self, ifindex))
    }
    fn grow(&self, number: u32, key: &OutKey) -> Result<(), Drop> {
        let mut held = self.held.lock().expect("nobody panics with it");
        let held = held.entry(number).or_default();
        let mut new = *held;
        let parts = [(Share::FLOW, Drop::FlowLimit), (Share::PORT, Drop::PortLimit)];
        for (index, (part, reason)) in parts.into_iter().enumerate() {
            if Share::of(key).has(part) {
                let most = self.most[index].load(Ordering::SeqCst);
                new[index] = new[index].more(key.generation, most).ok_or(reason)?;
            }
        }
        *held = new;
        Ok(())
    }
    fn shrink(&self, number: u32, key: &OutKey) {
        if number == 0 {
            return;
        }
        let mut held = self.held.lock().expect("nobody panics with it");
        let held = held.entry(number).or_default();
        for (index, part) in [Share::FLOW, Share::PORT].into_iter().enumerate() {
            if Share::of(key).has(part) {
                held[index] = held[index].less(key.generation).unwrap_or(held[index]);
            }
        }
    }
    fn is_allowed(&self, _: Guard, _: u32, key: &OutKey) -> Result<bool, Drop> {
        Ok(!self.denied.lock().expect("nobody panics with it").contains(&key.peer.0))
    }
    fn probe(&self, search: &mut Search) {
        for probe in 0..MAX_PROBES {
            if step(self, search, probe) {
                break;
            }
        }
    }
    fn flow(&self, key: OutKey) -> Option<usize> {
        self.lock().flows.get(&flow_id(&key)).copied()
    }
    fn insert_flow(&self, key: OutKey, flow: Flow) -> Result<(), Refused> {
        let memory = &mut *self.lock();
        if memory.flows.contains_key(&flow_id(&key)) {
            return Err(Refused::Exists);
        }
        let index = put(&mut memory.flow_slots, &mut memory.free_flows, (key, flow));
        memory.flows.insert(flow_id(&key), index);
        Ok(())
    }
    fn remove_flow(&self, key: OutKey, why: What) {
        let memory = &mut *self.lock();
        if memory.flow_slots[memory.flows[&flow_id(&key)]].1.state.is_counted() {
            self.shrink(key.ifindex, &key);
        }
        memory.ends.push((flow_id(&key), why));
        let index = memory.flows.remove(&flow_id(&key)).expect("only its ender removes it");
        memory.free_flows.push(index);
    }
    fn state(&self, flow: usize) -> FlowState {
        self.lock().flow_slots[flow].1.state
    }
    fn exchange(&self, flow: usize, expected: FlowState, new: FlowState) -> bool {
        let state = &mut self.lock().flow_slots[flow].1.state;
        let is_same = *state == expected;
        if is_same {
            *state = new;
        }
        is_same
    }
    fn check(&self, flow: usize) -> u16 {
        self.lock().flow_slots[flow].1.check
    }
    fn place(&self, flow: usize) -> (u32, Be16) {
        let Flow { vni, port, .. } = self.lock().flow_slots[flow].1;
        (vni, port)
    }
    fn end(&self, flow: usize, direction: Direction) -> u32 {
        self.lock().flow_slots[flow].1.ends[usize::from(direction == Direction::In)]
    }
    fn set_end(&self, flow: usize, direction: Direction, end: u32) {
        self.lock().flow_slots[flow].1.ends[usize::from(direction == Direction::In)] = end;
    }
    fn judged(&self, flow: usize) -> u32 {
        self.lock().flow_slots[flow].1.judged
    }
    fn set_judged(&self, flow: usize, epoch: u32) {
        self.lock().flow_slots[flow].1.judged = epoch;
    }
    fn sent(&self, flow: usize, traffic: Traffic) {
        self.lock().flow_slots[flow].1.sent.packets += traffic.packets;
    }
    fn claim(&self, key: InKey) -> Option<usize> {
        self.lock().claims.get(&claim_id(&key)).copied()
    }
    fn insert_claim(&self, key: InKey, claim: InFlow) -> Result<(), Refused> {
        let memory = &mut *self.lock();
        if memory.claims.contains_key(&claim_id(&key)) {
            return Err(Refused::Exists);
        }
        let index = put(&mut memory.claim_slots, &mut memory.free_claims, claim);
        memory.claims.insert(claim_id(&key), index);
        Ok(())
    }
    fn replace_claim(&self, key: InKey, claim: InFlow) -> Result<(), Refused> {
        let memory = &mut *self.lock();
        let index = put(&mut memory.claim_slots, &mut memory.free_claims, claim);
        let old = memory.claims.insert(claim_id(&key), index).expect("it is the caller's");
        memory.free_claims.push(old);
        Ok(())
    }
    fn remove_claim(&self, key: InKey) {
        let memory = &mut *self.lock();
        let index = memory.claims.remove(&claim_id(&key)).expect("only its owner removes it");
        memory.free_claims.push(index);
    }
    fn read(&self, claim: usize) -> InFlow {
        self.lock().claim_slots[claim]
    }
    fn set_refreshed(&self, claim: usize, tick: u32) {
        self.lock().claim_slots[claim].refreshed = tick;
    }
    fn set_claim_judged(&self, claim: usize, epoch: u32) {
        self.lock().claim_slots[claim].judged = epoch as u16;
    }
    fn received(&self, claim: usize, traffic: Traffic) {
        self.lock().claim_slots[claim].received.packets += traffic.packets;
    }
}

fn segment(protocol: u8, peer: u32, local_port: Be16, flags: u8) -> Segment {
    Segment {
        peer: Ip::v4(Ipv4(peer)),
        peer_port: Be16(80),
        local_port,
        protocol,
        flags,
        next: 101,
        acknowledged: 101,
        traffic: Traffic { packets: 1, bytes: 40 },
    }
}

/// How many flows and ports a slot holds, as counted one by one, and as the tables say.
fn held(tables: &Plain, number: u32) -> [[u32; 2]; 2] {
    let generation = tables.generation.load(Ordering::SeqCst);
    let memory = tables.lock();
    let flows =
        memory.flows.values().map(|&index| memory.flow_slots[index]).filter(|(key, flow)| {
            (key.ifindex, key.generation) == (number, generation) && flow.state.is_counted()
        });
    let shares: Vec<_> = flows.map(|(key, _)| Share::of(&key)).collect();
    let count = |part| shares.iter().filter(|share| share.has(part)).count() as u32;
    let told = tables.held.lock().expect("nobody panics with it");
    let told = told.get(&number).copied().unwrap_or_default();
    [[count(Share::FLOW), count(Share::PORT)], told.map(|tally| tally.count(generation))]
}

/// What must always be so of the tables: each flow has its own claim, each claim its flow; and what
/// is held is as many as there are, and no more than may be.
fn check(tables: &Plain) {
    for number in 0..4 {
        let [counted, told] = held(tables, number);
        assert_eq!(counted, told, "of slot {number}");
        for (told, most) in told.into_iter().zip(&tables.most) {
            let most = most.load(Ordering::SeqCst);
            assert!(most == 0 || told <= most, "slot {number} holds {told} of {most}");
        }
    }
    let memory = tables.lock();
    assert_eq!(memory.flows.len(), memory.claims.len(), "no port is lost");
    for &index in memory.flows.values() {
        let (OutKey { ifindex, generation, peer, guest_port, peer_port, protocol }, flow) =
            memory.flow_slots[index];
        let claim = InKey { vni: VNI, peer, peer_port, port: flow.port, protocol };
        let claim = memory.claims.get(&claim_id(&claim)).expect("a flow has its port");
        let owner = memory.claim_slots[*claim];
        assert_eq!(
            (owner.ifindex, owner.generation, owner.guest_port),
            (ifindex, generation, guest_port),
            "no two flows have one port towards one place"
        );
    }
}

fn sweep(tables: &Plain) {
    let keys: Vec<OutKey> = {
        let memory = tables.lock();
        memory.flows.values().map(|&index| memory.flow_slots[index].0).collect()
    };
    for key in keys {
        end(tables, key, &Timers::DEFAULT, tables.now());
    }
}

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
    tables.clock.fetch_add(Timers::DEFAULT.rest + 1, Ordering::SeqCst);
    sweep(&tables);
    assert_eq!(tables.lock().flows.len(), 0);
    check(&tables);
}

#[derive(Clone, Debug)]
enum Act {
    Deny(Vec<u32>),
    Send { guest: u32, udp: bool, peer: u32, port: u16, flags: u8 },
    Reply { of: usize, flags: u8 },
    Wait(u32),
    Sweep,
    Reattach,
}

fn act() -> impl Strategy<Value = Act> {
    let flags = prop::sample::select(vec![
        tcp::SYN,
        tcp::SYN | tcp::ACK,
        tcp::ACK,
        tcp::FIN | tcp::ACK,
        tcp::RST,
    ]);
    prop_oneof![
        8 => (1u32..4, any::<bool>(), 1u32..3, 0u16..40, flags.clone())
            .prop_map(|(guest, udp, peer, port, flags)| Act::Send { guest, udp, peer, port, flags }),
        8 => (any::<prop::sample::Index>(), flags)
            .prop_map(|(of, flags)| Act::Reply { of: of.index(1 << 16), flags }),
        1 => prop::sample::subsequence(vec![1, 2], 0..=2).prop_map(Act::Deny),
        2 => (0u32..400).prop_map(Act::Wait),
        1 => Just(Act::Sweep),
        1 => Just(Act::Reattach),
    ]
}

proptest! {
    /// A reply reaches exactly who last sent from the port to the peer, or nobody; nothing passes to
    /// or from a peer that is denied; UDP's ports do not depend on the peer; and when all is idle,
    /// nothing is left.
    #[test]
    fn traffic_of_all_kinds_keeps_to_the_model(
        acts in prop::collection::vec(act(), 1..300),
        most in prop::option::of((1u32..40, 1u32..40)),
    ) {
        let tables = Plain::default();
        let (flows, ports) = most.unwrap_or_default();
        tables.most[0].store(flows, Ordering::SeqCst);
        tables.most[1].store(ports, Ordering::SeqCst);
        // (protocol, peer, external port) -> who sent from there last.
        let mut senders: HashMap<(u8, u32, u16), (u32, u32, u16)> = HashMap::new();
        let mut sent = Vec::new();
        let mut denied: Vec<u32> = Vec::new();
        for act in acts {
            let generation = tables.generation.load(Ordering::SeqCst);
            match act {
                Act::Send { guest, udp, peer, port, flags } => {
                    let (protocol, flags) = if udp { (UDP, 0) } else { (TCP, flags) };
                    let slot = Plain::slot(&tables, guest);
                    let packet = segment(protocol, peer, Be16(port), flags);
                    if let Ok(external) = outward(&tables, &slot, PORTS, &packet) {
                        prop_assert!((4096..4160).contains(&external.get()));
                        prop_assert!(!denied.contains(&peer));
                        senders.insert((protocol, peer, external.0), (guest, generation, port));
                        sent.push((protocol, peer, external));
                    }
                }
                Act::Reply { of, flags } => {
                    if sent.is_empty() {
                        continue;
                    }
                    let (protocol, peer, port) = sent[of % sent.len()];
                    let flags = if protocol == TCP { flags } else { 0 };
                    if let Ok(to) = inward(&tables, VNI, &segment(protocol, peer, port, flags)) {
                        prop_assert!(!denied.contains(&peer));
                        let found = (to.slot.number, to.slot.attachment.generation(), to.port.0);
                        prop_assert_eq!(found, senders[&(protocol, peer, port.0)]);
                    }
                }
                Act::Deny(peers) => {
                    tables.deny(&peers);
                    denied = peers;
                }
                Act::Wait(ticks) => {
                    tables.clock.fetch_add(ticks, Ordering::SeqCst);
                }
                Act::Sweep => sweep(&tables),
                Act::Reattach => {
                    tables.generation.fetch_add(1, Ordering::SeqCst);
                }
            }
            check(&tables);
        }
        tables.clock.fetch_add(100_000, Ordering::SeqCst);
        sweep(&tables);
        prop_assert_eq!(tables.lock().flows.len(), 0);
        prop_assert_eq!(tables.lock().claims.len(), 0);
        prop_assert_eq!(
            end(
                &tables,
                OutKey {
                    ifindex: 1, generation: 0, peer: Ip::UNSPECIFIED, guest_port: Be16(0),
                    peer_port: Be16(0), protocol: 6,
                },
                &Timers::DEFAULT,
                0,
            ),
            Verdict::Stays
        );
    }
}
