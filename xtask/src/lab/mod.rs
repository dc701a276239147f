//! `cargo xtask lab`: tests inside machines that qemu emulates, with Debian's kernels and a KVM like
//! that of any server.
//!
//! What `/dev/kvm` is on the machine of a developer, and which kernel that has, is chance. Here is
//! ordinary KVM, with real SVM semantics, and a kernel without and one with tcx. It is slow: times
//! in the lab mean nothing.

mod checks;
pub mod demo;
mod image;
mod machine;
mod report;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::checks::{CHECKS, Check};
use self::machine::{Event, Machine};
use self::report::{CheckReport, KernelReport};
use crate::build::target;
use crate::command::step;
use crate::kernels::{self, KERNELS, Kernel};
use crate::linux;

/// How long a machine may take until its first process runs, and from the last one on.
const BOOT_PATIENCE: Duration = Duration::from_mins(3);

/// How much longer than the machine itself, which kills a check that takes too long, this side waits.
const MARGIN: Duration = Duration::from_secs(30);

/// What to run.
#[derive(Default)]
pub struct Selection {
    /// One check, whole; without one, all of them in their short form.
    pub check: Option<String>,
    /// One kernel; without one, all.
    pub kernel: Option<String>,
    /// All checks, whole.
    pub all: bool,
    /// Print the results as JSON.
    pub json: bool,
}

/// Runs the checks.
///
/// # Errors
/// If one fails: the end of what it said is printed.
pub fn run(selection: &Selection) -> Result<()> {
    kernels::can_be_had()?;
    let checks = pick(&CHECKS, selection.check.as_deref(), |check| check.name, "check")?;
    let kernels = pick(&KERNELS, selection.kernel.as_deref(), |kernel| kernel.name, "kernel")?;
    let is_whole = selection.all || selection.check.is_some();
    let folder = target().join("lab");
    fs::create_dir_all(&folder)?;

    let tests = checks::programs(&checks)?;
    let mut list = String::new();
    for check in &checks {
        let program = tests.get(check.name).with_context(|| format!("no test {}", check.name))?;
        let (seconds, words) =
            (check.patience(is_whole).as_secs(), check.arguments(is_whole).join(" "));
        list += &format!("{} {seconds} {} {words}\n", check.name, program.display());
    }
    let mut more = Vec::new();
    if checks.iter().any(|check| check.linux_guests) {
        linux::images()?;
        more = linux::names();
    }
    let programs = image::of_programs(&folder, &more, tests.into_values())?;
    let under = |kernel: &Kernel| {
        let folder = folder.join(kernel.name);
        fs::create_dir_all(&folder)?;
        let files = kernel.files(&folder)?;
        let initrd = image::of_kernel(&folder, &programs, &files, &list)?;
        let mut report = KernelReport::new(kernel.name);
        for check in &checks {
            let log = folder.join(format!("{}.log", check.name));
            let mut run = || {
                let machine = Machine::boot(&files.image, &initrd, check.name, &log)?;
                follow(&mut report, machine, check, is_whole, &log)
            };
            let mut result = run()?;
            if result.is_lost() {
                // The emulator has a fault or two of its own; what is ours fails the second time as well.
                tell(kernel.name, &format!("{}: once more", check.name));
                result = run()?;
            }
            report.checks.push(result);
        }
        Ok(report)
    };
    // A machine keeps one processor busy.
    let reports = thread::scope(|scope| {
        let under = &under;
        let kernels: Vec<_> =
            kernels.iter().map(|kernel| scope.spawn(move || under(kernel))).collect();
        kernels
            .into_iter()
            .map(|kernel| kernel.join().unwrap_or_else(|_| bail!("a thread panicked")))
            .collect::<Result<Vec<_>>>()
    })?;
    report::print(&reports, selection.json);
    if reports.iter().all(KernelReport::is_passed) {
        return Ok(());
    }
    bail!("checks failed in the lab; all that the machines said is in {}", folder.display())
}

/// The one of this name, or all.
fn pick<T>(
    all: &'static [T],
    name: Option<&str>,
    name_of: impl Fn(&T) -> &'static str,
    what: &str,
) -> Result<Vec<&'static T>> {
    let names = || all.iter().map(&name_of).collect::<Vec<_>>().join(", ");
    let picked: Vec<_> = all.iter().filter(|it| name.is_none_or(|n| n == name_of(it))).collect();
    match name {
        Some(name) if picked.is_empty() => bail!("there is no {what} {name}: {}", names()),
        _ => Ok(picked),
    }
}

fn tell(kernel: &str, text: &str) {
    step("lab", &format!("{kernel:<5} {text}"));
}

/// Follows a machine from its boot until it is off.
fn follow(
    report: &mut KernelReport,
    mut machine: Machine,
    check: &Check,
    is_whole: bool,
    log: &Path,
) -> Result<CheckReport> {
    let tell = |text: &str| tell(report.name, text);
    let mut result = CheckReport::new(check.name, log);
    let mut began = Instant::now();
    let mut deadline = began + BOOT_PATIENCE;
    loop {
        match machine.next(deadline)? {
            Event::Up(release) => {
                report.boot = began.elapsed();
                report.release = release;
            }
            Event::Begin(name) => {
                ensure!(name == check.name, "the machine began {name}");
                tell(&format!("{name}: {}", check.what));
                began = Instant::now();
                deadline = began + check.patience(is_whole) + MARGIN;
            }
            Event::Line(line) => {
                if line.starts_with("test ") && line.ends_with("... ok") {
                    tell(&format!("  {line}"));
                }
                result.hear(line);
            }
            Event::End(_, status) => {
                result.end(status, began.elapsed());
                deadline = Instant::now() + BOOT_PATIENCE;
            }
            Event::Off => break,
        }
    }
    if !machine.is_off(Duration::from_secs(5)) {
        tell("hangs: it is killed");
    }
    result.off(began.elapsed());
    tell(&result.summary());
    Ok(result)
}
