//! Random traffic against a simple model of a NAT: who sent from which port to whom, and when.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use warren_abi::conntrack::{Ports, Segment, Tables, error_inward, error_outward, inward, outward};
use warren_abi::drop::Drop;
use warren_abi::flow::{Timers, tcp};
use warren_abi::maps::{InKey, OutKey};
use warren_abi::wire::{Be16, ICMP, Ip, TCP, UDP};

use super::{PORTS, Plain, VNI, check, claim_id, flow_id, segment, sweep};

/// What happens.
#[derive(Clone, Debug)]
pub enum Act {
    /// A guest sends. `acknowledges`: all that the other side sent.
    Send { guest: u32, protocol: u8, peer: u32, port: u16, flags: u8, acknowledges: bool },
    /// A peer answers what was sent as the `of`-th.
    Reply { of: usize, flags: u8, acknowledges: bool },
    /// An ICMP error goes each way, about what was sent as the `of`-th.
    Error { of: usize },
    /// From now on, exactly these peers are denied.
    Deny(Vec<u32>),
    /// Ticks pass.
    Wait(u32),
    /// What expired is removed.
    Sweep,
    /// All slots have new tenants.
    Reattach,
    /// The host has other ports. Their number is 0 or a power of two, 64 at most.
    Ports(Ports),
}

/// A guest's port under an attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Source {
    guest: u32,
    generation: u32,
    protocol: u8,
    port: u16,
}

/// Who last sent from a port of the shared address to a peer.
#[derive(Clone, Copy, Debug)]
struct Sender {
    source: Source,
    /// When a packet last passed, either way.
    last: u32,
    /// Whether TCP's end was seen: how long it goes on is not this model's.
    is_ending: bool,
    /// Whether a packet was denied, and none of the guest's passed since.
    is_denied: bool,
}

/// The tables, and what is known of the traffic.
pub struct Model {
    tables: Plain,
    ports: Ports,
    denied: Vec<u32>,
    /// By protocol, peer and port of the shared address, as it is on the wire.
    senders: HashMap<(u8, u32, u16), Sender>,
    /// The port of each port of UDP, and when it was last used.
    mappings: HashMap<Source, (Be16, u32)>,
    sent: Vec<(u8, u32, Be16)>,
}

impl Model {
    /// No traffic yet. `most`: of flows and ports of a slot; 0: there is no limit.
    pub fn new(timers: Timers, [flows, ports]: [u32; 2]) -> Self {
        let tables = Plain { timers, ..Plain::default() };
        tables.most[0].store(flows, Ordering::SeqCst);
        tables.most[1].store(ports, Ordering::SeqCst);
        let (denied, senders) = (Vec::new(), HashMap::new());
        Self { tables, ports: PORTS, denied, senders, mappings: HashMap::new(), sent: Vec::new() }
    }

    /// Lets it happen.
    ///
    /// # Panics
    /// If what comes of it is not what must.
    pub fn apply(&mut self, act: Act) {
        match act {
            Act::Send { guest, protocol, peer, port, flags, acknowledges } => {
                let generation = self.generation();
                let source = Source { guest, generation, protocol, port };
                self.send(source, peer, flags, acknowledges);
            }
            Act::Reply { of, flags, acknowledges } if !self.sent.is_empty() => {
                self.reply(self.sent[of % self.sent.len()], flags, acknowledges);
            }
            Act::Error { of } if !self.sent.is_empty() => {
                self.error(self.sent[of % self.sent.len()]);
            }
            Act::Reply { .. } | Act::Error { .. } => {}
            Act::Deny(peers) => {
                self.tables.deny(&peers);
                self.denied = peers;
            }
            Act::Wait(ticks) => {
                self.tables.clock.fetch_add(ticks, Ordering::SeqCst);
            }
            Act::Sweep => sweep(&self.tables),
            Act::Reattach => {
                self.tables.generation.fetch_add(1, Ordering::SeqCst);
            }
            Act::Ports(ports) => self.ports = ports,
        }
        check(&self.tables);
    }

    /// When all is idle, nothing is left.
    ///
    /// # Panics
    /// If something is.
    pub fn finish(self) {
        self.tables.clock.fetch_add(100_000, Ordering::SeqCst);
        sweep(&self.tables);
        assert_eq!(self.tables.lock().flows.len(), 0);
        assert_eq!(self.tables.lock().claims.len(), 0);
    }

    fn generation(&self) -> u32 {
        self.tables.generation.load(Ordering::SeqCst)
    }

