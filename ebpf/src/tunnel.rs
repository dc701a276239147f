//! What comes out of the tunnel: tcx ingress on the VXLAN device, which decapsulated it.
//!
//! Here the kernel decapsulated: only it can undo the tunnel's segmentation state, without which a
//! TAP takes large packets apart in software, seven times slower. What is not segmented rarely
//! comes this way: see [`underlay`](crate::underlay).

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{
    BPF_F_TUNINFO_IPV6, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1, bpf_tunnel_key,
};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_redirect_neigh, bpf_skb_get_tunnel_key};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::conntrack::Receiver;
use warren_abi::drop::Drop;
use warren_abi::family::{Family, V4, V6};
use warren_abi::flow::Direction;
use warren_abi::fragment::{Tag, origin};
use warren_abi::maps::{HostVpc, ProxyVpc, Slot};
use warren_abi::wire::{ETHERTYPE_IPV6, Ethernet, GATEWAY_MAC, ICMP, Ip, Ipv4};

use crate::maps::End;
use crate::parse::{Packet, at};
use crate::{
    blocks, cache, conntrack, drops, encap, fragment, icmp, limit, migration, mss, nat, node,
    parse, public, route, tail,
};

/// Address families (`linux/socket.h`).
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// On a host: translates back, and hands to the guest's TAP.
#[classifier]
pub fn tunnel_host(ctx: TcContext) -> i32 {
    match tunnel(&ctx) {
        Ok((vni, remote)) => host(&ctx, vni, &remote),
        Err(reason) => drops::verdict(&ctx, 0, Err(reason)),
    }
}

/// Deals with a packet from the tunnel of `vni` and the tunnel's end `remote`, without its outer
/// headers.
#[inline(always)]
pub fn host(ctx: &TcContext, vni: u32, remote: &Ip) -> i32 {
    let Some(vpc) = cache::host_vpc(vni) else {
        return drops::verdict(ctx, 0, Err(Drop::UnknownVpc));
    };
    if !End::same(remote, &vpc.proxy_address) && !node::is_member(vni, remote) {
        return drops::verdict(ctx, 0, Err(Drop::NotFromProxy));
    }
    match parse::ethertype(ctx) {
        ETHERTYPE_IPV6 => {
            // SAFETY: the context is the kernel's for as long as the program runs.
            unsafe { (*ctx.skb.skb).cb[0] = vni };
            tail::call(ctx, tail::TO_GUEST_V6)
        }
        _ => finish(ctx, vni, to_guest::<V4>(ctx, vni, vpc)),
    }
}

/// The rest of [`host`], of IPv6.
#[classifier]
pub fn to_guest_v6(ctx: TcContext) -> i32 {
    // SAFETY: as above.
    let vni = unsafe { (*ctx.skb.skb).cb[0] };
    let vpc = cache::host_vpc(vni).ok_or((0, Drop::UnknownVpc));
    finish(&ctx, vni, vpc.and_then(|vpc| to_guest::<V6>(&ctx, vni, vpc)))
}

#[inline(always)]
fn finish(ctx: &TcContext, vni: u32, result: Result<i32, (u32, Drop)>) -> i32 {
    let result = match result {
        Err((0, Drop::Fragment)) => {
            let tag = Tag::new(origin::PROXY, vni, 0);
            fragment::to_program(ctx, tag).map_err(|reason| (0, reason))
        }
        result => result,
    };
    match migration::or_former(result) {
        Ok(action) => drops::verdict(ctx, 0, Ok(action)),
        Err((scope, reason)) => drops::verdict(ctx, scope, Err(reason)),
    }
}

