//! A function that the VMM put into its regions.

use alloc::vec::Vec;
use core::mem::transmute;

use warren_abi::microvm::{FunctionEntry, FunctionPlace, INVOCATION_MAX};

use crate::machine::{Function, Machine};

/// A function that was loaded.
pub struct Loaded(FunctionEntry);

impl Loaded {
    /// The function at its place, if there is one.
    pub fn from(place: FunctionPlace) -> Option<Self> {
        let entry = place.entry as usize;
        // SAFETY: the VMM found the entry point in a segment of code, and that is what such a function
        // has there. If it has not, the microVM is the function's own to ruin.
        (entry != 0).then(|| Self(unsafe { transmute::<usize, FunctionEntry>(entry) }))
    }
}

impl Function for Loaded {
    fn call(&mut self, _: &mut Machine, request: &[u8]) -> Vec<u8> {
        let mut reply = Vec::with_capacity(INVOCATION_MAX as usize);
        let room = reply.spare_capacity_mut();
        // SAFETY: request and room are what they are said to be, and are borrowed meanwhile.
        let length = unsafe {
            (self.0)(request.as_ptr(), request.len(), room.as_mut_ptr().cast(), room.len())
        };
        assert!(
            length <= reply.capacity(),
            "the function's reply is longer than there is room for"
        );
        // SAFETY: the function wrote so many bytes, as its type demands.
        unsafe { reply.set_len(length) };
        reply
    }
}
