//! Ports of a shared address: blocks, and the order in which a flow tries them.

use core::num::NonZeroU32;

/// Ports in a block.
pub const BLOCK_PORTS: u32 = 64;

/// How many ports a new flow tries before it gives up.
pub const MAX_PROBES: u32 = 64;

/// The block that a port belongs to.
#[inline]
pub const fn block_of(port: u16) -> u32 {
    port as u32 / BLOCK_PORTS
}

/// The port that a new flow tries at its `probe`-th attempt, of `count` ports from `base` on.
///
/// `random` scatters both the start (RFC 6056, algorithm 1: ports are not to be guessed) and the
/// stride. The stride is odd: if `count` is a power of two, the first `count` probes meet each
/// port once.
#[inline]
pub fn probe_port(base: u32, count: NonZeroU32, random: u32, probe: u32) -> u16 {
    let stride = (random >> 16) | 1;
    let offset = random.wrapping_add(probe.wrapping_mul(stride)) % count;
    (base + offset) as u16
}

/// How many source ports the tunnel has.
pub const TUNNEL_PORTS: u32 = 1 << 14;

/// Numbers the tunnel's source ports, from 0 to [`TUNNEL_PORTS`] less 1.
#[inline]
pub const fn tunnel_port_index(port: u16) -> u32 {
    port as u32 % TUNNEL_PORTS
}

/// The UDP source port of a flow's outer header, 49152 to 65535 (RFC 7348, section 5): the same
/// for all of its packets, so that the underlay keeps them in order.
#[inline]
pub const fn tunnel_port(addresses: u32, ports: u32, protocol: u8) -> u16 {
    // The finaliser of MurmurHash3.
    let mut hash = addresses ^ ports.rotate_left(13) ^ (protocol as u32) << 24;
    hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
    0xc000 | (hash ^ hash >> 16) as u16 & 0x3fff
}
