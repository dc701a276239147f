//! The Internet checksum (RFC 1071). Sums do not depend on the order of bytes: words are as they
//! lie in memory.

/// A sum of words, folded to one (RFC 1071, section 4.1).
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// What to add to a sum of words, of which some change (RFC 1624, equation 3).
#[inline(always)]
pub const fn difference<const N: usize>(old: [u16; N], new: [u16; N]) -> u32 {
    let mut sum = 0;
    let mut index = 0;
    while index < N {
        sum += !old[index] as u32 + new[index] as u32;
        index += 1;
    }
    sum
}

/// A checksum after `difference` was added to the sum under it, which is below 2^32 - 2^16.
#[inline(always)]
pub const fn adjust(checksum: u16, difference: u32) -> u16 {
    !fold(!checksum as u32 + difference)
}

/// A checksum after some of the words under it changed.
#[inline(always)]
pub const fn update<const N: usize>(checksum: u16, old: [u16; N], new: [u16; N]) -> u16 {
    adjust(checksum, difference(old, new))
}

/// The checksum that is the same after it is computed over itself and words whose sum is `rest`.
///
/// It is half of what is missing, and half is the rotation by one bit: twice a word is the rotation
/// back, as carries come in again at the other end.
#[inline(always)]
pub const fn settled(rest: u16) -> u16 {
    match (!rest).rotate_right(1) {
        0 => 0xffff,
        checksum => checksum,
    }
}
