//! `cargo xtask fuzz`: libFuzzer on the targets of `fuzz/`, with the address sanitizer.
//!
//! As `cargo fuzz` does it, which wants a nightly compiler: what it passes works with the stable
//! one, too, when that is told to take it.

use std::fs;
use std::process::Command;

use anyhow::{Result, bail};

use crate::build::{root, target as results};
use crate::command::{run as wait_for, step};

/// Only this target is instrumented; build scripts are not.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Coverage and comparisons for libFuzzer; checks of overflow and of debug assertions stay in.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Zsanitizer=address -Ccodegen-units=1 -Cdebug-assertions --cfg fuzzing";

/// Fuzzes a target, or lists them.
pub fn run(target: Option<String>, seconds: u32) -> Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root().join("fuzz/seeds"))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    match target {
        Some(target) if names.contains(&target) => fuzz(&target, seconds),
        Some(target) => bail!("there is no target {target}: {}", names.join(", ")),
        None => {
            println!("{}", names.join("\n"));
            Ok(())
        }
    }
}

fn fuzz(target: &str, seconds: u32) -> Result<()> {
    step("fuzz", target);
    let corpus = results().join("fuzz/corpus").join(target);
    let found = results().join("fuzz/found");
    fs::create_dir_all(&corpus)?;
    fs::create_dir_all(&found)?;
    let mut command = Command::new("cargo");
    command.current_dir(root()).env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", FLAGS);
    command.args(["run", "--release", "--package", "warren-fuzz", "--features", "fuzzer"]);
    command.args(["--target", TRIPLE, "--target-dir"]).arg(results().join("fuzz"));
    command.args(["--bin", target, "--"]).arg(&corpus).arg(root().join("fuzz/seeds").join(target));
    command.arg(format!("-max_total_time={seconds}"));
    command.arg(format!("-artifact_prefix={}/{target}-", found.display()));
    wait_for(&mut command)
}
