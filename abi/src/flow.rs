//! The life of a flow, as pure functions: the programs and the sweep run them, tests explore them.

use crate::flowlog::What;
use crate::wire::{ICMP, TCP};

/// Which way a packet of a flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the guest.
    Out,
    /// To the guest.
    In,
}

impl Direction {
    /// The other one.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(self) -> Self {
        match self {
            Self::Out => Self::In,
            Self::In => Self::Out,
        }
    }
}

/// TCP flags, as in byte 13 of the header (RFC 9293).
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement is valid.
    pub const ACK: u8 = 0x10;
}

/// Nanoseconds of `CLOCK_MONOTONIC` in a tick, the unit of flows' time stamps: 1.07 s, since a
/// shift is cheaper than a division.
pub const TICK_NS: u64 = 1 << 30;

/// The tick in which a moment of `CLOCK_MONOTONIC`, in nanoseconds, lies.
#[inline]
pub const fn tick(ns: u64) -> u32 {
    (ns / TICK_NS) as u32
}

/// When a flow was last used, and how far it came: one word, so that it changes atomically.
///
/// A packet writes it only if it changes: once a tick, and at TCP's turning points.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowState(pub u64);

impl FlowState {
    const GUEST_SYN: u32 = 1;
    const PEER_SYN: u32 = 1 << 1;
    const GUEST_FIN: u32 = 1 << 2;
    const PEER_FIN: u32 = 1 << 3;
    const GUEST_RST: u32 = 1 << 4;
    const PEER_RST: u32 = 1 << 5;
    /// The guest acknowledged the peer's SYN: the connection stands.
    const STANDS: u32 = 1 << 6;
    /// The guest acknowledged the peer's FIN, and so all that came before it.
    const GUEST_DONE: u32 = 1 << 7;
    /// The peer acknowledged the guest's FIN.
    const PEER_DONE: u32 = 1 << 8;
    /// It is a mapping, which [lags behind](Timers::grain) its flows.
    const MAPPING: u32 = 1 << 9;
    /// It is not among what its slot holds: it expired, or came from a former version.
    const UNCOUNTED: u32 = 1 << 10;
    /// Rules ended it, not time.
    const DENIED: u32 = 1 << 11;
    /// A random number, 16 bits from here on: see [`FlowState::begin`].
    const NONCE: u32 = 12;
    const ENDED: u32 = 1 << 31;

    const BOTH_SYN: u32 = Self::GUEST_SYN | Self::PEER_SYN;
    const BOTH_FIN: u32 = Self::GUEST_FIN | Self::PEER_FIN;
    const BOTH_DONE: u32 = Self::GUEST_DONE | Self::PEER_DONE;

    #[inline]
    const fn pack(tick: u32, marks: u32) -> Self {
        Self((tick as u64) << 32 | marks as u64)
    }

    /// A flow that the guest's packet begins: any of UDP and ICMP, a SYN of TCP.
    ///
    /// Of `random`, 16 bits stay for as long as the flow lives: memory of a flow that ended may
    /// become another's, and who would end the former one by an exchange must not hit that.
    #[inline]
    pub const fn begin(protocol: u8, now: u32, random: u32) -> Self {
        let nonce = (random & 0xffff) << Self::NONCE;
        Self::pack(now, nonce | if protocol == TCP { Self::GUEST_SYN } else { 0 })
    }

    /// The same of the mapping that flows share.
    #[inline]
    #[must_use]
    pub const fn of_mapping(self) -> Self {
        Self(self.0 | Self::MAPPING as u64)
    }

    /// Whether a packet with these TCP flags (0 for other protocols) can begin a flow.
    #[inline]
    pub const fn can_begin(protocol: u8, flags: u8) -> bool {
        protocol != TCP || flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN
    }

    /// The tick of the last packet that kept the flow alive.
    #[inline]
    pub const fn last_tick(self) -> u32 {
        (self.0 >> 32) as u32
    }

    #[inline]
    const fn marks(self) -> u32 {
        self.0 as u32
    }

    /// Somebody decided to remove it: to every packet, it is not there.
    #[inline]
    pub const fn is_ended(self) -> bool {
        self.marks() & Self::ENDED != 0
    }

    /// What is put in its place before it is removed.
    #[inline]
    #[must_use]
    pub const fn ended(self) -> Self {
        Self::pack(self.last_tick(), self.marks() | Self::ENDED)
    }

    /// Whether it is among what its slot [holds](crate::limit::Held), or was until it ended: not if it
    /// is finished, and only kept for what may come late.
    #[inline]
    pub const fn is_counted(self) -> bool {
        let marks = self.marks();
        marks & Self::UNCOUNTED == 0 && !Self::is_finished(marks)
    }

    /// What is put in its place when it expired. A packet of its guest's has it count again.
    #[inline]
    #[must_use]
    pub const fn uncounted(self) -> Self {
        Self::pack(self.last_tick(), self.marks() | Self::UNCOUNTED)
    }

