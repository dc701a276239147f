//! The maximum segment size that both sides of a TCP connection tell each other, made to fit the
//! tunnel.

use core::hint::black_box;

use aya_ebpf::helpers::generated::{bpf_skb_load_bytes, bpf_skb_store_bytes};
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::flow::tcp;
use warren_abi::mss::{Mss, OPTIONS_ROOM, find, of_mtu};
use warren_abi::wire::{Be16, IpHeader, VXLAN_OVERHEAD};

use crate::maps::underlay;
use crate::parse::{L4, Packet};

/// Length of a TCP header without options.
const TCP_HEADER: usize = 20;

/// Clamps the MSS that a SYN announces to what fits; leaves all other packets as they are.
#[inline(always)]
pub fn clamp(ctx: &TcContext, packet: &Packet) -> Result<(), Drop> {
    if packet.flags & tcp::SYN == 0 {
        return Ok(());
    }
    let plain = (size_of::<IpHeader>() + TCP_HEADER) as u32;
    // The compiler knows that the mask changes nothing; the verifier does not.
    let length = black_box(packet.header_length - plain) & (OPTIONS_ROOM as u32 - 1);
    if length == 0 {
        return Ok(());
    }
    let options = L4 + TCP_HEADER;
    let mut bytes = [0u8; OPTIONS_ROOM];
    // SAFETY: the buffer has room for as many bytes as the mask allows.
    let loaded = unsafe {
        bpf_skb_load_bytes(ctx.skb.skb.cast(), options as u32, bytes.as_mut_ptr().cast(), length)
    };
    if loaded != 0 {
        return Err(Drop::Truncated);
    }
    let new = Be16::new(of_mtu((underlay().mtu - VXLAN_OVERHEAD as u32) as u16));
    let Some(Mss { at, value: old }) = find(&bytes, length as usize) else {
        return Ok(());
    };
    if old.get() <= new.get() {
        return Ok(());
    }
    // SAFETY: two bytes are read from `new`.
    let stored = unsafe {
        let from = (&raw const new).cast();
        bpf_skb_store_bytes(ctx.skb.skb, (options + at) as u32, from, 2, 0)
    };
    // At an odd place, the bytes count the other way round (RFC 1071, section 2).
    let turn = (at as u32 & 1) * 8;
    let (old, new) = (old.0.rotate_left(turn) as u64, new.0.rotate_left(turn) as u64);
    if stored != 0 || ctx.l4_csum_replace(L4 + 16, old, new, 2).is_err() {
        return Err(Drop::Internal);
    }
    Ok(())
}
