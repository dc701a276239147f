//! Counting what is dropped.

use core::hint::black_box;

use aya_ebpf::bindings::TC_ACT_SHOT;
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;

use crate::maps::DROPS;

/// A verdict: left to the next program, or to the kernel.
pub const TCX_NEXT: i32 = -1;

/// The verdict of a program; a reason is counted under `scope` (0: nobody's).
#[inline(always)]
pub fn verdict(ctx: &TcContext, scope: u32, result: Result<i32, Drop>) -> i32 {
    #[cfg(feature = "revision")]
    // SAFETY: a jump to the next instruction.
    unsafe {
        core::arch::asm!("goto +0");
    }
    match result {
        Ok(action) => {
            log(ctx, scope, action as u32, "passed with action");
            action
        }
        Err(reason) => {
            count(scope, reason);
            log(ctx, scope, reason as u32, "dropped for reason");
            TC_ACT_SHOT
        }
    }
}

/// Counts a packet that is dropped.
#[inline(always)]
pub fn count(scope: u32, reason: Drop) {
    if let Some(counters) = DROPS.get_ptr_mut(scope) {
        // SAFETY: per-CPU, and tc programs do not interrupt one another on a CPU.
        unsafe { (*counters)[black_box(reason as usize) % Drop::COUNTERS] += 1 };
    }
}

#[cfg(feature = "log")]
#[inline(always)]
fn log(ctx: &TcContext, scope: u32, number: u32, what: &str) {
    aya_log_ebpf::debug!(ctx, "scope {}: {} {}", scope, what, number);
}

#[cfg(not(feature = "log"))]
#[inline(always)]
fn log(_: &TcContext, _: u32, _: u32, _: &str) {}
