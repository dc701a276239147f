//! Flows: which port stands for which guest's, and for how long.
//!
//! Pure decisions over [`Tables`]: BPF maps in the programs, plain maps in tests.
//!
//! Two tables hold a flow. A claim is inserted first, and whoever finds it there tries another
//! port. The flow itself comes second and holds the state; who loses that race gives the port
//! back and uses the winner's. Who would remove a flow ends its state with a compare-and-exchange
//! first: so a packet either refreshes a flow or finds it gone, and only who ended it touches its
//! claim.
//!
//! UDP's ports are endpoint-independent (RFC 4787, REQ-1, REQ-3): what claims one is a mapping, an
//! entry of both tables under no peer, and the flows from that port of the guest's all have its
//! port. The flows are the filter: only their peers get through. A flow keeps its mapping alive.
//!
//! A flow of a slot with a [`policy`](crate::policy) is judged before it begins, and once after each
//! change of the rules. One that is not allowed any more is as good as expired.
//!
//! A port whose flow ended rests. If there is no other, a new flow takes the one of the flow that
//! was idle longest, and is over ([`FlowState::is_over`]).

mod search;

pub use self::search::{Aim, Outcome, Purpose, Search, search, stay, step};
use crate::drop::Drop;
use crate::flow::{Direction, FlowState, Timers, tcp};
use crate::flowlog::What;
use crate::maps::{Attachment, Flow, Guard, InFlow, InKey, OutKey, Slot, Traffic};
use crate::wire::{Be16, Ip, TCP, UDP};

/// How often a state is looked at again when another CPU changed it meanwhile: that happens once
/// a tick, and at TCP's turning points.
const ATTEMPTS: u32 = 4;

/// Why an entry was not inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// There is one under this key.
    Exists,
    /// There is no room.
    Full,
}

/// Tables of flows and claims, which several CPUs change at once.
///
/// Each method is atomic. What [`Tables::flow`] and [`Tables::claim`] find stays readable, but
/// when the entry is removed its memory may become another's.
pub trait Tables: Sized {
    /// Where a flow lies.
    type Flow: Copy;
    /// Where a claim lies.
    type Claim: Copy;

    /// The tick that it is now.
    fn now(&self) -> u32;
    /// A random number.
    fn random(&self) -> u32;
    /// How long flows may be idle.
    fn timers(&self) -> &Timers;
    /// Whose flows in a VPC are those of an interface.
    fn slot(&self, vni: u32, ifindex: u32) -> Option<Slot>;
    /// Counts a flow or a mapping among what the slot of this number holds; a flow, also among those that begin.
    ///
    /// # Errors
    /// The limit that it would be beyond.
    fn grow(&self, number: u32, key: &OutKey) -> Result<(), Drop>;
    /// Counts it no more, among what is held under the attachment of its key.
    fn shrink(&self, number: u32, key: &OutKey);
    /// The same for the receiver of a packet, which is asked for all the time.
    #[inline(always)]
    fn receiver(&self, vni: u32, ifindex: u32) -> Option<Slot> {
        self.slot(vni, ifindex)
    }
    /// Whether the policy of a slot, which must be of this epoch, allows the flow.
    ///
    /// # Errors
    /// If the policy is not there.
    fn is_allowed(&self, guard: Guard, epoch: u32, key: &OutKey) -> Result<bool, Drop>;
    /// Calls [`judge`], wherever there is room for it.
    ///
    /// # Errors
    /// Its.
    #[inline(always)]
    fn judge(&self, slot: &Slot, key: OutKey) -> Result<(), Drop> {
        judge(self, slot.guard, slot.epoch, &key, self.flow(key))
    }
    /// Calls [`turn`], wherever there is room for it.
    ///
    /// # Errors
    /// Its.
    #[inline(always)]
    fn turn(
        &self,
        number: u32,
        key: OutKey,
        found: FlowState,
        state: FlowState,
    ) -> Result<bool, Drop> {
        match self.flow(key) {
            Some(flow) => turn(self, number, &key, flow, found, state),
            None => Ok(false),
        }
    }
    /// Calls [`forget`], wherever there is room for it.
    #[inline(always)]
    fn forget(&self, key: OutKey, state: FlowState) {
        if let Some(flow) = self.flow(key) {
            forget(self, key, flow, state);
        }
    }
    /// Whether a flow that is not there may begin, or may be known elsewhere.
    #[inline(always)]
    fn may_begin(&self, _key: OutKey) -> bool {
        true
    }

