//! How long guests have run: this program's `ioctl`, which the linker takes for libc's, counts what
//! `KVM_RUN` takes. KVM itself has no such account.

use std::ffi::{c_int, c_long, c_ulong};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const KVM_RUN: c_ulong = 0xae80;

static TOTAL_NS: AtomicU64 = AtomicU64::new(0);

/// Microseconds that all runs have taken, in all threads.
pub fn total_us() -> f64 {
    TOTAL_NS.load(Ordering::Relaxed) as f64 / 1000.0
}

/// The system call of that name.
///
/// # Safety
/// As of libc's. The argument is one word here, as it is in a register of either's caller.
#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(descriptor: c_int, request: c_ulong, argument: c_long) -> c_int {
    let began = (request == KVM_RUN).then(Instant::now);
    // SAFETY: the caller's, as above.
    let result = unsafe { libc::syscall(libc::SYS_ioctl, descriptor, request, argument) };
    if let Some(began) = began {
        TOTAL_NS.fetch_add(began.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }
    result as c_int
}
