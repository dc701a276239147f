//! What a function is, for those who publish it and for the guest that runs it: its [`package`], and
//! the `engine` that its code is compiled for.
#![no_std]
#![deny(missing_docs)]

extern crate alloc;

#[cfg(feature = "engine")]
pub mod engine;
pub mod package;
