//! What the demo and the benchmarks share: figures and how they are shown.
#![deny(missing_docs)]

pub mod figures;
