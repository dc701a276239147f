//! The life of a flow, as pure functions: the programs and the sweep run them, tests explore them.

use crate::wire::{ICMP, TCP};

/// Which way a packet of a flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the guest.
    Out,
    /// To the guest.
    In,
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
    const ENDED: u32 = 1 << 31;

    const BOTH_FIN: u32 = Self::GUEST_FIN | Self::PEER_FIN;

    #[inline]
    const fn pack(tick: u32, marks: u32) -> Self {
        Self((tick as u64) << 32 | marks as u64)
    }

    /// A flow that the guest's packet begins: any of UDP and ICMP, a SYN of TCP.
    #[inline]
    pub const fn begin(protocol: u8, now: u32) -> Self {
        Self::pack(now, if protocol == TCP { Self::GUEST_SYN } else { 0 })
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

    /// The sweep decided to remove it: to every packet, it is not there.
    #[inline]
    pub const fn is_ended(self) -> bool {
        self.marks() & Self::ENDED != 0
    }

    /// What the sweep puts in its place before it removes it.
    #[inline]
    #[must_use]
    pub const fn ended(self) -> Self {
        Self::pack(self.last_tick(), self.marks() | Self::ENDED)
    }

    /// Whether both sides closed it, or the guest reset it, or the peer refused it. What comes
    /// from the peer after that does not keep it alive.
    ///
    /// A reset from outside does not end an established flow: it may be forged (RFC 7857,
    /// section 2).
    #[inline]
    const fn is_closed(marks: u32) -> bool {
        marks & Self::BOTH_FIN == Self::BOTH_FIN
            || marks & Self::GUEST_RST != 0
            || marks & (Self::PEER_RST | Self::PEER_SYN) == Self::PEER_RST
    }

    /// The state after a packet with these TCP flags (0 for other protocols).
    #[inline]
    #[must_use]
    pub const fn after(self, direction: Direction, flags: u8, now: u32) -> Self {
        let mut marks = self.marks();
        match direction {
            Direction::Out => {
                if flags & (tcp::SYN | tcp::ACK) == tcp::SYN && Self::is_closed(marks) {
                    // The guest opens the same flow anew.
                    marks = Self::GUEST_SYN;
                }
                if flags & tcp::FIN != 0 {
                    marks |= Self::GUEST_FIN;
                }
                if flags & tcp::RST != 0 {
                    marks |= Self::GUEST_RST;
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
                if Self::is_closed(self.marks()) {
                    return Self::pack(self.last_tick(), marks);
                }
            }
        }
        Self::pack(now, marks)
    }

    /// How many ticks this flow may be idle.
    #[inline]
    pub const fn timeout(self, protocol: u8, timers: &Timers) -> u32 {
        let marks = self.marks();
        if protocol == ICMP {
            timers.icmp
        } else if protocol != TCP {
            timers.udp
        } else if Self::is_closed(marks) {
            timers.tcp_closed
        } else if marks & (Self::BOTH_FIN | Self::PEER_RST) != 0
            || marks & (Self::GUEST_SYN | Self::PEER_SYN) != Self::GUEST_SYN | Self::PEER_SYN
        {
            timers.tcp_transitory
        } else {
            timers.tcp_established
        }
    }

    /// Whether it was idle for longer than it may be.
    #[inline]
    pub const fn is_expired(self, protocol: u8, timers: &Timers, now: u32) -> bool {
        // A packet on another CPU may have stamped it with a later tick than the sweep's.
        let idle = now.wrapping_sub(self.last_tick()) as i32;
        idle > 0 && idle as u32 > self.timeout(protocol, timers)
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
    /// TCP while it opens and while it closes.
    pub tcp_transitory: u32,
    /// TCP while it stands.
    pub tcp_established: u32,
    /// TCP after both sides closed, or a reset: for retransmissions of the last segments.
    pub tcp_closed: u32,
}

impl Timers {
    /// At least so many seconds.
    const fn seconds(seconds: u64) -> u32 {
        (seconds * 1_000_000_000).div_ceil(TICK_NS) as u32
    }

    /// UDP 5 min (RFC 4787, REQ-5); ICMP 60 s (RFC 5508, REQ-2); TCP 4 min transitory and
    /// 2 h 4 min established (RFC 5382, REQ-5), 10 s closed.
    pub const DEFAULT: Self = Self {
        udp: Self::seconds(300),
        icmp: Self::seconds(60),
        tcp_transitory: Self::seconds(240),
        tcp_established: Self::seconds(7440),
        tcp_closed: Self::seconds(10),
    };
}

impl Default for Timers {
    fn default() -> Self {
        Self::DEFAULT
    }
}
