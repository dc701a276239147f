//! What comes from a VPC: tcx ingress on the proxy's interface in it.

use aya_ebpf::bindings::TC_ACT_OK;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::family::{Family, V4};
use warren_abi::flow::Direction;
use warren_abi::maps::ProxyVpc;
use warren_abi::wire::{Arp, ETHERTYPE_ARP, ETHERTYPE_IPV4};

use crate::answer::Answerer;
use crate::maps::INTERFACES;
use crate::{answer, arp, blocks, drops, encap, icmp, parse};

/// Answers ARP for the shared address; sends what is for it to the host that holds the port.
#[classifier]
pub fn vpc(ctx: TcContext) -> i32 {
    // SAFETY: the context is the kernel's for as long as the program runs; the entry is copied at
    // once, and one that is replaced meanwhile is a VPC as well.
    let vpc = unsafe { INTERFACES.get((*ctx.skb.skb).ifindex) }.copied();
    match vpc {
        Some(vpc) => {
            let result = ingress(&ctx, &vpc);
            let action = drops::verdict(&ctx, vpc.scope, result);
            let ProxyVpc { mac, shared_address: address, ifindex, scope, .. } = vpc;
            let proxy = Answerer::<V4> { mac, address, ifindex, scope };
            result.err().and_then(|reason| answer::send(&ctx, &proxy, reason)).unwrap_or(action)
        }
        None => drops::verdict(&ctx, 0, Err(Drop::UnknownVpc)),
    }
}

#[inline(always)]
fn ingress(ctx: &TcContext, vpc: &ProxyVpc) -> Result<i32, Drop> {
    parse::prepare(ctx)?;
    match parse::ethernet(ctx)?.ethertype {
        ETHERTYPE_IPV4 => to_host::<V4>(ctx, vpc),
        ETHERTYPE_ARP => resolve(ctx, vpc),
        _ => Err(Drop::NotIpv4),
    }
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
        Arp::REQUEST => arp::reply(ctx, &message, vpc.mac, vpc.ifindex),
        Arp::REPLY => Ok(TC_ACT_OK),
        _ => Err(Drop::UnexpectedArp),
    }
}
