//! What arrives on the underlay: tcx ingress on its interface, in front of the kernel's own stack.
//!
//! A packet of the tunnel that is not segmented (GSO) is decapsulated here and dealt with at once:
//! twice as fast as by way of the VXLAN device, which all others take, as does whatever is unusual
//! about the outer headers. What is not the tunnel's is a [`node`]'s message, or passes.
//!
//! In IPv6, all take the VXLAN device's way.
//!
//! Two ways must not mean that packets overtake each other: TCP takes large and small ones as lost
//! and sends anew. While a flow's large packets may still be on the longer way, its small ones
//! follow them.

use aya_ebpf::bindings::{
    BPF_F_ADJ_ROOM_DECAP_L3_IPV6, BPF_F_ADJ_ROOM_FIXED_GSO, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
};
use aya_ebpf::helpers::generated::bpf_jiffies64;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::Array;
use aya_ebpf::programs::TcContext;
use warren_abi::nat::{TUNNEL_PORTS, tunnel_port_index};
use warren_abi::wire::{
    Be16, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Ip, Ip6Header, IpHeader, Ipv4, TCP, Tunnel,
    UDP, VXLAN_PORT, Vxlan,
};

use crate::encap::ECN;
use crate::maps::End;
use crate::parse::{IP, at, pull};
use crate::{migration, node, tunnel};

/// Addressed to this machine (`linux/if_packet.h`).
const PACKET_HOST: u32 = 0;

/// For how many jiffies (of 1 to 10 ms) after a large packet a flow's small ones take the longer
/// way: several times what the kernel takes for a batch of received packets.
const WINDOW: u32 = 20;

/// In which jiffy the last segmented packet came, by the tunnel's source port, which tells flows
/// apart well enough.
#[map]
static SEGMENTED: Array<u32> = Array::with_max_entries(TUNNEL_PORTS, 0);

/// On a host.
#[classifier]
pub fn underlay_host(ctx: TcContext) -> i32 {
    // Without its outer headers, a packet could not be left to a former version's program.
    if migration::is_on() {
        return node::message(&ctx);
    }
    match decapsulate(&ctx, |_, _| false) {
        Some((vni, remote)) => tunnel::host(&ctx, vni, &Ip::v4(remote)),
        None => node::message(&ctx),
    }
}

/// On a proxy.
#[classifier]
pub fn underlay_proxy(ctx: TcContext) -> i32 {
    match decapsulate(&ctx, tunnel::goes_back) {
        Some((vni, remote)) => tunnel::proxy(&ctx, vni, &Ip::v4(remote)),
        None => node::message(&ctx),
    }
}

/// Takes the tunnel's headers off, if there is nothing special about them: its VNI and the outer
/// source. None: the packet is as it was.
///
/// `goes_back` tells whether what is in this VNI for this destination goes back into the tunnel, if it
/// is not for the one that sent it.
#[inline(always)]
fn decapsulate(ctx: &TcContext, goes_back: impl FnOnce(u32, Ip) -> bool) -> Option<(u32, Ipv4)> {
    #[repr(C, packed(2))]
    struct Headers {
        ethernet: Ethernet,
        tunnel: Tunnel,
        /// The beginning of the inner IP header, of either family.
        inner: [u8; 12],
        /// The addresses, of IPv4.
        addresses: [Ipv4; 2],
    }

    pull(ctx, (size_of::<Headers>() + size_of::<Ip6Header>()) as u32);
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    let Headers {
        ethernet,
        tunnel: Tunnel { ip, udp, vxlan, ethernet: inner },
        inner: packet,
        addresses,
    } = unsafe { at::<Headers>(ctx, 0)?.read_unaligned() };
    // SAFETY: the context is the kernel's for as long as the program runs.
    let (segment, is_tagged, is_ours) = unsafe {
        let skb = ctx.skb.skb;
        ((*skb).gso_size, (*skb).vlan_present != 0, (*skb).pkt_type == PACKET_HOST)
    };
    let is_tunnel = is_ours
        && ethernet.ethertype == ETHERTYPE_IPV4
        && ip.version_length == IpHeader::PLAIN
        && ip.protocol == UDP
        && { ip.destination } == End::address_v4()
        && ip.fragment.0 & IpHeader::FRAGMENT.0 == 0
        && udp.destination == Be16::new(VXLAN_PORT);
    if !is_tunnel {
        return None;
    }
    let last = SEGMENTED.get_ptr_mut(tunnel_port_index(udp.source.get()))?;
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_jiffies64() } as u32;
    if segment != 0 {
        // SAFETY: the verifier checked the pointer for null; an array's entries stay.
        unsafe { last.write_volatile(now) };
        return None;
    }
    let is_v6 = inner.ethertype == ETHERTYPE_IPV6;
    let (tos, protocol) = if is_v6 { (packet[1] >> 4, packet[6]) } else { (packet[1], packet[9]) };
    let (source, destination) = if is_v6 {
        // SAFETY: `at` checked the bounds; every bit pattern is a value.
        let header = unsafe { &*at::<Ip6Header>(ctx, IP + size_of::<Tunnel>())? };
        (header.source, header.destination)
    } else {
        (Ip::v4(addresses[0]), Ip::v4(addresses[1]))
    };
    let vni = u32::from_be(vxlan.vni) >> 8;
    let is_hairpin = source.is(destination) || goes_back(vni, destination);
    let is_plain = !is_tagged
        // Reserved bits are ignored.
        && { vxlan.flags } & Vxlan::FLAGS == Vxlan::FLAGS
        && udp.checksum == 0
        && (is_v6 || inner.ethertype == ETHERTYPE_IPV4)
        // What the underlay tells of congestion is the kernel's to pass on (RFC 6040).
        && ip.tos & ECN == tos & ECN
        // What goes back into the tunnel must not count as a packet that is in one already, which
        // where both ends are on one machine only the kernel can undo.
        && !is_hairpin
        && ip.total_length.get() as u32 + size_of::<Ethernet>() as u32 == ctx.len();
    // SAFETY: as above.
    let is_behind = protocol == TCP && now.wrapping_sub(unsafe { last.read_volatile() }) < WINDOW;
    if !is_plain || is_behind {
        return None;
    }
    let family = if is_v6 { BPF_F_ADJ_ROOM_DECAP_L3_IPV6 } else { 0 };
    let flags = (BPF_F_ADJ_ROOM_FIXED_GSO | family) as u64;
    ctx.adjust_room(-(size_of::<Tunnel>() as i32), BPF_ADJ_ROOM_MAC, flags).ok()?;
    if is_v6 {
        // SAFETY: `at` checked the bounds.
        unsafe { (*at::<Ethernet>(ctx, 0)?).ethertype = ETHERTYPE_IPV6 };
    }
    Some((vni, ip.source))
}
