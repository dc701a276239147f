//! The virtual processor: its state at boot, saved, and loaded into a clone.

use std::arch::x86_64::__cpuid;
use std::os::fd::AsRawFd;
use std::sync::LazyLock;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr,
    kvm_regs, kvm_segment, kvm_sregs, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::boot;

/// Whether this processor has what the guest's code (x86-64-v3) and its saved state (XCR0 = 7)
/// need, by name. The processor itself is asked and not KVM: these instructions are not
/// intercepted, and PVM offers less in CPUID than ring 3 can use.
fn features() -> [(&'static str, bool); 10] {
    [
        ("sse4.2", is_x86_feature_detected!("sse4.2")),
        ("popcnt", is_x86_feature_detected!("popcnt")),
        ("movbe", is_x86_feature_detected!("movbe")),
        ("xsave", is_x86_feature_detected!("xsave")),
        ("avx", is_x86_feature_detected!("avx")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("bmi1", is_x86_feature_detected!("bmi1")),
        ("bmi2", is_x86_feature_detected!("bmi2")),
        ("lzcnt", is_x86_feature_detected!("lzcnt")),
    ]
}

/// x87, SSE and AVX state.
const XCR0: u64 = 7;

/// Everything of a processor that a clone continues with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuState {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, descriptor tables.
    pub sregs: kvm_sregs,
    /// XCR0.
    pub xcr0: u64,
    /// XSAVE area, without the zero words at its end.
    pub xsave: Vec<u32>,
}

/// The names of the features that a guest needs.
pub fn required_features() -> Vec<String> {
    features().map(|(name, _)| name.to_owned()).to_vec()
}

/// Which of these features this processor lacks. One that is not known here counts as lacking.
pub fn missing_features(required: &[String]) -> Vec<String> {
    let present = |name: &str| features().contains(&(name, true));
    required.iter().filter(|name| !present(name)).cloned().collect()
}

/// What this host's KVM can offer to a guest.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
}

/// Ring 3 at the program's entry point, with its stack at the end of memory.
pub fn boot_state(vcpu: &VcpuFd, entry: u64, memory: u64) -> Result<CpuState, kvm_ioctls::Error> {
    let user = |selector, type_, l, db| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db,
        s: 1,
        l,
        g: 1,
        ..kvm_segment::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = user(0x33, 11, 1, 0);
    let data = user(0x2b, 3, 0, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: boot::TSS,
        limit: boot::TSS_LIMIT,
        selector: 0x40,
        type_: 11,
        present: 1,
        ..kvm_segment::default()
    };
    sregs.ldt = kvm_segment { unusable: 1, ..kvm_segment::default() };
    (sregs.gdt.base, sregs.gdt.limit) = (boot::GDT, boot::GDT_LIMIT);
    (sregs.idt.base, sregs.idt.limit) = (boot::IDT, boot::IDT_LIMIT);
    // PE, MP, ET, NE, WP, AM, PG; PAE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE; LME, LMA, NXE and,
    // because PVM insists, SCE.
    sregs.cr0 = 0x8005_0033;
    sregs.cr3 = boot::PML4;
    sregs.cr4 = 0x5_0620;
    sregs.efer = 0xd01;
    let regs = kvm_regs { rip: entry, rsp: memory, rflags: 2, ..kvm_regs::default() };
    Ok(CpuState { regs, sregs, xcr0: XCR0, xsave: fresh_xsave() })
}

/// x87 and MXCSR as after reset: all exceptions masked (Intel SDM volume 1, 8.1.5 and 10.2.3).
pub fn fresh_xsave() -> Vec<u32> {
    let mut xsave = vec![0; 7];
    xsave[0] = 0x037f;
    xsave[6] = 0x1f80;
    xsave
}

/// Reads the state of a processor that does not run.
pub fn save(vcpu: &VcpuFd) -> Result<CpuState, kvm_ioctls::Error> {
    let xsave = vcpu.get_xsave()?.region;
    let used = xsave.iter().rposition(|&word| word != 0).map_or(0, |last| last + 1);
    Ok(CpuState {
        regs: vcpu.get_regs()?,
        sregs: vcpu.get_sregs()?,
        xcr0: vcpu.get_xcrs()?.xcrs[0].value,
        xsave: xsave[..used].to_vec(),
    })
}

/// Loads a state into a processor that was described (`KVM_SET_CPUID2`). The order matters: modes,
/// then what they enable, then the registers.
pub fn load(vcpu: &VcpuFd, state: &CpuState) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = state.sregs;
    if is_emulated() {
        // There, ring 3 may use the ports of the I/O bitmap only while the task is not busy, which it
        // is on each real processor (`helper_check_io` of QEMU's target/i386).
        sregs.tr.type_ = AVAILABLE_TASK;
    }
    vcpu.set_sregs(&sregs)?;
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: state.xcr0, ..kvm_xcr::default() };
    vcpu.set_xcrs(&xcrs)?;
    let mut xsave = kvm_xsave::default();
    for (word, saved) in xsave.region.iter_mut().zip(&state.xsave) {
        *word = *saved;
    }
    // SAFETY: the kernel reads 4096 bytes, the size of `region`, unless the process asked for
    // dynamically enabled features (arch_prctl), which this one never does.
    unsafe { vcpu.set_xsave(&xsave) }?;
    if let Err(errno) = set_tsc_offset(vcpu, 0) {
        // KVM without this attribute (PVM) does not virtualise the counter in ring 3.
        tracing::debug!(%errno, "KVM does not set the offset of the time stamp counter");
    }
    vcpu.set_regs(&state.regs)
}

/// Type of the segment of a task that does not run.
const AVAILABLE_TASK: u8 = 9;

/// Whether this processor is one that QEMU emulates (its leaf of CPUID for hypervisors says so), and
/// with it the one that KVM offers here. Asked once, since a virtual machine's CPUID takes
/// microseconds: clones have their zygote's answer.
pub fn is_emulated() -> bool {
    static EMULATED: LazyLock<bool> = LazyLock::new(|| {
        let leaf = __cpuid(0x4000_0000);
        let signature = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes);
        signature.concat() == b"TCGTCGTCGTCG"
    });
    *EMULATED
}

nix::ioctl_write_ptr!(set_device_attr, kvm_bindings::KVMIO, 0xe1, kvm_device_attr);

/// Sets what the guest's time stamp counter is ahead of the host's, so that the host can name a moment
/// on the guest's clock (KVM API, devices/vcpu, 5.1: `KVM_VCPU_TSC_OFFSET`, Linux 5.16).
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), kvm_ioctls::Error> {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: (&raw const offset).addr() as u64,
        flags: 0,
    };
    // SAFETY: the descriptor is a vCPU's, and the attribute points to the 8 bytes that the kernel
    // reads for it.
    unsafe { set_device_attr(vcpu.as_raw_fd(), &raw const attribute) }
        .map(|_| ())
        .map_err(|errno| kvm_ioctls::Error::new(errno as i32))
}
