//! What comes from a VPC: tcx ingress on the proxy's interface in it.

use aya_ebpf::bindings::TC_ACT_OK;
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::family::{Family, V4, V6};
use warren_abi::flow::Direction;
use warren_abi::fragment::{Tag, origin};
use warren_abi::icmp::v6::{NEIGHBOUR_ADVERTISEMENT, NEIGHBOUR_SOLICITATION};
use warren_abi::maps::ProxyVpc;
use warren_abi::wire::{
    Arp, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ip, Ip6Header, IpHeader, Ipv4,
};

use crate::answer::Answerer;
use crate::drops::TCX_NEXT;
use crate::maps::REACHED;
use crate::parse::IP;
use crate::{answer, arp, blocks, cache, drops, encap, fragment, icmp, nd, parse, public};

/// Answers ARP and neighbour discovery for the shared addresses; sends what is for them to the host
/// that holds the port.
#[classifier]
pub fn vpc(ctx: TcContext) -> i32 {
    match parse::ethertype(&ctx) {
        ETHERTYPE_IPV6 => ingress::<V6>(&ctx, wanted_v6, |vpc| vpc.v6.shared_address, take_v6),
        _ => ingress::<V4>(&ctx, wanted_v4, |vpc| vpc.shared_address, take_v4),
    }
}

/// Takes a packet from a VPC, and answers for the shared address that it wants.
#[inline(always)]
fn ingress<F: Family>(
    ctx: &TcContext,
    wanted: impl FnOnce(&TcContext) -> Option<Ip>,
    address: impl FnOnce(&ProxyVpc) -> F::Address,
    take: impl FnOnce(&TcContext, &ProxyVpc) -> Result<i32, Drop>,
) -> i32 {
    let prepared = parse::prepare::<F>(ctx);
    let wanted = wanted(ctx).unwrap_or(Ip::UNSPECIFIED);
    let Some(vpc) = cache::vpc_at(ifindex(ctx), wanted) else {
        return drops::verdict(ctx, 0, Err(Drop::UnknownVpc));
    };
    let tag = Tag::new(origin::VPC, vpc.vni, 0);
    let taken = prepared.and_then(|()| is_ours(ctx, vpc)).and_then(|()| take(ctx, vpc));
    let result = fragment::or_divert::<F>(ctx, taken, tag);
    let ProxyVpc { mac, ifindex, scope, .. } = *vpc;
    let action = drops::verdict(ctx, scope, result);
    let proxy = Answerer::<F> { mac, address: address(vpc), ifindex, scope };
    result.err().and_then(|reason| answer::send(ctx, &proxy, reason)).unwrap_or(action)
}

#[inline(always)]
fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the context is the kernel's for as long as the program runs.
    unsafe { (*ctx.skb.skb).ifindex }
}

/// A switch that does not know whose a MAC address is sends to everyone: to forward that again would
/// double it.
#[inline(always)]
fn is_ours(ctx: &TcContext, vpc: &ProxyVpc) -> Result<(), Drop> {
    let to = parse::ethernet(ctx)?.destination;
    if to == vpc.mac {
        heard(vpc.scope);
    } else if !to.is_multicast() {
        return Err(Drop::OtherMac);
    }
    Ok(())
}

/// Notes that the VPC is reached. Whoever sends to the interface's MAC address has learnt it.
#[inline(always)]
fn heard(scope: u32) {
    if let Some(reached) = REACHED.get_ptr_mut(scope) {
        // SAFETY: the verifier checked the pointer for null; an array's entries stay. Written only when
        // the clock went on: processors do not take the line from each other with each packet.
        unsafe {
            let (at, now) = (&raw mut (*reached).at_ns, bpf_ktime_get_coarse_ns());
            if at.read_volatile() != now {
                at.write_volatile(now);
            }
        }
    }
}

/// Notes who is there to be asked, should nothing come any more.
#[inline(always)]
fn met(scope: u32, arp: &Arp) {
    if let Some(reached) = REACHED.get_ptr_mut(scope) {
        // SAFETY: as above. Torn, it is somebody who does not answer, once.
        unsafe {
            (&raw mut (*reached).neighbour).write_volatile(arp.sender);
            (&raw mut (*reached).mac).write_volatile(arp.sender_mac);
        }
    }
}

/// What a packet is for, or who is asked for.
#[inline(always)]
fn wanted_v4(ctx: &TcContext) -> Option<Ip> {
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    let address = match parse::ethertype(ctx) {
        ETHERTYPE_ARP => unsafe { (*parse::at::<Arp>(ctx, IP)?).target },
        _ => unsafe { (*parse::at::<IpHeader>(ctx, IP)?).destination },
    };
    Some(Ip::v4(address))
}

/// As [`wanted_v4`].
#[inline(always)]
fn wanted_v6(ctx: &TcContext) -> Option<Ip> {
    let asked = if nd::is_message(ctx) { nd::message(ctx).ok() } else { None };
    match asked {
        Some(message) if message.kind == NEIGHBOUR_SOLICITATION => Some(message.target),
        // SAFETY: as above.
        _ => Some(unsafe { (*parse::at::<Ip6Header>(ctx, IP)?).destination }),
    }
}

