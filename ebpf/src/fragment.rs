//! Fragments, on their way to the programs that deal with them, and what is known of datagrams.
//!
//! Whichever program meets a fragment hands it to the ingress of a device of their own, where those
//! of [`fragments_host`](crate::fragments_host) or [`fragments_proxy`](crate::fragments_proxy) run:
//! so that whole packets pay nothing. At the other end of that device the daemon keeps those that
//! came too early, and divides what does not fit the tunnel.

use core::arch::asm;

use aya_ebpf::bindings::{BPF_F_INGRESS, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC};
use aya_ebpf::helpers::generated::{bpf_ktime_get_coarse_ns, bpf_redirect};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray};
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::family::{Family, Fields};
use warren_abi::flow::{tcp, tick};
use warren_abi::fragment::{Cell, Datagram, DatagramKey, Fragmented, Piece, Tag};
use warren_abi::maps::Slot;
use warren_abi::wire::{Be16, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Ip};

use crate::maps::{DATAGRAMS, End, fragments_ifindex};
use crate::parse::{IP, Packet, at};
use crate::{drops, parse};

/// The identification of the next datagram.
#[map]
static IDENTIFICATIONS: Array<u64> = Array::with_max_entries(1, 0);

/// Where keys and values are put together: a program's stack has no room for them.
#[map]
static FRAGMENT: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

struct Scratch {
    cell: Cell,
    datagram: Datagram,
}

/// Hands a fragment over, and what is too big but may be divided.
#[inline(always)]
pub fn or_divert<F: Family>(
    ctx: &TcContext,
    result: Result<i32, Drop>,
    tag: Tag,
) -> Result<i32, Drop> {
    match result {
        // Nobody divides a packet of IPv6 but who made it (RFC 8200, section 5).
        Err(Drop::Fragment) if F::ETHERTYPE == ETHERTYPE_IPV6 && is_too_big(ctx) => {
            Err(Drop::TooBig)
        }
        Err(Drop::Fragment) => to_program(ctx, tag),
        Err(Drop::TooBig) if is_divisible::<F>(ctx) => to_daemon(ctx, tag),
        result => result,
    }
}

#[inline(always)]
fn is_too_big(ctx: &TcContext) -> bool {
    ctx.len() - IP as u32 > End::inner_mtu()
}

#[inline(always)]
fn is_divisible<F: Family>(ctx: &TcContext) -> bool {
    // SAFETY: `at` checked the bounds.
    F::ETHERTYPE == ETHERTYPE_IPV4
        && at::<F::Header>(ctx, IP).is_some_and(|header| !F::is_whole(unsafe { &*header }))
}

/// Hands a packet to the program of fragments.
#[inline(always)]
pub fn to_program(ctx: &TcContext, tag: Tag) -> Result<i32, Drop> {
    redirect(ctx, tag, BPF_F_INGRESS as u64)
}

/// Hands a packet from the tunnel to the program of fragments of a proxy, which needs to know the
/// tunnel's other end: that stands in front of the packet, for the tag has no room.
#[inline(always)]
pub fn to_program_from(ctx: &TcContext, tag: Tag, remote: &Ip) -> Result<i32, Drop> {
    ctx.adjust_room(size_of::<Ip>() as i32, BPF_ADJ_ROOM_MAC, 0).map_err(|_| Drop::Internal)?;
    let place = at::<Ip>(ctx, IP).ok_or(Drop::Internal)?;
    // SAFETY: `at` checked the bounds.
    unsafe { *place = *remote };
    to_program(ctx, tag)
}

/// The tunnel's other end, taken from in front of the packet.
#[inline(always)]
pub fn take_remote(ctx: &TcContext) -> Result<Ip, Drop> {
    parse::pull(ctx, (IP + size_of::<Ip>()) as u32);
    let place = at::<Ip>(ctx, IP).ok_or(Drop::Truncated)?;
    // SAFETY: `at` checked the bounds. What was put in as zeroes is taken out as such: a sum of all
    // bytes, if the kernel has one, stays right.
    let remote = unsafe { core::mem::replace(&mut *place, Ip::UNSPECIFIED) };
    ctx.adjust_room(-(size_of::<Ip>() as i32), BPF_ADJ_ROOM_MAC, 0).map_err(|_| Drop::Truncated)?;
    Ok(remote)
}

