//! Hands the linker scripts to the programs.

fn main() {
    let root = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo:rerun-if-changed=guest.ld");
    println!("cargo:rerun-if-changed=function.ld");
    // Checked on the host (clippy), the programs are not linked by the scripts.
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        for (program, script) in [
            ("warren-guest", "guest.ld"),
            ("warren-runtime", "guest.ld"),
            ("warren-guest-hostile", "guest.ld"),
            ("warren-function-counter", "function.ld"),
        ] {
            println!("cargo:rustc-link-arg-bin={program}=-Wl,-T,{root}/{script}");
        }
    }
}
