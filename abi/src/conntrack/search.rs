//! The search for a port that a flow or a mapping begins on.

use core::num::NonZeroU32;

use super::{Ports, Refused, Tables, Wanted};
use crate::drop::Drop;
use crate::flow::{FlowState, Timers};
use crate::flowlog::What;
use crate::maps::{Attachment, InFlow, OutKey};
use crate::nat::probe_port;
use crate::wire::Be16;

/// How often a new flow looks for one that is over, if others are faster.
const ROUNDS: u32 = 2;

/// What a search is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To begin on a port of the host's.
    Begin,
    /// To begin on the port of the mapping.
    Join,
}

/// Carries out a search, whose flow or mapping counts among what the slot holds if it begins: puts
/// the port into `port`, or leaves it there.
///
/// # Errors
/// If there is no port, no room, or a limit.
#[inline(always)]
pub fn search<T: Tables>(
    tables: &T,
    search: &mut Search,
    purpose: Purpose,
    port: &mut Be16,
) -> Result<(), Drop> {
    tables.grow(search.wanted.number, &search.wanted.key)?;
    let found = match purpose {
        Purpose::Begin => begin(tables, search, port),
        Purpose::Join => join(tables, search, port),
    };
    if search.outcome == Outcome::Begun {
        tables.begun();
    } else {
        // Not at all, or another CPU was faster.
        tables.shrink(search.wanted.number, &search.wanted.key);
    }
    found
}

/// Begins a flow or a mapping on a port of the host's, and puts that into `port`. If another CPU did
/// so meanwhile, it is that one's.
#[inline(always)]
fn begin<T: Tables>(tables: &T, search: &mut Search, port: &mut Be16) -> Result<(), Drop> {
    let mut round = 0;
    while round <= 2 * ROUNDS {
        search.aim = match (round, search.outcome) {
            (0, _) => Aim::Free,
            (_, Outcome::Found) => Aim::Take,
            _ => Aim::Oldest,
        };
        round += 1;
        if search.aim == Aim::Take {
            tables.stay(search);
        } else {
            tables.probe(search);
        }
        match search.outcome {
            Outcome::Begun => {
                *port = search.port;
                return Ok(());
            }
            Outcome::Lost => return meet(tables, search, port),
            Outcome::Full => return Err(Drop::FlowsExhausted),
            Outcome::Nothing => return Err(Drop::PortsExhausted),
            Outcome::Taken => {
                search.longest = 0;
            }
            Outcome::Found => {}
        }
    }
    Err(Drop::PortsExhausted)
}

/// Goes on with the flow or mapping that another CPU has just begun.
#[inline(always)]
fn meet<T: Tables>(tables: &T, search: &Search, port: &mut Be16) -> Result<(), Drop> {
    let Some(flow) = tables.flow(search.wanted.key) else {
        return Err(Drop::Internal);
    };
    if tables.check(flow) != search.wanted.key.check() {
        return Err(Drop::Internal);
    }
    *port = tables.place(flow).1;
    tables.sent(flow, search.wanted.sent);
    Ok(())
}

/// Begins a flow on the port of its mapping, which `port` is.
#[inline(always)]
fn join<T: Tables>(tables: &T, search: &mut Search, port: &mut Be16) -> Result<(), Drop> {
    (search.aim, search.port) = (Aim::Join, *port);
    tables.stay(search);
    match search.outcome {
        // If it was lost, then to a packet of the same flow, which has the same port.
        Outcome::Begun | Outcome::Lost => Ok(()),
        Outcome::Full => Err(Drop::FlowsExhausted),
        _ => Err(Drop::PortsExhausted),
    }
}

/// What ports are tried for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aim {
    /// One that is free: the flow begins there.
    Free,
    /// Of those whose flow is over, the one that was idle longest.
    Oldest,
    /// The one that was found: the flow begins there if the other is still over.
    Take,
    /// That of the mapping: the flow begins there, unless another's lives there.
    Join,
}

/// What came of a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No port yet.
    Nothing,
    /// The port is another's.
    Taken,
    /// There is a port whose flow is over.
    Found,
    /// The flow began.
    Begun,
    /// Another CPU began it, on a port of its own.
    Lost,
    /// There is no room for it.
    Full,
}

/// A search among the ports that a flow or a mapping may have.
#[derive(Clone, Copy, Debug)]
pub struct Search {
    wanted: Wanted,
    aim: Aim,
    outcome: Outcome,
    longest: u32,
    port: Be16,
}

impl Search {
    /// One that has not begun.
    #[inline(always)]
    pub const fn new(wanted: Wanted) -> Self {
        let (aim, outcome) = (Aim::Free, Outcome::Nothing);
        Self { wanted, aim, outcome, longest: 0, port: Be16(0) }
    }
}

