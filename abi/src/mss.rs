//! TCP's maximum segment size (RFC 9293, section 3.7.1): what fits the path, so that connections
//! need no path MTU discovery.

use crate::wire::Be16;

/// Room for a TCP header's options, which are 40 bytes at most; a power of two, so that masking is
/// a check of bounds.
pub const OPTIONS_ROOM: usize = 64;

/// Longest options of a TCP header.
const MAX_OPTIONS: usize = 40;

/// The largest segment that fits into packets of `mtu` bytes: without TCP's header and an IP header
/// of so many bytes, and without options, which the sender takes off (RFC 6691).
#[inline(always)]
pub const fn of_mtu(mtu: u16, ip_header: u16) -> u16 {
    mtu.saturating_sub(ip_header + 20)
}

/// An MSS option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mss {
    /// Where in the options the value is.
    pub at: usize,
    /// The value.
    pub value: Be16,
}

/// Looks for the MSS in `length` bytes of options, which zeroes follow; none if it is not there,
/// or the options are not well-formed up to it.
///
/// Byte by byte: to the verifier, one step is like the other, wherever the options lie.
#[inline(always)]
pub fn find(options: &[u8; OPTIONS_ROOM], length: usize) -> Option<Mss> {
    let mut skip = 0;
    let mut at = 0;
    while at <= MAX_OPTIONS - 4 {
        if skip > 0 {
            skip -= 1;
        } else {
            match (options[at], options[at + 1]) {
                // No operation.
                (1, _) => {}
                // The end of the list, or no end of an option.
                (0, _) | (_, 0 | 1) => return None,
                (2, 4) if at + 4 <= length => {
                    let value = Be16(u16::from_ne_bytes([options[at + 2], options[at + 3]]));
                    return Some(Mss { at: at + 2, value });
                }
                (_, size) => skip = size - 1,
            }
        }
        at += 1;
    }
    None
}
