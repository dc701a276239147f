//! Control groups, which stay when their microVM goes, as slots' TAPs do: version 2 where it has the controllers, version 1 else
//! (kernel documentation, admin-guide/cgroup-v2 and cgroup-v1).

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::Pid;

use super::{Inhabitant, JailError};

/// The controllers that limit a microVM.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];

/// The process itself, and the thread that KVM makes in its name for the recovery of large pages.
const TASKS: u32 = 2;

/// Microseconds in which a share of a processor is counted.
const PERIOD_US: u64 = 100_000;

/// How long [`remove`] waits for processes that were killed.
const LEAVING: Duration = Duration::from_secs(1);

/// What a microVM's process may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Memory, the kernel's for it among it, in bytes.
    pub memory_bytes: u64,
    /// Share of one processor, in percent.
    pub cpu_percent: u32,
}

impl Limits {
    /// Files of a group in version 2, and their content.
    fn v2(self) -> [(&'static str, String); 4] {
        let quota = u64::from(self.cpu_percent) * PERIOD_US / 100;
        [
            ("memory.max", self.memory_bytes.to_string()),
            ("memory.swap.max", "0".to_owned()),
            ("cpu.max", format!("{quota} {PERIOD_US}")),
            ("pids.max", TASKS.to_string()),
        ]
    }

    /// Files of a controller's group in version 1, and their content.
    fn v1(self, controller: &str) -> Vec<(&'static str, String)> {
        let quota = u64::from(self.cpu_percent) * PERIOD_US / 100;
        match controller {
            "memory" => vec![("memory.limit_in_bytes", self.memory_bytes.to_string())],
            "cpu" => vec![
                ("cpu.cfs_period_us", PERIOD_US.to_string()),
                ("cpu.cfs_quota_us", quota.to_string()),
            ],
            _ => vec![("pids.max", TASKS.to_string())],
        }
    }
}

/// A mounted hierarchy that has controllers of ours.
struct Hierarchy {
    path: PathBuf,
    /// The controller, in version 1.
    v1: Option<&'static str>,
}

/// The group of a zygote's microVMs in one hierarchy.
struct Group {
    directory: OwnedFd,
    /// What each slot's group gets.
    settings: Vec<(&'static str, String)>,
}

impl Group {
    /// Whether there is a process in the group of this name, or one that ended and was not waited for,
    /// which still counts as a task.
    fn has_somebody(&self, name: &str) -> bool {
        let starts_with = |file: &str| {
            let file = format!("{name}/{file}");
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
            let opened = openat(&self.directory, file.as_str(), flags, Mode::empty());
            let mut first = [0];
            let read = opened.map(|file| File::from(file).read(&mut first));
            matches!(read, Ok(Ok(1..))).then_some(first[0])
        };
        // The first has nothing if there is none, the second a number where pids are counted.
        starts_with("cgroup.procs").is_some()
            || !matches!(starts_with("pids.current"), None | Some(b'0'))
    }
}

/// One of a slot's groups: the first, unless the slot's former microVM is still in it, whose end
/// takes its time and must not be at the cost of the next one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    slot: u32,
    number: u32,
}

impl Place {
    /// The slot.
    pub fn slot(self) -> u32 {
        self.slot
    }

    fn name(self) -> String {
        match self {
            Self { slot, number: 0 } => format!("vm-{slot}"),
            Self { slot, number } => format!("vm-{slot}.{number}"),
        }
    }
}

/// The groups of a zygote's microVMs.
pub struct Cgroups {
    name: PathBuf,
    groups: Vec<Group>,
    /// Groups that are there, with these limits, and with nobody in them but this zygote's clones. Not
    /// dropped in a clone: to free it would copy the zygote's pages that it lies in.
    prepared: ManuallyDrop<BTreeSet<Place>>,
}

impl Cgroups {
    /// Makes the group for this zygote in each hierarchy; with none mounted nothing is limited, and
    /// the log says so.
    pub fn open(name: &Path, limits: Limits) -> Result<Self, JailError> {
        let mut groups = Vec::new();
        for Hierarchy { path, v1 } in hierarchies() {
            let own = path.join(name);
            let failed = |path: &Path| {
                let path = path.to_owned();
                move |source| JailError::Cgroup { path, source }
            };
            make(&own).map_err(failed(&own))?;
            if v1.is_none() {
                enable(&path, name).map_err(failed(&own))?;
            }
            let settings =
                v1.map_or_else(|| limits.v2().into(), |controller| limits.v1(controller));
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let directory = open(&own, flags, Mode::empty());
            let directory = directory.map_err(|errno| failed(&own)(errno.into()))?;
            groups.push(Group { directory, settings });
        }
        if groups.is_empty() {
            tracing::warn!("no control groups are mounted: microVMs share memory and processors");
        }
        Ok(Self { name: name.to_owned(), groups, prepared: ManuallyDrop::default() })
    }

    /// Finds the first group of a slot that is not in `taken`, and that nobody of another zygote's is
    /// in, and makes it if it is not there.
    pub fn prepare(&mut self, slot: u32, taken: &[Place]) -> Result<Place, JailError> {
        let is_free = |place: &Place| {
            let somebody = || self.groups.iter().any(|group| group.has_somebody(&place.name()));
            !taken.contains(place) && (self.prepared.contains(place) || !somebody())
        };
        let first = Place { slot, number: 0 };
        let mut places = (0..).map(|number| Place { slot, number });
        let place = places.find(is_free).unwrap_or(first);
        if !self.prepared.contains(&place) {
            self.make(&place.name())?;
            self.prepared.insert(place);
        }
        Ok(place)
    }

