//! The Internet checksum (RFC 1071). Sums do not depend on the order of bytes: words are as they
//! lie in memory.

/// A sum of words, folded to one (RFC 1071, section 4.1).
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// A checksum after some of the words under it changed (RFC 1624, equation 3).
#[inline(always)]
pub const fn update<const N: usize>(checksum: u16, old: [u16; N], new: [u16; N]) -> u16 {
    let mut sum = !checksum as u32;
    let mut index = 0;
    while index < N {
        sum += !old[index] as u32 + new[index] as u32;
        index += 1;
    }
    !fold(sum)
}
