//! Runs what was built: demo, tests, benchmarks, lints.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build::{self, results, root};
use crate::command::{output, run, step};
use crate::setup;

fn with_json(mut command: Command, json: Option<PathBuf>) -> Command {
    if let Some(file) = json {
        command.arg("--json").arg(file);
    }
    command
}

/// `cargo xtask demo`.
pub fn demo(json: Option<PathBuf>) -> Result<()> {
    setup::all()?;
    build::all(false)?;
    // In place of this process: Ctrl-C then reaches the one that has to clean up, and ends it.
    let mut command = with_json(Command::new(results().join("warren-demo")), json);
    Err(command.exec()).with_context(|| format!("cannot run {command:?}"))
}

/// `cargo xtask bench`.
pub fn bench(name: Option<String>, json: Option<PathBuf>) -> Result<()> {
    setup::all()?;
    build::all(false)?;
    let mut command = Command::new(results().join("warren-bench"));
    command.args(name);
    run(&mut with_json(command, json))
}

/// `cargo xtask test`.
pub fn test(filter: Option<String>) -> Result<()> {
    setup::all()?;
    build::all(false)?;
    if !kvm_opens() {
        step("test", "!!! /dev/kvm cannot be opened: MICROVM TESTS ARE SKIPPED !!!");
    }
    step("test", "unit and integration tests");
    let before = leftovers()?;
    // Release: the binaries the tests start are there already, and their dependencies with them.
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(["test", "--release", "--no-fail-fast"]).args(filter);
    run(&mut command)?;
    let after = leftovers()?;
    let new: Vec<_> = after.iter().filter(|line| !before.contains(line)).cloned().collect();
    if !new.is_empty() {
        bail!("the tests left something behind:\n{}", new.join("\n"));
    }
    Ok(())
}

/// `cargo xtask lint`.
pub fn lint() -> Result<()> {
    step("lint", "rustfmt");
    run(Command::new("cargo").current_dir(root()).args(["fmt", "--all", "--check"]))?;
    step("lint", "clippy");
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(["clippy", "--release", "--quiet", "--all-targets"]);
    command.args(["--", "--deny", "warnings"]);
    run(&mut command)
}

fn kvm_opens() -> bool {
    std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Interfaces, mounts, temporary directories and processes of Warren in this namespace.
fn leftovers() -> Result<Vec<String>> {
    let links = output(Command::new("ip").args(["-o", "link"]))?;
    let links = links
        .lines()
        .filter_map(|line| line.split(": ").nth(1))
        .filter(|name| name.starts_with("wrn") || name.starts_with("vpc-"))
        .map(|name| format!("interface {name}"));
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    let mounts =
        mounts.lines().filter(|line| line.contains("/warren-")).map(|line| format!("mount {line}"));
    let directories = std::fs::read_dir(std::env::temp_dir())?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("warren-"))
        .map(|entry| format!("directory {}", entry.path().display()));
    let mut found: Vec<_> = links.chain(mounts).chain(directories).collect();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Ok(exe) = std::fs::read_link(entry.path().join("exe")) else { continue };
        let name = exe.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if ["warrend", "warren-vmm", "warren-control"]
            .contains(&name.trim_end_matches(" (deleted)"))
        {
            found.push(format!("process {} {name}", entry.file_name().display()));
        }
    }
    Ok(found)
}