    /// Carries out a search of a purpose by [`search`], wherever there is room for it.
    ///
    /// # Errors
    /// As [`search`].
    #[inline(always)]
    fn search(&self, wanted: Wanted, purpose: Purpose, port: &mut Be16) -> Result<(), Drop> {
        search(self, &mut Search::new(wanted), purpose, port)
    }

    /// Goes on with a search, which [`Tables::search`] gave, until a [`step`] is decisive, for
    /// [`MAX_PROBES`](crate::nat::MAX_PROBES) at most.
    ///
    /// A program has the kernel repeat: a loop of its own would be verified pass by pass.
    fn probe(&self, search: &mut Search);

    /// Goes on with a search, which [`Tables::search`] gave, at the port that it has, by [`stay`].
    ///
    /// Apart from [`Tables::probe`], so that neither needs the stack of both.
    fn stay(&self, search: &mut Search);

    /// A flow.
    fn flow(&self, key: OutKey) -> Option<Self::Flow>;
    /// Inserts a flow that is not there, and was counted: it begins, of which [`Tables::begun`] is
    /// told later.
    ///
    /// # Errors
    /// If it is there, or there is no room.
    fn insert_flow(&self, key: OutKey, flow: Flow) -> Result<(), Refused>;
    /// The flow began that was inserted last.
    fn begun(&self);
    /// Removes a flow, which the caller ended. Its claim is still there. If it counted among what
    /// its slot holds, it does no more.
    fn remove_flow(&self, key: OutKey, why: What);
    /// A flow's state.
    fn state(&self, flow: Self::Flow) -> FlowState;
    /// Puts `new` in the place of `expected`, unless there is something else: whether it did.
    fn exchange(&self, flow: Self::Flow, expected: FlowState, new: FlowState) -> bool;
    /// Of what key a flow is: [`OutKey::check`].
    fn check(&self, flow: Self::Flow) -> u16;
    /// A flow's VPC and port.
    fn place(&self, flow: Self::Flow) -> (u32, Be16);
    /// The sequence number after the FIN that was sent in this direction.
    fn end(&self, flow: Self::Flow, direction: Direction) -> u32;
    /// Enters the sequence number after the FIN that is sent in this direction.
    fn set_end(&self, flow: Self::Flow, direction: Direction, end: u32);
    /// The epoch under which a flow was last judged.
    fn judged(&self, flow: Self::Flow) -> u32;
    /// Enters it.
    fn set_judged(&self, flow: Self::Flow, epoch: u32);
    /// Adds to what the guest sent.
    fn sent(&self, flow: Self::Flow, traffic: Traffic);

    /// A claim.
    fn claim(&self, key: InKey) -> Option<Self::Claim>;
    /// Inserts a claim that is not there.
    ///
    /// # Errors
    /// If it is there, or there is no room.
    fn insert_claim(&self, key: InKey, claim: InFlow) -> Result<(), Refused>;
    /// Replaces a claim.
    ///
    /// # Errors
    /// If there is no room.
    fn replace_claim(&self, key: InKey, claim: InFlow) -> Result<(), Refused>;
    /// Removes a claim.
    fn remove_claim(&self, key: InKey);
    /// What a claim says.
    fn read(&self, claim: Self::Claim) -> InFlow;
    /// Enters the tick in which a reply last refreshed the flow.
    fn set_refreshed(&self, claim: Self::Claim, tick: u32);
    /// Enters the epoch under which its flow was last found to be allowed.
    fn set_claim_judged(&self, claim: Self::Claim, epoch: u32);
    /// Adds to what the guest received.
    fn received(&self, claim: Self::Claim, traffic: Traffic);
}

/// What of a packet concerns its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Address of the peer.
    pub peer: Ip,
    /// The peer's port; 0 for ICMP.
    pub peer_port: Be16,
    /// The port on the guest's side, or the ICMP echo identifier.
    pub local_port: Be16,
    /// TCP, UDP or ICMP.
    pub protocol: u8,
    /// TCP flags; 0 for other protocols.
    pub flags: u8,
    /// TCP: the sequence number after it.
    pub next: u32,
    /// TCP: the acknowledgement number.
    pub acknowledged: u32,
    /// What it adds to its flow's traffic.
    pub traffic: Traffic,
}

