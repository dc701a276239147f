//! What Warren's eBPF programs, guest, daemons and tools must agree on.
//!
//! Every type here crosses a boundary that the compiler cannot check: a BPF map, a guest's memory,
//! a wire. Change one only together with all of its readers.
#![no_std]
#![deny(missing_docs)]
#![allow(
    clippy::inline_always,
    reason = "what packets run through: the verifier forgets bounds across a call"
)]

#[cfg(feature = "probe")]
extern crate alloc;

pub mod bfd;
pub mod checksum;
pub mod claim;
pub mod conntrack;
pub mod drop;
pub mod family;
pub mod flow;
pub mod flowlog;
pub mod fragment;
pub mod icmp;
pub mod limit;
pub mod maps;
pub mod microvm;
pub mod mss;
pub mod nat;
pub mod packet;
pub mod policy;
#[cfg(feature = "probe")]
pub mod probe;
pub mod rate;
pub mod route;
pub mod services;
pub mod wire;