    /// As if it had been idle for longer than it may be: nothing gets through from outside, and its
    /// port rests. A packet of the guest's that may pass has it go on.
    #[inline]
    #[must_use]
    pub const fn lapsed(self, protocol: u8, timers: &Timers, now: u32) -> Self {
        if self.is_expired(protocol, timers, now) {
            return self;
        }
        let then = now.wrapping_sub(self.limit(protocol, timers)).wrapping_sub(1);
        Self::pack(then, self.marks() | Self::DENIED)
    }

    /// Whether one side began to close it: what is acknowledged from then on tells when it is
    /// finished.
    #[inline]
    pub const fn is_closing(self) -> bool {
        self.marks() & Self::BOTH_FIN != 0
    }

    /// Whether the other side than `direction`'s sender sent its FIN.
    #[inline]
    pub const fn other_closed(self, direction: Direction) -> bool {
        let mark = match direction {
            Direction::Out => Self::PEER_FIN,
            Direction::In => Self::GUEST_FIN,
        };
        self.marks() & mark != 0
    }

    /// Whether both sides closed it, or the guest reset it, or the peer refused it. What comes
    /// from the peer after that does not keep it alive.
    ///
    /// A reset from outside does not end an established flow: it may be forged (RFC 7857,
    /// section 2.2).
    #[inline]
    const fn is_closed(marks: u32) -> bool {
        marks & Self::BOTH_FIN == Self::BOTH_FIN || Self::is_reset(marks)
    }

    #[inline]
    const fn is_reset(marks: u32) -> bool {
        marks & Self::GUEST_RST != 0 || marks & (Self::PEER_RST | Self::PEER_SYN) == Self::PEER_RST
    }

    /// Whether nothing of the connection is outstanding: closed, and each side acknowledged the
    /// other's end; or reset.
    #[inline]
    const fn is_finished(marks: u32) -> bool {
        marks & Self::BOTH_DONE == Self::BOTH_DONE || Self::is_reset(marks)
    }

    /// The state after a packet with these TCP flags (0 for other protocols). `all` tells that it
    /// acknowledges the other side's FIN.
    #[inline]
    #[must_use]
    pub const fn after(self, direction: Direction, flags: u8, all: bool, now: u32) -> Self {
        let mut marks = self.marks();
        match direction {
            Direction::Out => {
                marks &= !(Self::UNCOUNTED | Self::DENIED);
                if flags & (tcp::SYN | tcp::ACK) == tcp::SYN && Self::is_closed(marks) {
                    // The guest opens the same flow anew.
                    marks = marks & 0xffff << Self::NONCE | Self::GUEST_SYN;
                }
                if flags & tcp::ACK != 0 && marks & Self::PEER_SYN != 0 {
                    marks |= Self::STANDS;
                }
                if flags & tcp::FIN != 0 {
                    marks |= Self::GUEST_FIN;
                }
                if flags & tcp::RST != 0 {
                    marks |= Self::GUEST_RST;
                }
                if all {
                    marks |= Self::GUEST_DONE;
                }
            }
            Direction::In => {
                if flags & tcp::SYN != 0 {
                    marks |= Self::PEER_SYN;
                }
                if flags & tcp::FIN != 0 {
                    marks |= Self::PEER_FIN;
                }
                if flags & tcp::RST != 0 {
                    marks |= Self::PEER_RST;
                }
                if all {
                    marks |= Self::PEER_DONE;
                }
                if Self::is_closed(self.marks()) {
                    return Self::pack(self.last_tick(), marks);
                }
            }
        }
        Self::pack(now, marks)
    }

    /// How many ticks this flow may be idle, at least.
    #[inline]
    pub const fn timeout(self, protocol: u8, timers: &Timers) -> u32 {
        let marks = self.marks();
        if protocol == ICMP {
            timers.icmp
        } else if protocol != TCP {
            timers.udp
        } else if Self::is_closed(marks) {
            timers.tcp_closed
        } else if marks & (Self::BOTH_FIN | Self::PEER_RST) != 0 {
            timers.tcp_closing
        } else if marks & (Self::BOTH_SYN | Self::STANDS) == Self::BOTH_SYN | Self::STANDS {
            timers.tcp_established
        } else {
            timers.tcp_opening
        }
    }

    /// How many ticks may pass after the last one that is entered until it has been idle for its
    /// time-out, whatever was not entered since.
    #[inline]
    const fn limit(self, protocol: u8, timers: &Timers) -> u32 {
        // A flow lags behind its replies, and a mapping behind its flows.
        let lags = if self.marks() & Self::MAPPING == 0 { 1 } else { 2 };
        self.timeout(protocol, timers).saturating_add(lags * timers.grain(protocol))
    }

