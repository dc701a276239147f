//! The devices without a machine: a driver in Rust on one side, this test on the other. Tests of a
//! clause of virtio 1.2 have its number in their names.

#[path = "../common/mod.rs"]
mod common;

mod blk;
mod console;
mod driver;
mod foreign;
mod limiter;
mod mmio;
mod multiqueue;
mod net;
mod races;
mod rng;
mod tap;
mod vsock;
