//! What is run inside: test programs of the workspace, as they are.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::build::root;

/// A test program, or a part of it.
pub struct Check {
    /// What it is picked by.
    pub name: &'static str,
    /// What it shows.
    pub what: &'static str,
    test: &'static str,
    /// Beginnings of the tests' names that the short form runs.
    short: &'static [&'static str],
    /// The same of the whole; all tests, if there is none.
    whole: &'static [&'static str],
    /// Tests that make no sense there.
    without: &'static [&'static str],
    /// Whether it boots Linux guests, whose images are made for it then.
    pub linux_guests: bool,
    /// How long all of it may take.
    patience: Duration,
}

/// What most checks have.
const TEST: Check = Check {
    name: "",
    what: "",
    test: "",
    short: &[],
    whole: &[],
    without: &[],
    linux_guests: false,
    patience: Duration::from_mins(10),
};

/// All of them, the quick ones first.
pub const CHECKS: [Check; 9] = [
    Check {
        name: "lifecycle",
        what: "microVMs on ordinary KVM: start, release, calls, end",
        test: "lifecycle",
        ..TEST
    },
    Check {
        name: "clones",
        what: "clones of one template on ordinary KVM share nothing",
        test: "clones",
        // For hours, there.
        without: &["of_four_thousand"],
        ..TEST
    },
    Check {
        name: "image",
        what: "images of functions on ordinary KVM: data, code, and the walls around them",
        test: "image",
        ..TEST
    },
    Check {
        name: "jail",
        what: "each wall of the jail, with control groups of version 2",
        test: "jail",
        ..TEST
    },
    Check {
        name: "hostile",
        what: "guests on ordinary KVM that break the rules",
        test: "hostile",
        ..TEST
    },
    Check {
        name: "linux",
        what: "Linux guests: boot, snapshot, 8 clones with 8 identities, network",
        test: "linux",
        short: &["eight_clones_of_linux_6_12"],
        linux_guests: true,
        patience: Duration::from_mins(20),
        ..TEST
    },
    Check {
        name: "linux-path",
        what: "a Linux guest downloads through host and proxy",
        test: "datapath",
        short: &["linux::"],
        whole: &["linux::"],
        linux_guests: true,
        ..TEST
    },
    Check {
        name: "verifier",
        what: "the kernel takes all eBPF programs, and runs them on malformed frames",
        test: "programs",
        short: &["host::a_malformed_sweep"],
        // Other verifiers go through other numbers of instructions.
        without: &["budget::"],
        patience: Duration::from_mins(15),
        ..TEST
    },
    Check {
        name: "datapath",
        what: "TCP and UDP from a slot through host and proxy to a server in a VPC",
        test: "datapath",
        short: &["traffic::tcp_and_udp_reach", "lifecycle::what_was_known"],
        whole: &["traffic::", "lifecycle::", "upgrade::an_upgrade_that_fails"],
        patience: Duration::from_mins(20),
        ..TEST
    },
];

/// How long a check may take in its short form.
const SHORT: Duration = Duration::from_mins(5);

impl Check {
    /// How long it may take, which only a machine that hangs needs.
    pub fn patience(&self, all: bool) -> Duration {
        if all { self.patience } else { self.patience.min(SHORT) }
    }

    /// The arguments of the test program.
    pub fn arguments(&self, all: bool) -> Vec<String> {
        let mut arguments: Vec<_> =
            (if all { self.whole } else { self.short }).iter().map(|&name| name.into()).collect();
        for name in self.without {
            arguments.extend(["--skip".into(), (*name).into()]);
        }
        arguments
    }
}

/// Builds the test programs of these checks, and returns where they are.
pub fn programs(checks: &[&'static Check]) -> Result<HashMap<&'static str, PathBuf>> {
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(["test", "--release", "--no-run"]);
    command.args(["--message-format", "json-render-diagnostics"]);
    for check in checks {
        // Of no package: with a choice of them, dependencies would be built anew, with fewer features.
        command.args(["--test", check.test]);
    }
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("{command:?}: {}", output.status);
    }
    let mut found = HashMap::new();
    for line in output.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        let message: Value = serde_json::from_slice(line).context("cargo's message")?;
        let name = message["target"]["name"].as_str();
        let is_test = message["target"]["kind"][0] == "test";
        if let (true, Some(name), Some(path)) = (is_test, name, message["executable"].as_str()) {
            found.extend(checks.iter().filter(|c| c.test == name).map(|c| (c.name, path.into())));
        }
    }
    Ok(found)
}
