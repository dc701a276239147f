//! Topologies in network namespaces: what the integration tests, the demo and the benchmarks run on.
//!
//! Everything here is made by the process that uses it and goes away with it: namespaces have no
//! names in the file system, so that not even a killed test leaves one behind.
#![deny(missing_docs)]

pub mod capture;
pub mod cluster;
pub mod fleet;
pub mod functions;
pub mod grid;
pub mod guest;
pub mod netns;
pub mod postgres;
pub mod process;
pub mod rundir;
pub mod servers;
pub mod topology;
