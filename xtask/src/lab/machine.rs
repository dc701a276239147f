//! A machine of the lab: qemu, which emulates a processor with SVM, and what it says.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

/// A processor with SVM and nested page tables, on any machine.
const PROCESSOR: &str = "EPYC-v3,+svm,+npt";

/// What its first process begins lines with that are meant for here.
const MARK: &str = "@lab ";

/// What a machine says.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// It runs, under this kernel.
    Up(String),
    /// A check begins.
    Begin(String),
    /// A check ended, by this status.
    End(String, i32),
    /// A line of a check's output, or of the kernel's.
    Line(String),
    /// It is off, or hung and was killed.
    Off,
}

/// A machine that runs. It is killed when this is dropped.
pub struct Machine {
    qemu: Child,
    lines: Receiver<String>,
    log: File,
}

impl Machine {
    /// Boots a kernel with an initial file system, to run a check; all that it says is written to the
    /// file `log`.
    pub fn boot(kernel: &Path, initrd: &Path, check: &str, log: &Path) -> Result<Self> {
        let log = File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", "q35", "-accel", "tcg,thread=single", "-cpu", PROCESSOR]);
        // One processor: a machine keeps one of this host's busy. Its clock is the host's. If it counted
        // instructions (-icount), the emulator would deliver some of a guest's interrupts twice, also
        // where they are disabled: VMRUN leaves the vector of the one that it injects in
        // exception_index, and where such a machine's budget of instructions ends, that is delivered.
        command.args(["-smp", "1", "-m", "2048", "-nic", "none", "-display", "none"]);
        command.args(["-monitor", "none", "-serial", "stdio", "-no-reboot"]);
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
        command.args(["-append", &format!("console=ttyS0 quiet panic=-1 lab={check}")]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        // It warns of each feature of that processor that it does not have.
        command.stderr(log.try_clone()?);
        // SAFETY: one system call, which may be made between fork and exec.
        unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
        let mut qemu = command.spawn().context("cannot run qemu-system-x86_64")?;
        let output = qemu.stdout.take().context("its output is a pipe")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { qemu, lines, log })
    }

    /// What it says next, for which it has until `deadline`.
    pub fn next(&mut self, deadline: Instant) -> Result<Event> {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(line) = self.lines.recv_timeout(left) else {
            // Off, or out of time.
            return Ok(Event::Off);
        };
        writeln!(self.log, "{line}")?;
        Ok(parse(line))
    }

    /// Whether it powered itself off, for which it has so long.
    pub fn is_off(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if self.qemu.try_wait().is_ok_and(|status| status.is_some()) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        false
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Neither fails for a child that was not waited for.
        self.qemu.kill().ok();
        self.qemu.wait().ok();
    }
}

/// The firmware, too, writes to the console, and ends no line before the kernel begins.
fn parse(line: String) -> Event {
    let mut words = match line.find(MARK) {
        Some(at) => line[at + MARK.len()..].split(' '),
        None => return Event::Line(line),
    };
    match (words.next(), words.next(), words.next()) {
        (Some("up"), Some(release), None) => Event::Up(release.to_owned()),
        (Some("begin"), Some(name), None) => Event::Begin(name.to_owned()),
        (Some("end"), Some(name), Some(status)) => match status.parse() {
            Ok(status) => Event::End(name.to_owned(), status),
            Err(_) => Event::Line(line),
        },
        _ => Event::Line(line),
    }
}

#[cfg(test)]
mod tests {
    use super::{Event, parse};

    #[test]
    fn marks_are_found_and_other_lines_kept() {
        assert_eq!(parse("\u{1b}c@lab up 6.1.0".into()), Event::Up("6.1.0".into()));
        assert_eq!(parse("@lab begin clones".into()), Event::Begin("clones".into()));
        assert_eq!(parse("@lab end clones 137".into()), Event::End("clones".into(), 137));
        for line in ["@lab end clones", "@lab end clones x", "@lab", "test a ... ok"] {
            assert_eq!(parse(line.into()), Event::Line(line.into()));
        }
    }
}
