//! What comes from a VPC: tcx ingress on the proxy's interface in it.

use core::marker::PhantomData;

use aya_ebpf::bindings::TC_ACT_OK;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::family::{Family, V4, V6};
use warren_abi::flow::Direction;
use warren_abi::fragment::{Tag, origin};
use warren_abi::icmp::v6::{NEIGHBOUR_ADVERTISEMENT, NEIGHBOUR_SOLICITATION};
use warren_abi::maps::ProxyVpc;
use warren_abi::wire::{Arp, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ip};

use crate::answer::Answerer;
use crate::{answer, arp, blocks, cache, drops, encap, fragment, icmp, nd, parse};

/// Answers ARP and neighbour discovery for the shared addresses; sends what is for them to the host
/// that holds the port.
#[classifier]
pub fn vpc(ctx: TcContext) -> i32 {
    match parse::ethertype(&ctx) {
        ETHERTYPE_IPV6 => ingress(&ctx, |vpc| vpc.v6.shared_address, ingress_v6),
        _ => ingress(&ctx, |vpc| vpc.shared_address, ingress_v4),
    }
}

/// Takes a packet from a VPC, and answers for its shared address.
#[inline(always)]
fn ingress<F: Family>(
    ctx: &TcContext,
    address: impl FnOnce(&ProxyVpc) -> F::Address,
    take: impl FnOnce(&TcContext, &ProxyVpc, PhantomData<F>) -> Result<i32, Drop>,
) -> i32 {
    // SAFETY: the context is the kernel's for as long as the program runs.
    let Some(vpc) = cache::vpc_of(unsafe { (*ctx.skb.skb).ifindex }) else {
        return drops::verdict(ctx, 0, Err(Drop::UnknownVpc));
    };
    let tag = Tag::new(origin::VPC, vpc.ifindex, 0);
    let result = fragment::or_divert::<F>(ctx, take(ctx, vpc, PhantomData), tag);
    let ProxyVpc { mac, ifindex, scope, .. } = *vpc;
    let action = drops::verdict(ctx, scope, result);
    let proxy = Answerer::<F> { mac, address: address(vpc), ifindex, scope };
    result.err().and_then(|reason| answer::send(ctx, &proxy, reason)).unwrap_or(action)
}

#[inline(always)]
fn ingress_v4(ctx: &TcContext, vpc: &ProxyVpc, _: PhantomData<V4>) -> Result<i32, Drop> {
    parse::prepare::<V4>(ctx)?;
    match parse::ethernet(ctx)?.ethertype {
        ETHERTYPE_IPV4 => to_host::<V4>(ctx, vpc),
        ETHERTYPE_ARP => resolve(ctx, vpc),
        _ => Err(Drop::NotIpv4),
    }
}

#[inline(always)]
fn ingress_v6(ctx: &TcContext, vpc: &ProxyVpc, _: PhantomData<V6>) -> Result<i32, Drop> {
    parse::prepare::<V6>(ctx)?;
    if nd::is_message(ctx) { resolve_v6(ctx, vpc) } else { to_host::<V6>(ctx, vpc) }
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
    let host = blocks::holder(vpc, packet.local_port).ok_or(Drop::NoBlockHolder)?;
    encap::fits(ctx, &packet)?;
    encap::send(ctx, &packet, vpc.vni, host)
}

/// Answers who asks for the shared address. Replies go to the kernel, which asked.
#[inline(always)]
fn resolve(ctx: &TcContext, vpc: &ProxyVpc) -> Result<i32, Drop> {
    let message = arp::message(ctx)?;
    let Arp { target, .. } = message;
    if target != vpc.shared_address {
        return Err(Drop::UnexpectedArp);
    }
    match message.operation {
        Arp::REQUEST if vpc.standby != 0 => Err(Drop::Standby),
        Arp::REQUEST => arp::reply(ctx, &message, vpc.mac, vpc.ifindex),
        Arp::REPLY => Ok(TC_ACT_OK),
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
