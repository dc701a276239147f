//! What the demo and the benchmarks share: figures and how they are shown, and Ctrl-C.
#![deny(missing_docs)]

pub mod figures;
pub mod interrupt;
