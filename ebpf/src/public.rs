//! Public egress: what has no route in a VPC leaves by its public address, if it has one.
//!
//! That has a VNI of its own, without ports: a flow's port is the same there as on the shared address.
//! So proxies know nothing of flows here either, and any of them may translate.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::family::{Family, V4, V6};
use warren_abi::flow::Direction;
use warren_abi::fragment::{First, Fragmented, Tag, origin};
use warren_abi::maps::ProxyVpc;
use warren_abi::packet::Packet;
use warren_abi::wire::{Be16, ETHERTYPE_IPV4, Ip};

use crate::answer::{self, Answerer};
use crate::maps::{PRIVATE, PUBLIC};
use crate::{blocks, cache, drops, encap, fragment, icmp, nat, parse, tail, tunnel};

/// Sends a packet of a VPC's out by its public address.
#[inline(always)]
pub fn leave<F: Family>(ctx: &TcContext, vni: u32, local_port: Be16, peer_port: Be16) -> i32 {
    go_on::<F>(
        ctx,
        [tail::PUBLIC_OUT, tail::PUBLIC_OUT_V6],
        [vni, local_port.0.into(), peer_port.0.into()],
    )
}

/// Sends a packet to the host that holds the port, if the address of this VNI is a VPC's public one.
#[inline(always)]
pub fn enter<F: Family>(ctx: &TcContext, vni: u32, local_port: Be16, peer_port: Be16) -> i32 {
    go_on::<F>(
        ctx,
        [tail::PUBLIC_IN, tail::PUBLIC_IN_V6],
        [vni, local_port.0.into(), peer_port.0.into()],
    )
}

#[inline(always)]
fn go_on<F: Family>(ctx: &TcContext, programs: [u32; 2], told: [u32; 3]) -> i32 {
    // SAFETY: the context is the kernel's for as long as the program runs.
    unsafe {
        (*ctx.skb.skb).cb[0] = told[0];
        (*ctx.skb.skb).cb[1] = told[1];
        (*ctx.skb.skb).cb[2] = told[2];
    }
    let [v4, v6] = programs;
    tail::call(ctx, if F::ETHERTYPE == ETHERTYPE_IPV4 { v4 } else { v6 })
}

/// What [`go_on`] told: a VNI, the port on the guest's side and the peer's.
#[inline(always)]
fn told(ctx: &TcContext) -> (u32, Be16, Be16) {
    // SAFETY: as above.
    let [vni, local_port, peer_port, ..] = unsafe { (*ctx.skb.skb).cb };
    (vni, Be16(local_port as u16), Be16(peer_port as u16))
}

/// Whether an address is a public one where this VPC's is.
#[inline(always)]
pub fn is_public(vpc: &ProxyVpc, address: Ip) -> bool {
    match public_of(vpc.vni) {
        Some(public) => addressee(public, address).is_some(),
        None => false,
    }
}

/// Whether an address is a VPC's public one.
#[inline(always)]
pub fn is_entrance(vni: u32) -> bool {
    // SAFETY: nothing of it is read.
    unsafe { PRIVATE.get(vni) }.is_some()
}

#[inline(always)]
fn public_of(vni: u32) -> Option<&'static ProxyVpc> {
    // SAFETY: it is copied at once.
    cache::proxy_vpc(unsafe { *PUBLIC.get(vni)? })
}

/// Whose address this is, of those on the interface of a public one.
#[inline(always)]
fn addressee(public: &ProxyVpc, address: Ip) -> Option<u32> {
    if public.is_at(address) {
        return Some(public.vni);
    }
    tunnel::sibling_of(public, address).map(|sibling| sibling.vni)
}

/// The rest of [`leave`], in IPv4.
#[classifier]
pub fn public_out(ctx: TcContext) -> i32 {
    outwards::<V4>(&ctx)
}

/// The rest of [`leave`], in IPv6.
#[classifier]
pub fn public_out_v6(ctx: TcContext) -> i32 {
    outwards::<V6>(&ctx)
}

#[inline(always)]
fn outwards<F: Fragmented>(ctx: &TcContext) -> i32 {
    let (vni, ..) = told(ctx);
    let Some(&ProxyVpc { scope, .. }) = cache::proxy_vpc(vni) else {
        return drops::verdict(ctx, 0, Err(Drop::UnknownVpc));
    };
    drops::verdict(ctx, scope, out::<F>(ctx, vni))
}