    fn send(&mut self, source: Source, peer: u32, flags: u8, acknowledges: bool) {
        let Source { guest, protocol, port, .. } = source;
        let (slot, now) = (Plain::slot(&self.tables, guest), self.tables.now());
        let packet = packet(protocol, peer, Be16(port), flags, acknowledges);
        let is_denied = self.denied.contains(&peer);
        let before = self.senders.iter().find(|((to_protocol, to, _), sender)| {
            (*to_protocol, *to, sender.source) == (protocol, peer, source)
                && self.must_live(sender, protocol, now)
        });
        let before = before.map(|(&(_, _, external), _)| Be16(external));
        let sent = outward(&self.tables, &slot, self.ports, &packet);
        match sent {
            Ok(external) => {
                assert!(!is_denied, "to a peer that is denied");
                assert!(before.is_none_or(|port| port == external), "a flow keeps its port");
                let is_in_range = self.is_in_range(external);
                let known = self.senders.get(&(protocol, peer, external.0)).copied();
                let own = known.filter(|known| known.source == source);
                assert!(is_in_range || own.is_some(), "{external:?} is not the host's");
                if let (Some(known), None) = (known, own) {
                    let lives = self.must_live(&known, protocol, now);
                    assert!(!lives, "{known:?} lost {external:?}");
                }
                if protocol == UDP {
                    self.map(source, external, is_in_range && before.is_none());
                }
                let was_ending = own.is_some_and(|own| own.is_ending);
                let is_ending = was_ending || ends(&packet);
                let sender = Sender { source, last: now, is_ending, is_denied: false };
                self.senders.insert((protocol, peer, external.0), sender);
                self.sent.push((protocol, peer, external));
            }
            Err(reason) => {
                assert!(before.is_none() || is_denied, "{source:?} lives: {reason:?}");
                match reason {
                    Drop::Denied => {
                        assert!(is_denied, "nobody denies {peer}");
                        self.deny(|to, sender| to == peer && sender.source == source);
                    }
                    Drop::PortsExhausted => self.must_be_exhausted(&packet),
                    Drop::NoFlow => assert!(protocol == TCP, "anything begins a flow"),
                    Drop::FlowLimit | Drop::PortLimit => {}
                    _ => panic!("{reason:?}"),
                }
            }
        }
    }

    /// UDP's ports do not depend on the peer, for as long as the mapping was not idle for too long.
    fn map(&mut self, source: Source, external: Be16, is_new: bool) {
        let now = self.tables.now();
        let (mapped, last) = self.mappings.get(&source).copied().unwrap_or((external, now));
        if mapped == external || is_new {
            let is_idle = now - last > self.tables.timers().udp;
            let is_kept = mapped == external || is_idle || !self.is_in_range(mapped);
            assert!(is_kept, "{source:?} has two ports");
            self.mappings.insert(source, (external, now));
        }
    }

    fn is_in_range(&self, port: Be16) -> bool {
        u32::from(port.get()).wrapping_sub(self.ports.base) < self.ports.count
    }

    fn reply(&mut self, (protocol, peer, port): (u8, u32, Be16), flags: u8, acknowledges: bool) {
        let now = self.tables.now();
        let packet = packet(protocol, peer, port, flags, acknowledges);
        let is_denied = self.denied.contains(&peer);
        let sender = self.senders[&(protocol, peer, port.0)];
        match inward(&self.tables, VNI, &packet) {
            Ok(to) => {
                assert!(!is_denied, "from a peer that is denied");
                let generation = to.slot.attachment.generation();
                let found = Source { guest: to.slot.number, generation, protocol, port: to.port.0 };
                assert_eq!(found, sender.source, "it reached another");
                let Timers { udp, icmp, .. } = *self.tables.timers();
                let timeout = match protocol {
                    UDP => udp,
                    ICMP => icmp,
                    _ => self.longest_of_tcp(),
                };
                let most = timeout + self.tables.timers().grain(protocol);
                assert!(now - sender.last <= most, "{sender:?} is idle for too long");
                let is_ending = sender.is_ending || ends(&packet);
                self.senders
                    .insert((protocol, peer, port.0), Sender { last: now, is_ending, ..sender });
                if let Some((mapped, last)) = self.mappings.get_mut(&sender.source)
                    && *mapped == port
                {
                    *last = now;
                }
            }
            Err((_, reason)) => {
                let lives = self.must_live(&sender, protocol, now);
                assert!(!lives || is_denied, "{sender:?} lives: {reason:?}");
                if reason == Drop::Denied {
                    assert!(is_denied, "nobody denies {peer}");
                    self.deny(|to, other| to == peer && other.source == sender.source);
                }
            }
        }
    }

