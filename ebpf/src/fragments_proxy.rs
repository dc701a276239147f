//! A proxy's fragments: tcx ingress on their device.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::family::{Fields, V4, V6};
use warren_abi::flow::Direction;
use warren_abi::fragment::{First, Fragmented, Tag, origin};
use warren_abi::maps::ProxyVpc;
use warren_abi::packet::Packet;
use warren_abi::wire::{ETHERTYPE_IPV6, Ip};

use crate::fragment::{
    begin, direct_to, find, identify, identify_first, is_translated, look_for, look_for_from,
    piece, tag, take_remote, to_daemon, wait,
};
use crate::maps::End;
use crate::{blocks, cache, drops, encap, parse, public, tail, tunnel};

/// Deals with a fragment as its first one was dealt with.
#[classifier]
pub fn fragments_proxy(ctx: TcContext) -> i32 {
    match parse::ethertype(&ctx) {
        ETHERTYPE_IPV6 => tail::call(&ctx, tail::FRAGMENTS_PROXY_V6),
        _ => any::<V4>(&ctx),
    }
}

/// [`fragments_proxy`], in IPv6.
#[classifier]
pub fn fragments_proxy_v6(ctx: TcContext) -> i32 {
    any::<V6>(&ctx)
}

#[inline(always)]
fn any<F: Fragmented>(ctx: &TcContext) -> i32 {
    let Some(tag) = tag(ctx) else {
        return drops::verdict(ctx, 0, Err(Drop::Internal));
    };
    let Some(vpc) = cache::proxy_vpc(tag.owner) else {
        return drops::verdict(ctx, 0, Err(Drop::UnknownVpc));
    };
    let result = match tag.origin {
        origin::VPC => to_host::<F>(ctx, vpc, tag),
        origin::HOST => to_vpc::<F>(ctx, vpc, tag),
        _ => Err(Drop::Internal),
    };
    drops::verdict(ctx, vpc.scope, result)
}

/// From the VPC: to the host that holds the port.
#[inline(always)]
fn to_host<F: Fragmented>(ctx: &TcContext, vpc: &ProxyVpc, tag: Tag) -> Result<i32, Drop> {
    let (piece, fields) = piece::<F>(ctx)?;
    let Fields { protocol, length, source, destination, .. } = fields;
    if !F::same(destination, F::shared_on_proxy(vpc)?) {
        return Err(Drop::NotSharedAddress);
    }
    if length > End::inner_mtu() {
        return to_daemon(ctx, tag);
    }
    look_for(tag, F::ip(source), &piece, protocol)?;
    if piece.offset == 0 {
        let packet = parse::packet::<First<F>>(ctx, Direction::In)?;
        is_translated(&packet)?;
        let host = blocks::holder(vpc, packet.local_port);
        if host.is_none() && !public::is_entrance(vpc.vni) {
            return Err(Drop::NoBlockHolder);
        }
        direct_to(host.unwrap_or(&Ip::UNSPECIFIED))?;
        begin(vpc.scope, &packet)?;
        return match host {
            Some(host) => encap::send(ctx, &packet, vpc.vni, host),
            None => Ok(public::enter::<F>(ctx, vpc.vni, packet.local_port, packet.peer_port)),
        };
    }
    let Some(datagram) = find(&piece)? else { return wait(ctx, tag) };
    let (local_port, peer_port) = (datagram.local_port, datagram.peer_port);
    if datagram.host.is_unspecified() {
        return Ok(public::enter::<F>(ctx, vpc.vni, local_port, peer_port));
    }
    encap::send(ctx, &Packet::of(&fields, local_port, peer_port), vpc.vni, &datagram.host)
}

/// From a host: into the VPC, or back to a host. They come in order, as the host sent them.
#[inline(always)]
fn to_vpc<F: Fragmented>(ctx: &TcContext, vpc: &ProxyVpc, tag: Tag) -> Result<i32, Drop> {
    let remote = take_remote(ctx)?;
    let (piece, fields) = piece::<F>(ctx)?;
    let Fields { protocol, source, destination, .. } = fields;
    if !F::same(source, F::shared_on_proxy(vpc)?) {
        return Err(Drop::SpoofedAddress);
    }
    look_for_from(tag, remote, F::ip(destination), &piece, protocol)?;
    if piece.offset == 0 {
        let mut packet = parse::packet::<First<F>>(ctx, Direction::Out)?;
        is_translated(&packet)?;
        identify_first::<F>(ctx)?;
        tunnel::admit(ctx, vpc, &remote, &mut packet)?;
        // What leaves by a public address does not come back here.
        let is_public = vpc.hairpins & ProxyVpc::PUBLIC != 0;
        if is_public {
            begin(vpc.scope, &packet)?;
        }
        let action = tunnel::leave(ctx, vpc, &packet)?;
        if !is_public {
            begin(vpc.scope, &packet)?;
        }
        return Ok(action);
    }
    let datagram = find(&piece)?.ok_or(Drop::Fragment)?;
    let packet = Packet::of(&fields, datagram.local_port, datagram.peer_port);
    identify::<F>(ctx, datagram.id)?;
    tunnel::leave(ctx, vpc, &packet)
}
