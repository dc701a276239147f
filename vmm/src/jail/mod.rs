//! The walls around a microVM's process.
//!
//! What clones can share, the zygote builds once ([`Jail::build`]): namespaces of mounts, network,
//! IPC and host name with nothing in them, an empty root, resource limits, no new privileges. Each
//! clone goes in alone ([`Jail::enter`]): into its slot's control group, to its slot's own user and
//! group, under Landlock, and last under its seccomp filter. From there on it has its descriptors,
//! its memory, and the few system calls that moving packets and running the guest take.

mod cgroup;
mod filter;
mod inhabitants;
mod root;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreated, RulesetError, Scope,
};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, chdir, setgroups, setresgid, setresuid};
use seccompiler::BpfProgram;

use crate::control::GuestKind;
use cgroup::{Cgroups, Limits};
pub use cgroup::{Place, remove as remove_groups};
pub use inhabitants::{Inhabitant, by_user, inhabitants};

/// The first user and group, which slot 0 would have: the beginning of a range that nobody else
/// uses on a system with systemd (its "Users, Groups, UIDs and GIDs").
pub const FIRST_UID: u32 = 0x7000_0000;

/// What a microVM's process may have beyond its guest's memory, in bytes: its own heap and stack,
/// and what the kernel keeps for it (page tables, KVM's tables, socket buffers).
pub const OVERHEAD: u64 = 16 << 20;

/// What is mapped but hardly touched beside the guest's memory, in bytes: program and libraries.
const ADDRESS_SPACE: u64 = 64 << 20;

/// Descriptors of a process: its machine's, its socket's, and those of calls in progress.
const DESCRIPTORS: u64 = 512;

/// How microVMs are confined.
#[derive(Clone, Debug)]
pub struct JailConfig {
    /// User and group of slot 0; slot N has the Nth after it. Nobody else may have them.
    pub first_uid: u32,
    /// Control group below which each slot has one, relative to the root of each hierarchy. No
    /// other zygote may use it at the same time.
    pub cgroup: PathBuf,
    /// Share of one processor that a microVM may use, in percent.
    pub cpu_percent: u32,
}

impl JailConfig {
    /// A jail with the usual users, one processor, and control groups below `warren/NAME`.
    pub fn named(name: &str) -> Self {
        let cgroup = Path::new("warren").join(name);
        Self { first_uid: FIRST_UID, cgroup, cpu_percent: 100 }
    }
}