/// Ports of the shared address that new flows may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// The first one.
    pub base: u32,
    /// How many.
    pub count: u32,
}

impl Ports {
    /// Whether a port is one of them.
    #[inline(always)]
    #[must_use]
    pub const fn contains(self, port: Be16) -> bool {
        (port.get() as u32).wrapping_sub(self.base) < self.count
    }
}

/// Who gets a packet from the VPC, and at which port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receiver {
    /// The slot.
    pub slot: Slot,
    /// The guest's port.
    pub port: Be16,
}

/// What is wanted of the tables: a flow or a mapping that begins.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    key: OutKey,
    vni: u32,
    ports: Ports,
    sent: Traffic,
    now: u32,
    random: u32,
    epoch: u32,
    /// Number of the slot.
    number: u32,
}

impl Wanted {
    #[inline(always)]
    const fn claim(&self, port: Be16) -> InKey {
        self.key.claim(self.vni, port)
    }

    #[inline(always)]
    const fn back(&self) -> InFlow {
        let OutKey { ifindex, generation, guest_port, .. } = self.key;
        let (refreshed, judged) = (self.now, self.epoch as u16);
        InFlow { ifindex, generation, refreshed, guest_port, judged, received: Traffic::NONE }
    }

    #[inline(always)]
    const fn flow(&self, port: Be16) -> Flow {
        let state = FlowState::begin(self.key.protocol as u8, self.now, self.random);
        let state = if self.key.is_mapping() { state.of_mapping() } else { state };
        let (vni, check) = (self.vni, self.key.check());
        let (sent, began, judged) = (self.sent, self.now, self.epoch);
        Flow { state, vni, port, check, sent, ends: [0; 2], began, judged }
    }
}

/// The port that stands for the guest's in this flow, which the packet begins or keeps alive.
///
/// # Errors
/// Why there is none.
#[inline(always)]
pub fn outward<T: Tables>(
    tables: &T,
    slot: &Slot,
    ports: Ports,
    segment: &Segment,
) -> Result<Be16, Drop> {
    let mut port = Be16(0);
    outward_into(tables, slot, ports, segment, &mut port).map(|()| port)
}

/// [`outward`], which puts the port into `port`: one that is returned would have no value when there
/// is none, and the verifier wants one.
///
/// # Errors
/// As [`outward`].
#[inline(always)]
pub fn outward_into<T: Tables>(
    tables: &T,
    slot: &Slot,
    ports: Ports,
    segment: &Segment,
    port: &mut Be16,
) -> Result<(), Drop> {
    let key = OutKey {
        ifindex: slot.ifindex,
        generation: slot.attachment.generation(),
        peer: segment.peer,
        guest_port: segment.local_port,
        peer_port: segment.peer_port,
        protocol: segment.protocol as u32,
    };
    let now = tables.now();
    if resume(tables, slot, key, segment, now, port)? {
        return Ok(());
    }
    if !FlowState::can_begin(segment.protocol, segment.flags) || !tables.may_begin(key) {
        return Err(Drop::NoFlow);
    }
    if slot.epoch != 0 {
        tables.judge(slot, key)?;
    }
    let (vni, random, sent) = (slot.attachment.vni(), tables.random(), segment.traffic);
    let &Slot { epoch, number, .. } = slot;
    let is_udp = segment.protocol == UDP;
    if !is_udp || !mapped(tables, slot, key.mapping(), ports, now, port)? {
        let (key, sent) = if is_udp { (key.mapping(), Traffic::NONE) } else { (key, sent) };
        let wanted = Wanted { key, vni, ports, sent, now, random, epoch, number };
        tables.search(wanted, Purpose::Begin, port)?;
    }
    if is_udp {
        let wanted = Wanted { key, vni, ports, sent, now, random, epoch, number };
        tables.search(wanted, Purpose::Join, port)?;
    }
    Ok(())
}

/// Puts the port of the guest's flow that the packet keeps alive into `resumed`. False: there is no
/// such flow.
#[inline(always)]
fn resume<T: Tables>(
    tables: &T,
    slot: &Slot,
    key: OutKey,
    segment: &Segment,
    now: u32,
    resumed: &mut Be16,
) -> Result<bool, Drop> {
    let Some(Entered { flow, state, .. }) =
        refresh(tables, slot, key, Direction::Out, segment, now)?
    else {
        return Ok(false);
    };
    tables.sent(flow, segment.traffic);
    let (vni, port) = tables.place(flow);
    if segment.flags & tcp::FIN != 0 && state.is_closing() {
        // From now on, every packet of the peer's is looked at: it may acknowledge the end.
        if let Some(claim) = tables.claim(key.claim(vni, port)) {
            tables.set_refreshed(claim, now.wrapping_sub(tables.timers().grain(TCP)));
        }
    }
    *resumed = port;
    Ok(true)
}

