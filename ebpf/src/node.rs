//! What nodes tell each other beside the tunnel: requests of BFD, which are sent back, and proxies'
//! claims of shared addresses, which hosts take in. Both while the daemon is not there.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_redirect};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use warren_abi::bfd::{self, Control};
use warren_abi::claim::{self, Claim, Entry, Header, kind};
use warren_abi::drop::Drop;
use warren_abi::family::{Family, V4, V6};
use warren_abi::maps::Member;
use warren_abi::wire::{
    Be16, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Ip, Ip6Header, IpHeader, UDP, Udp,
};

use crate::drops::{self, TCX_NEXT};
use crate::maps::{CLAIMS, End, HEARD, MEMBERS};
use crate::parse::{IP, at, l4, pull};
use crate::{cache, tail};

/// Addressed to this machine (`linux/if_packet.h`).
const PACKET_HOST: u32 = 0;
/// No message is longer, in bytes, with its Ethernet header.
const LONGEST: u32 = 256;

/// Goes on with a packet of the underlay that is not the tunnel's.
#[inline(always)]
pub fn message(ctx: &TcContext) -> i32 {
    if ctx.len() > LONGEST { TCX_NEXT } else { tail::call(ctx, tail::NODE) }
}

/// The rest of [`message`], on a host.
#[classifier]
pub fn node_host(ctx: TcContext) -> i32 {
    received(&ctx, true).unwrap_or(TCX_NEXT)
}

/// The same on a proxy.
#[classifier]
pub fn node_proxy(ctx: TcContext) -> i32 {
    received(&ctx, false).unwrap_or(TCX_NEXT)
}

/// None: it is the kernel's.
#[inline(always)]
fn received(ctx: &TcContext, is_host: bool) -> Option<i32> {
    // SAFETY: the context is the kernel's for as long as the program runs.
    let is_ours = unsafe {
        let skb = ctx.skb.skb;
        (*skb).pkt_type == PACKET_HOST && (*skb).vlan_present == 0
    };
    if !is_ours {
        return None;
    }
    let l4 = if End::is_v6() { l4::<V6>() } else { l4::<V4>() };
    pull(ctx, l4 as u32 + (size_of::<Udp>() + size_of::<Control>()) as u32);
    let sender = sender(ctx)?;
    if End::is_v6() {
        receive::<V6>(ctx, &sender, is_host)
    } else {
        receive::<V4>(ctx, &sender, is_host)
    }
}

/// Who sent a packet of UDP to this machine's address in the underlay.
#[inline(always)]
fn sender(ctx: &TcContext) -> Option<Ip> {
    // SAFETY: `at` checked the bounds, here and below; every bit pattern is a value.
    let ethertype = unsafe { (*at::<Ethernet>(ctx, 0)?).ethertype };
    if End::is_v6() {
        // SAFETY: as above.
        let ip = unsafe { &*at::<Ip6Header>(ctx, IP)? };
        let (source, destination) = (ip.source, ip.destination);
        let is_ours = ethertype == ETHERTYPE_IPV6
            && ip.is_version_6()
            && ip.next_header == UDP
            && destination.is(End::address());
        return is_ours.then_some(source);
    }
    // SAFETY: as above.
    let ip = unsafe { &*at::<IpHeader>(ctx, IP)? };
    let (source, destination) = (ip.source, ip.destination);
    let is_ours = ethertype == ETHERTYPE_IPV4
        && ip.version_length == IpHeader::PLAIN
        && ip.protocol == UDP
        && ip.fragment.0 & IpHeader::FRAGMENT.0 == 0
        && destination == End::address_v4();
    is_ours.then_some(Ip::v4(source))
}

#[inline(always)]
fn receive<F: Family>(ctx: &TcContext, sender: &Ip, is_host: bool) -> Option<i32> {
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    let port = unsafe { (*at::<Udp>(ctx, l4::<F>())?).destination.get() };
    match port {
        bfd::PORT => asked::<F>(ctx, sender),
        claim::PORT if is_host => claimed::<F>(ctx, sender),
        _ => None,
    }
}

/// Sends a request of BFD back.
#[inline(always)]
fn asked<F: Family>(ctx: &TcContext, sender: &Ip) -> Option<i32> {
    let control = at::<Control>(ctx, message_of::<F>())?;
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    let request = unsafe { control.read_unaligned() };
    if !request.is_request() {
        return None;
    }
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let _ = HEARD.insert(sender, &now, 0);
    let answer = request.answer();
    // SAFETY: as above.
    unsafe { control.write_unaligned(answer) };
    let (before, after) = ([request.version, request.state], [answer.version, answer.state]);
    send_back::<F>(ctx, before, after)
}

