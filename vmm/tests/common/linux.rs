//! What tests of Linux guests need to be there.

use std::io::Write;

/// Whether Linux guests run here, and what they are made of (`has_images`) is there. If not it says
/// so, loudly; under `WARREN_REQUIRE_LINUX=1` that is a failure.
pub fn linux(has_images: bool) -> bool {
    let missing = match (warren_vmm::can_run_linux(), has_images) {
        (false, _) => {
            "this host's KVM cannot run Linux guests: `cargo xtask lab linux` has one that can"
        }
        (true, false) => "no images of Linux guests: `cargo xtask linux` makes them",
        (true, true) => return true,
    };
    assert!(std::env::var("WARREN_REQUIRE_LINUX").as_deref() != Ok("1"), "{missing}");
    // Not by eprintln!, which the test runner keeps to itself for a test that passes.
    let _ = writeln!(std::io::stderr(), "!!! SKIPPED, NOTHING WAS TESTED: {missing} !!!");
    false
}
