//! What guests send: tcx ingress on a slot's TAP.

use core::marker::PhantomData;

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use warren_abi::conntrack::Ports;
use warren_abi::drop::Drop;
use warren_abi::family::{Family, V4, V6};
use warren_abi::flow::Direction;
use warren_abi::fragment::{First, Tag, origin};
use warren_abi::icmp::v6::NEIGHBOUR_SOLICITATION;
use warren_abi::maps::{HostVpc, Slot};
use warren_abi::wire::{
    Arp, Be16, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, GATEWAY, GATEWAY_MAC,
    GATEWAY_V6, Ip, Ipv4, Neighbour,
};

use crate::answer::Answerer;
use crate::maps::{daemon_in, services_ifindex};
use crate::parse::Packet;
use crate::{
    answer, arp, cache, conntrack, drops, encap, fragment, icmp, limit, migration, mss, nat, nd,
    parse, services, tail,
};

/// Answers ARP and neighbour discovery; translates and sends everything else to the proxy of the
/// slot's VPC, or tells the guest why not.
#[classifier]
pub fn tap(ctx: TcContext) -> i32 {
    match parse::ethertype(&ctx) {
        ETHERTYPE_IPV6 => tail::call(&ctx, tail::TAP_V6),
        _ => ingress(&ctx, GATEWAY.into(), ingress_v4),
    }
}

/// The rest of [`tap`], of IPv6.
#[classifier]
pub fn tap_v6(ctx: TcContext) -> i32 {
    ingress(&ctx, GATEWAY_V6, ingress_v6)
}

/// Takes a packet of a slot's, and answers for the gateway, whose address is given.
#[inline(always)]
fn ingress<F: Family>(
    ctx: &TcContext,
    address: F::Address,
    take: impl FnOnce(&TcContext, &Slot, PhantomData<F>) -> Result<i32, Drop>,
) -> i32 {
    // SAFETY: the context is the kernel's for as long as the program runs.
    match cache::slot(unsafe { (*ctx.skb.skb).ifindex }) {
        Some(slot) => {
            let result = take(ctx, slot, PhantomData);
            // Read again, rather than kept on the stack.
            let Slot { attachment, ifindex, number: scope, .. } = *slot;
            let tag = Tag::new(origin::SLOT, ifindex, attachment.generation());
            let result = fragment::or_divert::<F>(ctx, result, tag);
            let result = result.map_err(|reason| ((), reason));
            let result = migration::or_former(result).map_err(|((), reason)| reason);
            let action = drops::verdict(ctx, scope, result);
            let gateway = Answerer::<F> { mac: GATEWAY_MAC, address, ifindex, scope };
            result.err().and_then(|reason| answer::send(ctx, &gateway, reason)).unwrap_or(action)
        }
        None => drops::verdict(ctx, 0, Err(Drop::Detached)),
    }
}

#[inline(always)]
fn ingress_v4(ctx: &TcContext, slot: &Slot, _: PhantomData<V4>) -> Result<i32, Drop> {
    parse::prepare::<V4>(ctx)?;
    let ethernet = parse::ethernet(ctx)?;
    if ethernet.ethertype == ETHERTYPE_ARP {
        return resolve(ctx, &ethernet, slot);
    }
    if ethernet.source != slot.mac {
        return Err(Drop::SpoofedMac);
    }
    if ethernet.ethertype != ETHERTYPE_IPV4 {
        return Err(Drop::NotIpv4);
    }
    let mut packet = parse::packet::<V4>(ctx, Direction::Out)?;
    if packet.source != slot.address {
        return Err(Drop::SpoofedAddress);
    }
    if warren_abi::services::is_address(packet.destination) {
        return services::to_daemon(ctx, slot, &packet);
    }
    to_vpc(ctx, slot, &mut packet)
}

#[inline(always)]
fn ingress_v6(ctx: &TcContext, slot: &Slot, _: PhantomData<V6>) -> Result<i32, Drop> {
    parse::prepare::<V6>(ctx)?;
    let ethernet = parse::ethernet(ctx)?;
    if nd::is_message(ctx) {
        return Ok(tail::call(ctx, tail::RESOLVE_V6));
    }
    if ethernet.source != slot.mac {
        return Err(Drop::SpoofedMac);
    }
    let mut packet = parse::packet::<V6>(ctx, Direction::Out)?;
    if !packet.source.is(V6::guest(slot)) {
        return Err(Drop::SpoofedAddress);
    }
    to_vpc(ctx, slot, &mut packet)
}