/// Takes in a proxy's claims, and tells it so, and of later ones, if all of them are of VPCs that it is
/// known in.
#[inline(always)]
fn claimed<F: Family>(ctx: &TcContext, sender: &Ip) -> Option<i32> {
    let entries = message_of::<F>() + size_of::<Header>();
    pull(ctx, (entries + claim::MOST * size_of::<Entry>()) as u32);
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    let header = unsafe { *at::<Header>(ctx, message_of::<F>())? };
    if header.version != Header::VERSION || header.kind != kind::CLAIMS {
        return None;
    }
    let count = header.count.get() as usize;
    let mut is_known = true;
    for index in 0..claim::MOST {
        if index >= count {
            break;
        }
        // SAFETY: as above.
        let entry = unsafe { *at::<Entry>(ctx, entries + index * size_of::<Entry>())? };
        let claim = Claim { sequence: entry.sequence(), proxy: *sender };
        match take(entry.vni(), &claim) {
            None => is_known = false,
            Some(sequence) if sequence != claim.sequence => {
                let place = entries + index * size_of::<Entry>();
                tell::<F>(ctx, place, entry, Entry::new(entry.vni(), sequence, entry.flags))?;
            }
            Some(_) => {}
        }
    }
    if !is_known {
        drops::count(0, Drop::NotFromProxy);
        return Some(TC_ACT_SHOT);
    }
    let answer = at::<Header>(ctx, message_of::<F>())?;
    // SAFETY: as above.
    unsafe { (*answer).kind = kind::KNOWN };
    send_back::<F>(ctx, [header.version, header.kind], [header.version, kind::KNOWN])
}

/// Takes in a claim: the number of the one that is valid now. None: its sender is no proxy of the
/// VPC's.
#[inline(always)]
fn take(vni: u32, claim: &Claim) -> Option<u32> {
    if !is_member(vni, &claim.proxy) {
        return None;
    }
    // SAFETY: one that is replaced meanwhile is the older one, or both are.
    if let Some(known) = unsafe { CLAIMS.get(&vni) }
        && !claim.replaces(known)
    {
        return Some(known.sequence);
    }
    CLAIMS.insert(&vni, claim, 0).ok()?;
    cache::changed();
    Some(claim.sequence)
}

/// Puts another entry in the place of one.
#[inline(always)]
fn tell<F: Family>(ctx: &TcContext, place: usize, before: Entry, after: Entry) -> Option<()> {
    let word = |[high, low]: [Be16; 2]| (low.0 as u64) << 16 | high.0 as u64;
    let flags = BPF_F_MARK_MANGLED_0 as u64 | 4;
    let (from, to) = (word(before.sequence), word(after.sequence));
    ctx.l4_csum_replace(l4::<F>() + 6, from, to, flags).ok()?;
    // SAFETY: `at` checked the bounds.
    unsafe { (*at::<Entry>(ctx, place)?).sequence = after.sequence };
    Some(())
}

/// Whether this is a proxy of the VPC's.
#[inline(always)]
pub fn is_member(vni: u32, proxy: &Ip) -> bool {
    let Some(place) = PROXY.get_ptr_mut(0) else { return false };
    // SAFETY: per-CPU, and tc programs do not interrupt one another on a CPU.
    unsafe { *place = *proxy };
    warren_is_member(vni) != 0
}

/// The proxy that [`warren_is_member`] is asked about.
#[map]
static PROXY: PerCpuArray<Ip> = PerCpuArray::with_max_entries(1, 0);

/// [`is_member`]. A global function: it has a stack of its own, and is rarely called.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn warren_is_member(vni: u32) -> i32 {
    let Some(proxy) = PROXY.get(0) else { return 0 };
    // SAFETY: nothing is read of it.
    unsafe { MEMBERS.get(&Member { vni, proxy: *proxy }) }.is_some().into()
}

/// Where a message begins.
#[inline(always)]
const fn message_of<F: Family>() -> usize {
    l4::<F>() + size_of::<Udp>()
}

/// Sends the packet back where it came from, of whose message the first two bytes were changed. All
/// else that changes places leaves its checksum as it is.
#[inline(always)]
fn send_back<F: Family>(ctx: &TcContext, before: [u8; 2], after: [u8; 2]) -> Option<i32> {
    let [before, after] = [before, after].map(|bytes| u16::from_ne_bytes(bytes) as u64);
    let flags = BPF_F_MARK_MANGLED_0 as u64 | 2;
    ctx.l4_csum_replace(l4::<F>() + 6, before, after, flags).ok()?;
    // SAFETY: `at` checked the bounds; each pair is of one header.
    unsafe {
        let ethernet = &mut *at::<Ethernet>(ctx, 0)?;
        (ethernet.source, ethernet.destination) = (ethernet.destination, ethernet.source);
        if F::ETHERTYPE == ETHERTYPE_IPV6 {
            let ip = &mut *at::<Ip6Header>(ctx, IP)?;
            (ip.source, ip.destination) = (ip.destination, ip.source);
        } else {
            let ip = &mut *at::<IpHeader>(ctx, IP)?;
            (ip.source, ip.destination) = (ip.destination, ip.source);
        }
        let udp = &mut *at::<Udp>(ctx, l4::<F>())?;
        (udp.source, udp.destination) = (udp.destination, udp.source);
        Some(bpf_redirect(End::ifindex(), 0) as i32)
    }
}