/// One step of a search among all ports: whether there is no need for more.
#[inline(always)]
pub fn step<T: Tables>(tables: &T, search: &mut Search, probe: u32) -> bool {
    let Wanted { ports: Ports { base, count }, random, now, .. } = search.wanted;
    let Some(count) = NonZeroU32::new(count) else {
        search.outcome = Outcome::Nothing;
        return true;
    };
    let port = Be16::new(probe_port(base, count, random, probe));
    if search.aim == Aim::Free {
        search.port = port;
        attempt(tables, search);
        return search.outcome != Outcome::Taken;
    }
    if probe == 0 {
        search.outcome = Outcome::Nothing;
    }
    if let Some(over) = over(tables, &search.wanted, port, tables.timers()) {
        // Of two alike, the guest's own: its time stamps go on where they were (RFC 6191).
        let rank = over.state.idle(now).saturating_mul(2).saturating_add(1 + over.is_own as u32);
        if rank > search.longest {
            (search.longest, search.port, search.outcome) = (rank, port, Outcome::Found);
        }
    }
    false
}

/// A search at the one port that it has: to take it, or to join its mapping.
#[inline(always)]
pub fn stay<T: Tables>(tables: &T, search: &mut Search) {
    if search.aim == Aim::Join {
        attempt(tables, search);
        if search.outcome != Outcome::Taken {
            return;
        }
        if is_claimed_by(tables, &search.wanted, search.port) {
            // Another CPU is just beginning this very flow.
            search.outcome = Outcome::Lost;
            return;
        }
    }
    search.outcome = Outcome::Taken;
    if let Some(over) = over(tables, &search.wanted, search.port, tables.timers()) {
        take(tables, search, &over);
    }
}

/// Whether the port is claimed by the wanted flow itself.
#[inline(always)]
fn is_claimed_by<T: Tables>(tables: &T, wanted: &Wanted, port: Be16) -> bool {
    tables.claim(wanted.claim(port)).is_some_and(|claim| {
        let (InFlow { ifindex, generation, guest_port, .. }, key) =
            (tables.read(claim), &wanted.key);
        ifindex == key.ifindex && generation == key.generation && guest_port == key.guest_port
    })
}

/// Begins a flow or a mapping on this port, if it is free.
#[inline(always)]
fn attempt<T: Tables>(tables: &T, search: &mut Search) {
    let wanted = &search.wanted;
    match tables.insert_claim(wanted.claim(search.port), wanted.back()) {
        Ok(()) => settle(tables, search),
        Err(Refused::Exists) => search.outcome = Outcome::Taken,
        Err(Refused::Full) => search.outcome = Outcome::Full,
    }
}

/// Begins a flow or a mapping on a port that it has claimed.
#[inline(always)]
fn settle<T: Tables>(tables: &T, search: &mut Search) {
    let wanted = &search.wanted;
    let inserted = tables.insert_flow(wanted.key, wanted.flow(search.port));
    if inserted.is_err() {
        tables.remove_claim(wanted.claim(search.port));
    }
    search.outcome = match inserted {
        Ok(()) => Outcome::Begun,
        Err(Refused::Exists) => Outcome::Lost,
        Err(Refused::Full) => Outcome::Full,
    };
}

/// A flow that another one may take the port of.
struct Over<F> {
    ifindex: u32,
    generation: u32,
    guest_port: Be16,
    flow: F,
    state: FlowState,
    is_own: bool,
}

/// The flow that has the port towards the wanted flow's peer, if it is over, or of a former
/// attachment.
#[inline(always)]
fn over<T: Tables>(
    tables: &T,
    wanted: &Wanted,
    port: Be16,
    timers: &Timers,
) -> Option<Over<T::Flow>> {
    let InFlow { ifindex, generation, guest_port, .. } =
        tables.read(tables.claim(wanted.claim(port))?);
    let key = OutKey { ifindex, generation, guest_port, ..wanted.key };
    let flow = tables.flow(key)?;
    let state = tables.state(flow);
    // Whether it is the claim's: if it still has this state at the exchange, it still is.
    let is_it = tables.check(flow) == key.check() && tables.place(flow) == (wanted.vni, port);
    if state.is_ended() || !is_it {
        return None;
    }
    let is_own = ifindex == wanted.key.ifindex && generation == wanted.key.generation;
    let attachment = Attachment::new(wanted.vni, generation);
    let is_stale = !is_own
        && tables.slot(wanted.vni, ifindex).is_none_or(|slot| slot.attachment != attachment);
    let is_over = is_stale || state.is_over(key.protocol as u8, timers, wanted.now);
    is_over.then_some(Over { ifindex, generation, guest_port, flow, state, is_own })
}

/// Begins a flow or a mapping on the port of one that is over.
#[inline(always)]
fn take<T: Tables>(tables: &T, search: &mut Search, over: &Over<T::Flow>) {
    let &Over { ifindex, generation, guest_port, flow, state, .. } = over;
    if !tables.exchange(flow, state, state.ended()) {
        return;
    }
    let key = OutKey { ifindex, generation, guest_port, ..search.wanted.key };
    tables.remove_flow(key, What::TakenOver);
    if tables.replace_claim(search.wanted.claim(search.port), search.wanted.back()).is_ok() {
        settle(tables, search);
    } else {
        tables.remove_claim(search.wanted.claim(search.port));
        search.outcome = Outcome::Full;
    }
}
