//! Running commands, and saying so.

use std::process::Command;

use anyhow::{Context, Result, bail};

/// Says what is being done.
pub fn step(what: &str, detail: &str) {
    eprintln!("{what:>8}  {detail}");
}

/// Runs a command to its end.
///
/// # Errors
/// It cannot be started, or does not exit with 0; the message holds the command.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

/// Runs a command and returns what it printed.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
