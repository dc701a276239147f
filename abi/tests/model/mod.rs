//! Tables of flows in plain memory, and what must always be so of them. Tests and the fuzzer share
//! them.

pub mod acts;

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use warren_abi::conntrack::{Ports, Refused, Search, Segment, Tables, end, stay, step};
use warren_abi::drop::Drop;
use warren_abi::flow::{Direction, FlowState, Timers};
use warren_abi::flowlog::What;
use warren_abi::limit::{Share, Tally};
use warren_abi::maps::{Attachment, Flow, Guard, InFlow, InKey, OutKey, Slot, Traffic};
use warren_abi::nat::MAX_PROBES;
use warren_abi::wire::{Be16, Ip, Ipv4, Mac};

pub const VNI: u32 = 7;
pub const PORTS: Ports = Ports { base: 4096, count: 64 };

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
pub struct Plain {
    memory: Mutex<Memory>,
    pub clock: AtomicU32,
    dice: AtomicU32,
    pub generation: AtomicU32,
    pub timers: Timers,
    /// The policy of all slots, which changes with its epoch: peers that no flow may have.
    epoch: AtomicU32,
    /// Most flows and ports of a slot; 0: there is no limit.
    pub most: [AtomicU32; 2],
    held: Mutex<HashMap<u32, [Tally; 2]>>,
    denied: Mutex<HashSet<[u32; 4]>>,
}

#[derive(Default)]
pub struct Memory {
    pub flows: HashMap<FlowId, usize>,
    flow_slots: Vec<(OutKey, Flow)>,
    free_flows: Vec<usize>,
    pub claims: HashMap<ClaimId, usize>,
    claim_slots: Vec<InFlow>,
    free_claims: Vec<usize>,
    pub ends: Vec<(FlowId, What)>,
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
    pub fn lock(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().expect("nobody panics with it")
    }

    /// Changes the policy.
    pub fn deny(&self, peers: &[u32]) {
        let peers = peers.iter().map(|&peer| Ip::v4(Ipv4(peer)).0).collect();
        *self.denied.lock().expect("nobody panics with it") = peers;
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    pub fn slot(&self, number: u32) -> Slot {
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
        &self.timers
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
    fn stay(&self, search: &mut Search) {
        stay(self, search);
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
    fn begun(&self) {}
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

pub fn segment(protocol: u8, peer: u32, local_port: Be16, flags: u8) -> Segment {
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
pub fn held(tables: &Plain, number: u32) -> [[u32; 2]; 2] {
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
pub fn check(tables: &Plain) {
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

pub fn sweep(tables: &Plain) {
    let keys: Vec<OutKey> = {
        let memory = tables.lock();
        memory.flows.values().map(|&index| memory.flow_slots[index].0).collect()
    };
    for key in keys {
        end(tables, key, tables.timers(), tables.now());
    }
}
