//! ICMP errors of the data path's own: why a packet went no further (RFC 1812, section 4.3).
//!
//! One for one, to who sent the packet, no longer than 82 bytes, and not faster than
//! [`rate::ANSWERS`], so that nobody can be flooded by them but who asks for it. What a guest gets
//! is made on its own VMM's time, inside the `write` to the TAP.

use aya_ebpf::bindings::{TC_ACT_SHOT, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC};
use aya_ebpf::helpers::generated::{bpf_ktime_get_coarse_ns, bpf_redirect, bpf_skb_change_tail};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use warren_abi::checksum::{fold, settled};
use warren_abi::drop::Drop;
use warren_abi::family::{Answering, Family, V4, V6};
use warren_abi::fragment::First;
use warren_abi::icmp::Reason;
use warren_abi::rate;
use warren_abi::wire::{Be16, ETHERTYPE_IPV4, Ethernet, ICMP, Mac, TCP, UDP};

use crate::maps::{ANSWERS, End};
use crate::parse::{IP, at, l4};
use crate::{drops, tail};

/// Who answers, and where the answer leaves.
pub struct Answerer<F: Family> {
    /// MAC address.
    pub mac: Mac,
    /// Address.
    pub address: F::Address,
    /// Index of the interface that the packet came from.
    pub ifindex: u32,
    /// On whose account: as of [`drops::verdict`].
    pub scope: u32,
}

/// The answer, which embeds `N` words of the packet's transport.
#[repr(C, packed(2))]
struct Message<F: Family, G: Family, const N: usize> {
    ethernet: Ethernet,
    ip: F::Header,
    kind: [u8; 2],
    checksum: u16,
    rest: [Be16; 2],
    about: G::Header,
    l4: [u16; N],
}

/// Answers a packet that was parsed, is unchanged, and was dropped for `reason`, if that is
/// something its sender should know: returns the program's verdict then.
#[inline(always)]
pub fn send<F: Family>(ctx: &TcContext, from: &Answerer<F>, reason: Drop) -> Option<i32> {
    Reason::of::<F>(reason, 0)?;
    let order = ORDER.get_ptr_mut(0)?;
    let Answerer { mac, address, ifindex, scope } = *from;
    // SAFETY: per-CPU, and tc programs do not interrupt one another on a CPU.
    unsafe {
        (*order).from = Answerer { mac, address: F::ip(address), ifindex, scope };
        (*order).reason = reason;
    }
    let is_v4 = F::ETHERTYPE == ETHERTYPE_IPV4;
    Some(tail::call(ctx, if is_v4 { tail::ANSWER } else { tail::ANSWER_V6 }))
}

/// What [`answer`] or [`answer_v6`] is to send; an IPv4 address is mapped.
pub struct Order {
    from: Answerer<V6>,
    reason: Drop,
}

#[map]
static ORDER: PerCpuArray<Order> = PerCpuArray::with_max_entries(1, 0);

/// The rest of [`send`], in IPv4.
#[classifier]
pub fn answer(ctx: TcContext) -> i32 {
    let answer = ORDER.get(0).and_then(|order| {
        let Answerer { mac, address, ifindex, scope } = order.from;
        let from = Answerer::<V4> { mac, address: address.to_v4()?, ifindex, scope };
        now::<_, V4>(&ctx, &from, order.reason)
    });
    answer.unwrap_or(TC_ACT_SHOT)
}

/// The rest of [`send`], in IPv6.
#[classifier]
pub fn answer_v6(ctx: TcContext) -> i32 {
    let answer = ORDER.get(0).and_then(|order| {
        now::<_, V6>(&ctx, &order.from, order.reason)
            .or_else(|| now::<_, First<V6>>(&ctx, &order.from, order.reason))
    });
    answer.unwrap_or(TC_ACT_SHOT)
}

