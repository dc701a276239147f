//! The ports to the VMM: each access leaves the guest.

use core::arch::asm;

use warren_abi::microvm::{BARRIER_PORT, PANIC_PORT, PanicMessage, READY_PORT, WAIT_PORT};

/// Stands at the release barrier until the VMM lets the guest go on.
pub fn barrier() {
    out(BARRIER_PORT, 0);
}

/// Acknowledges the identity.
pub fn ready() {
    out(READY_PORT, 0);
}

/// Lets the VMM serve all queues, and waits until something came or so many microseconds passed.
pub fn wait(microseconds: u32) {
    out(WAIT_PORT, microseconds);
}

/// Ends the microVM with a message.
pub fn panic(message: &PanicMessage) -> ! {
    loop {
        // All memory lies below 4 GiB.
        out(PANIC_PORT, (&raw const *message).addr() as u32);
    }
}

fn out(port: u16, value: u32) {
    // SAFETY: the VMM allows these ports to ring 3 and may read and write all memory meanwhile,
    // which the compiler assumes of an asm block without `nomem`. No register but RIP changes.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
    }
}