#[inline(always)]
fn to_guest<F: Family>(ctx: &TcContext, vni: u32, vpc: &HostVpc) -> Result<i32, (u32, Drop)> {
    let nobody = |reason| (0, reason);
    let shared = F::shared(vpc).map_err(nobody)?;
    parse::prepare::<F>(ctx).map_err(nobody)?;
    if parse::ethernet(ctx).map_err(nobody)?.ethertype != F::ETHERTYPE {
        return Err((0, Drop::NotIpv4));
    }
    let mut packet = parse::packet::<F>(ctx, Direction::In).map_err(nobody)?;
    if !F::same(packet.destination, shared) {
        return Err((0, Drop::NotSharedAddress));
    }
    let (slot, translated) = if packet.is_error {
        let subject = icmp::subject(ctx, &mut packet, Direction::In).map_err(nobody)?;
        if !F::same(subject.local, shared) {
            return Err((0, Drop::IcmpError));
        }
        let Receiver { slot, port } = conntrack::error_inward::<F>(vni, &subject)?;
        let address = F::guest(&slot);
        (slot, icmp::translate(ctx, &packet, &subject, Direction::In, address, port))
    } else {
        let Receiver { slot, port } = conntrack::inward(vni, &packet)?;
        let clamped = mss::clamp(ctx, &packet);
        let address = F::guest(&slot);
        let translate = |()| nat::translate(ctx, &packet, Direction::In, address, port);
        (slot, clamped.and_then(translate))
    };
    translated
        .and_then(|()| limit::admit(&slot, Direction::In, packet.traffic))
        .and_then(|()| deliver::<F>(ctx, &slot))
        .map_err(|reason| (slot.number, reason))
}

/// Hands a packet that was translated to the guest.
#[inline(always)]
pub fn deliver<F: Family>(ctx: &TcContext, slot: &Slot) -> Result<i32, Drop> {
    let ethernet = at::<Ethernet>(ctx, 0).ok_or(Drop::Internal)?;
    // SAFETY: `at` checked the bounds.
    unsafe {
        *ethernet =
            Ethernet { destination: slot.mac, source: GATEWAY_MAC, ethertype: F::ETHERTYPE };
        Ok(bpf_redirect(slot.ifindex, 0) as i32)
    }
}

/// On a proxy: sends into the VPC what a host may send there.
#[classifier]
pub fn tunnel_proxy(ctx: TcContext) -> i32 {
    match tunnel(&ctx) {
        Ok((vni, remote)) => proxy(&ctx, vni, &remote),
        Err(reason) => drops::verdict(&ctx, 0, Err(reason)),
    }
}

/// As [`host`].
#[inline(always)]
pub fn proxy(ctx: &TcContext, vni: u32, remote: &Ip) -> i32 {
    let Some(vpc) = cache::proxy_vpc(vni) else {
        return drops::verdict(ctx, 0, Err(Drop::UnknownVpc));
    };
    let result = match parse::ethertype(ctx) {
        ETHERTYPE_IPV6 => to_vpc::<V6>(ctx, vpc, remote),
        _ => to_vpc::<V4>(ctx, vpc, remote),
    };
    let result = match result {
        Err(Drop::Fragment) => {
            fragment::to_program_from(ctx, Tag::new(origin::HOST, vni, 0), remote)
        }
        result => result,
    };
    drops::verdict(ctx, vpc.scope, result)
}

#[inline(always)]
fn to_vpc<F: Family>(ctx: &TcContext, vpc: &ProxyVpc, remote: &Ip) -> Result<i32, Drop> {
    parse::prepare::<F>(ctx)?;
    if parse::ethernet(ctx)?.ethertype != F::ETHERTYPE {
        return Err(Drop::NotIpv4);
    }
    let mut packet = parse::packet::<F>(ctx, Direction::Out)?;
    admit(ctx, vpc, remote, &mut packet)?;
    leave(ctx, vpc, &packet)
}

/// Whether the host that sent a packet may do so.
#[inline(always)]
pub fn admit<F: Family>(
    ctx: &TcContext,
    vpc: &ProxyVpc,
    remote: &Ip,
    packet: &mut Packet<F>,
) -> Result<(), Drop> {
    let shared = F::shared_on_proxy(vpc)?;
    if !F::same(packet.source, shared) {
        return Err(Drop::SpoofedAddress);
    }
    if packet.is_error {
        let subject = icmp::subject(ctx, packet, Direction::Out)?;
        if !F::same(subject.local, shared) || !F::same(subject.peer, packet.destination) {
            return Err(Drop::IcmpError);
        }
    }
    let holder = blocks::holder(vpc, packet.local_port).ok_or(Drop::NotBlockHolder)?;
    if End::same(holder, remote) { Ok(()) } else { Err(Drop::NotBlockHolder) }
}