/// Why a wall cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A system call failed.
    #[error("jail: {what}: {source}; warren-vmm's zygote needs root and a kernel from 6.1 on")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Control groups are mounted and cannot be used.
    #[error("jail: control group {}: {source}; is the hierarchy writable?", path.display())]
    Cgroup {
        /// The group or file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Landlock refused, or is not there.
    #[error(
        "jail: Landlock: {0}; has the kernel CONFIG_SECURITY_LANDLOCK, and `landlock` in lsm=?"
    )]
    Landlock(#[from] RulesetError),
    /// The filter cannot be made or loaded.
    #[error("jail: seccomp: {0}")]
    Seccomp(#[from] seccompiler::Error),
    /// The slot's user would be out of range.
    #[error("jail: slot {0} has no user: lower the first user")]
    NoUser(u32),
}

fn system<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> JailError {
    move |error| JailError::System { what, source: error.into() }
}

/// What all clones of a zygote share, and what each needs to go in.
pub struct Jail {
    kind: GuestKind,
    first_uid: u32,
    cgroups: Cgroups,
    ruleset: RulesetCreated,
    filter: BpfProgram,
    /// Moves to control groups are quick while this is open.
    _favor_moves: Option<OwnedFd>,
}

impl Jail {
    /// Builds the shared walls around this process, which is to fork clones of this kind with
    /// `memory_bytes` of guest memory each. Afterwards its working directory is `run_dir`, and no path leads anywhere
    /// but from there.
    ///
    /// # Errors
    /// It is not root, or the kernel refuses. This process may then be half in, and should end.
    pub fn build(
        config: &JailConfig,
        kind: GuestKind,
        memory_bytes: u64,
        run_dir: &Path,
    ) -> Result<Self, JailError> {
        let limits =
            Limits { memory_bytes: memory_bytes + OVERHEAD, cpu_percent: config.cpu_percent };
        let cgroups = Cgroups::open(&config.cgroup, limits)?;
        // Everything that this kernel knows is denied: the rule set has no rules. Files it must know.
        let abi = ABI::V6;
        let ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(ABI::V1))?
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(abi))?
            .handle_access(AccessNet::from_all(abi))?
            .scope(Scope::from_all(abi))?
            .create()?;
        let filter = filter::of_microvm(kind)?;
        root::separate().map_err(system("namespaces"))?;
        let favor_moves = cgroup::favor_moves(run_dir).map_err(|errno| {
            tracing::info!(%errno, "moving a process to its control group takes milliseconds here");
        });
        root::leave(run_dir).map_err(system("an empty root"))?;
        let limits = [
            // A clone maps its memory, and the image of it.
            (Resource::RLIMIT_AS, 2 * memory_bytes + ADDRESS_SPACE),
            (Resource::RLIMIT_CORE, 0),
            (Resource::RLIMIT_MEMLOCK, 0),
            (Resource::RLIMIT_MSGQUEUE, 0),
            (Resource::RLIMIT_NICE, 0),
            (Resource::RLIMIT_NOFILE, DESCRIPTORS),
            (Resource::RLIMIT_RTPRIO, 0),
            (Resource::RLIMIT_SIGPENDING, 16),
        ];
        for (resource, limit) in limits {
            setrlimit(resource, limit, limit).map_err(system("setrlimit"))?;
        }
        setgroups(&[]).map_err(system("setgroups"))?;
        prctl::set_no_new_privs().map_err(system("no new privileges"))?;
        let favor_moves = favor_moves.ok();
        Ok(Self {
            kind,
            first_uid: config.first_uid,
            cgroups,
            ruleset,
            filter,
            _favor_moves: favor_moves,
        })
    }

    /// In the zygote, when it has all that it needs to fork: leaves it no other system calls.
    ///
    /// # Errors
    /// [`JailError::Seccomp`].
    pub fn confine(&self) -> Result<(), JailError> {
        Ok(seccompiler::apply_filter(&filter::of_zygote(self.kind)?)?)
    }

    /// In the zygote, before a clone is forked into a slot: finds a place in the jail where nobody is,
    /// also not of those that are `taken` because the slot's former clones have not ended wholly.
    ///
    /// # Errors
    /// [`JailError::Cgroup`].
    pub fn prepare(&mut self, slot: u32, taken: &[Place]) -> Result<Place, JailError> {
        self.cgroups.prepare(slot, taken)
    }

    /// In the clone: everything but the filter, which would not let [`Jail`] be dropped.
    ///
    /// # Errors
    /// A wall does not stand: this process must end.
    pub fn enter(self, place: Place) -> Result<Cell, JailError> {
        let Self { first_uid, cgroups, ruleset, filter, .. } = self;
        chdir("/").map_err(system("chdir"))?;
        cgroups.join(place)?;
        let slot = place.slot();
        let id = first_uid.checked_add(slot).filter(|&id| id < u32::MAX);
        let id = id.ok_or(JailError::NoUser(slot))?;
        let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
        setresgid(group, group, group).map_err(system("setresgid"))?;
        setresuid(user, user, user).map_err(system("setresuid"))?;
        ruleset.restrict_self()?;
        Ok(Cell { filter })
    }
}

/// A process within all walls but the last.
pub struct Cell {
    filter: BpfProgram,
}

impl Cell {
    /// Loads the filter: from here on any other system call is the process's end.
    ///
    /// # Errors
    /// [`JailError::Seccomp`].
    pub fn close(self) -> Result<(), JailError> {
        Ok(seccompiler::apply_filter(&self.filter)?)
    }
}
