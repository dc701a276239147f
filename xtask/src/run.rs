//! Runs what was built: demo, tests, benchmarks, lints.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build::{self, results, root};
use crate::command::{run, step};
use crate::{examples, kernels, lab, leftovers, linux, setup, suite};

fn with_json(mut command: Command, json: Option<PathBuf>) -> Command {
    if let Some(file) = json {
        command.arg("--json").arg(file);
    }
    command
}

/// `cargo xtask demo`.
pub fn demo(json: Option<PathBuf>, in_lab: bool) -> Result<()> {
    setup::all()?;
    build::all(false)?;
    if in_lab {
        return lab::demo::run();
    }
    // In place of this process: Ctrl-C then reaches the one that has to clean up, and ends it.
    let mut command = with_json(Command::new(results().join("warren-demo")), json);
    Err(command.exec()).with_context(|| format!("cannot run {command:?}"))
}

/// `cargo xtask bench`.
pub fn bench(name: Option<String>, json: Option<PathBuf>) -> Result<()> {
    setup::all()?;
    build::all(false)?;
    if name.as_deref() == Some("restart") {
        build::other_ebpf()?;
    }
    if name.as_deref() == Some("clone") {
        build::hyperlight();
    }
    if name.as_deref() == Some("cold-start") {
        examples::build(&[])?;
    }
    let mut command = Command::new(results().join("warren-bench"));
    command.args(name);
    run(&mut with_json(command, json))
}

/// `cargo xtask test`.
pub fn test(filter: Option<&str>) -> Result<()> {
    setup::all()?;
    build::all(false)?;
    step("test", "the component of tests, and examples");
    examples::test_component()?;
    examples::build(&[])?;
    if !kvm_opens() {
        step("test", "!!! /dev/kvm cannot be opened: MICROVM TESTS ARE SKIPPED !!!");
    }
    step("test", "unit and integration tests");
    let before = leftovers::find()?;
    // Release: the binaries the tests start are there already, and their dependencies with them.
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(["test", "--release", "--no-fail-fast"]).args(filter);
    // What failed says where, and no more than that is read.
    command.env("RUST_BACKTRACE", "0");
    suite::run(&mut command)?;
    if filter.is_none() {
        suite::run(build::function("test").arg("--no-fail-fast").env("RUST_BACKTRACE", "0"))?;
    }
    let new = leftovers::settled(&before)?;
    if !new.is_empty() {
        bail!("the tests left something behind:\n{}", new.join("\n"));
    }
    if filter.is_some() {
        return Ok(());
    }
    if let Err(missing) = kernels::can_be_had() {
        step("test", &format!("!!! {missing}: THE LAB'S TESTS ARE SKIPPED !!!"));
        return Ok(());
    }
    lab::run(&lab::Selection::default())
}

/// `cargo xtask lab`.
pub fn lab(selection: &lab::Selection) -> Result<()> {
    setup::all()?;
    build::all(false)?;
    lab::run(selection)
}

/// `cargo xtask linux`.
pub fn linux() -> Result<()> {
    setup::all()?;
    build::all(false)?;
    linux::images()
}

/// `cargo xtask examples`.
pub fn examples(named: &[examples::Example]) -> Result<()> {
    setup::all()?;
    examples::build(named)
}

/// `cargo xtask chaos`.
pub fn chaos(seed: Option<u64>, minutes: u64) -> Result<()> {
    setup::all()?;
    build::all(false)?;
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(["test", "--release", "--package", "warren-netns"]);
    command.args(["--test", "chaos", "--", "--nocapture"]);
    command.env("WARREN_CHAOS_SECONDS", (minutes * 60).to_string());
    if let Some(seed) = seed {
        command.env("WARREN_CHAOS_SEED", seed.to_string());
    }
    run(&mut command)
}

/// `cargo xtask lint`.
pub fn lint() -> Result<()> {
    step("lint", "rustfmt");
    for workspace in [
        root(),
        root().join(build::HYPERLIGHT),
        root().join("examples/rust"),
        root().join("tests/component"),
    ] {
        run(Command::new("cargo").current_dir(workspace).args(["fmt", "--all", "--check"]))?;
    }
    step("lint", "clippy");
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(["clippy", "--release", "--quiet", "--all-targets"]);
    // The agent's program, too, which no plain build makes.
    command.args(["--features", "warren-agent/init", "--", "--deny", "warnings"]);
    run(&mut command)?;
    let mut command = build::function("clippy");
    run(command.args(["--quiet", "--all-targets", "--", "--deny", "warnings"]))
}

fn kvm_opens() -> bool {
    std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}