#[inline(always)]
fn out<F: Fragmented>(ctx: &TcContext, vni: u32) -> Result<i32, Drop> {
    let public = public_of(vni).ok_or(Drop::NoRoute)?;
    let address = F::shared_on_proxy(public)?;
    let packet = translate::<F>(ctx, Direction::Out, address)?;
    let destination = F::ip(packet.destination);
    match addressee(public, destination) {
        Some(vni) => Ok(enter::<F>(ctx, vni, packet.peer_port, packet.local_port)),
        None => tunnel::to_next_hop::<F>(public, destination),
    }
}

/// The rest of [`enter`], in IPv4.
#[classifier]
pub fn public_in(ctx: TcContext) -> i32 {
    inwards::<V4>(&ctx)
}

/// The rest of [`enter`], in IPv6.
#[classifier]
pub fn public_in_v6(ctx: TcContext) -> i32 {
    inwards::<V6>(&ctx)
}

#[inline(always)]
fn inwards<F: Fragmented>(ctx: &TcContext) -> i32 {
    let (vni, port, _) = told(ctx);
    let Some(public) = cache::proxy_vpc(vni) else {
        return drops::verdict(ctx, 0, Err(Drop::UnknownVpc));
    };
    let ProxyVpc { mac, ifindex, scope, .. } = *public;
    let address = F::shared_on_proxy(public);
    let result =
        fragment::or_divert::<F>(ctx, to_host::<F>(ctx, vni, port), Tag::new(origin::VPC, vni, 0));
    let action = drops::verdict(ctx, scope, result);
    // SAFETY: as above.
    let is_from_there = unsafe { (*ctx.skb.skb).ifindex } == ifindex;
    match (result, address) {
        (Err(reason), Ok(address)) if is_from_there => {
            let proxy = Answerer::<F> { mac, address, ifindex, scope };
            answer::send(ctx, &proxy, reason).unwrap_or(action)
        }
        _ => action,
    }
}

#[inline(always)]
fn to_host<F: Fragmented>(ctx: &TcContext, vni: u32, port: Be16) -> Result<i32, Drop> {
    // SAFETY: it is copied at once.
    let vni = unsafe { *PRIVATE.get(vni).ok_or(Drop::NoBlockHolder)? };
    let vpc = cache::proxy_vpc(vni).ok_or(Drop::NoBlockHolder)?;
    let host = blocks::holder(vpc, port).ok_or(Drop::NoBlockHolder)?;
    let packet = translate::<F>(ctx, Direction::In, F::shared_on_proxy(vpc)?)?;
    encap::send(ctx, &packet, vni, host)
}

/// Puts `address` in the place of the guest's side in a packet or in part of one, which is as it says
/// then.
#[inline(always)]
fn translate<F: Fragmented>(
    ctx: &TcContext,
    direction: Direction,
    address: F::Address,
) -> Result<Packet<F>, Drop> {
    let mut packet = match parse::packet::<F>(ctx, direction) {
        Ok(mut packet) if packet.is_error => {
            let subject = icmp::subject(ctx, &mut packet, direction)?;
            fits(ctx, &packet, direction)?;
            icmp::translate(ctx, &packet, &subject, direction, address, subject.local_port)?;
            packet
        }
        Ok(packet) => {
            fits(ctx, &packet, direction)?;
            nat::translate_address(ctx, &packet, direction, address)?;
            packet
        }
        Err(Drop::Fragment) => {
            let (piece, fields) = fragment::piece::<F>(ctx)?;
            let (_, local_port, peer_port) = told(ctx);
            let packet = Packet::of(&fields, local_port, peer_port);
            if piece.offset == 0 {
                let first = parse::packet::<First<F>>(ctx, direction)?;
                nat::translate_address(ctx, &first, direction, address)?;
            } else {
                nat::readdress(ctx, &packet, direction, address)?;
            }
            packet
        }
        Err(reason) => return Err(reason),
    };
    match direction {
        Direction::Out => packet.source = address,
        Direction::In => packet.destination = address,
    }
    Ok(packet)
}

/// What came by the tunnel fits wherever it goes.
#[inline(always)]
fn fits<F: Family>(ctx: &TcContext, packet: &Packet<F>, direction: Direction) -> Result<(), Drop> {
    match direction {
        Direction::Out => Ok(()),
        Direction::In => encap::fits(ctx, packet),
    }
}