    /// Errors reach whom they are about, and neither refresh nor end a flow.
    fn error(&mut self, (protocol, peer, port): (u8, u32, Be16)) {
        let Segment { peer: address, peer_port, .. } = segment(protocol, peer, port, 0);
        let sender = self.senders[&(protocol, peer, port.0)];
        let Source { guest, generation, port: guest_port, .. } = sender.source;
        let is_denied = self.denied.contains(&peer);
        let protocol = u32::from(protocol);
        let about = InKey { vni: VNI, peer: address, peer_port, port, protocol };
        let key = OutKey {
            ifindex: guest,
            generation,
            peer: address,
            guest_port: Be16(guest_port),
            peer_port,
            protocol,
        };
        let state = || {
            let memory = self.tables.lock();
            memory.flows.get(&flow_id(&key)).map(|&index| memory.flow_slots[index].1.state)
        };
        let before = state();
        if let Ok(to) = error_inward(&self.tables, about) {
            assert!(!is_denied, "from a peer that is denied");
            let found = (to.slot.number, to.slot.attachment.generation(), to.port.0);
            assert_eq!(found, (guest, generation, guest_port), "it reached another");
        }
        let slot = Plain::slot(&self.tables, guest);
        if generation == self.generation()
            && let Ok(found) = error_outward(&self.tables, &slot, key)
        {
            assert!(!is_denied, "to a peer that is denied");
            assert!(before.is_some(), "{found:?} is nobody's");
        }
        if is_denied {
            self.deny(|to, other| to == peer && other.source == sender.source);
        } else {
            assert_eq!(state(), before);
        }
    }

    fn deny(&mut self, is_meant: impl Fn(u32, &Sender) -> bool) {
        for ((_, to, _), sender) in &mut self.senders {
            sender.is_denied |= is_meant(*to, sender);
        }
    }

    /// Whether the flow must be there, since nothing expires earlier than it should.
    fn must_live(&self, sender: &Sender, protocol: u8, now: u32) -> bool {
        let timers = self.tables.timers();
        let timeout = match protocol {
            UDP => timers.udp,
            ICMP => timers.icmp,
            _ => timers.tcp_opening.min(timers.tcp_established),
        };
        sender.source.generation == self.generation()
            && !sender.is_ending
            && !sender.is_denied
            && now - sender.last <= timeout
    }

    fn longest_of_tcp(&self) -> u32 {
        let &Timers { tcp_opening, tcp_established, tcp_closing, tcp_closed, .. } =
            self.tables.timers();
        tcp_opening.max(tcp_established).max(tcp_closing).max(tcp_closed)
    }

    /// A flow is refused only if each port of the host's is a living one's.
    fn must_be_exhausted(&self, packet: &Segment) {
        let &Segment { peer, peer_port, protocol, .. } = packet;
        let is_taken = |peer, peer_port, port| {
            let protocol = u32::from(protocol);
            let key = InKey { vni: VNI, peer, peer_port, port: Be16::new(port), protocol };
            let memory = self.tables.lock();
            memory.claims.get(&claim_id(&key)).is_some_and(|&index| {
                let flow = key.flow(&memory.claim_slots[index]);
                let state = memory.flow_slots[memory.flows[&flow_id(&flow)]].1.state;
                let is_over =
                    state.is_over(packet.protocol, self.tables.timers(), self.tables.now());
                flow.generation == self.generation() && !is_over
            })
        };
        let Ports { base, count } = self.ports;
        let mut ports = (base..base + count).map(|port| port as u16);
        if protocol == UDP {
            // No port for a mapping; or the mapping's is another's towards this peer.
            let all = ports.clone().all(|port| is_taken(Ip::UNSPECIFIED, Be16(0), port));
            assert!(all || ports.any(|port| is_taken(peer, peer_port, port)));
        } else {
            assert!(ports.all(|port| is_taken(peer, peer_port, port)));
        }
    }
}

/// Whether TCP's end begins with it.
fn ends(packet: &Segment) -> bool {
    packet.protocol == TCP && packet.flags & (tcp::FIN | tcp::RST) != 0
}

fn packet(protocol: u8, peer: u32, local_port: Be16, flags: u8, acknowledges: bool) -> Segment {
    let flags = if protocol == TCP { flags } else { 0 };
    let packet = segment(protocol, peer, local_port, flags);
    Segment { acknowledged: if acknowledges { packet.acknowledged } else { 1 }, ..packet }
}