#[inline(always)]
fn take_v4(ctx: &TcContext, vpc: &ProxyVpc) -> Result<i32, Drop> {
    match parse::ethernet(ctx)?.ethertype {
        ETHERTYPE_IPV4 => to_host::<V4>(ctx, vpc),
        ETHERTYPE_ARP => resolve(ctx, vpc),
        _ => Err(Drop::NotIpv4),
    }
}

#[inline(always)]
fn take_v6(ctx: &TcContext, vpc: &ProxyVpc) -> Result<i32, Drop> {
    if nd::is_message(ctx) { resolve_v6(ctx, vpc) } else { to_host::<V6>(ctx, vpc) }
}

/// Has the kernel ask for neighbours in nobody's name (RFC 5227, section 1.1), where it would do so
/// in that of a shared address which another proxy owns: who is asked would take this one for the
/// owner.
#[classifier]
pub fn vpc_egress(ctx: TcContext) -> i32 {
    if parse::ethertype(&ctx) == ETHERTYPE_ARP {
        disown(&ctx);
    }
    TCX_NEXT
}

#[inline(always)]
fn disown(ctx: &TcContext) -> Option<()> {
    parse::pull(ctx, (IP + size_of::<Arp>()) as u32);
    let arp = parse::at::<Arp>(ctx, IP)?;
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    let Arp { operation, sender, target, .. } = unsafe { *arp };
    let vpc = cache::vpc_at(ifindex(ctx), Ip::v4(sender))?;
    let is_anothers = vpc.standby != 0 && vpc.shared_address == sender;
    if operation == Arp::REQUEST && sender != target && is_anothers {
        // SAFETY: no helper ran since that changes the packet.
        unsafe { (*arp).sender = Ipv4(0) };
    }
    Some(())
}

/// Sends what is for the shared address to the host that holds the port.
#[inline(always)]
fn to_host<F: Family>(ctx: &TcContext, vpc: &ProxyVpc) -> Result<i32, Drop> {
    let shared = F::shared_on_proxy(vpc)?;
    let mut packet = parse::packet::<F>(ctx, Direction::In)?;
    if !F::same(packet.destination, shared) {
        return Err(Drop::NotSharedAddress);
    }
    if packet.is_error {
        let subject = icmp::subject(ctx, &mut packet, Direction::In)?;
        if !F::same(subject.local, shared) {
            return Err(Drop::IcmpError);
        }
    }
    let Some(host) = blocks::holder(vpc, packet.local_port) else {
        return Ok(public::enter::<F>(ctx, vpc.vni, packet.local_port, packet.peer_port));
    };
    encap::fits(ctx, &packet)?;
    encap::send(ctx, &packet, vpc.vni, host)
}

/// Answers who asks for the shared address. Replies go to the kernel, which asked.
#[inline(always)]
fn resolve(ctx: &TcContext, vpc: &ProxyVpc) -> Result<i32, Drop> {
    let message = arp::message(ctx)?;
    let Arp { sender, target, .. } = message;
    match message.operation {
        Arp::REQUEST if target != vpc.shared_address => Err(Drop::UnexpectedArp),
        // Another proxy's announcement asks nobody.
        Arp::REQUEST if sender == target => Err(Drop::UnexpectedArp),
        Arp::REQUEST if vpc.standby != 0 => Err(Drop::Standby),
        Arp::REQUEST => arp::reply(ctx, &message, vpc.mac, vpc.ifindex),
        // It may have asked in nobody's name.
        Arp::REPLY if target == vpc.shared_address || target == Ipv4(0) => {
            // Another proxy may take itself for the owner.
            if sender != vpc.shared_address {
                met(vpc.scope, &message);
            }
            Ok(TC_ACT_OK)
        }
        _ => Err(Drop::UnexpectedArp),
    }
}

/// As [`resolve`]. The kernel asks from the shared address, or from the link-local one that the
/// daemon gave the interface.
#[inline(always)]
fn resolve_v6(ctx: &TcContext, vpc: &ProxyVpc) -> Result<i32, Drop> {
    let shared = V6::shared_on_proxy(vpc)?;
    let message = nd::message(ctx)?;
    let own = |address: Ip| address.is(shared) || address.is(Ip::link_local(vpc.mac));
    match message.kind {
        NEIGHBOUR_SOLICITATION if message.target.is(shared) && vpc.standby != 0 => {
            Err(Drop::Standby)
        }
        NEIGHBOUR_SOLICITATION if own(message.target) => {
            nd::reply(ctx, &message, vpc.mac, 0, vpc.ifindex)
        }
        NEIGHBOUR_ADVERTISEMENT if own(message.destination) => Ok(TC_ACT_OK),
        _ => Err(Drop::UnexpectedNd),
    }
}
