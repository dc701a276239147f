//! What came of the checks.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

/// Lines of a check that failed that are printed: its end has the reason.
const TAIL: usize = 60;

/// What came of a check.
pub struct CheckReport {
    pub name: &'static str,
    outcome: Outcome,
    /// Tests that passed, by what the test program says.
    tests: u32,
    took: Duration,
    tail: VecDeque<String>,
    log: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Running,
    Passed,
    /// No test has such a name: nothing was tested.
    Empty,
    /// Ended by this status.
    Failed(i32),
    /// The machine died or hung.
    Lost,
}

/// What came of all checks under a kernel.
pub struct KernelReport {
    pub name: &'static str,
    /// What `uname -r` says there.
    pub release: String,
    /// How long it took until the first process ran.
    pub boot: Duration,
    pub checks: Vec<CheckReport>,
}

impl CheckReport {
    /// Of one whose machine boots.
    pub fn new(name: &'static str, log: &Path) -> Self {
        let (outcome, took) = (Outcome::Running, Duration::ZERO);
        Self { name, outcome, tests: 0, took, tail: VecDeque::new(), log: log.to_owned() }
    }

    /// Takes a line of its output.
    pub fn hear(&mut self, line: String) {
        let passed = line.strip_prefix("test result: ok. ").and_then(|rest| rest.split(' ').next());
        self.tests += passed.and_then(|count| count.parse::<u32>().ok()).unwrap_or(0);
        self.tail.push_back(line);
        if self.tail.len() > TAIL {
            self.tail.pop_front();
        }
    }

    /// It ended.
    pub fn end(&mut self, status: i32, took: Duration) {
        self.took = took;
        self.outcome = match (status, self.tests) {
            (0, 0) => Outcome::Empty,
            (0, _) => Outcome::Passed,
            (status, _) => Outcome::Failed(status),
        };
    }

    /// The machine is off, or was killed.
    pub fn off(&mut self, took: Duration) {
        if self.outcome == Outcome::Running {
            (self.took, self.outcome) = (took, Outcome::Lost);
        }
    }

    /// Whether its machine died or hung.
    pub fn is_lost(&self) -> bool {
        self.outcome == Outcome::Lost
    }

    /// What came of it, in a line.
    pub fn summary(&self) -> String {
        let (name, seconds) = (self.name, self.took.as_secs_f64());
        match self.outcome {
            Outcome::Running => format!("{name}: runs"),
            Outcome::Passed => format!("{name}: {} tests passed in {seconds:.1} s", self.tests),
            Outcome::Empty => format!("{name}: no test of these names: nothing was tested"),
            Outcome::Failed(137) => format!("{name}: killed after {seconds:.1} s, its time"),
            Outcome::Failed(status) => format!("{name}: FAILED ({status}) after {seconds:.1} s"),
            Outcome::Lost => format!("{name}: the machine died or hung after {seconds:.1} s"),
        }
    }
}

impl KernelReport {
    /// Before the first machine.
    pub fn new(name: &'static str) -> Self {
        Self { name, release: String::new(), boot: Duration::ZERO, checks: Vec::new() }
    }

    /// Whether all checks passed.
    pub fn is_passed(&self) -> bool {
        self.checks.iter().all(|check| check.outcome == Outcome::Passed)
    }
}

/// Prints the end of what failed, and what came of all.
pub fn print(reports: &[KernelReport], json: bool) {
    for report in reports {
        for check in report.checks.iter().filter(|check| check.outcome != Outcome::Passed) {
            eprintln!("\nLinux {}, {} ({}):", report.name, check.summary(), check.log.display());
            for line in &check.tail {
                eprintln!("    {line}");
            }
        }
    }
    if json {
        let kernels: Vec<_> = reports.iter().map(to_json).collect();
        println!("{}", json!({ "kernels": kernels }));
        return;
    }
    for report in reports {
        println!("Linux {} ({}):", report.name, report.release);
        for check in &report.checks {
            println!("  {}", check.summary());
        }
    }
}

fn to_json(report: &KernelReport) -> serde_json::Value {
    let checks = report.checks.iter().map(|check| {
        json!({
            "name": check.name,
            "passed": check.outcome == Outcome::Passed,
            "tests": check.tests,
            "seconds": check.took.as_secs_f64(),
            "summary": check.summary(),
            "log": check.log,
        })
    });
    json!({
        "kernel": report.name,
        "release": report.release,
        "boot_seconds": report.boot.as_secs_f64(),
        "checks": checks.collect::<Vec<_>>(),
    })
}