/// Puts the port of a mapping, which a new flow keeps alive, into `found`. False: there is no
/// mapping yet.
///
/// A mapping on a port that the host has no more is for its flows, not for new ones: what they
/// send would go nowhere.
#[inline(always)]
fn mapped<T: Tables>(
    tables: &T,
    slot: &Slot,
    key: OutKey,
    ports: Ports,
    now: u32,
    found: &mut Be16,
) -> Result<bool, Drop> {
    let Some(Entered { flow, state, .. }) = enter(tables, slot, key, Direction::Out, None, now)?
    else {
        return Ok(false);
    };
    let (vni, port) = tables.place(flow);
    if ports.contains(port) {
        *found = port;
        return Ok(true);
    }
    if tables.exchange(flow, state, state.ended()) {
        remove(tables, key, vni, port, What::Withdrawn);
    }
    Ok(false)
}

/// Removes a flow that expired and lost its mapping, unless its state is another meanwhile.
#[inline(always)]
pub fn forget<T: Tables>(tables: &T, key: OutKey, flow: T::Flow, state: FlowState) {
    if tables.exchange(flow, state, state.ended()) {
        let (vni, port) = tables.place(flow);
        remove(tables, key, vni, port, What::Expired);
    }
}

/// Removes a flow or a mapping that the caller ended.
#[inline(always)]
fn remove<T: Tables>(tables: &T, key: OutKey, vni: u32, port: Be16, why: What) {
    tables.remove_flow(key, why);
    tables.remove_claim(key.claim(vni, port));
}

/// Whom a packet from the VPC is for.
///
/// # Errors
/// Why it is for nobody, and the slot that this concerns, or 0.
#[inline(always)]
pub fn inward<T: Tables>(tables: &T, vni: u32, segment: &Segment) -> Result<Receiver, (u32, Drop)> {
    let Segment { peer, peer_port, local_port: port, protocol, .. } = *segment;
    let key = InKey { vni, peer, peer_port, port, protocol: protocol as u32 };
    let (claim, found, slot) = find(tables, key, Drop::NoFlow)?;
    let InFlow { refreshed, guest_port, judged, .. } = found;

    // The state is the other table's: look there from time to time, when TCP turns, and when rules
    // changed.
    let now = tables.now();
    let grain = tables.timers().grain(protocol);
    let is_judged = judged == slot.epoch as u16;
    if is_due(refreshed, now, grain)
        || !is_judged
        || segment.flags & (tcp::SYN | tcp::FIN | tcp::RST) != 0
    {
        let state = match refresh(tables, &slot, key.flow(&found), Direction::In, segment, now) {
            Ok(Some(Entered { state, .. })) => state,
            Ok(None) => return Err((slot.number, Drop::NoFlow)),
            Err(reason) => return Err((slot.number, reason)),
        };
        // At worst, another flow's claim is refreshed late.
        let tick = if state.is_closing() { now.wrapping_sub(grain) } else { now };
        if refreshed != tick {
            tables.set_refreshed(claim, tick);
        }
        if !is_judged {
            tables.set_claim_judged(claim, slot.epoch);
        }
    }
    tables.received(claim, segment.traffic);
    Ok(Receiver { slot, port: guest_port })
}

/// Whether so much time passed since something was entered that it is due again.
#[inline(always)]
const fn is_due(entered: u32, now: u32, grain: u32) -> bool {
    // A packet on another CPU may have entered a later tick than this one's.
    now.wrapping_sub(entered) as i32 >= grain as i32
}

