//! The engine: compiler and runtime must be set up alike, or the runtime refuses the code.

use core::num::NonZeroUsize;

use wasmtime::Config;

/// Target of the compiled code: no operating system, and the baseline of processors that guests are
/// built for.
pub const TARGET: &str = "x86_64-unknown-none";

/// The most stack that a function's code may use, in bytes.
pub const STACK_BYTES: usize = 512 << 10;

/// What compiler and runtime have in common. In the guest there are no signals to catch and no page
/// tables to change: each access to memory is checked, and memory is written, not mapped.
pub fn config() -> Config {
    let mut config = Config::new();
    config
        .signals_based_traps(false)
        .memory_init_cow(false)
        .memory_reservation(0)
        .memory_guard_size(0)
        .memory_reservation_for_growth(0)
        .concurrency_support(false)
        .max_wasm_stack(STACK_BYTES)
        .wasm_backtrace_max_frames(NonZeroUsize::new(32));
    config
}
