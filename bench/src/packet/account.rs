//! The kernel's own account of what its programs cost.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use aya::sys::{Stats, enable_stats};
use warren_netns::netns::Namespace;

/// Has the kernel keep the account, as long as this value lives or any process asks for it.
pub struct Accounting {
    _switch: OwnedFd,
}

impl Accounting {
    pub fn on() -> Result<Self> {
        let switch = enable_stats(Stats::RunTime).context("cannot enable BPF statistics")?;
        Ok(Self { _switch: switch })
    }
}

/// A program whose account is read.
pub struct Program {
    fd: OwnedFd,
}

/// The programs that a packet meets on its way in: all packets the first, some also another.
pub struct Hook(pub Vec<Program>);

impl Hook {
    /// The time of all programs, by the runs of the first: packets.
    pub fn account(&self) -> Result<Account> {
        let mut sum = Account::default();
        for (index, program) in self.0.iter().enumerate() {
            let Account { ns, runs } = program.account()?;
            sum.ns += ns;
            sum.runs += if index == 0 { runs } else { 0 };
        }
        Ok(sum)
    }
}

/// What a program ran so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Nanoseconds (`run_time_ns` of `bpf_prog_info`).
    pub ns: u64,
    /// How often (`run_cnt`).
    pub runs: u64,
}

impl Program {
    /// The only program at the ingress of an interface.
    pub fn at_ingress(namespace: &Namespace, interface: &str) -> Result<Self> {
        let query = || SchedClassifier::query_tcx(interface, TcAttachType::Ingress);
        let (_, programs) = namespace.run(query)?;
        ensure!(programs.len() == 1, "{} programs at {interface}, not one", programs.len());
        let fd = programs[0].fd()?;
        Ok(Self { fd: fd.as_fd().try_clone_to_owned()? })
    }

    /// A program that is open.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Its account now.
    pub fn account(&self) -> Result<Account> {
        let path = PathBuf::from(format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd()));
        let text = std::fs::read_to_string(path)?;
        parse(&text).context("the kernel keeps no account of programs: this needs Linux 5.1")
    }
}

fn parse(fdinfo: &str) -> Option<Account> {
    let field = |name| {
        let value = fdinfo.lines().find_map(|line| line.strip_prefix(name))?;
        value.trim().parse().ok()
    };
    Some(Account { ns: field("run_time_ns:")?, runs: field("run_cnt:")? })
}

impl Account {
    /// Nanoseconds per run since `before`; `None` if there was no run.
    pub fn ns_per_run_since(self, before: Self) -> Option<f64> {
        let runs = self.runs.checked_sub(before.runs).filter(|&runs| runs > 0)?;
        Some(self.ns.checked_sub(before.ns)? as f64 / runs as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_read_and_compared() {
        let text = |ns, runs| format!("pos:\t0\nrun_time_ns:\t{ns}\nrun_cnt:\t{runs}\n");
        let before = parse(&text(1000, 10)).expect("both fields are there");
        let after = parse(&text(4000, 20)).expect("both fields are there");
        assert_eq!(after.ns_per_run_since(before), Some(300.0));
        assert_eq!(after.ns_per_run_since(after), None);
        assert_eq!(parse("pos:\t0\n"), None);
    }
}
