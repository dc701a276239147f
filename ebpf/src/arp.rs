//! ARP (RFC 826), answered in place.

use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::wire::{Arp, Be16, ETHERTYPE_IPV4, Ethernet, Mac};

use crate::parse::{IP, at};

/// The ARP message behind the Ethernet header, of the kind for Ethernet and IPv4.
#[inline(always)]
pub fn message(ctx: &TcContext) -> Result<Arp, Drop> {
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    let arp = unsafe { *at::<Arp>(ctx, IP).ok_or(Drop::Truncated)? };
    let lengths = (arp.hardware_length, arp.protocol_length);
    if arp.hardware != Be16::new(1) || arp.protocol != ETHERTYPE_IPV4 || lengths != (6, 4) {
        return Err(Drop::UnexpectedArp);
    }
    Ok(arp)
}

/// Turns the request `arp` into the reply that `mac` has its target, and sends it back.
#[inline(always)]
pub fn reply(ctx: &TcContext, arp: &Arp, mac: Mac, ifindex: u32) -> Result<i32, Drop> {
    #[repr(C, packed(2))]
    struct Frame {
        ethernet: Ethernet,
        arp: Arp,
    }

    let frame = at::<Frame>(ctx, 0).ok_or(Drop::Truncated)?;
    // SAFETY: `at` checked the bounds.
    unsafe {
        (*frame).ethernet.destination = arp.sender_mac;
        (*frame).ethernet.source = mac;
        (*frame).arp.operation = Arp::REPLY;
        (*frame).arp.sender_mac = mac;
        (*frame).arp.sender = arp.target;
        (*frame).arp.target_mac = arp.sender_mac;
        (*frame).arp.target = arp.sender;
        Ok(bpf_redirect(ifindex, 0) as i32)
    }
}
