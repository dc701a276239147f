//! Hands the linker script to the programs.

fn main() {
    let root = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo:rerun-if-changed=guest.ld");
    // Checked on the host (clippy), the programs are not linked by the script.
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        println!("cargo:rustc-link-arg-bins=-Wl,-T,{root}/guest.ld");
    }
}