    /// Makes a group, or sets its limits anew.
    fn make(&self, name: &str) -> Result<(), JailError> {
        for Group { directory, settings, .. } in &self.groups {
            match mkdirat(directory, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(self.error(name, errno.into())),
            }
            for (file, value) in settings {
                let file = format!("{name}/{file}");
                let written = write(directory, &file, value);
                // A kernel without swap or without bandwidth control has no such file.
                if let Err(error) = written
                    && error.kind() != ErrorKind::NotFound
                {
                    return Err(self.error(&file, error));
                }
            }
        }
        Ok(())
    }

    /// Moves this process into a group.
    pub fn join(&self, place: Place) -> Result<(), JailError> {
        let file = format!("{}/cgroup.procs", place.name());
        for Group { directory, .. } in &self.groups {
            write(directory, &file, "0").map_err(|error| self.error(&file, error))?;
        }
        Ok(())
    }

    fn error(&self, file: &str, source: io::Error) -> JailError {
        JailError::Cgroup { path: self.name.join(file), source }
    }
}

/// The processes in the slots' groups below this name, and below groups of it; none: no hierarchy is
/// mounted. It looks into one hierarchy, the first that clones [join](Cgroups::join).
pub fn inhabitants(name: &Path) -> Option<Vec<Inhabitant>> {
    let own = hierarchies().into_iter().next()?.path.join(name);
    let mut found = Vec::new();
    inhabitants_below(&own, &mut found);
    Some(found)
}

fn inhabitants_below(group: &Path, found: &mut Vec<Inhabitant>) {
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        let Some(slot) = entry.file_name().to_str().and_then(slot_of) else {
            inhabitants_below(&entry.path(), found);
            continue;
        };
        let processes = fs::read_to_string(entry.path().join("cgroup.procs")).unwrap_or_default();
        // 0 is one that this process cannot see; without a command line it is a thread of KVM's, which
        // is a process of its own for Linux 6.1.
        let is_process = |pid: &i32| {
            *pid > 0 && fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
        };
        let pids = processes.lines().filter_map(|line| line.parse().ok()).filter(is_process);
        found.extend(pids.map(|pid| Inhabitant { slot, pid: Pid::from_raw(pid) }));
    }
}

/// The slot whose group has this name.
fn slot_of(name: &str) -> Option<u32> {
    let place = name.strip_prefix("vm-")?;
    place.split_once('.').map_or(place, |(slot, _)| slot).parse().ok()
}

/// Removes the groups below this name, and those above that nobody else has any below. Those that
/// somebody is in, and does not leave within a second, stay.
pub fn remove(name: &Path) {
    let deadline = Instant::now() + LEAVING;
    for Hierarchy { path, .. } in hierarchies() {
        let own = path.join(name);
        while !remove_tree(&own) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        for group in own.ancestors().skip(1).take_while(|group| *group != path) {
            let _ = fs::remove_dir(group);
        }
    }
}

/// Whether the group is gone.
fn remove_tree(group: &Path) -> bool {
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_tree(&entry.path());
    }
    fs::remove_dir(group).is_ok() || !group.exists()
}

/// Makes a group, also while somebody removes its parents because they are empty.
fn make(group: &Path) -> io::Result<()> {
    for _ in 0..100 {
        match fs::create_dir_all(group) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            made => return made,
        }
    }
    fs::create_dir_all(group)
}

fn write(directory: &OwnedFd, file: &str, value: &str) -> io::Result<()> {
    let file = openat(directory, file, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    File::from(file).write_all(value.as_bytes())
}

/// What is mounted: version 2 if all controllers are there, else each that version 1 has.
fn hierarchies() -> Vec<Hierarchy> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut v1 = Vec::new();
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        let (Some(path), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let path = PathBuf::from(path);
        if kind == "cgroup2" {
            let has = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
            let has = |wanted: &&str| has.split_whitespace().any(|name| name == *wanted);
            if CONTROLLERS.iter().all(has) {
                return vec![Hierarchy { path, v1: None }];
            }
        } else if kind == "cgroup" {
            let controller = CONTROLLERS
                .into_iter()
                .find(|controller| options.split(',').any(|option| option == *controller));
            if let Some(controller) = controller {
                v1.push(Hierarchy { path, v1: Some(controller) });
            }
        }
    }
    v1
}

/// Version 2: hands the controllers down to the groups of the slots.
fn enable(hierarchy: &Path, name: &Path) -> io::Result<()> {
    let mut group = hierarchy.to_owned();
    let mut parts = name.components();
    loop {
        let all = CONTROLLERS.map(|controller| format!("+{controller}")).join(" ");
        fs::write(group.join("cgroup.subtree_control"), all)?;
        match parts.next() {
            Some(part) => group.push(part),
            None => return Ok(()),
        }
    }
}

/// Has the kernel not wait for a grace period of RCU, milliseconds, before a process is moved
/// (`favordynmods`, Linux 6.0). It favours so while any hierarchy asks for it, so this is one without
/// controllers, which nobody sees and which goes with the descriptor. It is mounted, for a moment,
/// over `place`, in a mount namespace that is not shared.
pub fn favor_moves(place: &Path) -> Result<OwnedFd, Errno> {
    let options = Some("none,name=warren,favordynmods");
    mount(Some("none"), place, Some("cgroup"), MsFlags::empty(), options)?;
    let opened = open(place, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
    umount2(place, MntFlags::MNT_DETACH).and(opened)
}
