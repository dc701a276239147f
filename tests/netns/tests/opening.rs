//! A daemon that is killed while it opens its data path.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use warren_netns::fleet::built;
use warren_netns::process::Process;
use warren_netns::rundir::RunDir;
use warren_netns::topology::{HOST, Topology, UNDERLAY};

const EXPEDITED: &str = "/sys/kernel/rcu_expedited";
const PATIENCE: Duration = Duration::from_secs(20);
/// So many that opening them takes a while.
const SLOTS: u32 = 1500;

/// A host's daemon, which has nothing but its data path to open: it fails after that.
struct Daemon {
    topology: Topology,
    run: RunDir,
}

impl Daemon {
    fn new() -> Self {
        let daemon = Self {
            topology: Topology::new().expect("the topology can be made"),
            run: RunDir::new().expect("a BPF file system can be mounted"),
        };
        let text = format!(
            "name = 'host'\n\
             listen = ['unix:{dir}/grpc.sock']\n\
             run_dir = '{dir}/run'\n\
             bpffs = '{dir}/bpf/host'\n\
             programs = '{programs}'\n\
             [underlay]\n\
             interface = '{UNDERLAY}'\n\
             address = '{HOST}'\n\
             [host]\n\
             slots = {SLOTS}\n\
             vmm = '/bin/false'\n\
             [[host.templates]]\n\
             name = 'none'\n\
             path = '/dev/null'\n",
            dir = daemon.run.path().display(),
            programs = built("warren-ebpf.o").expect("the programs are built").display(),
        );
        std::fs::write(daemon.config(), text).expect("it can be written");
        daemon
    }

    fn config(&self) -> PathBuf {
        self.run.path().join("host.toml")
    }

    fn command(&self) -> std::process::Command {
        let mut command =
            self.topology.host.command(built("warrend").expect("the daemon is built"));
        command.args(["--role", "host", "--config"]).arg(self.config());
        command
    }

    fn start(&self) -> Process {
        let log = self.run.path().join("host.log");
        Process::start("warrend", self.command(), &log).expect("it starts")
    }

    /// How many TAPs there are.
    fn taps(&self) -> usize {
        let links = self.topology.host.ip_lines("link show").expect("ip runs");
        links.iter().filter(|link| link.contains(": wrn")).count()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.command().arg("--uninstall").status().ok();
    }
}

fn setting() -> String {
    std::fs::read_to_string(EXPEDITED).expect("this kernel has the setting").trim().to_owned()
}

/// The children of a process.
fn children(process: &Process) -> Vec<String> {
    let pid = process.pid();
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    list.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "{what}: it did not become so");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_daemon_that_is_killed_while_it_opens_leaves_the_kernel_s_setting_as_it_was() {
    let before = setting();
    assert_ne!(before, "1", "the administrator wants it on: nothing to see here");
    let daemon = Daemon::new();
    for taps in [1, SLOTS as usize / 2] {
        let mut process = daemon.start();
        let mut guardians = Vec::new();
        eventually("the daemon is at it", || {
            guardians = children(&process);
            setting() == "2" && !guardians.is_empty() && daemon.taps() > taps
        });
        process.kill().expect("it can be killed");
        assert!(daemon.taps() < SLOTS as usize, "it was done before it was killed");
        for guardian in &guardians {
            let path = Path::new("/proc").join(guardian);
            eventually("who guards the setting is gone", || !path.exists());
        }
        eventually("the setting is back", || setting() == "0");
    }
    // What it left half done, the next one completes.
    let mut process = daemon.start();
    eventually("all slots are there", || daemon.taps() > SLOTS as usize);
    eventually("the setting is back", || setting() == "0");
    process.kill().ok();
}

#[test]
fn two_daemons_that_open_at_once_both_get_ready_and_leave_the_setting_as_it_was() {
    let daemons = [Daemon::new(), Daemon::new()];
    let mut processes = daemons.each_ref().map(Daemon::start);
    for (daemon, process) in daemons.iter().zip(&mut processes) {
        eventually("all slots are there", || daemon.taps() > SLOTS as usize);
        process.stop(PATIENCE).expect("it can be stopped");
    }
    eventually("the setting is back", || setting() == "0");
}
