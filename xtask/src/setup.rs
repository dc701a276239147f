//! `cargo xtask setup`: finds what is missing and installs it.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::command::{output, run, step};

/// Debian packages, and what each is for.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "links the guest and SQLite"),
    ("libc6-dev", "links the guest and SQLite"),
    ("rustc-web", "compiles the eBPF programs and the guest"),
    ("cargo-web", "compiles the eBPF programs and the guest"),
    ("libstd-rust-web-dev-bpf", "core for the eBPF target"),
    ("rust-web-src", "core and alloc for the guest's target"),
    ("llvm-22-dev", "bpf-linker"),
    ("libpolly-22-dev", "bpf-linker"),
    ("zlib1g-dev", "bpf-linker"),
    ("libzstd-dev", "bpf-linker"),
    ("libxml2-dev", "bpf-linker"),
    ("libpcap-dev", "filters of `warren capture`"),
    ("iproute2", "namespaces of the tests and the demo"),
    ("redis-server", "a real server in a tenant's VPC"),
    ("redis-tools", "its client"),
    ("nginx-light", "a real server in a tenant's VPC"),
    ("iperf3", "TCP streams of the data path's benchmark"),
    ("nftables", "SNAT that the data path's benchmark compares with"),
    ("postgresql", "load of the benchmark of restarts"),
    ("unbound", "a real resolver in a tenant's VPC"),
    ("bind9-dnsutils", "a guest's DNS client: dig"),
    ("keepalived", "gateways that the benchmark of dying proxies compares with"),
    ("nmap", "what a guest can reach"),
    ("qemu-system-x86", "the lab's machines"),
    ("busybox-static", "what runs first in them"),
    ("cpio", "what they boot from"),
    ("kmod", "their kernels' modules"),
    ("xz-utils", "unpacks those"),
    ("binutils", "strips the tests that run there"),
    ("debian-archive-keyring", "whose kernels they are"),
    ("e2fsprogs", "makes the image of Linux guests' test function"),
    ("clang-22", "compiles the example in C"),
    ("libclang-rt-22-dev-wasm32", "its runtime library"),
    ("wasi-libc", "its library of C"),
    ("make", "builds the example in C"),
    ("npm", "builds the example in JavaScript"),
    ("python3-venv", "builds the example in Python"),
];

/// Installs what is missing. Where it may not, it lists the commands and fails.
pub fn all() -> Result<()> {
    let commands = missing()?;
    if commands.is_empty() {
        step("setup", "nothing is missing");
        return Ok(());
    }
    let listed = commands.iter().map(|c| format!("    {c}")).collect::<Vec<_>>().join("\n");
    if !nix::unistd::geteuid().is_root() {
        bail!("something is missing and this is not root; run:\n{listed}");
    }
    step("setup", &format!("something is missing; running:\n{listed}"));
    for command in &commands {
        run(Command::new("sh").args(["-c", command]).env("DEBIAN_FRONTEND", "noninteractive"))?;
    }
    Ok(())
}

/// Shell commands that install what is missing, in order.
fn missing() -> Result<Vec<String>> {
    let mut commands = Vec::new();
    let debian = Path::new("/usr/bin/dpkg-query").exists();
    if debian {
        let packages = missing_packages();
        if !packages.is_empty() {
            for (name, purpose) in PACKAGES.iter().filter(|(name, _)| packages.contains(name)) {
                step("setup", &format!("missing: {name} ({purpose})"));
            }
            commands.push("apt-get update -qq".to_owned());
            commands.push(format!(
                "apt-get install -qq -y --no-install-recommends {}",
                packages.join(" ")
            ));
        }
    } else {
        for program in
            ["cc", "ip", "redis-server", "redis-cli", "nginx", "iperf3", "nft", "postgres"]
        {
            if !on_path(program) {
                bail!("`{program}` is missing: install it with your package manager");
            }
        }
        if output(Command::new("rustc").args(["+nightly", "--version"])).is_err() {
            commands.push("rustup toolchain install nightly --component rust-src".to_owned());
        }
    }
    if !on_path("bpf-linker") {
        step("setup", "missing: bpf-linker (links the eBPF programs; about a minute)");
        commands.push(if debian {
            "LLVM_PREFIX=/usr/lib/llvm-22 cargo install --quiet --locked bpf-linker \
             --no-default-features --features llvm-22"
                .to_owned()
        } else {
            "cargo install --locked bpf-linker".to_owned()
        });
    }
    Ok(commands)
}

fn missing_packages() -> Vec<&'static str> {
    let names = PACKAGES.iter().map(|(name, _)| *name);
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f", "${Package} ${db:Status-Status}\n"]).args(names.clone());
    // It exits 1 if any package is unknown, and still lists the others.
    let listed = query.output().map(|o| o.stdout).unwrap_or_default();
    let listed = String::from_utf8_lossy(&listed).into_owned();
    let is_listed = |name: &str| listed.lines().any(|line| line == format!("{name} installed"));
    // Others' packages of Node.js have npm, too, and exclude Debian's.
    names.filter(|name| !(is_listed(name) || *name == "npm" && on_path(name))).collect()
}

/// Whether a program of that name can be run.
pub fn on_path(program: &str) -> bool {
    let cargo_bin = std::env::var_os("CARGO_HOME").map(|home| Path::new(&home).join("bin"));
    std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .chain(cargo_bin)
        .any(|dir| dir.join(program).is_file())
}