/// Hands a packet to the daemon, which writes it back: later, or in parts.
#[inline(always)]
pub fn to_daemon(ctx: &TcContext, tag: Tag) -> Result<i32, Drop> {
    redirect(ctx, tag, 0)
}

#[inline(always)]
fn redirect(ctx: &TcContext, tag: Tag, flags: u64) -> Result<i32, Drop> {
    let ethernet = at::<Ethernet>(ctx, 0).ok_or(Drop::Internal)?;
    // SAFETY: `at` checked the bounds; the helper has no preconditions.
    unsafe {
        ((*ethernet).destination, (*ethernet).source) = tag.to_macs();
        Ok(bpf_redirect(fragments_ifindex(), flags) as i32)
    }
}

/// The tag of what came to the device for fragments.
#[inline(always)]
pub fn tag(ctx: &TcContext) -> Option<Tag> {
    let Ethernet { destination, source, .. } = parse::ethernet(ctx).ok()?;
    Tag::from_macs(destination, source)
}

/// What a fragment says of itself, and its header.
#[inline(always)]
pub fn piece<F: Fragmented>(ctx: &TcContext) -> Result<(Piece, Fields<F>), Drop> {
    parse::prepare::<F>(ctx)?;
    if parse::ethernet(ctx)?.ethertype != F::ETHERTYPE {
        return Err(Drop::Internal);
    }
    // SAFETY: `at` checked the bounds.
    let header = unsafe { &*at::<F::Fragment>(ctx, IP).ok_or(Drop::Truncated)? };
    let (piece, fields) = F::piece(header)?.ok_or(Drop::Internal)?;
    piece.check::<F>(fields.protocol)?;
    if fields.length + IP as u32 > ctx.len() {
        return Err(Drop::Truncated);
    }
    Ok((piece, fields))
}

/// Whether the packet of a first fragment is one that is translated in fragments: not an ICMP error,
/// of which all must be there; nor a SYN, which nobody divides but to hide it (RFC 1858).
#[inline(always)]
pub fn is_translated<F: Family>(packet: &Packet<F>) -> Result<(), Drop> {
    if packet.is_error {
        return Err(Drop::IcmpError);
    }
    if packet.flags & tcp::SYN != 0 { Err(Drop::BadFragment) } else { Ok(()) }
}

/// Gives a fragment its datagram's new identification.
#[inline(always)]
pub fn identify<F: Fragmented>(ctx: &TcContext, id: u32) -> Result<(), Drop> {
    // SAFETY: `at` checked the bounds.
    F::identify(unsafe { &mut *at::<F::Fragment>(ctx, IP).ok_or(Drop::Internal)? }, id);
    Ok(())
}

/// This CPU's scratch: tc programs do not interrupt one another.
///
/// Looked for whenever it is needed: there is no room on the stack for where it lies, while a first
/// fragment is translated.
#[inline(always)]
fn scratch() -> Result<*mut Scratch, Drop> {
    FRAGMENT.get_ptr_mut(0).ok_or(Drop::Internal)
}

/// Looks for a fragment's datagram: what is known of that is in the scratch from here on.
#[inline(always)]
pub fn look_for(tag: Tag, peer: Ip, piece: &Piece, protocol: u8) -> Result<(), Drop> {
    look_for_from(tag, Ip::UNSPECIFIED, peer, piece, protocol)
}

/// [`look_for`], where it came out of the tunnel of a proxy, whose other end is `remote`.
#[inline(always)]
pub fn look_for_from(
    tag: Tag,
    remote: Ip,
    peer: Ip,
    piece: &Piece,
    protocol: u8,
) -> Result<(), Drop> {
    let Tag { origin, owner, mark, .. } = tag;
    let Piece { id, length: first, .. } = *piece;
    let (origin, protocol) = (origin as u32, protocol as u32);
    let scratch = scratch()?;
    // SAFETY: it is a map value, and nobody else's at this time, so below; the helper has no
    // preconditions.
    unsafe {
        (*scratch).datagram = Datagram {
            key: DatagramKey { origin, owner, mark, remote, peer, id, protocol },
            began: tick(bpf_ktime_get_coarse_ns()),
            first,
            // One that is all there is concerns no others (RFC 6946, section 4).
            seen: if piece.more { first as i32 } else { 0 },
            id,
            ifindex: 0,
            generation: 0,
            host: Ip::UNSPECIFIED,
            local_port: Be16(0),
            peer_port: Be16(0),
        };
        (*scratch).cell = (*scratch).datagram.key.cell();
    }
    Ok(())
}

