//! Running tests, so that what failed is found.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs `cargo test` to its end.
///
/// # Errors
/// If one fails: what the failed ones printed is repeated, as nobody finds it among thousands of lines.
pub fn run(command: &mut Command) -> Result<()> {
    let context = format!("cannot run {command:?}");
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| context)?;
    let stdout = BufReader::new(child.stdout.take().context("no stdout")?);
    let mut failures = Failures::default();
    for line in stdout.split(b'\n') {
        let line = line?;
        let mut shown = std::io::stdout().lock();
        shown.write_all(&line)?;
        shown.write_all(b"\n")?;
        failures.take(&String::from_utf8_lossy(&line));
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{command:?}: {status}\n{}", failures.lines.join("\n"));
    }
    Ok(())
}

/// What libtest prints of failed tests: from `failures:` to the result of each program.
#[derive(Default)]
struct Failures {
    lines: Vec<String>,
    within: bool,
}

impl Failures {
    fn take(&mut self, line: &str) {
        if line == "failures:" {
            self.within = true;
        } else if line.starts_with("test result: ") {
            self.within = false;
        }
        if self.within {
            self.lines.push(line.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_are_repeated() {
        let mut failures = Failures::default();
        for line in [
            "test one ... ok",
            "failures:",
            "---- two stdout ----",
            "it broke",
            "test result: FAILED. 1 passed; 1 failed",
            "test three ... ok",
            "test result: ok. 1 passed",
        ] {
            failures.take(line);
        }
        assert_eq!(failures.lines, ["failures:", "---- two stdout ----", "it broke"]);
    }
}
