//! What parses other people's bytes, and what decides about their traffic, fed with any bytes: a
//! function for each target, which panics if something is wrong. `cargo xtask fuzz TARGET` looks for
//! bytes that make it; `seeds/TARGET` is where it begins, and what the tests run.

mod abi;
mod devices;
#[path = "../../abi/tests/model/mod.rs"]
mod model;
mod nat;
#[path = "../../abi/tests/model/packet.rs"]
mod packet;
mod proto;
mod vmm;

/// A target.
pub type Target = fn(&[u8]);

/// All targets, by name.
pub const TARGETS: [(&str, Target); 19] = [
    ("conntrack", nat::conntrack),
    ("endpoint", proto::endpoint),
    ("function", vmm::function),
    ("icmp_error", abi::icmp_error),
    ("limits", proto::limits),
    ("messages", proto::messages),
    ("mss", abi::mss),
    ("packet", abi::packet),
    ("policy", nat::policy),
    ("probe", abi::probe),
    ("route", proto::route),
    ("rule", proto::rule),
    ("security", proto::security),
    ("snapshot", vmm::snapshot),
    ("virtio_blk", devices::blk),
    ("virtio_console", devices::console),
    ("virtio_net", devices::net),
    ("virtio_rng", devices::rng),
    ("virtio_vsock", devices::vsock),
];

/// The target of this name.
///
/// # Panics
/// If there is none.
pub fn target(name: &str) -> Target {
    let found = TARGETS.iter().find(|(target, _)| *target == name);
    found.unwrap_or_else(|| panic!("there is no target {name}")).1
}
