//! The no-OS guest's runtime: one program in ring 3, without interrupts, on virtio devices that its
//! VMM serves whenever it waits.
//!
//! A program calls [`run`] from its `main`. Life of a program:
//! 1. Boot: devices are found and their queues set up ([`machine`]).
//! 2. The release barrier ([`barrier`]): the snapshot is taken here, and each clone wakes up here.
//! 3. Identity ([`identity`]): MAC, addresses, random generator and clock are set from what the VMM
//!    wrote; then the guest acknowledges.
//! 4. Calls ([`calls`]) are served, one at a time.
//!
//! An exception ends the microVM: the VMM reads vector and address itself. A panic passes its
//! message on and ends it as well.
#![no_std]
#![deny(missing_docs)]

extern crate alloc;

mod barrier;
mod calls;
mod channel;
mod clock;
mod dns;
mod hal;
mod heap;
mod http;
mod identity;
mod linear;
mod loaded;
mod log;
mod machine;
mod net;
mod port;
mod probe;
mod runtime;
mod single;
mod start;
mod stream;
mod tcp;
mod wasi;

pub use machine::{Function, Machine, Timeout, run};
pub use probe::Probe;
pub use runtime::run as serve_component;
