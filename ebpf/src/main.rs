//! The data path: one tc program per hook, attached by tcx.
//!
//! Host: [`tap`] is what guests send, [`tunnel`] what returns to them. Proxy: [`tunnel`] is what
//! hosts send into a VPC, [`vpc`] what returns. [`underlay`] is the tunnel's short cut on both.
//! [`public`] is how what has no route in a VPC leaves, and returns. [`node`] is what nodes tell each other. [`services`] is between guests and the daemon. [`sweep`] collects flows that ended.
//!
//! Nothing that a program does not understand passes: the kernel's own stack is out of reach from
//! guests, tunnels and VPCs.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![allow(
    clippy::inline_always,
    reason = "a call costs a packet more than it saves, and the verifier forgets bounds across it"
)]
#![allow(clippy::needless_pass_by_value, reason = "the signature of a program is given")]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "maps take keys by value as well, and would copy them"
)]

mod answer;
mod arp;
mod atomic;
mod blocks;
mod cache;
mod conntrack;
mod drops;
mod encap;
mod flowlog;
mod fragment;
mod fragments_host;
mod fragments_proxy;
mod icmp;
mod limit;
mod maps;
mod migration;
mod mss;
mod nat;
mod nd;
mod node;
mod parse;
mod policy;
mod public;
mod route;
mod services;
mod stack;
mod sweep;
mod tail;
mod tap;
mod tunnel;
mod underlay;
mod vpc;

/// The kernel offers most helpers to programs under a licence compatible with the GPL only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier rejects programs that could come here.
    loop {}
}
