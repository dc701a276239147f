//! A virtual machine: processor, memory, devices, and what its exits mean.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use warren_abi::microvm::{
    BARRIER_PORT, BOOT_ADDRESS, Boot, IDENTITY_ADDRESS, Identity, MMIO_BYTES, NET_MMIO, PANIC_PORT,
    PanicMessage, READY_PORT, VSOCK_MMIO, WAIT_FOREVER, WAIT_PORT,
};

use crate::boot::EXCEPTION_PORT;
use crate::control::{EndReason, WATCHDOG};
use crate::cpu::{self, CpuState};
use crate::devices::QueueError;
use crate::devices::mmio::MmioState;
use crate::devices::net::Net;
use crate::devices::vsock::Vsock;
use crate::memory::GuestRam;
use crate::timer::KickTimer;

/// Exception vectors that push an error code (Intel SDM volume 3, table 6-1).
const WITH_ERROR_CODE: [u8; 8] = [8, 10, 11, 12, 13, 14, 17, 21];
const PAGE_FAULT: u8 = 14;

/// The state of processor and devices: with the memory, all of a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// Processor.
    pub cpu: CpuState,
    /// Network device.
    pub net: MmioState,
    /// Vsock device.
    pub vsock: MmioState,
}

/// Why the guest gave the processor back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It stands at the release barrier.
    Barrier,
    /// It acknowledges its identity.
    Ready,
    /// It waits for something to come, at most so long.
    Wait(Option<Duration>),
    /// It did not: the timer took it.
    Kicked,
}

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM refused.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// The host refused memory or a timer.
    #[error("{what}: {source}")]
    Host {
        /// What was asked of it.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A saved device cannot be loaded.
    #[error(transparent)]
    Device(#[from] QueueError),
}

/// A virtual machine with one processor.
pub struct Machine {
    // Dropped in this order: the timer points into the processor, which runs on the memory.
    timer: KickTimer,
    vcpu: VcpuFd,
    _vm: VmFd,
    /// Its memory.
    pub ram: GuestRam,
    /// Its network device.
    pub net: Net,
    /// Its vsock device.
    pub vsock: Vsock,
    watchdog: Duration,
    last_exit: Instant,
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

impl Machine {
    /// A machine without state: the template's.
    pub fn new(kvm: &Kvm, ram: GuestRam) -> Result<Self, MachineError> {
        Self::with_devices(kvm, ram, Net::new(), Vsock::new())
    }

    /// A clone: private memory over the template's, its saved state, and a TAP.
    pub fn clone_from(
        kvm: &Kvm,
        cpuid: &CpuId,
        memory: Arc<File>,
        bytes: u64,
        state: &MachineState,
        tap: OwnedFd,
    ) -> Result<Self, MachineError> {
        let ram = GuestRam::map(memory, bytes, false)
            .map_err(|source| MachineError::Host { what: "map guest memory", source })?;
        let net = Net::load(&state.net, ram.dma(), tap)?;
        let vsock = Vsock::load(&state.vsock, ram.dma())?;
        let machine = Self::with_devices(kvm, ram, net, vsock)?;
        machine.load_cpu(cpuid, &state.cpu)?;
        Ok(machine)
    }

    fn with_devices(
        kvm_fd: &Kvm,
        ram: GuestRam,
        net: Net,
        vsock: Vsock,
    ) -> Result<Self, MachineError> {
        let vm = kvm_fd.create_vm().map_err(kvm("create a VM"))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: ram.bytes(),
            userspace_addr: ram.host_address(),
        };
        // SAFETY: the range is `ram`'s mapping, which outlives the VM: fields drop in order.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("set the memory region"))?;
        let mut vcpu = vm.create_vcpu(0).map_err(kvm("create a vCPU"))?;
        let timer = KickTimer::new(&mut vcpu)
            .map_err(|errno| MachineError::Host { what: "make a timer", source: errno.into() })?;
        let last_exit = Instant::now();
        Ok(Self { timer, vcpu, _vm: vm, ram, net, vsock, watchdog: WATCHDOG, last_exit })
    }

    /// Puts the processor at a program's entry point.
    pub fn boot_cpu(&self, cpuid: &CpuId, entry: u64) -> Result<(), MachineError> {
        let state = cpu::boot_state(&self.vcpu, entry, self.ram.bytes());
        self.load_cpu(cpuid, &state.map_err(kvm("read the initial state"))?)
    }

    fn load_cpu(&self, cpuid: &CpuId, state: &CpuState) -> Result<(), MachineError> {
        cpu::load(&self.vcpu, cpuid, state).map_err(kvm("load the processor's state"))
    }

    /// Changes how long the guest may run without an exit.
    pub fn set_watchdog(&mut self, budget: Duration) {
        self.watchdog = budget;
    }

    /// Saves processor and devices. The guest must have just reached the barrier.
    pub fn save(&mut self) -> Result<MachineState, MachineError> {
        // The state is whole only when the pending port access was completed (KVM API, 5).
        self.vcpu.set_kvm_immediate_exit(1);
        let completed = self.vcpu.run();
        debug_assert!(completed.is_err(), "immediate_exit returns before the guest runs");
        self.vcpu.set_kvm_immediate_exit(0);
        let cpu = cpu::save(&self.vcpu).map_err(kvm("save the processor's state"))?;
        Ok(MachineState { cpu, net: self.net.save(), vsock: self.vsock.save() })
    }

    /// Sets what the guest is to do when it leaves the barrier.
    pub fn command(&self, command: u32) -> Result<(), EndReason> {
        let address = BOOT_ADDRESS + std::mem::offset_of!(Boot, command) as u64;
        self.ram.all().write_obj(command, GuestAddress(address)).map_err(|error| host(&error))
    }

    /// Writes the identity page.
    pub fn write_identity(&self, identity: &Identity) -> Result<(), EndReason> {
        // SAFETY: `Identity` is `repr(C)` and, as the assertion below keeps, without padding, so
        // all of its bytes are initialised.
        let bytes = unsafe {
            std::slice::from_raw_parts((&raw const *identity).cast::<u8>(), size_of::<Identity>())
        };
        let address = GuestAddress(IDENTITY_ADDRESS);
        self.ram.all().write_slice(bytes, address).map_err(|error| host(&error))
    }

    /// Frequency of the guest's time stamp counter, in Hz.
    pub fn tsc_hz(&self) -> Result<u64, EndReason> {
        let khz = self.vcpu.get_tsc_khz().map_err(|error| host(&error))?;
        Ok(u64::from(khz) * 1000)
    }

    /// Runs the guest until it gives the processor back or ends. Registers of devices are served
    /// on the way.
    pub fn run(&mut self) -> Result<Exit, EndReason> {
        loop {
            self.timer.arm().map_err(|errno| host(&errno))?;
            let exit = self.vcpu.run();
            // A kick is no exit of the guest's doing.
            let kicked =
                matches!(&exit, Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN));
            if kicked {
                self.vcpu.set_kvm_immediate_exit(0);
                if self.last_exit.elapsed() >= self.watchdog {
                    let budget_ms = self.watchdog.as_millis() as u64;
                    return Err(EndReason::Watchdog { rip: self.rip(), budget_ms });
                }
                return Ok(Exit::Kicked);
            }
            self.last_exit = Instant::now();
            let memory = self.ram.dma();
            match exit.map_err(|error| host(&error))? {
                VcpuExit::MmioRead(address, data) => match device(address) {
                    Some((Device::Net, offset)) => self.net.read(offset, data),
                    Some((Device::Vsock, offset)) => self.vsock.read(offset, data),
                    None => return Err(stray(address)),
                },
                VcpuExit::MmioWrite(address, data) => match device(address) {
                    Some((Device::Net, offset)) => self.net.write(offset, data, memory)?,
                    Some((Device::Vsock, offset)) => self.vsock.write(offset, data, memory)?,
                    None => return Err(stray(address)),
                },
                VcpuExit::IoOut(port, data) => {
                    let value = <[u8; 4]>::try_from(data as &[u8]).ok().map(u32::from_le_bytes);
                    return match (port, value) {
                        (BARRIER_PORT, Some(_)) => Ok(Exit::Barrier),
                        (READY_PORT, Some(_)) => Ok(Exit::Ready),
                        (WAIT_PORT, Some(WAIT_FOREVER)) => Ok(Exit::Wait(None)),
                        (WAIT_PORT, Some(us)) => {
                            Ok(Exit::Wait(Some(Duration::from_micros(us.into()))))
                        }
                        (PANIC_PORT, Some(address)) => Err(self.panic_message(address)),
                        (EXCEPTION_PORT..0x60, _) => {
                            Err(self.exception((port - EXCEPTION_PORT) as u8))
                        }
                        _ => Err(protocol(format!("wrote {} bytes to port {port:#x}", data.len()))),
                    };
                }
                VcpuExit::IoIn(port, _) => return Err(protocol(format!("read port {port:#x}"))),
                VcpuExit::Shutdown => return Err(EndReason::TripleFault { rip: self.rip() }),
                other => {
                    let what = format!("unexpected exit {other:?}");
                    return Err(protocol(format!("{what} at {:#x}", self.rip())));
                }
            }
        }
    }

    /// Starts the watchdog's budget anew, after the guest was kept waiting.
    pub fn resumed(&mut self) {
        self.last_exit = Instant::now();
    }

    fn rip(&self) -> u64 {
        self.vcpu.get_regs().map_or(0, |regs| regs.rip)
    }

    /// What the processor left on the exception stack: error code, if the vector has one, and RIP.
    fn exception(&self, vector: u8) -> EndReason {
        let has_code = WITH_ERROR_CODE.contains(&vector);
        let stack = self.vcpu.get_regs().map_or(0, |regs| regs.rsp);
        let word = |index: u64| {
            let address = GuestAddress(stack.saturating_add(index * 8));
            self.ram.all().read_obj::<u64>(address).unwrap_or(0)
        };
        EndReason::Exception {
            vector,
            error_code: has_code.then(|| word(0)),
            rip: word(u64::from(has_code)),
            address: (vector == PAGE_FAULT)
                .then(|| self.vcpu.get_sregs().map_or(0, |sregs| sregs.cr2)),
        }
    }

    fn panic_message(&self, address: u32) -> EndReason {
        let mut text = [0; 508];
        let address = u64::from(address);
        let memory = self.ram.dma();
        let text_address = address + std::mem::offset_of!(PanicMessage, text) as u64;
        let length = memory.read_obj::<u32>(GuestAddress(address));
        let read = memory.read_slice(&mut text, GuestAddress(text_address));
        match (length, read) {
            (Ok(length), Ok(())) => {
                let text = &text[..(length as usize).min(text.len())];
                // Escaped: the guest shall not write lines of its own into our log.
                let message = String::from_utf8_lossy(text).escape_debug().to_string();
                EndReason::Panic { message }
            }
            _ => protocol(format!("panic message at {address:#x}, outside of its memory")),
        }
    }
}

const _: () = assert!(size_of::<Identity>() == 3 * 8 + 64 + 16 + 64 + 4 + 4 + 6 + 2);

enum Device {
    Net,
    Vsock,
}

/// The device at an address, and the register's offset.
fn device(address: u64) -> Option<(Device, u64)> {
    let offset = |base: u64| address.checked_sub(base).filter(|&offset| offset < MMIO_BYTES);
    if let Some(offset) = offset(NET_MMIO) {
        return Some((Device::Net, offset));
    }
    offset(VSOCK_MMIO).map(|offset| (Device::Vsock, offset))
}

fn stray(address: u64) -> EndReason {
    protocol(format!("accessed {address:#x}, where no device is"))
}

fn protocol(error: String) -> EndReason {
    EndReason::Protocol { error }
}

/// The host's failure, not the guest's.
pub fn host(error: &dyn std::fmt::Display) -> EndReason {
    EndReason::Host { error: error.to_string() }
}

impl From<QueueError> for EndReason {
    fn from(error: QueueError) -> Self {
        Self::Queue { queue: error.queue.to_owned(), error: error.error }
    }
}

impl From<MachineError> for EndReason {
    fn from(error: MachineError) -> Self {
        Self::Setup { error: error.to_string() }
    }
}
