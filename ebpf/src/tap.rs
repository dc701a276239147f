//! What guests send: tcx ingress on a slot's TAP.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::family::{Family, V4};
use warren_abi::flow::Direction;
use warren_abi::maps::Slot;
use warren_abi::wire::{Arp, ETHERTYPE_ARP, ETHERTYPE_IPV4, Ethernet, GATEWAY, GATEWAY_MAC, Ipv4};

use crate::answer::Answerer;
use crate::maps::{HOST_VPCS, slot};
use crate::parse::Packet;
use crate::{answer, arp, conntrack, drops, encap, icmp, migration, mss, nat, parse, services};

/// Answers ARP; translates and sends everything else to the proxy of the slot's VPC, or tells the
/// guest why not.
#[classifier]
pub fn tap(ctx: TcContext) -> i32 {
    // SAFETY: the context is the kernel's for as long as the program runs.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    match slot(ifindex) {
        Some(slot) => {
            let result = ingress(&ctx, &slot).map_err(|reason| ((), reason));
            let result = migration::or_former(result).map_err(|((), reason)| reason);
            let action = drops::verdict(&ctx, slot.number, result);
            let (address, scope) = (GATEWAY.into(), slot.number);
            let gateway = Answerer::<V4> { mac: GATEWAY_MAC, address, ifindex, scope };
            result.err().and_then(|reason| answer::send(&ctx, &gateway, reason)).unwrap_or(action)
        }
        None => drops::verdict(&ctx, 0, Err(Drop::Detached)),
    }
}

#[inline(always)]
fn ingress(ctx: &TcContext, slot: &Slot) -> Result<i32, Drop> {
    parse::prepare(ctx)?;
    let ethernet = parse::ethernet(ctx)?;
    if ethernet.ethertype == ETHERTYPE_ARP {
        return answer(ctx, &ethernet, slot);
    }
    if ethernet.source != slot.mac {
        return Err(Drop::SpoofedMac);
    }
    if ethernet.ethertype != ETHERTYPE_IPV4 {
        return Err(Drop::NotIpv4);
    }
    let packet = parse::packet::<V4>(ctx, Direction::Out)?;
    if packet.source != slot.address {
        return Err(Drop::SpoofedAddress);
    }
    if warren_abi::services::is_address(packet.destination) {
        return services::to_daemon(ctx, slot, &packet);
    }
    to_vpc(ctx, slot, packet)
}

/// Translates a packet and sends it to the proxy of the slot's VPC.
#[inline(always)]
pub fn to_vpc<F: Family>(ctx: &TcContext, slot: &Slot, mut packet: Packet<F>) -> Result<i32, Drop> {
    if !F::is_destination(packet.destination) {
        return Err(Drop::BadDestination);
    }
    let vni = slot.attachment.vni();
    if vni == 0 {
        return Err(Drop::Detached);
    }
    if packet.ttl <= 1 {
        return Err(Drop::TtlExceeded);
    }
    // SAFETY: the entry is copied at once; one that is replaced meanwhile is a VPC as well.
    let vpc = *unsafe { HOST_VPCS.get(vni) }.ok_or(Drop::UnknownVpc)?;
    let shared = F::shared(&vpc)?;

    encap::fits(ctx, &packet)?;
    let port = if packet.is_error {
        let subject = icmp::subject(ctx, &mut packet, Direction::Out)?;
        // An error goes to who sent the packet that it is about.
        if !F::same(subject.local, F::guest(slot)) || !F::same(subject.peer, packet.destination) {
            return Err(Drop::IcmpError);
        }
        let port = conntrack::error_outward::<F>(slot, &subject)?;
        icmp::translate(ctx, &packet, &subject, Direction::Out, shared, port)?;
        port
    } else {
        let port = conntrack::outward(slot, &vpc, &packet)?;
        mss::clamp(ctx, &packet)?;
        nat::translate(ctx, &packet, Direction::Out, shared, port)?;
        port
    };
    // What the proxy sees, so that both choose the same tunnel port for a flow's two directions.
    packet.source = shared;
    packet.local_port = port;
    encap::send(ctx, &packet, vni, vpc.proxy_address)
}

/// The guest has one neighbour, the gateway, whatever it asks for.
#[inline(always)]
fn answer(ctx: &TcContext, ethernet: &Ethernet, slot: &Slot) -> Result<i32, Drop> {
    let message = arp::message(ctx)?;
    let Arp { sender, target, .. } = message;
    let spoofed = ethernet.source != slot.mac
        || message.sender_mac != slot.mac
        || (sender != slot.address && sender != Ipv4(0));
    if spoofed {
        return Err(Drop::SpoofedArp);
    }
    // A guest that asks for its own address wants to hear nothing (RFC 5227, section 2.1.1).
    if message.operation != Arp::REQUEST || target == slot.address {
        return Err(Drop::UnexpectedArp);
    }
    arp::reply(ctx, &message, GATEWAY_MAC, slot.ifindex)
}