/// Translates a packet and sends it to the proxy of the slot's VPC. `packet` becomes what it is
/// outside.
#[inline(always)]
pub fn to_vpc<F: Translated>(
    ctx: &TcContext,
    slot: &Slot,
    packet: &mut Packet<F>,
) -> Result<i32, Drop> {
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
    let vpc = cache::host_vpc(vni).ok_or(Drop::UnknownVpc)?;
    F::shared(vpc)?;
    let ports = Ports { base: vpc.port_base, count: vpc.port_count };

    encap::fits(ctx, packet)?;
    limit::admit(slot, Direction::Out, packet.traffic)?;
    if packet.is_error {
        let is_v4 = F::ETHERTYPE == ETHERTYPE_IPV4;
        return Ok(tail::call(ctx, if is_v4 { tail::ERROR_TO_VPC } else { tail::ERROR_TO_VPC_V6 }));
    }
    let port = conntrack::outward(slot, ports, packet)?;
    let Some(program) = F::PROGRAM else {
        return translate(ctx, packet, vni, vpc, port);
    };
    // SAFETY: the context is the kernel's for as long as the program runs.
    unsafe {
        (*ctx.skb.skb).cb[0] = vni;
        (*ctx.skb.skb).cb[1] = port.0 as u32;
        (*ctx.skb.skb).cb[2] = slot.number;
    }
    Ok(tail::call(ctx, program))
}

/// What guests send.
pub trait Translated: Family {
    /// The place of the program that [`to_vpc`] ends with, if the stack has no room for the rest.
    const PROGRAM: Option<u32>;
}

impl Translated for V4 {
    const PROGRAM: Option<u32> = None;
}

impl Translated for First<V4> {
    const PROGRAM: Option<u32> = None;
}

impl Translated for V6 {
    const PROGRAM: Option<u32> = Some(tail::TRANSLATE_V6);
}

impl Translated for First<V6> {
    const PROGRAM: Option<u32> = Some(tail::TRANSLATE_FIRST_V6);
}

/// The rest of [`to_vpc`]: puts the VPC's shared address and this port in the place of the guest's.
#[inline(always)]
fn translate<F: Family>(
    ctx: &TcContext,
    packet: &mut Packet<F>,
    vni: u32,
    vpc: &HostVpc,
    port: Be16,
) -> Result<i32, Drop> {
    let shared = F::shared(vpc)?;
    mss::clamp(ctx, packet)?;
    nat::translate(ctx, packet, Direction::Out, shared, port)?;
    // What the proxy sees, so that both choose the same tunnel port for a flow's two directions.
    packet.source = shared;
    packet.local_port = port;
    encap::send(ctx, packet, vni, &vpc.proxy_address)
}

/// [`translate`], in IPv6.
#[classifier]
pub fn translate_v6(ctx: TcContext) -> i32 {
    rest::<V6>(&ctx, |_, _| Ok(()))
}

/// [`translate`], of a first fragment in IPv6.
#[classifier]
pub fn translate_first_v6(ctx: TcContext) -> i32 {
    rest::<First<V6>>(&ctx, fragment::begin)
}

/// The rest of [`to_vpc`] in a program of its own, and what comes after it.
#[inline(always)]
fn rest<F: Family>(ctx: &TcContext, then: impl FnOnce(u32, &Packet<F>) -> Result<(), Drop>) -> i32 {
    // SAFETY: the context is the kernel's for as long as the program runs.
    let [vni, port, scope, ..] = unsafe { (*ctx.skb.skb).cb };
    let vpc = cache::host_vpc(vni).ok_or(Drop::UnknownVpc);
    let result = vpc.and_then(|vpc| {
        let mut packet = parse::packet::<F>(ctx, Direction::Out)?;
        let action = translate(ctx, &mut packet, vni, vpc, Be16(port as u16))?;
        then(scope, &packet)?;
        Ok(action)
    });
    drops::verdict(ctx, scope, result)
}

