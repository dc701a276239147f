//! warren-vmm: microVMs cloned from a snapshot, one process each, and the client that drives them.
//!
//! - [`client`]: what `warrend` uses: a [`client::Zygote`] forks parked microVMs, a
//!   [`client::MicroVm`] releases and stops one, [`client::invoke`] calls its function.
//! - [`control`]: the messages between the client and the processes.
//! - [`template`] boots a guest and saves it, and makes the image of a [`function`]; [`snapshot`] is the
//!   file, and the diff of a microVM that went on.
//! - `linux` has what a Linux guest needs beyond what the no-OS guest does.
//! - [`zygote`] forks into a [`jail`]; in the child, `instance` lives: a `machine` with its `devices`, and a
//!   `server` for its socket.
#![deny(missing_docs)]

mod boot;
pub mod client;
mod clock;
pub mod control;
mod cpu;
// For tests and fuzz targets: nobody else drives devices.
#[doc(hidden)]
pub mod devices;
pub mod function;
mod instance;
pub mod jail;
mod linux;
mod machine;
pub mod make;
mod memory;
pub mod rates;
mod server;
pub mod snapshot;
pub mod template;
mod timer;
pub mod zygote;

pub use cpu::is_emulated;
pub use linux::is_possible as can_run_linux;
