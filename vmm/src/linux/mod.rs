//! Linux guests: an unmodified kernel with devices found through ACPI tables, and an agent as its
//! first process, which stands at the release barrier as the no-OS guest does.
//!
//! [`boot`] fills memory, [`acpi`] describes the machine, [`cpu`] is the processor with its interrupt
//! controllers, [`pc`] has the devices that only Linux needs.

mod acpi;
pub mod boot;
pub mod cpu;
mod log;
pub mod pc;

use std::path::Path;

/// Whether this host's KVM can run Linux: whether there is hardware virtualisation behind it. Without
/// (PVM), ring 0 of a guest is emulated, too slowly and not wholly.
pub fn is_possible() -> bool {
    ["kvm_intel", "kvm_amd"].iter().any(|module| Path::new("/sys/module").join(module).exists())
}
