//! A virtual machine: processor, memory, devices, and what its exits mean.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use warren_abi::microvm::{
    BARRIER_PORT, BOOT_ADDRESS, Boot, COMMAND_PARK, COMMAND_PREFAULT, COMMAND_RELEASE,
    IDENTITY_ADDRESS, Identity, MMIO_BYTES, NET_MMIO, PANIC_PORT, PanicMessage, READY_PORT,
    VSOCK_MMIO, WAIT_FOREVER, WAIT_PORT,
};

use crate::boot::EXCEPTION_PORT;
use crate::clock::{monotonic_ns, wall_clock_ns};
use crate::control::{EndReason, PublicIdentity, WATCHDOG};
use crate::cpu::{self, CpuState};
use crate::devices::mmio::MmioState;
use crate::devices::net::Net;
use crate::devices::vsock::Vsock;
use crate::devices::{Device as _, QueueError};
use crate::memory::{GuestRam, Pages};
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
    /// Of the guest's time stamp counter.
    tsc_hz: u64,
    watchdog: Duration,
    last_exit: Instant,
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

/// A virtual machine with a processor and nothing to run: all that does not depend on a template.
pub struct Shell {
    // Dropped in this order: the timer points into the processor.
    timer: KickTimer,
    vcpu: VcpuFd,
    vm: VmFd,
}

impl Shell {
    /// Makes KVM's objects, of the processor that `cpuid` describes.
    pub fn new(kvm_fd: &Kvm, cpuid: &CpuId) -> Result<Self, MachineError> {
        let vm = kvm_fd.create_vm().map_err(kvm("create a VM"))?;
        let mut vcpu = vm.create_vcpu(0).map_err(kvm("create a vCPU"))?;
        vcpu.set_cpuid2(cpuid).map_err(kvm("describe the processor"))?;
        let timer = KickTimer::new(&mut vcpu)
            .map_err(|errno| MachineError::Host { what: "make a timer", source: errno.into() })?;
        Ok(Self { timer, vcpu, vm })
    }

    /// Makes it a template's machine, with the processor at a program's entry point.
    pub fn boot(self, ram: GuestRam, entry: u64) -> Result<Machine, MachineError> {
        let machine = self.with_devices(ram, Net::new(), Vsock::new())?;
        let state = cpu::boot_state(&machine.vcpu, entry, machine.ram.bytes())
            .map_err(kvm("read the initial state"))?;
        machine.load_cpu(&state)?;
        Ok(machine)
    }

    /// Makes it a clone: private memory over the template's, its saved state, and a TAP.
    pub fn load(
        self,
        ram: GuestRam,
        state: &MachineState,
        tap: Option<OwnedFd>,
    ) -> Result<Machine, MachineError> {
        let net = Net::load(&state.net, ram.dma(), tap)?;
        let vsock = Vsock::load(&state.vsock, ram.dma())?;
        let machine = self.with_devices(ram, net, vsock)?;
        machine.load_cpu(&state.cpu)?;
        Ok(machine)
    }

    fn with_devices(self, ram: GuestRam, net: Net, vsock: Vsock) -> Result<Machine, MachineError> {
        let Self { timer, vcpu, vm } = self;
        let tsc_hz = vcpu.get_tsc_khz().map_err(kvm("ask for the frequency of its counter"))?;
        let tsc_hz = u64::from(tsc_hz) * 1000;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: ram.bytes(),
            userspace_addr: ram.host_address(),
        };
        // SAFETY: the range is `ram`'s mapping, which outlives the VM: fields drop in order.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("set the memory region"))?;
        let last_exit = Instant::now();
        Ok(Machine { timer, vcpu, _vm: vm, ram, net, vsock, tsc_hz, watchdog: WATCHDOG, last_exit })
    }
}

impl Machine {
    fn load_cpu(&self, state: &CpuState) -> Result<(), MachineError> {
        cpu::load(&self.vcpu, state).map_err(kvm("load the processor's state"))
    }

    /// Changes how long the guest may run without an exit.
    pub fn set_watchdog(&mut self, budget: Duration) {
        self.watchdog = budget;
    }

    /// Saves processor and devices. The guest must stand at the barrier, or wait: then it goes on
    /// behind the port access.
    pub fn save(&mut self) -> Result<MachineState, MachineError> {
        self.complete_exit();
        let cpu = cpu::save(&self.vcpu).map_err(kvm("save the processor's state"))?;
        Ok(MachineState { cpu, net: self.net.save(), vsock: self.vsock.save() })
    }

