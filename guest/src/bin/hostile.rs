//! A guest that turns against its VMM when it is called: for vmm's tests.
#![no_std]
#![no_main]
#![deny(missing_docs)]

extern crate alloc;

use alloc::vec::Vec;

use warren_guest::{Function, Machine};

struct Hostile;

impl Function for Hostile {
    fn call(&mut self, _: &mut Machine, request: &[u8]) -> Vec<u8> {
        request.to_vec()
    }
}

/// Called by the runtime's entry point.
#[unsafe(no_mangle)]
extern "C" fn main() -> ! {
    warren_guest::run(&mut Hostile)
}
