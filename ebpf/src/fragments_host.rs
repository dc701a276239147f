//! A host's fragments: tcx ingress on their device.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::conntrack::Receiver;
use warren_abi::drop::Drop;
use warren_abi::family::{Fields, V4, V6};
use warren_abi::flow::Direction;
use warren_abi::fragment::{First, Fragmented, Piece, Tag, origin};
use warren_abi::maps::{Attachment, Slot, Traffic};
use warren_abi::packet::Packet;
use warren_abi::wire::ETHERTYPE_IPV6;

use crate::drops::TCX_NEXT;
use crate::fragment::{
    begin, direct, find, identify, identify_first, is_translated, look_for, piece, tag, to_daemon,
    wait,
};
use crate::maps::{End, uncached_slot};
use crate::tap::Translated;
use crate::{cache, conntrack, drops, encap, limit, nat, parse, tail, tap, tunnel};

/// First fragments of guests, as whole packets. All others are left to [`fragments_rest`]: together,
/// they need more stack than there is.
#[classifier]
pub fn fragments_first(ctx: TcContext) -> i32 {
    match parse::ethertype(&ctx) {
        ETHERTYPE_IPV6 => tail::call(&ctx, tail::FRAGMENTS_FIRST_V6),
        _ => first_of_guest::<V4>(&ctx),
    }
}

/// [`fragments_first`], in IPv6.
#[classifier]
pub fn fragments_first_v6(ctx: TcContext) -> i32 {
    first_of_guest::<V6>(&ctx)
}

#[inline(always)]
fn first_of_guest<F: Fragmented>(ctx: &TcContext) -> i32
where
    First<F>: Translated,
{
    let Some(tag @ Tag { origin: origin::SLOT, .. }) = tag(ctx) else { return TCX_NEXT };
    let Some(slot) = uncached_slot(tag.owner) else { return TCX_NEXT };
    match first::<F>(ctx, &slot, tag) {
        Ok(None) => TCX_NEXT,
        Ok(Some(action)) => drops::verdict(ctx, slot.number, Ok(action)),
        Err(reason) => drops::verdict(ctx, slot.number, Err(reason)),
    }
}

/// All others: as their datagram's first one was dealt with.
#[classifier]
pub fn fragments_rest(ctx: TcContext) -> i32 {
    let is_v6 = parse::ethertype(&ctx) == ETHERTYPE_IPV6;
    match tag(&ctx) {
        Some(Tag { origin: origin::SLOT, .. }) if is_v6 => {
            tail::call(&ctx, tail::FRAGMENTS_REST_V6)
        }
        Some(Tag { origin: origin::PROXY, .. }) if is_v6 => {
            tail::call(&ctx, tail::FRAGMENTS_TO_GUEST_V6)
        }
        Some(tag @ Tag { origin: origin::SLOT, .. }) => rest_of_guest::<V4>(&ctx, tag),
        Some(tag @ Tag { origin: origin::PROXY, .. }) => {
            finish(&ctx, to_guest::<V4>(&ctx, tag, first_to_guest::<V4>))
        }
        _ => drops::verdict(&ctx, 0, Err(Drop::Internal)),
    }
}

/// [`fragments_rest`], of a guest's in IPv6.
#[classifier]
pub fn fragments_rest_v6(ctx: TcContext) -> i32 {
    match tag(&ctx) {
        Some(tag) => rest_of_guest::<V6>(&ctx, tag),
        None => drops::verdict(&ctx, 0, Err(Drop::Internal)),
    }
}

/// [`fragments_rest`], of a proxy's in IPv6.
#[classifier]
pub fn fragments_to_guest_v6(ctx: TcContext) -> i32 {
    match tag(&ctx) {
        Some(tag) => finish(
            &ctx,
            to_guest::<V6>(&ctx, tag, |ctx, _| Ok(tail::call(ctx, tail::FIRST_TO_GUEST_V6))),
        ),
        None => drops::verdict(&ctx, 0, Err(Drop::Internal)),
    }
}

/// [`fragments_to_guest_v6`], of a first one.
#[classifier]
pub fn first_to_guest_v6(ctx: TcContext) -> i32 {
    match tag(&ctx) {
        Some(tag) => finish(&ctx, first_to_guest::<V6>(&ctx, tag.owner)),
        None => drops::verdict(&ctx, 0, Err(Drop::Internal)),
    }
}

#[inline(always)]
fn rest_of_guest<F: Fragmented>(ctx: &TcContext, tag: Tag) -> i32 {
    match uncached_slot(tag.owner) {
        Some(slot) => drops::verdict(ctx, slot.number, rest::<F>(ctx, &slot, tag)),
        None => drops::verdict(ctx, 0, Err(Drop::Detached)),
    }
}

#[inline(always)]
fn finish(ctx: &TcContext, result: Result<i32, (u32, Drop)>) -> i32 {
    match result {
        Ok(action) => drops::verdict(ctx, 0, Ok(action)),
        Err((scope, reason)) => drops::verdict(ctx, scope, Err(reason)),
    }
}

