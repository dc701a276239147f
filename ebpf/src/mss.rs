//! The maximum segment size that both sides of a TCP connection tell each other, made to fit the
//! tunnel.

use core::hint::black_box;
use core::mem::MaybeUninit;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{bpf_skb_load_bytes, bpf_skb_store_bytes};
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::family::Family;
use warren_abi::flow::tcp;
use warren_abi::mss::{Mss, OPTIONS_ROOM, find, of_mtu};
use warren_abi::wire::Be16;

use crate::maps::End;
use crate::parse::{IP, Packet, l4};
use crate::stack;

/// Length of a TCP header without options.
const TCP_HEADER: usize = 20;

/// Clamps the MSS that a SYN announces to what fits; leaves all other packets as they are.
#[inline(always)]
pub fn clamp<F: Family>(ctx: &TcContext, packet: &Packet<F>) -> Result<(), Drop> {
    let plain = (F::HEADER + TCP_HEADER) as u32;
    if packet.flags & tcp::SYN == 0 || packet.header_length == plain {
        return Ok(());
    }
    match warren_clamp(ctx.skb.skb, l4::<F>() as u32, packet.header_length - plain) {
        0 => Ok(()),
        _ => Err(Drop::Internal),
    }
}

/// [`clamp`], where TCP's header is at `header` and has so many bytes of options: 0, or 1 if a
/// helper failed.
///
/// A global function: the verifier looks at it once, not with each of the many ways to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_clamp(skb: *mut __sk_buff, header: u32, length: u32) -> u32 {
    let ctx = TcContext::new(skb);
    if length == 0 {
        return 0;
    }
    // The compiler knows that this changes nothing; the verifier does not. Before Linux 6.8, nor does
    // it learn from the comparison that there is a byte at least.
    let length = (black_box(length - 1) & (OPTIONS_ROOM as u32 - 1)) + 1;
    let options = header as usize + TCP_HEADER;
    let mut words = MaybeUninit::<[u64; OPTIONS_ROOM / 8]>::uninit();
    let words: *mut [u8; OPTIONS_ROOM] = (&raw mut *stack::zero(&mut words)).cast();
    // SAFETY: they are as many bytes, and nobody else's.
    let bytes = unsafe { &mut *words };
    // SAFETY: the buffer has room for as many bytes as the mask and 1 allow.
    let loaded = unsafe {
        bpf_skb_load_bytes(skb.cast(), options as u32, bytes.as_mut_ptr().cast(), length)
    };
    if loaded != 0 {
        return 1;
    }
    let mtu = End::inner_mtu() as u16;
    let new = Be16::new(of_mtu(mtu, (header - IP as u32) as u16));
    let Some(Mss { at, value: old }) = find(bytes, length as usize) else {
        return 0;
    };
    if old.get() <= new.get() {
        return 0;
    }
    // SAFETY: two bytes are read from `new`.
    let stored = unsafe {
        let from = (&raw const new).cast();
        bpf_skb_store_bytes(skb, (options + at) as u32, from, 2, 0)
    };
    // At an odd place, the bytes count the other way round (RFC 1071, section 2).
    let turn = (at as u32 & 1) * 8;
    let (old, new) = (old.0.rotate_left(turn) as u64, new.0.rotate_left(turn) as u64);
    u32::from(stored != 0 || ctx.l4_csum_replace(header as usize + 16, old, new, 2).is_err())
}
