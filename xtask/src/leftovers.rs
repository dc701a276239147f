//! What tests could leave behind on the machine.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use aya::programs::{loaded_links, loaded_programs};

use crate::command::output;

/// How long the kernel may take to free what nobody uses any more.
const PATIENCE: Duration = Duration::from_secs(10);

/// Names of the programs, as in `abi/src/maps.rs`; the kernel keeps 15 characters.
const PROGRAMS: [&str; 5] = ["tap", "tunnel_host", "tunnel_proxy", "vpc", "sweep"];

/// What is there now and was not before, and stays.
pub fn settled(before: &BTreeSet<String>) -> Result<Vec<String>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let new: Vec<_> = find()?.difference(before).cloned().collect();
        if new.is_empty() || Instant::now() > deadline {
            return Ok(new);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Interfaces, pins, BPF programs and links, mounts, namespaces, temporary directories, control
/// groups and processes of Warren.
pub fn find() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let links = output(Command::new("ip").args(["-o", "link"]))?;
    let names = links.lines().filter_map(|line| line.split(": ").nth(1));
    let ours = names.filter(|name| name.starts_with("wrn") || name.starts_with("vpc-"));
    found.extend(ours.map(|name| format!("interface {name}")));
    for line in fs::read_to_string("/proc/mounts")?.lines() {
        if line.contains("/warren-") {
            found.insert(format!("mount {line}"));
        }
    }
    let mut directories =
        vec![("directory", std::env::temp_dir()), ("pins", Path::new("/sys/fs/bpf").into())];
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    directories.extend(hierarchies.map(|entry| ("control group", entry.path())));
    directories.push(("control group", Path::new("/sys/fs/cgroup").into()));
    for (kind, directory) in directories {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let ours = entries.filter(|e| e.file_name().to_string_lossy().starts_with("warren"));
        found.extend(ours.map(|entry| format!("{kind} {}", entry.path().display())));
    }
    bpf(&mut found);
    processes(&mut found)?;
    Ok(found)
}

/// One that is freed while it is looked at is no leftover.
fn bpf(found: &mut BTreeSet<String>) {
    let mut ours = BTreeSet::new();
    for program in loaded_programs().flatten() {
        if let Some(name) = program.name_as_str().filter(|name| PROGRAMS.contains(name)) {
            ours.insert(program.id());
            found.insert(format!("BPF program {} {name}", program.id()));
        }
    }
    for link in loaded_links().flatten().filter(|link| ours.contains(&link.program_id())) {
        found.insert(format!("BPF link {}", link.id()));
    }
}

/// Processes of Warren, and network namespaces that are not everybody's.
fn processes(found: &mut BTreeSet<String>) -> Result<()> {
    let own = fs::read_link("/proc/self/ns/net")?;
    for entry in fs::read_dir("/proc")?.flatten() {
        let (pid, path) = (entry.file_name(), entry.path());
        let pid = pid.display();
        let Ok(exe) = fs::read_link(path.join("exe")) else { continue };
        let name = exe.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = name.trim_end_matches(" (deleted)");
        if ["warrend", "warren-vmm", "warren-control"].contains(&name) {
            found.insert(format!("process {pid} {name}"));
        }
        if let Ok(namespace) = fs::read_link(path.join("ns/net"))
            && namespace != own
        {
            found.insert(format!("namespace {} of process {pid} {name}", namespace.display()));
        }
    }
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        found.insert(format!("namespace {}", entry.path().display()));
    }
    Ok(())
}