/// Sends the answer, if one is due to a packet of `G`.
#[inline(always)]
fn now<F, G>(ctx: &TcContext, from: &Answerer<F>, reason: Drop) -> Option<i32>
where
    F: Answering,
    G: Family<Address = F::Address>,
{
    let why = Reason::of::<F>(reason, End::inner_mtu() as u16)?;
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    let (ip, [kind, _]) = unsafe { (&*at::<G::Header>(ctx, IP)?, *at::<[u8; 2]>(ctx, l4::<G>())?) };
    // Others may be fragmented on their way.
    if reason == Drop::TooBig && !G::is_whole(ip) {
        return None;
    }
    let protocol = G::fields(ip).ok()?.protocol;
    // Never an error about an error (RFC 1122, section 3.2.2; RFC 4443, section 2.4).
    let is_due = match protocol {
        TCP | UDP => true,
        ICMP => !G::is_error(kind),
        _ => false,
    };
    if !is_due || !admits(from.scope) {
        return None;
    }
    match protocol {
        TCP => message::<F, G, 10>(ctx, from, &why, 8),
        UDP => message::<F, G, 4>(ctx, from, &why, 3),
        _ => message::<F, G, 4>(ctx, from, &why, 1),
    }
}

/// Whether there may be one more answer now. One that may not is counted.
#[inline(always)]
fn admits(scope: u32) -> bool {
    let Some(due) = ANSWERS.get_ptr_mut(scope) else { return false };
    // SAFETY: the verifier checked the pointer for null; map values stay readable. A race between
    // CPUs lets an answer more pass, at worst.
    let (due_ns, now_ns) = unsafe { (due.read_volatile(), bpf_ktime_get_coarse_ns()) };
    match rate::ANSWERS.admit(due_ns, now_ns) {
        Some(next_ns) => {
            // SAFETY: as above.
            unsafe { due.write_volatile(next_ns) };
            true
        }
        None => {
            drops::count(scope, Drop::AnswerRate);
            false
        }
    }
}

/// Makes the message of the packet, in whose transport header the checksum is the word at `index`.
/// What it embeds stays where it is.
#[inline(always)]
fn message<F, G, const N: usize>(
    ctx: &TcContext,
    from: &Answerer<F>,
    why: &Reason,
    index: usize,
) -> Option<i32>
where
    F: Answering,
    G: Family<Address = F::Address>,
{
    // SAFETY: `at` checked the bounds.
    if unsafe { (*at::<Ethernet>(ctx, 0)?).destination.is_multicast() } {
        return None;
    }
    let whole = size_of::<Message<F, G, N>>();
    let length = l4::<G>() + size_of::<[u16; N]>();
    // SAFETY: the context is the kernel's for as long as the program runs.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, length as u32, 0) } != 0 {
        return None;
    }
    ctx.adjust_room((whole - length) as i32, BPF_ADJ_ROOM_MAC, 0).ok()?;
    let message = at::<Message<F, G, N>>(ctx, 0)?;
    // SAFETY: `at` checked the bounds, and headers are 2-byte aligned in packets.
    unsafe {
        let about = &*(&raw const (*message).about);
        let l4 = &mut *(&raw mut (*message).l4);
        // If the packet's checksum was left to the device, it still is, and is filled in on the way
        // out, where the message's checksum no longer knows of it. So that it makes no difference,
        // it becomes one that such filling in does not change; nobody may rely on it (RFC 5508,
        // REQ-3c).
        l4[index] = 0;
        let rest = l4.iter().map(|&word| word as u32).sum();
        l4[index] = settled(fold(rest));

        let ip = &mut *(&raw mut (*message).ip);
        *ip = F::answer(from.address, G::source(about), (whole - IP - F::HEADER) as u16);
        let Reason { kind, rest: words } = *why;
        let sum = u16::from_ne_bytes(kind) as u32 + words[0].0 as u32 + words[1].0 as u32;
        let sum = sum + F::pseudo_sum(ip) + G::sum(about) + rest + l4[index] as u32;
        (*message).kind = kind;
        (*message).checksum = !fold(sum);
        (*message).rest = words;
        let asker = (*message).ethernet.source;
        (*message).ethernet =
            Ethernet { destination: asker, source: from.mac, ethertype: F::ETHERTYPE };
        Some(bpf_redirect(from.ifindex, 0) as i32)
    }
}
