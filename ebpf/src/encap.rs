//! VXLAN (RFC 7348), written by the program: cheaper than a trip through a VXLAN device.

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L2_ETH, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4,
    BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO,
    bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
};
use aya_ebpf::bpf_f_adj_room_encap_l2;
use aya_ebpf::helpers::generated::bpf_redirect_neigh;
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use warren_abi::checksum::fold;
use warren_abi::drop::Drop;
use warren_abi::family::Family;
use warren_abi::nat::tunnel_port;
use warren_abi::wire::{
    Be16, Ethernet, Ip, Ip6Header, IpHeader, Ipv4, TUNNEL_MAC, Tunnel, TunnelV6, UDP, Udp,
    VXLAN_OVERHEAD, VXLAN_PORT, Vxlan,
};

use crate::maps::End;
use crate::parse::{IP, Packet, at};

/// The lower two bits of DSCP and ECN (RFC 3168).
pub const ECN: u8 = 0b11;

/// Whether the packet, or each segment that is made of it, fits into the tunnel.
#[inline(always)]
pub fn fits<F: Family>(ctx: &TcContext, packet: &Packet<F>) -> Result<(), Drop> {
    let inner = ctx.len() - IP as u32;
    // SAFETY: the context is the kernel's for as long as the program runs.
    let segment = unsafe { (*ctx.skb.skb).gso_size };
    let longest = if segment == 0 { inner } else { segment + packet.header_length };
    if longest > End::inner_mtu() || inner + VXLAN_OVERHEAD as u32 > u16::MAX as u32 {
        return Err(Drop::TooBig);
    }
    Ok(())
}

/// Puts the packet, which [`fits`], into the tunnel of `vni` to `remote`, and sends it there.
///
/// `packet` tells of it as it was parsed; its addresses and ports are hashed as they are given.
#[inline(always)]
pub fn send<F: Family>(
    ctx: &TcContext,
    packet: &Packet<F>,
    vni: u32,
    remote: &Ip,
) -> Result<i32, Drop> {
    let ports = (packet.local_port.0 as u32) << 16 | packet.peer_port.0 as u32;
    let addresses = F::hash(packet.source) ^ F::hash(packet.destination);
    let port = tunnel_port(addresses, ports, packet.protocol);
    if End::is_v6() {
        let place = REMOTE.get_ptr_mut(0).ok_or(Drop::Internal)?;
        // SAFETY: per-CPU, and tc programs do not interrupt one another on a CPU.
        unsafe { *place = *remote };
        let marks = (port as u32) << 8 | (packet.tos & ECN) as u32;
        return match warren_send_v6(ctx.skb.skb, vni, marks, F::ETHERTYPE.0 as u32) {
            action if action >= 0 => Ok(action),
            _ => Err(Drop::Internal),
        };
    }
    let length = (ctx.len() - IP as u32) as u16 + VXLAN_OVERHEAD;
    let flags = BPF_F_ADJ_ROOM_ENCAP_L3_IPV4
        | BPF_F_ADJ_ROOM_ENCAP_L4_UDP
        | BPF_F_ADJ_ROOM_ENCAP_L2_ETH
        | BPF_F_ADJ_ROOM_FIXED_GSO;
    let flags = flags as u64 | bpf_f_adj_room_encap_l2(size_of::<Ethernet>() as u64);
    ctx.adjust_room(size_of::<Tunnel>() as i32, BPF_ADJ_ROOM_MAC, flags)
        .map_err(|_| Drop::Internal)?;

    let mut ip = IpHeader {
        version_length: IpHeader::PLAIN,
        // RFC 6040, section 4.1, normal mode; the underlay's DSCP is not the tenant's to set.
        tos: packet.tos & ECN,
        total_length: Be16::new(length),
        identification: Be16(0),
        fragment: IpHeader::DF,
        ttl: 64,
        protocol: UDP,
        checksum: 0,
        source: End::address_v4(),
        destination: Ipv4(remote.0[3]),
    };
    ip.checksum = !fold(ip.sum());
    let header = at::<Tunnel>(ctx, IP).ok_or(Drop::Internal)?;
    // SAFETY: `at` checked the bounds.
    unsafe {
        (*header).ip = ip;
        (*header).udp = Udp {
            source: Be16::new(port),
            destination: Be16::new(VXLAN_PORT),
            length: Be16::new(length - size_of::<IpHeader>() as u16),
            checksum: 0,
        };
        (*header).vxlan = Vxlan::new(vni);
        (*header).ethernet =
            Ethernet { destination: TUNNEL_MAC, source: TUNNEL_MAC, ethertype: F::ETHERTYPE };
    }
    // No next hop given: the kernel's routes say which gateway leads there, as they are now.
    // SAFETY: the helper takes no parameters from a null pointer of size 0.
    Ok(unsafe { bpf_redirect_neigh(End::ifindex(), core::ptr::null_mut(), 0, 0) } as i32)
}

/// The tunnel's other end, for [`warren_send_v6`].
#[map]
static REMOTE: PerCpuArray<Ip> = PerCpuArray::with_max_entries(1, 0);

/// [`send`], where the underlay is of IPv6: the action, or -1. `marks` are the tunnel's source port
/// and ECN, `ethertype` is the inner packet's.
///
/// UDP's checksum is 0 (RFC 7348, section 5; RFC 6935, section 5): the packet inside has its own.
///
/// A global function: it has a stack of its own.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_send_v6(skb: *mut __sk_buff, vni: u32, marks: u32, ethertype: u32) -> i32 {
    let ctx = TcContext::new(skb);
    send_v6(&ctx, vni, marks, Be16(ethertype as u16)).unwrap_or(-1)
}

#[inline(always)]
fn send_v6(ctx: &TcContext, vni: u32, marks: u32, ethertype: Be16) -> Option<i32> {
    const HEADERS: u16 = size_of::<TunnelV6>() as u16 - size_of::<Ip6Header>() as u16;

    let remote = REMOTE.get(0)?;
    let length = (ctx.len() - IP as u32) as u16 + HEADERS;
    let flags = BPF_F_ADJ_ROOM_ENCAP_L3_IPV6
        | BPF_F_ADJ_ROOM_ENCAP_L4_UDP
        | BPF_F_ADJ_ROOM_ENCAP_L2_ETH
        | BPF_F_ADJ_ROOM_FIXED_GSO;
    let flags = flags as u64 | bpf_f_adj_room_encap_l2(size_of::<Ethernet>() as u64);
    ctx.adjust_room(size_of::<TunnelV6>() as i32, BPF_ADJ_ROOM_MAC, flags).ok()?;
    let header = at::<TunnelV6>(ctx, IP)?;
    // SAFETY: `at` checked the bounds.
    unsafe {
        (*header).ip = Ip6Header {
            // As in IPv4: ECN alone is the tenant's to set.
            version: [0x60, (marks as u8 & ECN) << 4, 0, 0],
            payload_length: Be16::new(length),
            next_header: UDP,
            hop_limit: 64,
            source: End::address(),
            destination: *remote,
        };
        (*header).udp = Udp {
            source: Be16::new((marks >> 8) as u16),
            destination: Be16::new(VXLAN_PORT),
            length: Be16::new(length),
            checksum: 0,
        };
        (*header).vxlan = Vxlan::new(vni);
        (*header).ethernet = Ethernet { destination: TUNNEL_MAC, source: TUNNEL_MAC, ethertype };
        // SAFETY: the helper takes no parameters from a null pointer of size 0.
        Some(bpf_redirect_neigh(End::ifindex(), core::ptr::null_mut(), 0, 0) as i32)
    }
}
