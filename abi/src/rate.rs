//! How fast packets may come.

/// The generic cell rate algorithm (ITU-T I.371), a token bucket whose state is one time.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Time for one packet, in nanoseconds.
    pub interval_ns: u64,
    /// How many may come at once, at least 1.
    pub burst: u64,
}

/// How many ICMP errors of its own a host sends to a slot, and a proxy into a VPC: 1,000 a second,
/// 250 at once. More than path MTU discovery or a traceroute ever needs; it bounds what a flood of
/// packets that are dropped can have sent (RFC 1812, section 4.3.2.8; RFC 4443, section 2.4 f).
pub const ANSWERS: Rate = Rate { interval_ns: 1_000_000, burst: 250 };

impl Rate {
    /// Whether a packet may pass now. `due_ns` is what the last one left, or 0; returns what this
    /// one leaves. Times are of one clock, in nanoseconds.
    #[inline(always)]
    pub const fn admit(self, due_ns: u64, now_ns: u64) -> Option<u64> {
        let start = if due_ns > now_ns { due_ns } else { now_ns };
        if start - now_ns > (self.burst - 1) * self.interval_ns {
            return None;
        }
        Some(start + self.interval_ns)
    }
}