/// The slot that a packet came from, or the daemon's stand-in.
#[inline(always)]
fn sender(ctx: &TcContext, source: Ip) -> Result<Slot, Drop> {
    // SAFETY: the context is the kernel's for as long as the program runs.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    let found = match source.to_v4().and_then(warren_abi::services::vpc_of) {
        Some(vni) if ifindex == services_ifindex() => Some(daemon_in(vni)),
        _ => cache::slot(ifindex).copied(),
    };
    found.ok_or(Drop::Detached)
}

/// The rest of [`to_vpc`], of an ICMP error in IPv4.
#[classifier]
pub fn error_to_vpc(ctx: TcContext) -> i32 {
    translate_error::<V4>(&ctx)
}

/// The rest of [`to_vpc`], of an ICMP error in IPv6.
#[classifier]
pub fn error_to_vpc_v6(ctx: TcContext) -> i32 {
    translate_error::<V6>(&ctx)
}

#[inline(always)]
fn translate_error<F: Family>(ctx: &TcContext) -> i32 {
    let parsed = parse::packet::<F>(ctx, Direction::Out);
    match parsed.and_then(|packet| Ok((packet, sender(ctx, F::ip(packet.source))?))) {
        Ok((packet, slot)) => {
            let result = error_of_slot(ctx, &slot, packet).map_err(|reason| ((), reason));
            let result = migration::or_former(result).map_err(|((), reason)| reason);
            drops::verdict(ctx, slot.number, result)
        }
        Err(reason) => drops::verdict(ctx, 0, Err(reason)),
    }
}

#[inline(always)]
fn error_of_slot<F: Family>(
    ctx: &TcContext,
    slot: &Slot,
    mut packet: Packet<F>,
) -> Result<i32, Drop> {
    let vni = slot.attachment.vni();
    let vpc = cache::host_vpc(vni).ok_or(Drop::UnknownVpc)?;
    let shared = F::shared(vpc)?;
    let subject = icmp::subject(ctx, &mut packet, Direction::Out)?;
    // An error goes to who sent the packet that it is about.
    if !F::same(subject.local, F::guest(slot)) || !F::same(subject.peer, packet.destination) {
        return Err(Drop::IcmpError);
    }
    let port = conntrack::error_outward::<F>(slot, &subject)?;
    icmp::translate(ctx, &packet, &subject, Direction::Out, shared, port)?;
    packet.source = shared;
    packet.local_port = port;
    encap::send(ctx, &packet, vni, &vpc.proxy_address)
}

/// The guest has one neighbour, the gateway, whatever it asks for.
#[inline(always)]
fn resolve(ctx: &TcContext, ethernet: &Ethernet, slot: &Slot) -> Result<i32, Drop> {
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

/// As [`resolve`], the rest of [`tap_v6`].
#[classifier]
pub fn resolve_v6(ctx: TcContext) -> i32 {
    // SAFETY: the context is the kernel's for as long as the program runs.
    match cache::slot(unsafe { (*ctx.skb.skb).ifindex }) {
        Some(slot) => drops::verdict(&ctx, slot.number, discover(&ctx, slot)),
        None => drops::verdict(&ctx, 0, Err(Drop::Detached)),
    }
}

/// Link-local addresses other than the gateway's are all the guest's: the link has two ends.
#[inline(always)]
fn discover(ctx: &TcContext, slot: &Slot) -> Result<i32, Drop> {
    let ethernet = parse::ethernet(ctx)?;
    let message = nd::message(ctx)?;
    let (source, own) = (message.source, V6::guest(slot));
    let is_own = source.is(own)
        || source.is_unspecified()
        || source.is_link_local() && !source.is(GATEWAY_V6);
    if !is_own || ethernet.source != slot.mac || message.mac.is_some_and(|mac| mac != slot.mac) {
        return Err(Drop::SpoofedNd);
    }
    // A guest that asks whether its own address is in use wants to hear nothing (RFC 4862,
    // section 5.4).
    let is_probe = source.is_unspecified();
    if message.kind != NEIGHBOUR_SOLICITATION || is_probe || message.target.is(own) {
        return Err(Drop::UnexpectedNd);
    }
    nd::reply(ctx, &message, GATEWAY_MAC, Neighbour::ROUTER, slot.ifindex)
}
