//! ICMP errors, translated for the flow of the packet that they embed (RFC 5508, sections 4 to 7).

use core::hint::black_box;
use core::ptr::null_mut;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_skb_load_bytes};
use aya_ebpf::programs::TcContext;
use warren_abi::checksum::fold;
use warren_abi::drop::Drop;
use warren_abi::flow::Direction;
use warren_abi::icmp::{IcmpError, IcmpErrorTcp, Subject};
use warren_abi::wire::{Be16, IpHeader, Ipv4, TCP};

use crate::nat;
use crate::parse::{IP, L4, Packet, at, pull};

/// Bytes that are summed at once.
const CHUNK: u32 = 64;
/// Chunks of the longest message that is summed: hosts and routers send up to 576 bytes
/// (RFC 1812, section 4.3.2.3).
const CHUNKS: u32 = 32;

/// The flow that an ICMP error is about. Its ports become the packet's, so that it takes the
/// flow's way.
#[inline(always)]
pub fn subject(
    ctx: &TcContext,
    packet: &mut Packet,
    direction: Direction,
) -> Result<Subject, Drop> {
    pull(ctx, (L4 + size_of::<IcmpErrorTcp>()) as u32);
    let error = at::<IcmpError>(ctx, L4).ok_or(Drop::Truncated)?;
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    let subject = unsafe { &*error }.subject(direction)?;
    packet.local_port = subject.local_port;
    packet.peer_port = subject.peer_port;
    Ok(subject)
}

/// Puts `address` and `port` in the place of the guest's side, in the error and in the packet
/// that it embeds.
#[inline(always)]
pub fn translate(
    ctx: &TcContext,
    packet: &Packet,
    subject: &Subject,
    direction: Direction,
    address: Ipv4,
    port: Be16,
) -> Result<(), Drop> {
    verify(ctx)?;
    nat::readdress(ctx, packet, direction, address)?;
    // SAFETY: `at` checked the bounds, here and below; every bit pattern is a value. The two
    // references are to different fields.
    unsafe {
        let error = &mut *at::<IcmpError>(ctx, L4).ok_or(Drop::Internal)?;
        let tcp = match at::<IcmpErrorTcp>(ctx, L4) {
            Some(longer) if subject.protocol == TCP && length(ctx)? >= TCP_LENGTH => {
                Some(&mut (*longer).checksum)
            }
            _ => None,
        };
        error.translate(subject, direction, address, port, tcp);
    }
    Ok(())
}

/// Length of a message that embeds TCP's checksum.
const TCP_LENGTH: u32 = size_of::<IcmpErrorTcp>() as u32;

/// The length of the ICMP message.
#[inline(always)]
fn length(ctx: &TcContext) -> Result<u32, Drop> {
    // SAFETY: `at` checked the bounds.
    let total = unsafe { (*at::<IpHeader>(ctx, IP).ok_or(Drop::Internal)?).total_length.get() };
    (total as u32).checked_sub(size_of::<IpHeader>() as u32).ok_or(Drop::Truncated)
}

/// Sums up the message: its checksum must be right (RFC 5508, REQ-3a), since what is made of it
/// is updated, not made anew.
#[inline(always)]
fn verify(ctx: &TcContext) -> Result<(), Drop> {
    let length = length(ctx)?;
    if length < size_of::<IcmpError>() as u32 {
        return Err(Drop::Truncated);
    }
    if length >= CHUNK * (CHUNKS + 1) {
        return Err(Drop::TooBig);
    }
    match warren_sum(ctx.skb.skb, length) {
        0xffff => Ok(()),
        sum if sum <= 0xffff => Err(Drop::BadChecksum),
        _ => Err(Drop::Truncated),
    }
}

/// More than a sum: the packet ends before.
const TRUNCATED: u32 = 1 << 16;

/// The sum of so many bytes from the transport header on (RFC 1071), folded, or [`TRUNCATED`].
///
/// A global function: the verifier looks at it once, not with each of the many ways to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_sum(skb: *mut __sk_buff, length: u32) -> u32 {
    let mut chunk = [0u32; CHUNK as usize / 4];
    let (mut sum, mut left, mut offset) = (0, length, L4 as u32);
    let mut index = 0;
    while index < CHUNKS {
        if left < CHUNK {
            break;
        }
        let Some(more) = sum_up(skb, &mut chunk, offset, CHUNK, sum) else { return TRUNCATED };
        sum = more;
        left -= CHUNK;
        offset += CHUNK;
        index += 1;
    }
    // The compiler knows that the mask changes nothing; the verifier does not.
    let left = black_box(left) & (CHUNK - 1);
    if left > 0 {
        chunk = [0; CHUNK as usize / 4];
        let Some(more) = sum_up(skb, &mut chunk, offset, left, sum) else { return TRUNCATED };
        sum = more;
    }
    fold(sum) as u32
}

/// Loads `length` bytes of the packet, at most a chunk, and adds all of the chunk to `sum`; none if
/// they are not there.
#[inline(always)]
fn sum_up(
    skb: *mut __sk_buff,
    chunk: &mut [u32; CHUNK as usize / 4],
    offset: u32,
    length: u32,
    sum: u32,
) -> Option<u32> {
    let buffer = chunk.as_mut_ptr();
    // SAFETY: the buffer has room for a chunk, and is initialised.
    unsafe {
        if bpf_skb_load_bytes(skb.cast(), offset, buffer.cast(), length) != 0 {
            return None;
        }
        Some(bpf_csum_diff(null_mut(), 0, buffer, CHUNK, sum) as u32)
    }
}