/// Sends a packet of the shared address's into the VPC, or back to a host, or to where it may leave.
#[inline(always)]
pub fn leave<F: Family>(ctx: &TcContext, vpc: &ProxyVpc, packet: &Packet<F>) -> Result<i32, Drop> {
    let own = if F::same(packet.destination, packet.source) { Some(vpc) } else { None };
    if let Some(own) = own.or_else(|| sibling_of(vpc, F::ip(packet.destination))) {
        return hairpin(ctx, own, packet);
    }
    match to_next_hop::<F>(vpc, F::ip(packet.destination)) {
        Err(Drop::NoRoute) if vpc.hairpins & ProxyVpc::PUBLIC != 0 => {
            Ok(public::leave::<F>(ctx, vpc.vni, packet.local_port, packet.peer_port))
        }
        result => result,
    }
}

/// Sends a packet towards a destination in the VPC.
#[inline(always)]
pub fn to_next_hop<F: Family>(vpc: &ProxyVpc, destination: Ip) -> Result<i32, Drop> {
    let next_hop = route::next_hop(vpc, destination)?;
    // The next hop is given and no route asked for: VPCs' networks may overlap.
    let (nh_family, ipv6_nh) = match next_hop.to_v4() {
        Some(address) => (AF_INET, [address.0, 0, 0, 0]),
        None => (AF_INET6, next_hop.0),
    };
    let is_v6 = F::ETHERTYPE == ETHERTYPE_IPV6;
    if is_v6 != (nh_family == AF_INET6) {
        return Err(Drop::NoRoute);
    }
    let mut to =
        bpf_redir_neigh { nh_family, __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh } };
    // SAFETY: the parameters are on the stack while the helper reads them.
    unsafe { Ok(bpf_redirect_neigh(vpc.ifindex, &raw mut to, size_of_val(&to) as i32, 0) as i32) }
}

/// The VPC with another shared address on the same interface, if that is what this is.
#[inline(always)]
pub fn sibling_of(vpc: &ProxyVpc, address: Ip) -> Option<&'static ProxyVpc> {
    if vpc.hairpins & ProxyVpc::SIBLINGS == 0 {
        return None;
    }
    let sibling = cache::vpc_at(vpc.ifindex, address)?;
    if sibling.is_at(address) { Some(sibling) } else { None }
}

/// Whether what is in this VNI for this destination goes back into the tunnel, if it is not for the
/// one that sent it.
#[inline(always)]
pub fn goes_back(vni: u32, destination: Ip) -> bool {
    match cache::proxy_vpc(vni) {
        Some(vpc) if vpc.hairpins == 0 => false,
        Some(vpc) => sibling_of(vpc, destination).is_some() || public::is_public(vpc, destination),
        None => false,
    }
}

/// Sends a packet for a shared address of the VPC's back to the host that holds the port: it is for a guest
/// there, which gets it from the sender's shared port, if it wrote to that before (RFC 4787, REQ-9).
///
/// No port tells whom an echo request is for (RFC 5508, REQ-7: that is Basic NAT's to know).
#[inline(always)]
fn hairpin<F: Family>(ctx: &TcContext, vpc: &ProxyVpc, packet: &Packet<F>) -> Result<i32, Drop> {
    if packet.protocol == ICMP && !packet.is_error {
        return Err(Drop::BadDestination);
    }
    let Some(host) = blocks::holder(vpc, packet.peer_port) else {
        return Ok(public::enter::<F>(ctx, vpc.vni, packet.peer_port, packet.local_port));
    };
    encap::fits(ctx, packet)?;
    encap::send(ctx, packet, vpc.vni, host)
}

/// The VNI that a packet came with, and the outer source.
#[inline(always)]
fn tunnel(ctx: &TcContext) -> Result<(u32, Ip), Drop> {
    let mut key = MaybeUninit::<bpf_tunnel_key>::uninit();
    let size = size_of::<bpf_tunnel_key>() as u32;
    // SAFETY: the helper fills all of the size it is given, or fails; all fields are integers.
    unsafe {
        let flags = if End::is_v6() { BPF_F_TUNINFO_IPV6 as u64 } else { 0 };
        if bpf_skb_get_tunnel_key(ctx.skb.skb, key.as_mut_ptr(), size, flags) != 0 {
            return Err(Drop::Internal);
        }
        let key = key.assume_init_ref();
        let remote = &key.__bindgen_anon_1;
        // The helper swaps an address of IPv4 into the order of the processor.
        let remote = match End::is_v6() {
            true => Ip(remote.remote_ipv6),
            false => Ip::v4(Ipv4(remote.remote_ipv4.to_be())),
        };
        Ok((key.tunnel_id, remote))
    }
}
