//! What TAPs carried, by the kernel's statistics of them.

use warren_abi::maps::Traffic;

/// What a slot's TAP carried since it was made, what was dropped behind it included: packets as they
/// cross it, before they are segmented, and bytes with Ethernet headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// By the guest.
    pub sent: Traffic,
    /// By the guest.
    pub received: Traffic,
}

impl Carried {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        self.each(other, |one, other| one + other)
    }

    /// What came after `before`; all of it if the TAP was made since.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        self.each(before, |now, before| now.checked_sub(before).unwrap_or(now))
    }

    fn each(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
        let traffic = |one: Traffic, other: Traffic| Traffic {
            packets: f(one.packets, other.packets),
            bytes: f(one.bytes, other.bytes),
        };
        Self {
            sent: traffic(self.sent, other.sent),
            received: traffic(self.received, other.received),
        }
    }
}
