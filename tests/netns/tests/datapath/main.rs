//! The data path of a host and of a proxy, in namespaces: no daemon, no microVM, no KVM. Guests
//! are namespaces behind a slot's TAP, or tests that write frames.

mod addresses;
mod answers;
mod bed;
mod eni;
mod flowlog;
mod flows;
mod fragments;
mod fragments_v6;
mod guest;
mod hairpin;
mod hostile;
mod icmp;
mod lifecycle;
mod limits;
mod linux;
mod mss;
mod policy;
mod public;
mod resets;
mod reuse;
mod routes;
mod services;
mod standby;
mod succession;
mod timers;
mod traffic;
mod underlay_v6;
mod upgrade;
mod v6;
mod vxlan;
