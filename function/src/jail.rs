//! The walls around the compiler's process: no files, no network, no other programs; memory and time
//! of a processor up to a limit.

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    Scope,
};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::jailed::Limits;

/// The user and group that own nothing.
const NOBODY: u32 = 65534;

/// Calls that are allowed with any argument.
const ANY: &[libc::c_long] = &[
    // Its pipes.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    // Memory of its own, of which none is executable (below).
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads.
    libc::SYS_exit,
    libc::SYS_futex,
    libc::SYS_get_robust_list,
    libc::SYS_gettid,
    libc::SYS_prctl,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    // Time, randomness, its end.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
];

/// Calls that libraries try and can do without: to them this kernel does not have them. Threads are
/// then made by `clone`, whose flags a filter sees.
const ABSENT: &[libc::c_long] = &[
    libc::SYS_clone3,
    libc::SYS_fstat,
    libc::SYS_ioctl,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_readlink,
    libc::SYS_statx,
];

/// Why a wall cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A system call failed.
    #[error("jail: {what}: {source}; the compiler needs a kernel from 6.1 on")]
    System {
        /// What was tried.
        what: &'static str,
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
}

fn system<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> JailError {
    move |error| JailError::System { what, source: error.into() }
}

/// A process within all walls but the last.
#[must_use = "without its filter a process is not in jail"]
pub struct Cell {
    filters: [BpfProgram; 2],
}

/// Goes into the jail, for good. It has the three standard streams there, and threads that it makes
/// from then on.
///
/// # Errors
/// A wall does not stand: this process must end. So it must if it has threads already, which stay
/// outside.
pub fn enter(limits: Limits) -> Result<Cell, JailError> {
    let filters = [absent()?, allowed()?];
    close_all_but_standard()?;
    separate()?;
    let cpu_seconds = limits.cpu_time.as_secs().max(1);
    let resources = [
        (Resource::RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
        // It is up softly first, with a signal that says so.
        (Resource::RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
        (Resource::RLIMIT_CORE, 0, 0),
        (Resource::RLIMIT_MEMLOCK, 0, 0),
        (Resource::RLIMIT_MSGQUEUE, 0, 0),
        (Resource::RLIMIT_RTPRIO, 0, 0),
    ];
    for (resource, soft, hard) in resources {
        setrlimit(resource, soft, hard).map_err(system("setrlimit"))?;
    }
    if Uid::effective().is_root() {
        let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        setgroups(&[]).map_err(system("setgroups"))?;
        setresgid(group, group, group).map_err(system("setresgid"))?;
        setresuid(user, user, user).map_err(system("setresuid"))?;
    }
    prctl::set_no_new_privs().map_err(system("no new privileges"))?;
    // Everything that this kernel knows is denied: the rule set has no rules. Files it must know.
    let abi = ABI::V6;
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    Ok(Cell { filters })
}

impl Cell {
    /// Takes the right to descriptors, and loads the filter: from here on a system call that it does
    /// not know is the process's end.
    ///
    /// # Errors
    /// [`JailError`]: this process must end.
    pub fn close(self) -> Result<(), JailError> {
        setrlimit(Resource::RLIMIT_NOFILE, 3, 3).map_err(system("setrlimit"))?;
        for filter in &self.filters {
            seccompiler::apply_filter(filter)?;
        }
        Ok(())
    }
}

/// Whoever started this process may have left descriptors open.
fn close_all_but_standard() -> Result<(), JailError> {
    // SAFETY: nothing here owns a descriptor yet but the standard streams.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
    Errno::result(closed).map(drop).map_err(system("close_range"))
}

/// Takes this process to namespaces of its own, if it may: without root it must do without, and the
/// filter, which knows no sockets, stands alone.
fn separate() -> Result<(), JailError> {
    let apart = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    match unshare(apart) {
        Ok(()) | Err(Errno::EPERM) => Ok(()),
        Err(errno) => Err(system("namespaces")(errno)),
    }
}

/// Answers [`ABSENT`]'s calls.
fn absent() -> Result<BpfProgram, seccompiler::Error> {
    let rules = ABSENT.iter().map(|&call| (call, Vec::new())).collect();
    let answer = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// What is not listed kills the process.
fn allowed() -> Result<BpfProgram, seccompiler::Error> {
    let mut rules: std::collections::BTreeMap<_, _> =
        ANY.iter().chain(ABSENT).map(|&call| (call, Vec::new())).collect();
    // The third argument of both is the protection.
    let not_executable = masked(2, libc::PROT_EXEC as u64, 0)?;
    rules.insert(libc::SYS_mmap, vec![not_executable.clone()]);
    rules.insert(libc::SYS_mprotect, vec![not_executable]);
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![masked(0, thread, thread)?]);
    // To abort: a signal to itself.
    let itself = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![masked(0, u64::from(u32::MAX), itself)?]);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    Ok(filter.try_into()?)
}

/// A rule for calls of which an argument has this value in the bits of the mask.
fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, seccompiler::Error> {
    let compare = SeccompCmpOp::MaskedEq(mask);
    let is = SeccompCondition::new(argument, SeccompCmpArgLen::Qword, compare, value)?;
    Ok(SeccompRule::new(vec![is])?)
}
