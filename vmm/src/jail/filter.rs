//! The system calls of a jailed process, and those of the zygote that forks it.
//!
//! The zygote's filter allows its clones' calls as well as its own, and a clone inherits it; its own
//! filter then takes the rest away. A filter that follows another is loaded in a fraction of the time:
//! the kernel works out ahead what it says to each call (`SECCOMP_CACHE`), but only for calls that the
//! former allows.

use std::collections::BTreeMap;

use kvm_bindings::{
    KVMIO, kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_device_attr, kvm_irq_level, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msrs, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
    kvm_vcpu_events, kvm_xcrs,
};
use nix::{request_code_none, request_code_read, request_code_write};
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use crate::control::GuestKind;

/// A microVM's calls that are allowed with any argument.
const ANY: &[libc::c_long] = &[
    // Sockets, TAP and the guest's streams, all open already or accepted.
    libc::SYS_accept4,
    libc::SYS_close,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_write,
    libc::SYS_writev,
    // Memory of its own, of which none is executable (below).
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_munmap,
    libc::SYS_sysinfo,
    // Time, randomness, its end.
    libc::SYS_clock_gettime,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_timer_create,
    libc::SYS_timer_delete,
    libc::SYS_timer_settime,
];

/// `ioctl`'s requests: KVM's, in the order of a machine's life (KVM API, 4), a socket's mode, and
/// what a TAP may hand out, which guests negotiate.
const IOCTLS: &[u64] = &[
    request_code_none!(KVMIO, 0x01), // KVM_CREATE_VM
    request_code_none!(KVMIO, 0x03), // KVM_CHECK_EXTENSION
    request_code_none!(KVMIO, 0x04), // KVM_GET_VCPU_MMAP_SIZE
    request_code_none!(KVMIO, 0x41), // KVM_CREATE_VCPU
    request_code_write!(KVMIO, 0x46, size_of::<kvm_userspace_memory_region>()),
    request_code_write!(KVMIO, 0x90, size_of::<kvm_cpuid2>()), // KVM_SET_CPUID2
    request_code_read!(KVMIO, 0x83, size_of::<kvm_sregs>()),   // KVM_GET_SREGS
    request_code_write!(KVMIO, 0x84, size_of::<kvm_sregs>()),  // KVM_SET_SREGS
    request_code_read!(KVMIO, 0xa6, size_of::<kvm_xcrs>()),    // KVM_GET_XCRS
    request_code_write!(KVMIO, 0xa7, size_of::<kvm_xcrs>()),   // KVM_SET_XCRS
    request_code_read!(KVMIO, 0xa4, XSAVE_BYTES),              // KVM_GET_XSAVE
    request_code_write!(KVMIO, 0xa5, XSAVE_BYTES),             // KVM_SET_XSAVE
    request_code_write!(KVMIO, 0xe1, size_of::<kvm_device_attr>()), // KVM_SET_DEVICE_ATTR
    request_code_write!(KVMIO, 0x82, size_of::<kvm_regs>()),   // KVM_SET_REGS
    request_code_read!(KVMIO, 0x81, size_of::<kvm_regs>()),    // KVM_GET_REGS
    request_code_none!(KVMIO, 0xa3),                           // KVM_GET_TSC_KHZ
    request_code_none!(KVMIO, 0x80),                           // KVM_RUN
    libc::FIONBIO,
    libc::TUNSETOFFLOAD,
];

/// Calls of a Linux guest's microVM besides: it reads the function's image.
const LINUX: &[libc::c_long] = &[libc::SYS_lseek, libc::SYS_pread64];

/// Requests of a Linux guest's machine besides.
const LINUX_IOCTLS: &[u64] = &[
    request_code_none!(KVMIO, 0x47), // KVM_SET_TSS_ADDR
    request_code_none!(KVMIO, 0x60), // KVM_CREATE_IRQCHIP
    request_code_none!(KVMIO, 0xa2), // KVM_SET_TSC_KHZ
    // Whose numbers say that it is read, though it is written.
    request_code_read!(KVMIO, 0x63, size_of::<kvm_irqchip>()), // KVM_SET_IRQCHIP
    request_code_write!(KVMIO, 0xa2, size_of::<kvm_debugregs>()),
    request_code_write!(KVMIO, 0x8f, size_of::<kvm_lapic_state>()),
    request_code_write!(KVMIO, 0x89, size_of::<kvm_msrs>()),
    request_code_write!(KVMIO, 0x7b, size_of::<kvm_clock_data>()),
    request_code_write!(KVMIO, 0x99, size_of::<kvm_mp_state>()),
    request_code_write!(KVMIO, 0xa0, size_of::<kvm_vcpu_events>()),
    request_code_write!(KVMIO, 0x61, size_of::<kvm_irq_level>()), // KVM_IRQ_LINE
];

/// What a Linux guest's microVM may do to a descriptor: be signalled when something comes to it.
const LINUX_FCNTL: &[libc::c_int] = &[libc::F_SETOWN, libc::F_GETFL, libc::F_SETFL];

/// `struct kvm_xsave` without what dynamically enabled features would add.
const XSAVE_BYTES: usize = 4096;

/// What the zygote does besides: fork, open and remove sockets and control groups, and build the
/// walls around a clone, of which this is the last.
const ZYGOTE: &[libc::c_long] = &[
    libc::SYS_bind,
    libc::SYS_chdir,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_connect,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_landlock_restrict_self,
    libc::SYS_listen,
    libc::SYS_mkdirat,
    libc::SYS_openat,
    libc::SYS_poll,
    libc::SYS_prctl,
    libc::SYS_recvmsg,
    libc::SYS_seccomp,
    libc::SYS_sendmsg,
    libc::SYS_set_robust_list,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setsid,
    libc::SYS_socket,
    libc::SYS_unlink,
    libc::SYS_wait4,
];

/// A microVM's filter: what is not listed kills the process.
pub fn of_microvm(kind: GuestKind) -> Result<BpfProgram, Error> {
    compile(kind, &[])
}

/// The zygote's.
pub fn of_zygote(kind: GuestKind) -> Result<BpfProgram, Error> {
    compile(kind, ZYGOTE)
}

fn compile(kind: GuestKind, more: &[libc::c_long]) -> Result<BpfProgram, Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let (calls, ioctls, commands): (&[_], &[_], &[_]) = match kind {
        GuestKind::NoOs => (&[], &[], &[]),
        GuestKind::Linux => (LINUX, LINUX_IOCTLS, LINUX_FCNTL),
    };
    if !commands.is_empty() {
        let commands = commands.iter().map(|&command| one_of(1, command as u64));
        rules.insert(libc::SYS_fcntl, commands.collect::<Result<_, _>>()?);
    }
    for &call in ANY.iter().chain(calls).chain(more) {
        rules.insert(call, Vec::new());
    }
    // The third argument of both is the protection.
    let not_executable = SeccompCondition::new(
        2,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64),
        0,
    )?;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![SeccompRule::new(vec![not_executable.clone()])?]);
    }
    let growing = SeccompCondition::new(
        3,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        libc::MREMAP_MAYMOVE as u64,
    )?;
    rules.insert(libc::SYS_mremap, vec![SeccompRule::new(vec![growing])?]);
    let requests = IOCTLS.iter().chain(ioctls).map(|&request| one_of(1, request));
    rules.insert(libc::SYS_ioctl, requests.collect::<Result<_, _>>()?);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    Ok(filter.try_into()?)
}

/// A rule for calls with this value as an argument.
fn one_of(argument: u8, value: u64) -> Result<SeccompRule, Error> {
    let is = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
    Ok(SeccompRule::new(vec![is])?)
}
