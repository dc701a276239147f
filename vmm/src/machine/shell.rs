//! How a machine is made: KVM's objects first, then what a template or a clone has.

use std::fs::File;
use std::os::fd::OwnedFd;

use kvm_bindings::{CpuId, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::{Linux, Machine, MachineError, MachineState, kvm};
use crate::control::{GuestKind, WATCHDOG};
use crate::devices::Device;
use crate::devices::net::Net;
use crate::devices::vsock::Vsock;
use crate::linux::pc::Pc;
use crate::memory::GuestRam;
use crate::timer::KickTimer;
use crate::{cpu, linux};

/// A virtual machine with a processor and nothing to run: all that does not depend on a template.
pub struct Shell {
    // Dropped in this order: the timer points into the processor.
    timer: KickTimer,
    vcpu: VcpuFd,
    vm: VmFd,
}

/// A signal may interrupt it, such as the kick of a machine that this process had before.
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            made => return made,
        }
    }
}

impl Shell {
    /// Makes KVM's objects for a kind of guest, with the processor that `cpuid` describes.
    pub fn new(kvm_fd: &Kvm, cpuid: &CpuId, kind: GuestKind) -> Result<Self, MachineError> {
        let vm = create_vm(kvm_fd).map_err(kvm("create a VM"))?;
        if kind == GuestKind::Linux {
            linux::cpu::prepare(&vm).map_err(kvm("create interrupt controllers"))?;
        }
        let mut vcpu = vm.create_vcpu(0).map_err(kvm("create a vCPU"))?;
        let described = match kind {
            GuestKind::NoOs => vcpu.set_cpuid2(cpuid),
            GuestKind::Linux => vcpu.set_cpuid2(&linux::cpu::describe(cpuid)),
        };
        described.map_err(kvm("describe the processor"))?;
        let timer = KickTimer::new(&mut vcpu)
            .map_err(|errno| MachineError::Host { what: "make a timer", source: errno.into() })?;
        Ok(Self { timer, vcpu, vm })
    }

    /// Makes it a template's machine, with the processor at a program's entry point.
    pub fn boot(self, ram: GuestRam, entry: u64) -> Result<Machine, MachineError> {
        let machine = self.with_devices(ram, Net::new(), Vsock::new(), None)?;
        let state = cpu::boot_state(&machine.vcpu, entry, machine.ram.bytes())
            .map_err(kvm("read the initial state"))?;
        machine.load_cpu(&state)?;
        Ok(machine)
    }

    /// Makes it a Linux template's machine, with the processor at the kernel's entry point.
    pub fn boot_linux(
        self,
        kvm_fd: &Kvm,
        mut ram: GuestRam,
        entry: u64,
        disk: Option<File>,
    ) -> Result<Machine, MachineError> {
        ram.open_to_devices();
        let (mut net, mut vsock) = (Net::multiqueue(), Vsock::new());
        net.mmio_mut().use_interrupts();
        vsock.mmio_mut().use_interrupts();
        let msrs = kvm_fd.get_msr_index_list().map_err(kvm("list the registers"))?;
        let msrs = msrs.as_slice().to_vec();
        let linux = Linux { pc: Pc::new(disk)?, msrs, tsc_ahead: 0 };
        let machine = self.with_devices(ram, net, vsock, Some(linux))?;
        let state = linux::cpu::boot_state(&machine.vcpu, entry);
        machine.load_cpu(&state.map_err(kvm("read the initial state"))?)?;
        linux::cpu::boot_msrs(&machine.vcpu).map_err(kvm("set registers"))?;
        Ok(machine)
    }

    /// Makes it a clone: private memory over the template's, its saved state, a TAP, and the disk
    /// that the template has.
    pub fn load(
        self,
        mut ram: GuestRam,
        state: &MachineState,
        tap: Option<OwnedFd>,
        disk: Option<File>,
    ) -> Result<Machine, MachineError> {
        let linux = match &state.linux {
            Some(saved) => {
                ram.open_to_devices();
                let pc = Pc::load(&saved.pc, ram.dma(), disk)?;
                Some(Linux { pc, msrs: saved.platform.registers(), tsc_ahead: 0 })
            }
            None => None,
        };
        let net = Net::load(&state.net, ram.dma(), tap)?;
        let vsock = Vsock::load(&state.vsock, ram.dma())?;
        let mut machine = self.with_devices(ram, net, vsock, linux)?;
        machine.load_state(state)?;
        Ok(machine)
    }

    fn with_devices(
        self,
        ram: GuestRam,
        net: Net,
        vsock: Vsock,
        linux: Option<Linux>,
    ) -> Result<Machine, MachineError> {
        let Self { timer, vcpu, vm } = self;
        let tsc_hz = vcpu.get_tsc_khz().map_err(kvm("ask for the frequency of its counter"))?;
        let tsc_hz = u64::from(tsc_hz) * 1000;
        for (slot, memory) in (0u32..).zip(ram.slots()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: if memory.read_only { KVM_MEM_READONLY } else { 0 },
                guest_phys_addr: memory.guest_address,
                memory_size: memory.bytes,
                userspace_addr: memory.host_address,
            };
            // SAFETY: the range is a mapping of `ram`'s, which outlives the VM: fields drop in order.
            unsafe { vm.set_user_memory_region(region) }.map_err(kvm("set a memory region"))?;
        }
        let (watchdog, kicked_at) = (WATCHDOG, None);
        Ok(Machine { timer, vcpu, vm, ram, net, vsock, linux, tsc_hz, watchdog, kicked_at })
    }
}