/// A claim that a peer names, and its slot; `missing` if there is none.
#[inline(always)]
fn find<T: Tables>(
    tables: &T,
    key: InKey,
    missing: Drop,
) -> Result<(T::Claim, InFlow, Slot), (u32, Drop)> {
    // What comes from no address is no answer to anybody: a mapping's claim is there.
    if key.peer.is_unspecified() {
        return Err((0, missing));
    }
    let claim = tables.claim(key).ok_or((0, missing))?;
    // One that is recycled meanwhile is another flow's, whose attachment is checked like any.
    let found = tables.read(claim);
    let slot = tables.receiver(key.vni, found.ifindex).ok_or((0, Drop::StaleFlow))?;
    if slot.attachment != Attachment::new(key.vni, found.generation) {
        return Err((slot.number, Drop::StaleFlow));
    }
    Ok((claim, found, slot))
}

/// The port that stands for the guest's in the flow that its ICMP error is about. Errors neither
/// refresh nor end a flow (RFC 5508, REQ-6).
///
/// # Errors
/// If there is no such flow, or it is not allowed.
#[inline(always)]
pub fn error_outward<T: Tables>(tables: &T, slot: &Slot, key: OutKey) -> Result<Be16, Drop> {
    let flow = tables.flow(key).ok_or(Drop::IcmpError)?;
    if tables.judged(flow) != slot.epoch {
        tables.judge(slot, key)?;
    }
    Ok(tables.place(flow).1)
}

/// Whom an ICMP error from the VPC about a packet of this flow is for.
///
/// # Errors
/// As [`inward`].
#[inline(always)]
pub fn error_inward<T: Tables>(tables: &T, key: InKey) -> Result<Receiver, (u32, Drop)> {
    let (_, flow, slot) = find(tables, key, Drop::IcmpError)?;
    if flow.judged != slot.epoch as u16 {
        tables.judge(&slot, key.flow(&flow)).map_err(|reason| (slot.number, reason))?;
    }
    Ok(Receiver { slot, port: flow.guest_port })
}

/// What was found of a flow or a mapping.
struct Entered<F> {
    flow: F,
    /// Its state with the packet.
    state: FlowState,
    /// Its state before.
    before: FlowState,
}

/// Enters a packet into its flow's state, and from time to time into its mapping's; none if the
/// flow is not there.
#[inline(always)]
fn refresh<T: Tables>(
    tables: &T,
    slot: &Slot,
    key: OutKey,
    direction: Direction,
    segment: &Segment,
    now: u32,
) -> Result<Option<Entered<T::Flow>>, Drop> {
    let found = enter(tables, slot, key, direction, Some(segment), now)?;
    if let Some(Entered { flow, state, before }) = found
        && key.protocol == UDP as u32
        && before.last_tick() != now
        && is_mapping_due(before.last_tick(), now, tables.timers().grain(UDP))
    {
        // If it is gone, it was just taken for idle: a flow that lives goes on alone.
        let mapping = enter(tables, slot, key.mapping(), Direction::Out, None, now);
        if direction == Direction::Out
            && before.is_expired(UDP, tables.timers(), now)
            && !matches!(mapping, Ok(Some(of)) if tables.place(of.flow) == tables.place(flow))
        {
            // Its port may be another's: it begins anew.
            tables.forget(key, state);
            return Ok(None);
        }
    }
    Ok(found)
}

/// Whether a flow's mapping, into which it was entered when it began, is due: once a grain of each
/// flow's, and at once if there is none.
#[inline(always)]
const fn is_mapping_due(before: u32, now: u32, grain: u32) -> bool {
    match (before.checked_div(grain), now.checked_div(grain)) {
        (Some(before), Some(now)) => before != now,
        _ => true,
    }
}

/// Enters a packet into the state of a flow, which it has judged if rules changed, or of a mapping
/// (without a packet); none if it is not there.
#[inline(always)]
fn enter<T: Tables>(
    tables: &T,
    slot: &Slot,
    key: OutKey,
    direction: Direction,
    packet: Option<&Segment>,
    now: u32,
) -> Result<Option<Entered<T::Flow>>, Drop> {
    let flags = packet.map_or(0, |segment| segment.flags);
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        attempt += 1;
        let Some(flow) = tables.flow(key) else {
            return Ok(None);
        };
        let found = tables.state(flow);
        if tables.check(flow) != key.check() {
            // It was removed, and the entry recycled, before its state was read. If that happens
            // afterwards, the exchange fails, for the state is another's. Only a flow of this very
            // tick goes without, and such a one does not expire.
            continue;
        }
        if found.is_ended() {
            return Err(Drop::NoFlow);
        }
        if direction == Direction::In
            && found.last_tick() != now
            && found.is_expired(key.protocol as u8, tables.timers(), now)
        {
            return Ok(None);
        }
        let mut all = false;
        if let Some(Segment { next, acknowledged, .. }) = packet {
            if tables.judged(flow) != slot.epoch {
                tables.judge(slot, key)?;
            }
            if flags & tcp::FIN != 0 {
                // Before the mark: who sees that, sees this.
                tables.set_end(flow, direction, *next);
            }
            if flags & tcp::ACK != 0 && found.other_closed(direction) {
                all = *acknowledged == tables.end(flow, direction.reversed());
            }
        }
        let state = found.after(direction, flags, all, now);
        let entered = Entered { flow, state, before: found };
        let exchanged = if found.is_counted() == state.is_counted() {
            state == found || tables.exchange(flow, found, state)
        } else {
            tables.turn(slot.number, key, found, state)?
        };
        if exchanged {
            return Ok(Some(entered));
        }
    }
    Err(Drop::Internal)
}

