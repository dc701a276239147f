//! Neighbour discovery (RFC 4861), answered in place.
//!
//! Router solicitations are not: what a router would announce (address, gateway, MTU), guests are
//! given with their identity, as in IPv4, and a VPC has routers of its own.

use aya_ebpf::helpers::generated::{bpf_redirect, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use warren_abi::checksum::fold;
use warren_abi::drop::Drop;
use warren_abi::family::{Family, V6};
use warren_abi::icmp::v6 as icmp;
use warren_abi::wire::{Be16, ETHERTYPE_IPV6, Ethernet, ICMPV6, Ip, Ip6Header, Mac, Neighbour};

use crate::icmp::warren_sum;
use crate::parse::{IP, at, l4};

/// Longest message that is looked at: what fits any link (RFC 8200, section 5).
const LONGEST: u32 = 1280 - V6::HEADER as u32;

/// A solicitation, or an advertisement.
#[derive(Clone, Copy)]
pub struct Message {
    /// Its type.
    pub kind: u8,
    /// Who sent it; `::` if it has no address yet.
    pub source: Ip,
    /// To whom.
    pub destination: Ip,
    /// Whose link-layer address it is about.
    pub target: Ip,
    /// The sender's link-layer address, if it tells.
    pub mac: Option<Mac>,
}

/// Whether the packet, which is of IPv6, is one of neighbour discovery's.
#[inline(always)]
pub fn is_message(ctx: &TcContext) -> bool {
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    unsafe {
        match (at::<Ip6Header>(ctx, IP), at::<u8>(ctx, l4::<V6>())) {
            (Some(ip), Some(kind)) if (*ip).next_header == ICMPV6 => {
                (icmp::ROUTER_SOLICITATION..=icmp::REDIRECT).contains(&*kind)
            }
            _ => false,
        }
    }
}

/// The message, if it is valid (RFC 4861, sections 7.1.1 and 7.1.2) and about a neighbour.
#[inline(always)]
pub fn message(ctx: &TcContext) -> Result<Message, Drop> {
    #[repr(C, packed(2))]
    struct Packet {
        ip: Ip6Header,
        kind: [u8; 2],
        checksum: u16,
        flags: [u8; 4],
        target: Ip,
    }

    // SAFETY: `at` checked the bounds; every bit pattern is a value; so below.
    let packet = unsafe { &*at::<Packet>(ctx, IP).ok_or(Drop::Truncated)? };
    let length = packet.ip.payload_length.get() as u32;
    let is_about_neighbour =
        matches!(packet.kind[0], icmp::NEIGHBOUR_SOLICITATION | icmp::NEIGHBOUR_ADVERTISEMENT);
    let is_valid = packet.ip.is_version_6()
        && packet.ip.hop_limit == Neighbour::HOP_LIMIT
        && packet.kind[1] == 0
        && { packet.target }.0[0] & 0xff != 0xff
        && (Neighbour::PLAIN..=LONGEST).contains(&length);
    if !is_about_neighbour || !is_valid {
        return Err(Drop::UnexpectedNd);
    }
    let mut message = Message {
        kind: packet.kind[0],
        source: packet.ip.source,
        destination: packet.ip.destination,
        target: packet.target,
        mac: None,
    };
    let pseudo = V6::pseudo_sum(&packet.ip);
    if length as usize >= size_of::<Neighbour>() {
        // SAFETY: as above.
        let neighbour = unsafe { &*at::<Neighbour>(ctx, l4::<V6>()).ok_or(Drop::Truncated)? };
        if neighbour.option == Neighbour::SOURCE_MAC {
            message.mac = Some(neighbour.mac);
        }
    }
    match warren_sum(ctx.skb.skb, l4::<V6>() as u32, length, pseudo) {
        0xffff => Ok(message),
        _ => Err(Drop::BadChecksum),
    }
}

/// Turns the solicitation into the advertisement that `mac` has its target, and sends it back.
/// `flags` are [`Neighbour::ROUTER`] or 0.
#[inline(always)]
pub fn reply(
    ctx: &TcContext,
    message: &Message,
    mac: Mac,
    flags: u8,
    ifindex: u32,
) -> Result<i32, Drop> {
    #[repr(C, packed(2))]
    struct Frame {
        ethernet: Ethernet,
        ip: Ip6Header,
        neighbour: Neighbour,
    }
    /// All nodes of the link, and their MAC address.
    const ALL_NODES: Ip = Ip([0xff02_0000u32.to_be(), 0, 0, 1u32.to_be()]);
    const ALL_NODES_MAC: Mac = Mac::new([0x33, 0x33, 0, 0, 0, 1]);

    // SAFETY: the context is the kernel's for as long as the program runs.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, size_of::<Frame>() as u32, 0) } != 0 {
        return Err(Drop::Internal);
    }
    let frame = at::<Frame>(ctx, 0).ok_or(Drop::Internal)?;
    // Who has no address yet is told with all others (RFC 4861, section 7.2.4).
    let is_probe = message.source.is_unspecified();
    // SAFETY: `at` checked the bounds.
    unsafe {
        let asker = (*frame).ethernet.source;
        (*frame).ethernet.destination = if is_probe { ALL_NODES_MAC } else { asker };
        (*frame).ethernet.source = mac;
        (*frame).ethernet.ethertype = ETHERTYPE_IPV6;
        (*frame).ip.version = [0x60, 0, 0, 0];
        (*frame).ip.payload_length = Be16::new(size_of::<Neighbour>() as u16);
        (*frame).ip.source = message.target;
        (*frame).ip.destination = if is_probe { ALL_NODES } else { message.source };
        let solicited = if is_probe { 0 } else { Neighbour::SOLICITED };
        (*frame).neighbour = Neighbour {
            kind: [icmp::NEIGHBOUR_ADVERTISEMENT, 0],
            checksum: 0,
            flags: [flags | solicited | Neighbour::OVERRIDE, 0, 0, 0],
            target: message.target,
            option: Neighbour::TARGET_MAC,
            mac,
        };
        let pseudo = V6::pseudo_sum(&*(&raw const (*frame).ip));
        let words = &*(&raw const (*frame).neighbour).cast::<[u16; size_of::<Neighbour>() / 2]>();
        let sum = pseudo + words.iter().map(|&word| word as u32).sum::<u32>();
        (*frame).neighbour.checksum = !fold(sum);
        Ok(bpf_redirect(ifindex, 0) as i32)
    }
}
