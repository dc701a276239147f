//! ICMP errors of the data path's own: why a packet went no further (RFC 1812, section 4.3).
//!
//! One for one, to who sent the packet, and no longer than 82 bytes, so that nobody can be flooded
//! by them but who asks for it; no further limit. What a guest gets is made on its own VMM's time,
//! inside the `write` to the TAP.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use warren_abi::checksum::{fold, settled};
use warren_abi::drop::Drop;
use warren_abi::icmp::{Reason, is_error};
use warren_abi::wire::{
    Be16, ETHERTYPE_IPV4, Ethernet, ICMP, IpHeader, Ipv4, Mac, TCP, UDP, VXLAN_OVERHEAD,
};

use crate::maps::underlay;
use crate::parse::{IP, L4, at};

/// Who answers, and where the answer leaves.
pub struct Answerer {
    /// MAC address.
    pub mac: Mac,
    /// Address.
    pub address: Ipv4,
    /// Index of the interface that the packet came from.
    pub ifindex: u32,
}

/// The answer, which embeds `N` words of the packet's transport.
#[repr(C, packed(2))]
struct Message<const N: usize> {
    ethernet: Ethernet,
    ip: IpHeader,
    kind: [u8; 2],
    checksum: u16,
    rest: [Be16; 2],
    about: IpHeader,
    l4: [u16; N],
}

/// Answers a packet that was parsed, is unchanged, and was dropped for `reason`, if that is
/// something its sender should know: returns the program's verdict then.
#[inline(always)]
pub fn send(ctx: &TcContext, from: &Answerer, reason: Drop) -> Option<i32> {
    let mtu = underlay().mtu - VXLAN_OVERHEAD as u32;
    let why = Reason::of(reason, mtu as u16)?;
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    let (ip, [kind, _]) = unsafe { (*at::<IpHeader>(ctx, IP)?, *at::<[u8; 2]>(ctx, L4)?) };
    if why.is_about_df() && ip.fragment.0 & IpHeader::DF.0 == 0 {
        return None;
    }
    match ip.protocol {
        TCP => message::<10>(ctx, from, &why, 8),
        UDP => message::<4>(ctx, from, &why, 3),
        // Never an error about an error (RFC 1122, section 3.2.2).
        ICMP if !is_error(kind) => message::<4>(ctx, from, &why, 1),
        _ => None,
    }
}

/// Makes the message of the packet, in whose transport header the checksum is the word at `index`.
#[inline(always)]
fn message<const N: usize>(
    ctx: &TcContext,
    from: &Answerer,
    why: &Reason,
    index: usize,
) -> Option<i32> {
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    let (ethernet, about, mut l4) =
        unsafe { (*at::<Ethernet>(ctx, 0)?, *at::<IpHeader>(ctx, IP)?, *at::<[u16; N]>(ctx, L4)?) };
    if ethernet.destination.is_multicast() {
        return None;
    }
    // If the packet's checksum was left to the device, it still is, and is filled in on the way
    // out, where the message's checksum no longer knows of it. So that it makes no difference, it
    // becomes one that such filling in does not change; nobody may rely on it (RFC 5508, REQ-3c).
    l4[index] = 0;
    l4[index] = settled(fold(l4.iter().map(|&word| word as u32).sum()));

    let mut ip = IpHeader {
        version_length: IpHeader::PLAIN,
        // Internetwork control (RFC 1812, section 4.3.2.5).
        tos: 0xc0,
        total_length: Be16::new((size_of::<Message<N>>() - IP) as u16),
        identification: Be16(0),
        fragment: IpHeader::DF,
        ttl: 64,
        protocol: ICMP,
        checksum: 0,
        source: from.address,
        destination: about.source,
    };
    ip.checksum = !fold(ip.sum());
    let Reason { kind, rest } = *why;
    let sum = u16::from_ne_bytes(kind) as u32 + rest[0].0 as u32 + rest[1].0 as u32;
    let sum = sum + about.sum() + l4.iter().map(|&word| word as u32).sum::<u32>();

    let length = (L4 + size_of::<[u16; N]>()) as u32;
    let room = (size_of::<Message<N>>() - length as usize) as i32;
    // SAFETY: the context is the kernel's for as long as the program runs.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, length, 0) } != 0 {
        return None;
    }
    ctx.adjust_room(room, BPF_ADJ_ROOM_MAC, 0).ok()?;
    let message = at::<Message<N>>(ctx, 0)?;
    // SAFETY: `at` checked the bounds.
    unsafe {
        (*message).ethernet =
            Ethernet { destination: ethernet.source, source: from.mac, ethertype: ETHERTYPE_IPV4 };
        (*message).ip = ip;
        (*message).kind = kind;
        (*message).checksum = !fold(sum);
        (*message).rest = rest;
        (*message).about = about;
        (*message).l4 = l4;
        Some(bpf_redirect(from.ifindex, 0) as i32)
    }
}
