//! `cargo xtask build`: three targets, one folder of results.
//!
//! The eBPF programs and the guest are `no_std` for targets of their own. Debian's `rustc-web`
//! builds both where it is installed; elsewhere a rustup nightly with `rust-src` does.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::{run, step};

/// Present where Debian's compiler has a core library for eBPF.
const DEBIAN_BPF: &str = "/usr/lib/rustlib/bpfel-unknown-none";

/// The peer of `cargo xtask bench clone`, a workspace of its own.
pub const HYPERLIGHT: &str = "bench/hyperlight";

/// The workspace's folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").into()
}

/// The folder of all build results.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Where the binaries, the eBPF object and the guests end up.
pub fn results() -> PathBuf {
    target().join("release")
}

/// Builds everything; the eBPF programs with their log if `log_verdicts`.
pub fn all(log_verdicts: bool) -> Result<()> {
    ebpf(log_verdicts)?;
    guest()?;
    agent()?;
    step("build", "warrend, warren-vmm, warren-control, warren-gateway, warren");
    run(Command::new("cargo").current_dir(root()).args(["build", "--release"]))?;
    step("build", "warren-compile, warren-package");
    run(function("build").arg("--bins"))
}

/// A cargo command for the package of functions, with its compiler and its stores.
pub fn function(command: &str) -> Command {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(root()).args([command, "--release", "--package", "warren-function"]);
    cargo.args(["--features", "compile,store"]);
    cargo
}

fn ebpf(log_verdicts: bool) -> Result<()> {
    step("build", "eBPF programs");
    ebpf_into("ebpf", if log_verdicts { &["log"] } else { &[] })?;
    keep("ebpf/bpfel-unknown-none/release/warren-ebpf", "warren-ebpf.o")
}

/// Builds the same eBPF programs of other instructions: what an upgrade is measured with.
pub fn other_ebpf() -> Result<()> {
    step("build", "other eBPF programs");
    ebpf_into("ebpf-other", &["revision"])?;
    keep("ebpf-other/bpfel-unknown-none/release/warren-ebpf", "warren-ebpf-other.o")
}

/// Builds what `bench clone` compares with; says so where that fails, and leaves none from before.
pub fn hyperlight() {
    const RESULTS: [(&str, &str); 2] = [
        ("hyperlight/host/release/hyperlight-peer", "hyperlight-peer"),
        (
            "hyperlight/guest/x86_64-unknown-none/release/hyperlight-peer-guest",
            "hyperlight-peer-guest.elf",
        ),
    ];
    step("build", "Hyperlight, and its guest");
    let built = run(&mut hyperlight_host()).and_then(|()| run(&mut hyperlight_guest()));
    let kept = built.and_then(|()| RESULTS.iter().try_for_each(|(from, name)| keep(from, name)));
    if let Err(error) = kept {
        step("build", &format!("Hyperlight cannot be built, and is not measured: {error:#}"));
        for (_, name) in RESULTS {
            std::fs::remove_file(results().join(name)).ok();
        }
    }
}

fn hyperlight_host() -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(root().join(HYPERLIGHT)).args(["build", "--release", "--locked"]);
    command.args(["--package", "hyperlight-peer", "--target-dir"]);
    command.arg(target().join("hyperlight/host"));
    command
}

/// Its target and the rest are in the package's `.cargo/config.toml`.
fn hyperlight_guest() -> Command {
    let mut command = no_std_cargo("hyperlight/guest");
    command.current_dir(root().join(HYPERLIGHT).join("guest")).arg("--locked");
    command
}

fn ebpf_into(folder: &str, features: &[&str]) -> Result<()> {
    let mut command = no_std_cargo(folder);
    command.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3");
    command.args(["--package", "warren-ebpf", "--target", "bpfel-unknown-none"]);
    command.args(["--features", &features.join(",")]);
    if !Path::new(DEBIAN_BPF).exists() {
        command.arg("-Zbuild-std=core");
    }
    let flags = ["-Cdebuginfo=2", "-Clink-arg=--btf", "--cfg=bpf_target_arch=\"x86_64\""];
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    run(&mut command)
}

fn guest() -> Result<()> {
    step("build", "guest");
    let mut command = no_std_cargo("guest");
    command.args(["--package", "warren-guest", "--target", "guest/x86_64-unknown-none.json"]);
    command.args(["-Zjson-target-spec", "-Zbuild-std=core,alloc"]);
    command.arg("-Zbuild-std-features=compiler-builtins-mem");
    run(&mut command)?;
    for name in
        ["warren-guest", "warren-runtime", "warren-guest-hostile", "warren-function-counter"]
    {
        keep(&format!("guest/x86_64-unknown-none/release/{name}"), &format!("{name}.elf"))?;
    }
    Ok(())
}

/// Builds the agent of Linux guests, in which there is no library: statically linked, which no crate
/// but the last needs to know.
fn agent() -> Result<()> {
    step("build", "agent of Linux guests");
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(["rustc", "--release", "--package", "warren-agent"]);
    command.args(["--bin", "warren-agent", "--features", "init"]);
    run(command.args(["--", "-Ctarget-feature=+crt-static"]))
}

/// `cargo build` by the compiler that can build for bare targets, in a target folder of its own:
/// two compilers in one folder would rebuild each other's results.
pub fn no_std_cargo(folder: &str) -> Command {
    let mut command = if Path::new(DEBIAN_BPF).exists() {
        let mut command = Command::new("/usr/bin/cargo");
        command.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
        command
    } else {
        let mut command = Command::new("cargo");
        command.arg("+nightly");
        command
    };
    // What the outer cargo set for xtask itself would choose its toolchain again.
    for name in ["CARGO", "RUSTUP_TOOLCHAIN", "RUSTDOC", "RUSTFLAGS"] {
        command.env_remove(name);
    }
    command.args(["build", "--release", "--target-dir"]).arg(target().join(folder));
    command.current_dir(root());
    command
}

/// Copies a result beside the binaries, if it changed.
fn keep(from: &str, name: &str) -> Result<()> {
    let from = target().join(from);
    let to = results().join(name);
    let new = std::fs::read(&from).with_context(|| format!("no {}", from.display()))?;
    if std::fs::read(&to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    std::fs::create_dir_all(results())?;
    std::fs::copy(&from, &to).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(())
}
