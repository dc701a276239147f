//! warren-vmm: microVMs cloned from a snapshot, one process each, and the client that drives them.
//!
//! - [`client`]: what `warrend` uses: a [`client::Zygote`] forks parked microVMs, a
//!   [`client::MicroVm`] releases and stops one, [`client::invoke`] calls its function.
//! - [`control`]: the messages between the client and the processes.
#![deny(missing_docs)]

pub mod client;
pub mod control;
