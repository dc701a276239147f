//! The processor of a Linux guest: how it boots, and what of it and its interrupt controllers a
//! clone continues with, beyond what every guest has.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_vcpu_events,
};
use kvm_ioctls::{Error, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::boot::{BOOT_STACK, GDT, GDT_LIMIT, PML4, ZERO_PAGE};
use crate::cpu::{self, CpuState};

/// Where KVM may put what a processor without unrestricted guests needs (`KVM_SET_TSS_ADDR`): three
/// pages that no device or memory has.
const TSS: usize = 0xfffb_d000;

/// `IA32_MTRR_DEF_TYPE` (Intel SDM volume 4): enabled, write-back.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 0x806);
/// `IA32_TIME_STAMP_COUNTER`
const TSC: u32 = 0x10;
/// `IA32_TSC_DEADLINE`: takes effect only when the local APIC's timer is in that mode, and by a
/// counter that already counts from where it did.
const TSC_DEADLINE: u32 = 0x6e0;

/// Interrupt controllers, clock and model-specific registers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlatformState {
    chips: Vec<kvm_irqchip>,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    debug: kvm_debugregs,
    /// The guest's clock (kvmclock), in nanoseconds.
    clock_ns: u64,
    /// Its time stamp counter.
    tsc: u64,
    tsc_khz: u32,
}

impl PartialEq for PlatformState {
    /// KVM's structures have unions, which only their bytes tell apart.
    fn eq(&self, other: &Self) -> bool {
        postcard::to_allocvec(self) == postcard::to_allocvec(other)
    }
}

impl PlatformState {
    /// The model-specific registers that are in it, and the counter, which is by itself.
    pub fn registers(&self) -> Vec<u32> {
        self.msrs.iter().map(|(index, _)| *index).chain([TSC]).collect()
    }
}

/// Before a processor is made: interrupt controllers in the kernel.
pub fn prepare(vm: &VmFd) -> Result<(), Error> {
    vm.set_tss_address(TSS)?;
    vm.create_irq_chip()
}

/// What the processor of a Linux guest says of itself: KVM's, with what only KVM's user can know.
pub fn describe(cpuid: &CpuId) -> CpuId {
    let mut cpuid = cpuid.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                // One logical processor, whose APIC is number 0.
                entry.ebx = entry.ebx & 0xffff | 1 << 16;
                // The timer by the counter's deadline, and that there is a hypervisor.
                entry.ecx |= 1 << 24 | 1 << 31;
            }
            0xb | 0x1f => entry.edx = 0,
            _ => {}
        }
    }
    cpuid
}

/// 64-bit mode at the kernel's entry (Linux, x86/boot, 64-bit boot protocol).
pub fn boot_state(vcpu: &VcpuFd, entry: u64) -> Result<CpuState, Error> {
    let segment = |selector, type_, l, db| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db,
        s: 1,
        l,
        g: 1,
        ..kvm_segment::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = segment(0x10, 11, 1, 0);
    let data = segment(0x18, 3, 0, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, GDT_LIMIT);
    // PE, ET, PG; PAE; LME, LMA.
    sregs.cr0 = 0x8000_0011;
    sregs.cr3 = PML4;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
    let regs =
        kvm_regs { rip: entry, rsp: BOOT_STACK, rsi: ZERO_PAGE, rflags: 2, ..kvm_regs::default() };
    Ok(CpuState { regs, sregs, xcr0: 1, xsave: cpu::fresh_xsave() })
}

/// The registers that a firmware would have set.
pub fn boot_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    set_msrs(vcpu, &[MTRR_DEF_TYPE])
}

/// Reads the state of a machine that does not run.
pub fn save(vm: &VmFd, vcpu: &VcpuFd, registers: &[u32]) -> Result<PlatformState, Error> {
    let chips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
    let chips = chips.map(|chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
        vm.get_irqchip(&mut chip).map(|()| chip)
    });
    let msrs = msrs(vcpu, registers)?;
    let tsc = msrs.iter().find(|(index, _)| *index == TSC).map_or(0, |(_, value)| *value);
    Ok(PlatformState {
        chips: chips.into_iter().collect::<Result<_, _>>()?,
        lapic: vcpu.get_lapic()?,
        // The counter itself is set by its offset.
        msrs: msrs.into_iter().filter(|(index, _)| *index != TSC).collect(),
        events: vcpu.get_vcpu_events()?,
        mp_state: vcpu.get_mp_state()?,
        debug: vcpu.get_debug_regs()?,
        clock_ns: vm.get_clock()?.clock,
        tsc,
        tsc_khz: vcpu.get_tsc_khz()?,
    })
}

/// Those of these registers that KVM lets its user read and write.
fn msrs(vcpu: &VcpuFd, registers: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
    let mut found = Vec::new();
    for &index in registers {
        let mut one = msr_list(&[(index, 0)])?;
        // Those of features that this guest does not have cannot be read, and others not written.
        if vcpu.get_msrs(&mut one)? == 1 && (index == TSC || vcpu.set_msrs(&one)? == 1) {
            found.push((index, one.as_slice()[0].data));
        }
    }
    Ok(found)
}

fn msr_list(values: &[(u32, u64)]) -> Result<Msrs, Error> {
    let entry = |&(index, data): &_| kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
    let entries: Vec<_> = values.iter().map(entry).collect();
    Msrs::from_entries(&entries).map_err(|_| Error::new(libc::E2BIG))
}

fn set_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), Error> {
    let set = vcpu.set_msrs(&msr_list(values)?)?;
    if set == values.len() { Ok(()) } else { Err(Error::new(libc::EINVAL)) }
}

/// Loads what [`crate::cpu::load`] does not, after it. The guest's clocks go on from where they were
/// saved. Returns what its counter is ahead of the host's (two's complement).
pub fn load(vm: &VmFd, vcpu: &VcpuFd, state: &PlatformState) -> Result<u64, Error> {
    if vcpu.get_tsc_khz()? != state.tsc_khz {
        // Possible where the processor can scale its counter.
        vcpu.set_tsc_khz(state.tsc_khz)?;
    }
    // SAFETY: reads a counter; x86-64 always has it.
    let now = unsafe { core::arch::x86_64::_rdtsc() };
    let ahead = state.tsc.wrapping_sub(now);
    cpu::set_tsc_offset(vcpu, ahead)?;
    for chip in &state.chips {
        vm.set_irqchip(chip)?;
    }
    vcpu.set_debug_regs(&state.debug)?;
    vcpu.set_lapic(&state.lapic)?;
    let (deadline, msrs): (Vec<_>, Vec<_>) =
        state.msrs.iter().copied().partition(|(index, _)| *index == TSC_DEADLINE);
    set_msrs(vcpu, &msrs)?;
    set_msrs(vcpu, &deadline)?;
    // No flags: that the counter is stable is for reading only.
    let clock = kvm_clock_data { clock: state.clock_ns, ..kvm_clock_data::default() };
    vm.set_clock(&clock)?;
    vcpu.set_mp_state(state.mp_state)?;
    vcpu.set_vcpu_events(&state.events)?;
    Ok(ahead)
}
