//! A function that tells whether the microVM is what its snapshot was.
#![no_std]
#![no_main]

extern crate alloc;

use core::sync::atomic::{AtomicI32, Ordering};

static CALLS: AtomicI32 = AtomicI32::new(0);

/// The value, and as much more as there were calls before.
#[hyperlight_guest_bin::guest_function("Call")]
fn call(value: i32) -> i32 {
    value + CALLS.fetch_add(1, Ordering::Relaxed)
}