    /// What stage it is in, for people: of TCP `opening`, `established`, `closing` or `closed`, of
    /// others `active`.
    pub const fn stage(self, protocol: u8) -> &'static str {
        let marks = self.marks();
        if protocol != TCP {
            "active"
        } else if Self::is_closed(marks) {
            "closed"
        } else if marks & (Self::BOTH_FIN | Self::PEER_RST) != 0 {
            "closing"
        } else if marks & (Self::BOTH_SYN | Self::STANDS) == Self::BOTH_SYN | Self::STANDS {
            "established"
        } else {
            "opening"
        }
    }

    /// How many ticks it has been idle.
    #[inline]
    pub const fn idle(self, now: u32) -> u32 {
        // A packet on another CPU may have stamped it with a later tick than this one's.
        let idle = now.wrapping_sub(self.last_tick()) as i32;
        if idle < 0 { 0 } else { idle as u32 }
    }

    /// Whether it was idle for longer than it may be: nothing from outside gets through any more.
    #[inline]
    pub const fn is_expired(self, protocol: u8, timers: &Timers, now: u32) -> bool {
        let idle = self.idle(now);
        idle > 0 && idle > self.limit(protocol, timers)
    }

    /// Whether it expired, and its port rested since (RFC 6888, REQ-8).
    ///
    /// What is closed rests while it is kept for the last segments.
    #[inline]
    pub const fn has_rested(self, protocol: u8, timers: &Timers, now: u32) -> bool {
        let (idle, timeout) = (self.idle(now), self.limit(protocol, timers));
        let until = if protocol == TCP && Self::is_closed(self.marks()) {
            if timeout > timers.rest { timeout } else { timers.rest }
        } else {
            timeout.saturating_add(timers.rest)
        };
        idle > 0 && idle > until
    }

    /// Whether it is to be removed: it expired and rested; if it is of a former attachment, it
    /// rested.
    #[inline]
    pub const fn is_gone(self, is_stale: bool, protocol: u8, timers: &Timers, now: u32) -> bool {
        let idle = self.idle(now);
        // Stale flows do not wait for a tick if there is nothing to wait for.
        is_stale && (timers.rest == 0 || idle > timers.rest)
            || self.has_rested(protocol, timers, now)
    }

    /// Why it ended, if it was removed in this state.
    #[inline]
    pub const fn end(self, is_stale: bool, protocol: u8) -> What {
        let marks = self.marks();
        if is_stale {
            What::Detached
        } else if protocol != TCP || !Self::is_closed(marks) {
            if marks & Self::DENIED == 0 { What::Expired } else { What::Denied }
        } else if Self::is_reset(marks) {
            What::Reset
        } else {
            What::Closed
        }
    }

    /// Whether another flow may have its port, if there is no better one: it is finished, or it
    /// expired. One that lives, never.
    ///
    /// RFC 6888, REQ-8, exceptions A and C: sessions are tracked, and filtering is address- and
    /// port-dependent.
    #[inline]
    pub const fn is_over(self, protocol: u8, timers: &Timers, now: u32) -> bool {
        (protocol == TCP && Self::is_finished(self.marks()))
            || self.is_expired(protocol, timers, now)
    }
}

/// How long flows may be idle, in ticks ([`TICK_NS`]).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timers {
    /// UDP.
    pub udp: u32,
    /// ICMP echo.
    pub icmp: u32,
    /// TCP until the connection stands.
    pub tcp_opening: u32,
    /// TCP while it stands.
    pub tcp_established: u32,
    /// TCP after one side closed it, or the peer reset it.
    pub tcp_closing: u32,
    /// TCP after both sides closed it, or it was reset: for retransmissions of the last segments.
    pub tcp_closed: u32,
    /// How long a port rests before another flow towards the same place gets it, unless there is
    /// no other.
    pub rest: u32,
}

impl Timers {
    /// At least so many seconds.
    pub const fn seconds(seconds: u32) -> u32 {
        (seconds as u64 * 1_000_000_000).div_ceil(TICK_NS) as u32
    }

    /// How many ticks may pass before a packet is entered where it would cost a look-up: a reply in
    /// its flow's state, a flow's packet in its mapping's. A quarter of the shortest timer, by
    /// which everything lives longer.
    #[inline]
    pub const fn grain(&self, protocol: u8) -> u32 {
        let timer = match protocol {
            ICMP => self.icmp,
            TCP => shorter(
                shorter(self.tcp_opening, self.tcp_established),
                shorter(self.tcp_closing, self.tcp_closed),
            ),
            _ => self.udp,
        };
        timer / 4
    }

    /// UDP 5 min (RFC 4787, REQ-5); ICMP 60 s (RFC 5508, REQ-2); TCP 4 min while it opens or
    /// closes and after a reset (RFC 7857, sections 2.1 and 2.2), 2 h 4 min established (RFC 5382,
    /// REQ-5); a rest of 120 s (RFC 6888, REQ-8).
    pub const DEFAULT: Self = Self {
        udp: Self::seconds(300),
        icmp: Self::seconds(60),
        tcp_opening: Self::seconds(240),
        tcp_established: Self::seconds(7440),
        tcp_closing: Self::seconds(240),
        tcp_closed: Self::seconds(240),
        rest: Self::seconds(120),
    };
}

#[inline]
const fn shorter(a: u32, b: u32) -> u32 {
    if a < b { a } else { b }
}

impl Default for Timers {
    fn default() -> Self {
        Self::DEFAULT
    }
}
