//! The guest that runs WebAssembly components, built as `warren-guest` is.
#![no_std]
#![no_main]
#![deny(missing_docs)]

/// Called by the runtime's entry point.
#[unsafe(no_mangle)]
extern "C" fn main() -> ! {
    warren_guest::serve_component()
}
