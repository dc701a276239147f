//! ICMP errors, translated for the flow of the packet that they embed (RFC 5508, sections 4 to 7).

use core::hint::black_box;
use core::mem::MaybeUninit;
use core::ptr::null_mut;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_skb_load_bytes};
use aya_ebpf::programs::TcContext;
use warren_abi::checksum::fold;
use warren_abi::drop::Drop;
use warren_abi::family::Family;
use warren_abi::flow::Direction;
use warren_abi::icmp::{IcmpError, IcmpErrorTcp, Subject};
use warren_abi::wire::{Be16, TCP};

use crate::nat;
use crate::parse::{IP, Packet, at, l4, pull};
use crate::stack;

/// Bytes that are summed at once.
const CHUNK: u32 = 64;
/// Chunks of the longest message that is summed: hosts and routers send up to 576 bytes
/// (RFC 1812, section 4.3.2.3).
const CHUNKS: u32 = 32;

/// The flow that an ICMP error is about. Its ports become the packet's, so that it takes the
/// flow's way.
#[inline(always)]
pub fn subject<F: Family>(
    ctx: &TcContext,
    packet: &mut Packet<F>,
    direction: Direction,
) -> Result<Subject<F::Address>, Drop> {
    pull(ctx, (l4::<F>() + size_of::<IcmpErrorTcp<F>>()) as u32);
    let error = at::<IcmpError<F>>(ctx, l4::<F>()).ok_or(Drop::Truncated)?;
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    let subject = unsafe { &*error }.subject(direction)?;
    packet.local_port = subject.local_port;
    packet.peer_port = subject.peer_port;
    Ok(subject)
}

/// Puts `address` and `port` in the place of the guest's side, in the error and in the packet
/// that it embeds.
#[inline(always)]
pub fn translate<F: Family>(
    ctx: &TcContext,
    packet: &Packet<F>,
    subject: &Subject<F::Address>,
    direction: Direction,
    address: F::Address,
    port: Be16,
) -> Result<(), Drop> {
    let length = verify::<F>(ctx)?;
    nat::readdress(ctx, packet, direction, address)?;
    // SAFETY: `at` checked the bounds, here and below; every bit pattern is a value. The two
    // references are to different fields.
    unsafe {
        let error = &mut *at::<IcmpError<F>>(ctx, l4::<F>()).ok_or(Drop::Internal)?;
        let tcp = match at::<IcmpErrorTcp<F>>(ctx, l4::<F>()) {
            Some(longer)
                if subject.protocol == TCP && length >= size_of::<IcmpErrorTcp<F>>() as u32 =>
            {
                Some(&mut (*longer).checksum)
            }
            _ => None,
        };
        error.translate(subject, direction, address, port, tcp);
    }
    Ok(())
}

/// Sums up the message: its checksum must be right (RFC 5508, REQ-3a), since what is made of it
/// is updated, not made anew. Returns its length.
#[inline(always)]
fn verify<F: Family>(ctx: &TcContext) -> Result<u32, Drop> {
    // SAFETY: `at` checked the bounds.
    let header = unsafe { &*at::<F::Header>(ctx, IP).ok_or(Drop::Internal)? };
    let length = F::length(header).checked_sub(F::HEADER as u32).ok_or(Drop::Truncated)?;
    if length < size_of::<IcmpError<F>>() as u32 {
        return Err(Drop::Truncated);
    }
    if length >= CHUNK * (CHUNKS + 1) {
        return Err(Drop::TooBig);
    }
    let pseudo = F::pseudo_sum(header);
    match warren_sum(ctx.skb.skb, l4::<F>() as u32, length, pseudo) {
        0xffff => Ok(length),
        sum if sum <= 0xffff => Err(Drop::BadChecksum),
        _ => Err(Drop::Truncated),
    }
}

/// More than a sum: the packet ends before.
const TRUNCATED: u32 = 1 << 16;

/// The sum of so many bytes from `offset` on and of `sum` (RFC 1071), folded, or [`TRUNCATED`].
///
/// A global function: the verifier looks at it once, not with each of the many ways to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_sum(skb: *mut __sk_buff, offset: u32, length: u32, sum: u32) -> u32 {
    let mut room = MaybeUninit::uninit();
    let chunk = stack::zero(&mut room);
    let (mut sum, mut left, mut offset) = (sum, length, offset);
    let mut index = 0;
    while index < CHUNKS {
        if left < CHUNK {
            break;
        }
        let Some(more) = sum_up(skb, chunk, offset, CHUNK, sum) else { return TRUNCATED };
        sum = more;
        left -= CHUNK;
        offset += CHUNK;
        index += 1;
    }
    if left > 0 {
        // The compiler knows that this changes nothing; the verifier does not. Before Linux 6.8, nor
        // does it learn from the comparison that there is a byte at least.
        let left = (black_box(left - 1) & (CHUNK - 1)) + 1;
        let chunk = stack::zero(&mut room);
        let Some(more) = sum_up(skb, chunk, offset, left, sum) else { return TRUNCATED };
        sum = more;
    }
    fold(sum) as u32
}

/// Loads `length` bytes of the packet, at most a chunk, and adds all of the chunk to `sum`; none if
/// they are not there.
#[inline(always)]
fn sum_up(
    skb: *mut __sk_buff,
    chunk: &mut [u64; CHUNK as usize / 8],
    offset: u32,
    length: u32,
    sum: u32,
) -> Option<u32> {
    let buffer = chunk.as_mut_ptr().cast();
    // SAFETY: the buffer has room for a chunk, and is initialised.
    unsafe {
        if bpf_skb_load_bytes(skb.cast(), offset, chunk.as_mut_ptr().cast(), length) != 0 {
            return None;
        }
        Some(bpf_csum_diff(null_mut(), 0, buffer, CHUNK, sum) as u32)
    }
}
