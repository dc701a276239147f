//! Who of a VPC's proxies owns its shared address: the one that claimed it last.
//!
//! A proxy tells hosts of its claims, and the other proxies, in UDP packets from and to [`PORT`]. On
//! a host, the program at the underlay takes them in: traffic follows while the daemon is not there.

use crate::wire::{Be16, Ip};

/// UDP port of claims, of their sender and receiver.
pub const PORT: u16 = 7785;

/// Most claims in one packet to a host.
pub const MOST: usize = 16;

/// What a packet is.
pub mod kind {
    /// To a host: claims of the sender's.
    pub const CLAIMS: u8 = 1;
    /// From a host: it knows of all these claims. A greater number than it was told is another's, which
    /// is valid.
    pub const KNOWN: u8 = 2;
    /// To a proxy: what the sender says of itself and all VPCs.
    pub const STATEMENTS: u8 = 3;
    /// To a proxy: may it say that, too.
    pub const QUERY: u8 = 4;
}

/// What a packet begins with.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// [`Header::VERSION`].
    pub version: u8,
    /// One of [`kind`].
    pub kind: u8,
    /// How many [`Entry`]s follow.
    pub count: Be16,
}

impl Header {
    /// The only version.
    pub const VERSION: u8 = 1;
}

/// One claim, or what a proxy says of one VPC.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Of [`Entry::UNWILLING`] and [`Entry::OWNER`].
    pub flags: u8,
    /// The VPC's VNI, 24 bits.
    pub vni: [u8; 3],
    /// [`Claim::sequence`] of the last claim that the sender knows of; 0: of none.
    pub sequence: [Be16; 2],
}

impl Entry {
    /// Flag: the sender does not want the address.
    pub const UNWILLING: u8 = 1;
    /// Flag: the claim is the sender's.
    pub const OWNER: u8 = 2;

    /// Of a VPC.
    #[inline(always)]
    #[must_use]
    pub const fn new(vni: u32, sequence: u32, flags: u8) -> Self {
        let [_, a, b, c] = vni.to_be_bytes();
        let sequence = [Be16::new((sequence >> 16) as u16), Be16::new(sequence as u16)];
        Self { flags, vni: [a, b, c], sequence }
    }

    /// The VPC's VNI.
    #[inline(always)]
    #[must_use]
    pub const fn vni(&self) -> u32 {
        let [a, b, c] = self.vni;
        (a as u32) << 16 | (b as u32) << 8 | c as u32
    }

    /// The sequence number.
    #[inline(always)]
    #[must_use]
    pub const fn sequence(&self) -> u32 {
        let [high, low] = self.sequence;
        (high.get() as u32) << 16 | low.get() as u32
    }
}

/// A claim: the value of [`names::CLAIMS`](crate::maps::names::CLAIMS).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Counts up from one claim of a VPC's address to the next; the seconds of the claim's time
    /// since 1970, at least, so that it does so after all proxies forgot.
    pub sequence: u32,
    /// The proxy, by its underlay address.
    pub proxy: Ip,
}

impl Claim {
    /// Whether it is valid where `other` was until now. Of two at once, everyone takes the same.
    #[inline(always)]
    #[must_use]
    pub const fn replaces(&self, other: &Self) -> bool {
        // Serial number arithmetic (RFC 1982).
        match self.sequence.wrapping_sub(other.sequence) {
            0 => !self.proxy.is(other.proxy) && is_greater(self.proxy.0, other.proxy.0),
            ahead => ahead < 1 << 31,
        }
    }
}

#[inline(always)]
const fn is_greater(a: [u32; 4], b: [u32; 4]) -> bool {
    // Addresses of one underlay differ in the last words first.
    if a[3] != b[3] {
        return u32::from_be(a[3]) > u32::from_be(b[3]);
    }
    if a[2] != b[2] {
        return u32::from_be(a[2]) > u32::from_be(b[2]);
    }
    if a[1] != b[1] {
        return u32::from_be(a[1]) > u32::from_be(b[1]);
    }
    u32::from_be(a[0]) > u32::from_be(b[0])
}

const _: () = assert!(size_of::<Header>() == 4 && size_of::<Entry>() == 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_claim_is_valid_for_everyone() {
        let claim = |sequence, last| Claim { sequence, proxy: Ip([0, 0, 0, u32::to_be(last)]) };
        assert!(claim(8, 1).replaces(&claim(7, 2)));
        assert!(!claim(7, 2).replaces(&claim(8, 1)));
        assert!(claim(3, 1).replaces(&claim(u32::MAX - 3, 2)));
        assert!(claim(7, 2).replaces(&claim(7, 1)) && !claim(7, 1).replaces(&claim(7, 2)));
        assert!(!claim(7, 1).replaces(&claim(7, 1)));
    }

    #[test]
    fn an_entry_holds_what_it_was_made_of() {
        let entry = Entry::new(0x0012_3456, 0x789a_bcde, Entry::OWNER);
        assert_eq!((entry.vni(), entry.sequence(), entry.flags), (0x12_3456, 0x789a_bcde, 2));
    }
}