/// The datagram of a later fragment, if its first one was here; the fragment must not be over that.
#[inline(always)]
pub fn find(piece: &Piece) -> Result<Option<&'static Datagram>, Drop> {
    // SAFETY: as above.
    let Scratch { cell, datagram: wanted } = unsafe { &*scratch()? };
    let Some(datagram) = DATAGRAMS.get_ptr_mut(cell) else { return Ok(None) };
    // SAFETY: the verifier checked the pointer for null; map values stay readable to the end of the
    // program. One that is replaced meanwhile is told by its key, or is a datagram of the same
    // owner's.
    let datagram = unsafe { &mut *datagram };
    if !datagram.is_of(&wanted.key, wanted.began) {
        return Ok(None);
    }
    datagram.enter(piece)?;
    Ok(Some(datagram))
}

/// Gives the datagram of a first fragment an identification of its own.
#[inline(always)]
pub fn identify_first<F: Fragmented>(ctx: &TcContext) -> Result<(), Drop> {
    let id = identification()?;
    let scratch = scratch()?;
    // SAFETY: as above.
    unsafe { (*scratch).datagram.id = id };
    identify::<F>(ctx, id)
}

/// Tells who gets the datagram: a slot's guest.
#[inline(always)]
pub fn direct(slot: &Slot) -> Result<(), Drop> {
    let scratch = scratch()?;
    // SAFETY: as above.
    unsafe {
        (*scratch).datagram.ifindex = slot.ifindex;
        (*scratch).datagram.generation = slot.attachment.generation();
    }
    Ok(())
}

/// Tells who gets the datagram: a host.
#[inline(always)]
pub fn direct_to(host: &Ip) -> Result<(), Drop> {
    let scratch = scratch()?;
    // SAFETY: as above.
    unsafe { (*scratch).datagram.host = *host };
    Ok(())
}

/// Remembers a datagram by its first fragment. One that has to give way is counted.
#[inline(always)]
pub fn begin<F: Family>(scope: u32, packet: &Packet<F>) -> Result<(), Drop> {
    // SAFETY: as above.
    let Scratch { cell, datagram } = unsafe { &mut *scratch()? };
    if datagram.seen == 0 {
        return Ok(());
    }
    // SAFETY: as in `find`.
    if let Some(former) = DATAGRAMS.get_ptr(&*cell).map(|former| unsafe { &*former })
        && former.is_awaited(datagram.began)
        && !former.key.is(&datagram.key)
    {
        drops::count(scope, Drop::FragmentsExhausted);
    }
    (datagram.local_port, datagram.peer_port) = (packet.local_port, packet.peer_port);
    // Full: the others are dropped as strangers.
    let _ = DATAGRAMS.insert(&*cell, &*datagram, 0);
    Ok(())
}

/// Has a fragment wait for its datagram's first one, if it did not wait long enough.
#[inline(always)]
pub fn wait(ctx: &TcContext, tag: Tag) -> Result<i32, Drop> {
    to_daemon(ctx, tag.again().ok_or(Drop::Fragment)?)
}

/// An identification for a datagram that leaves from a shared address: guests choose theirs without
/// regard to each other, and a receiver puts together whatever has the same (RFC 6864, section 5.3).
#[inline(always)]
pub fn identification() -> Result<u32, Drop> {
    let last = IDENTIFICATIONS.get_ptr_mut(0).ok_or(Drop::Internal)?;
    let mut next = 1u64;
    // SAFETY: one atomic instruction on the map value; `core` has none on this target.
    unsafe {
        asm!(
            "{next} = atomic_fetch_add((u64 *)({last} + 0), {next})",
            last = in(reg) last,
            next = inout(reg) next,
        );
    }
    Ok(next as u32)
}