/// Puts a state in the place of another, of which one counts among what the slot holds, and the
/// other does not: whether it did.
///
/// # Errors
/// The limit that the flow would be beyond.
#[inline(always)]
pub fn turn<T: Tables>(
    tables: &T,
    number: u32,
    key: &OutKey,
    flow: T::Flow,
    found: FlowState,
    state: FlowState,
) -> Result<bool, Drop> {
    let was_counted = found.is_counted();
    if !was_counted {
        tables.grow(number, key)?;
    }
    let exchanged = tables.exchange(flow, found, state);
    // It counts no more; or it was counted in vain.
    if exchanged == was_counted {
        tables.shrink(number, key);
    }
    Ok(exchanged)
}

/// Asks the slot's policy, if it has one, whether a flow that begins may be, or one that was last
/// judged under another epoch. Such a one lapses if it is not allowed; then, and until the rules
/// change, they are asked again at each packet of its guest's.
///
/// # Errors
/// [`Drop::Denied`] if it is not allowed.
#[inline(always)]
pub fn judge<T: Tables>(
    tables: &T,
    guard: Guard,
    epoch: u32,
    key: &OutKey,
    flow: Option<T::Flow>,
) -> Result<(), Drop> {
    let is_allowed = epoch == 0 || tables.is_allowed(guard, epoch, key)?;
    if let Some(flow) = flow {
        let found = tables.state(flow);
        if tables.check(flow) == key.check() && !found.is_ended() {
            if is_allowed {
                tables.set_judged(flow, epoch);
            } else {
                let now = tables.now();
                // If another packet was faster, the next one makes it lapse.
                tables.exchange(
                    flow,
                    found,
                    found.lapsed(key.protocol as u8, tables.timers(), now),
                );
            }
        }
    }
    if is_allowed { Ok(()) } else { Err(Drop::Denied) }
}

/// What a sweep made of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It stays.
    Stays,
    /// It was idle for too long, and is removed.
    Expired,
    /// It was of a former attachment, and is removed.
    Stale,
}

/// Removes a flow or a mapping that ended and whose port has rested: ends it first, so that a
/// packet that comes meanwhile finds it ended, and one that came before makes the exchange fail.
/// One that ended and rests is counted no more.
#[inline(always)]
pub fn end<T: Tables>(tables: &T, key: OutKey, timers: &Timers, now: u32) -> Verdict {
    let Some(flow) = tables.flow(key) else {
        return Verdict::Stays;
    };
    let state = tables.state(flow);
    let (vni, port) = tables.place(flow);
    let slot = tables.slot(vni, key.ifindex);
    let (attachment, number) = slot.map_or((None, 0), |slot| (Some(slot.attachment), slot.number));
    let is_stale = attachment != Some(Attachment::new(vni, key.generation));
    let protocol = key.protocol as u8;
    let is_gone = state.is_gone(is_stale, protocol, timers, now);
    let rests = state.is_counted() && state.is_expired(protocol, timers, now);
    let new = if is_gone { state.ended() } else { state.uncounted() };
    if !(is_gone || rests)
        || state.is_ended()
        || tables.check(flow) != key.check()
        || !tables.exchange(flow, state, new)
    {
        return Verdict::Stays;
    }
    if !is_gone {
        tables.shrink(number, &key);
        return Verdict::Stays;
    }
    remove(tables, key, vni, port, state.end(is_stale, protocol));
    if is_stale { Verdict::Stale } else { Verdict::Expired }
}