    /// The state is whole only when the pending port access was completed (KVM API, 5).
    fn complete_exit(&mut self) {
        self.vcpu.set_kvm_immediate_exit(1);
        let completed = self.vcpu.run();
        debug_assert!(completed.is_err(), "immediate_exit returns before the guest runs");
        self.vcpu.set_kvm_immediate_exit(0);
    }

    /// Lets the guest take its page faults, so that it has none after the release.
    pub fn park(&mut self) -> Result<(), EndReason> {
        // The page of the identity becomes this clone's own, and the code that the release needs is
        // mapped.
        getrandom(&mut [0; 64])?;
        self.write_identity(&NOBODY)?;
        self.command(COMMAND_PREFAULT)?;
        self.run_until(Exit::Barrier)?;
        self.command(COMMAND_PARK)
    }

    /// Makes a clone what it was when it was loaded, but with the pages in place that it will need:
    /// as good as parked.
    pub fn recycle(&mut self, state: &MachineState, kept: &[Pages]) -> Result<(), EndReason> {
        // The port access that it stands in is completed, so that it is not after the state changed.
        self.complete_exit();
        let tap = self.net.take_tap();
        self.net = Net::load(&state.net, self.ram.dma(), tap)?;
        self.vsock = Vsock::load(&state.vsock, self.ram.dma())?;
        self.ram.reset(kept).map_err(|error| host(&error))?;
        Ok(self.load_cpu(&state.cpu)?)
    }

    /// Gives the guest its identity, fresh entropy and the time, and the command to go. Returns when
    /// that was (`CLOCK_MONOTONIC`, ns): the guest's own clock begins there, and it runs next.
    pub fn release(&mut self, public: &PublicIdentity) -> Result<u64, EndReason> {
        let mut entropy = [0; 64];
        getrandom(&mut entropy)?;
        let mut hostname = [0; 64];
        let length = public.hostname.len().min(hostname.len());
        hostname[..length].copy_from_slice(&public.hostname.as_bytes()[..length]);
        self.command(COMMAND_RELEASE)?;
        let wall_clock_ns = wall_clock_ns()?;
        // SAFETY: reads a counter; x86-64 always has it.
        let tsc = unsafe { core::arch::x86_64::_rdtsc() };
        let released_ns = monotonic_ns()?;
        self.write_identity(&Identity {
            wall_clock_ns,
            tsc,
            tsc_hz: self.tsc_hz,
            entropy,
            instance_id: public.instance_id,
            hostname,
            ipv4: public.ipv4,
            gateway: public.gateway,
            mac: public.mac,
            mtu: public.mtu,
        })?;
        self.resumed();
        Ok(released_ns)
    }

    /// Sets what the guest is to do when it leaves the barrier.
    fn command(&self, command: u32) -> Result<(), EndReason> {
        let address = BOOT_ADDRESS + std::mem::offset_of!(Boot, command) as u64;
        self.ram.all().write_obj(command, GuestAddress(address)).map_err(|error| host(&error))
    }

    /// Writes the identity page.
    fn write_identity(&self, identity: &Identity) -> Result<(), EndReason> {
        // SAFETY: `Identity` is `repr(C)` and, as the assertion below keeps, without padding, so
        // all of its bytes are initialised.
        let bytes = unsafe {
            std::slice::from_raw_parts((&raw const *identity).cast::<u8>(), size_of::<Identity>())
        };
        let address = GuestAddress(IDENTITY_ADDRESS);
        self.ram.all().write_slice(bytes, address).map_err(|error| host(&error))
    }

    /// Runs the guest up to this exit; another one is its end.
    pub fn run_until(&mut self, expected: Exit) -> Result<(), EndReason> {
        loop {
            match self.run()? {
                exit if exit == expected => return Ok(()),
                Exit::Kicked => {}
                exit => return Err(protocol(format!("{exit:?} instead of {expected:?}"))),
            }
        }
    }

    /// Runs the guest until it gives the processor back or ends. Registers of devices are served
    /// on the way.
    pub fn run(&mut self) -> Result<Exit, EndReason> {
        loop {
            self.timer.arm(&mut self.vcpu).map_err(|errno| host(&errno))?;
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

fn getrandom(buffer: &mut [u8; 64]) -> Result<(), EndReason> {
    // SAFETY: the buffer has that many bytes. Up to 256 are never cut short (getrandom(2)).
    let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if got == buffer.len() as isize { Ok(()) } else { Err(host(&io::Error::last_os_error())) }
}

/// What is in the identity page of a parked clone.
const NOBODY: Identity = Identity {
    wall_clock_ns: 0,
    tsc: 0,
    tsc_hz: 0,
    entropy: [0; 64],
    instance_id: [0; 16],
    hostname: [0; 64],
    ipv4: [0; 4],
    gateway: [0; 4],
    mac: [0; 6],
    mtu: 0,
};

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