/// What a guest's fragment says of itself.
#[inline(always)]
fn of_guest<F: Fragmented>(
    ctx: &TcContext,
    slot: &Slot,
    tag: Tag,
) -> Result<(Piece, Fields<F>), Drop> {
    let vni = slot.attachment.vni();
    if slot.attachment != Attachment::new(vni, tag.mark) || vni == 0 {
        return Err(Drop::StaleFlow);
    }
    let (piece, fields) = piece::<F>(ctx)?;
    if F::same(fields.source, F::guest(slot)) {
        Ok((piece, fields))
    } else {
        Err(Drop::SpoofedAddress)
    }
}

/// Of a guest's: to the proxy. None: it is no first one.
#[inline(always)]
fn first<F: Fragmented>(ctx: &TcContext, slot: &Slot, tag: Tag) -> Result<Option<i32>, Drop>
where
    First<F>: Translated,
{
    let (piece, fields) = of_guest::<F>(ctx, slot, tag)?;
    if piece.offset != 0 {
        return Ok(None);
    }
    if fields.length > End::inner_mtu() {
        return to_daemon(ctx, tag).map(Some);
    }
    look_for(tag, F::ip(fields.destination), &piece, fields.protocol)?;
    let mut packet = parse::packet::<First<F>>(ctx, Direction::Out)?;
    is_translated(&packet)?;
    identify_first::<F>(ctx)?;
    // A program that this one may end with remembers the datagram itself.
    let action = tap::to_vpc(ctx, slot, &mut packet)?;
    begin(slot.number, &packet)?;
    Ok(Some(action))
}

/// Of a guest's: to the proxy, or it waits.
#[inline(always)]
fn rest<F: Fragmented>(ctx: &TcContext, slot: &Slot, tag: Tag) -> Result<i32, Drop> {
    let (piece, fields) = of_guest::<F>(ctx, slot, tag)?;
    let Fields { protocol, length, destination, .. } = fields;
    if length > End::inner_mtu() {
        return to_daemon(ctx, tag);
    }
    look_for(tag, F::ip(destination), &piece, protocol)?;
    let Some(datagram) = find(&piece)? else { return wait(ctx, tag) };
    limit::admit(slot, Direction::Out, Traffic { packets: 1, bytes: length as u64 })?;
    let vni = slot.attachment.vni();
    let vpc = cache::host_vpc(vni).ok_or(Drop::UnknownVpc)?;
    let mut packet = Packet::of(&fields, datagram.local_port, datagram.peer_port);
    packet.source = F::shared(vpc)?;
    identify::<F>(ctx, datagram.id)?;
    nat::readdress(ctx, &packet, Direction::Out, packet.source)?;
    encap::send(ctx, &packet, vni, &vpc.proxy_address)
}

/// From the proxy: to the guest. They come in order, as the proxy sent them.
#[inline(always)]
fn to_guest<F: Fragmented>(
    ctx: &TcContext,
    tag: Tag,
    first: impl FnOnce(&TcContext, u32) -> Result<i32, (u32, Drop)>,
) -> Result<i32, (u32, Drop)> {
    let nobody = |reason| (0, reason);
    let vpc = cache::host_vpc(tag.owner).ok_or((0, Drop::UnknownVpc))?;
    let (piece, fields) = piece::<F>(ctx).map_err(nobody)?;
    if !F::same(fields.destination, F::shared(vpc).map_err(nobody)?) {
        return Err((0, Drop::NotSharedAddress));
    }
    look_for(tag, F::ip(fields.source), &piece, fields.protocol).map_err(nobody)?;
    if piece.offset == 0 {
        return first(ctx, tag.owner);
    }
    let datagram = find(&piece).map_err(nobody)?.ok_or((0, Drop::Fragment))?;
    let slot = uncached_slot(datagram.ifindex).ok_or((0, Drop::StaleFlow))?;
    let dropped = |reason| (slot.number, reason);
    if slot.attachment != Attachment::new(tag.owner, datagram.generation) {
        return Err(dropped(Drop::StaleFlow));
    }
    let packet = Packet::of(&fields, datagram.local_port, datagram.peer_port);
    nat::readdress(ctx, &packet, Direction::In, F::guest(&slot)).map_err(dropped)?;
    let traffic = Traffic { packets: 1, bytes: fields.length as u64 };
    limit::admit(&slot, Direction::In, traffic).map_err(dropped)?;
    tunnel::deliver::<F>(ctx, &slot).map_err(dropped)
}

/// The first one, which was looked for.
#[inline(always)]
fn first_to_guest<F: Fragmented>(ctx: &TcContext, vni: u32) -> Result<i32, (u32, Drop)> {
    let nobody = |reason| (0, reason);
    let packet = parse::packet::<First<F>>(ctx, Direction::In).map_err(nobody)?;
    is_translated(&packet).map_err(nobody)?;
    let Receiver { slot, port } = conntrack::inward(vni, &packet)?;
    let dropped = |reason| (slot.number, reason);
    nat::translate(ctx, &packet, Direction::In, F::guest(&slot), port).map_err(dropped)?;
    direct(&slot).map_err(dropped)?;
    begin(slot.number, &packet).map_err(dropped)?;
    limit::admit(&slot, Direction::In, packet.traffic).map_err(dropped)?;
    tunnel::deliver::<F>(ctx, &slot).map_err(dropped)
}
