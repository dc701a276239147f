//! The guest that serves the network probe of `warren_abi::probe`.
//!
//! Built from the workspace's root by `cargo xtask build`, with Debian's `rustc-web` and
//! `rust-web-src`, because the target needs hard floats and with them its own `core`:
//! ```text
//! RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 /usr/bin/cargo build --release -p warren-guest \
//!     --target guest/x86_64-unknown-none.json -Zjson-target-spec \
//!     -Zbuild-std=core,alloc -Zbuild-std-features=compiler-builtins-mem
//! ```
//! into `target/x86_64-unknown-none/release/`: `warren-guest`, and `warren-guest-hostile` for tests.
//! For clippy the host's own target will do, without unwinding:
//! `CARGO_PROFILE_DEV_PANIC=abort cargo clippy -p warren-guest`.
#![no_std]
#![no_main]
#![deny(missing_docs)]

/// Called by the runtime's entry point.
#[unsafe(no_mangle)]
extern "C" fn main() -> ! {
    warren_guest::run(&mut warren_guest::Probe::default())
}
