//! A virtual machine: processor, memory, devices, and what its exits mean.
//!
//! [`Shell`] makes one; `release` is what it does at the guest's release barrier.

mod release;
mod shell;

use std::io;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use warren_abi::microvm::{
    BARRIER_PORT, MMIO_BYTES, NET_MMIO, PANIC_PORT, PanicMessage, READY_PORT, VSOCK_MMIO,
    WAIT_FOREVER, WAIT_PORT,
};

use crate::boot::EXCEPTION_PORT;
use crate::clock::processor_time;
use crate::control::{EndReason, GuestKind};
use crate::cpu::{self, CpuState};
use crate::devices::disk::DiskError;
use crate::devices::mmio::MmioState;
use crate::devices::net::{Limits, Net, NetState};
use crate::devices::vsock::Vsock;
use crate::devices::{Device, QueueError};
use crate::linux;
use crate::linux::cpu::PlatformState;
use crate::linux::pc::{Pc, PcState, pulse, virtio_gsi};
use crate::memory::{GuestRam, Pages};
use crate::rates::Rates;
use crate::timer::KickTimer;
pub use shell::Shell;

/// Exception vectors that push an error code (Intel SDM volume 3, table 6-1).
const WITH_ERROR_CODE: [u8; 8] = [8, 10, 11, 12, 13, 14, 17, 21];
const PAGE_FAULT: u8 = 14;

/// The state of processor and devices: with the memory, all of a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// Processor.
    pub cpu: CpuState,
    /// Network device.
    pub net: NetState,
    /// Vsock device.
    pub vsock: MmioState,
    /// What a Linux guest has beyond.
    pub linux: Option<LinuxState>,
}

/// What a Linux guest's machine has beyond others'.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinuxState {
    /// Interrupt controllers and registers.
    pub platform: PlatformState,
    /// Devices.
    pub pc: PcState,
}

impl MachineState {
    /// What kind of guest it is of.
    pub fn kind(&self) -> GuestKind {
        if self.linux.is_some() { GuestKind::Linux } else { GuestKind::NoOs }
    }
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
    /// The function's disk cannot be used.
    #[error("the function's image: {0}")]
    Disk(#[from] DiskError),
}

/// A virtual machine with one processor.
pub struct Machine {
    // Dropped in this order: the timer points into the processor, which runs on the memory.
    timer: KickTimer,
    vcpu: VcpuFd,
    vm: VmFd,
    /// Its memory.
    pub ram: GuestRam,
    /// Its network device.
    pub net: Net,
    /// Its vsock device.
    pub vsock: Vsock,
    linux: Option<Linux>,
    /// Of the guest's time stamp counter.
    tsc_hz: u64,
    watchdog: Duration,
    /// What processor time this thread had used when the guest was first kicked since its last exit.
    kicked_at: Option<Duration>,
}

/// What a Linux guest's machine has beyond others'.
struct Linux {
    pc: Pc,
    /// The model-specific registers that are saved.
    msrs: Vec<u32>,
    /// What the guest's time stamp counter is ahead of the host's, in two's complement.
    tsc_ahead: u64,
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

impl Machine {
    fn load_cpu(&self, state: &CpuState) -> Result<(), MachineError> {
        cpu::load(&self.vcpu, state).map_err(kvm("load the processor's state"))
    }

    /// Loads processor and interrupt controllers.
    fn load_state(&mut self, state: &MachineState) -> Result<(), MachineError> {
        self.load_cpu(&state.cpu)?;
        if let (Some(linux), Some(saved)) = (&mut self.linux, &state.linux) {
            let ahead = linux::cpu::load(&self.vm, &self.vcpu, &saved.platform);
            linux.tsc_ahead = ahead.map_err(kvm("load the state of a Linux guest"))?;
        }
        Ok(())
    }

    /// Whether the guest is interrupted, instead of polling.
    pub fn has_interrupts(&self) -> bool {
        self.linux.is_some()
    }

    /// Changes how long the guest may run without an exit, in processor time.
    pub fn set_watchdog(&mut self, budget: Duration) {
        self.watchdog = budget;
    }

    /// Limits what its devices move from now on.
    pub fn set_rates(&mut self, rates: &Rates) {
        self.net
            .set_limits(Limits { receive: rates.net_receive(), transmit: rates.net_transmit() });
        if let Some(linux) = &mut self.linux {
            linux.pc.limit_disk(rates.disk());
        }
    }

    /// Saves processor and devices. The guest must stand at the barrier, or wait: then it goes on
    /// behind the port access.
    pub fn save(&mut self) -> Result<MachineState, MachineError> {
        self.complete_exit();
        let cpu = cpu::save(&self.vcpu).map_err(kvm("save the processor's state"))?;
        let linux = match &self.linux {
            Some(Linux { pc, msrs, .. }) => {
                let platform = linux::cpu::save(&self.vm, &self.vcpu, msrs);
                let platform = platform.map_err(kvm("save the state of a Linux guest"))?;
                Some(LinuxState { platform, pc: pc.save() })
            }
            None => None,
        };
        Ok(MachineState { cpu, net: self.net.save(), vsock: self.vsock.save(), linux })
    }

    /// The state is whole only when the pending port access was completed (KVM API, 5).
    fn complete_exit(&mut self) {
        self.vcpu.set_kvm_immediate_exit(1);
        let completed = self.vcpu.run();
        debug_assert!(completed.is_err(), "immediate_exit returns before the guest runs");
        self.vcpu.set_kvm_immediate_exit(0);
    }

    /// Makes a clone what it was when it was loaded, but with the pages in place that it will need:
    /// as good as parked.
    pub fn recycle(&mut self, state: &MachineState, kept: &[Pages]) -> Result<(), EndReason> {
        // The port access that it stands in is completed, so that it is not after the state changed.
        self.complete_exit();
        self.kicked_at = None;
        let tap = self.net.take_tap();
        self.net = Net::load(&state.net, self.ram.dma(), tap)?;
        self.vsock = Vsock::load(&state.vsock, self.ram.dma())?;
        if let (Some(linux), Some(saved)) = (&mut self.linux, &state.linux) {
            linux.pc.reload(&saved.pc, self.ram.dma())?;
        }
        self.ram.reset(kept).map_err(|error| host(&error))?;
        Ok(self.load_state(state)?)
    }

    /// Runs the guest up to this exit; another one is its end.
    pub fn run_until(&mut self, expected: Exit) -> Result<(), EndReason> {
        loop {
            match self.run()? {
                exit if exit == expected => return Ok(()),
                Exit::Kicked if self.has_interrupts() => {
                    self.exchange()?;
                }
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
                KickTimer::kicked(&mut self.vcpu);
                // A guest with interrupts sleeps within KVM, where nobody can tell that it does.
                if self.linux.is_none() {
                    self.watch()?;
                }
                return Ok(Exit::Kicked);
            }
            self.kicked_at = None;
            let memory = self.ram.dma();
            let Self { net, vsock, linux, .. } = self;
            let is_linux = linux.is_some();
            match exit.map_err(|error| host(&error))? {
                VcpuExit::MmioRead(address, data) => match device(net, vsock, linux, address) {
                    Some((device, offset)) => device.read(offset, data),
                    None if is_linux => data.fill(0xff),
                    None => return Err(stray(address)),
                },
                VcpuExit::MmioWrite(address, data) => match device(net, vsock, linux, address) {
                    Some((device, offset)) => {
                        device.write(offset, data, memory)?;
                        self.raise()?;
                    }
                    None if is_linux => {}
                    None => return Err(stray(address)),
                },
                VcpuExit::IoOut(port, data) => {
                    let value = <[u8; 4]>::try_from(data as &[u8]).ok().map(u32::from_le_bytes);
                    return match (port, value, linux) {
                        (BARRIER_PORT, Some(_), _) => Ok(Exit::Barrier),
                        (READY_PORT, Some(_), _) => Ok(Exit::Ready),
                        (_, _, Some(linux)) => {
                            linux.pc.write_port(port, data)?;
                            self.raise()?;
                            continue;
                        }
                        (WAIT_PORT, Some(WAIT_FOREVER), None) => Ok(Exit::Wait(None)),
                        (WAIT_PORT, Some(us), None) => {
                            Ok(Exit::Wait(Some(Duration::from_micros(us.into()))))
                        }
                        (PANIC_PORT, Some(address), None) => Err(self.panic_message(address)),
                        (EXCEPTION_PORT..0x60, _, None) => {
                            Err(self.exception((port - EXCEPTION_PORT) as u8))
                        }
                        _ => Err(protocol(format!("wrote {} bytes to port {port:#x}", data.len()))),
                    };
                }
                VcpuExit::IoIn(port, data) => match linux {
                    Some(linux) => {
                        linux.pc.read_port(port, data);
                        self.raise()?;
                    }
                    None => return Err(protocol(format!("read port {port:#x}"))),
                },
                VcpuExit::Shutdown => {
                    return Err(match linux {
                        Some(linux) => linux.pc.reset(),
                        None => EndReason::TripleFault { rip: self.rip() },
                    });
                }
                other => {
                    let what = format!("unexpected exit {other:?}");
                    return Err(protocol(format!("{what} at {:#x}", self.rip())));
                }
            }
        }
    }

    /// Moves packets both ways, and lets devices do what is due; returns whether something came for
    /// the guest.
    pub fn exchange(&mut self) -> Result<bool, EndReason> {
        self.transmit()?;
        self.receive()
    }

    /// Takes all packets that the guest queued.
    pub fn transmit(&mut self) -> Result<(), EndReason> {
        let memory = self.ram.dma();
        self.net.transmit(memory)?;
        Ok(self.vsock.transmit(memory)?)
    }

    /// The other half of [`Machine::exchange`].
    pub fn receive(&mut self) -> Result<bool, EndReason> {
        let memory = self.ram.dma();
        let mut received = self.net.receive(memory)?;
        received |= self.vsock.receive(memory)?;
        if self.has_interrupts() {
            self.serve_due()?;
            self.raise()?;
        }
        Ok(received)
    }

    /// Lets devices do what is due, and has the guest kicked when something is due next.
    fn serve_due(&mut self) -> Result<(), EndReason> {
        let Self { net, vsock, linux, ram, timer, .. } = self;
        let mut next: Option<Instant> = None;
        for (_, device) in devices(net, vsock, linux) {
            if device.due().is_some_and(|due| due <= Instant::now()) {
                device.serve(ram.dma())?;
            }
            next = next.into_iter().chain(device.due()).min();
        }
        if let Some(next) = next {
            let left = next.saturating_duration_since(Instant::now());
            timer.hasten(left).map_err(|errno| host(&errno))?;
        }
        Ok(())
    }

    /// Raises the interrupts that devices want, for a guest that has them.
    fn raise(&mut self) -> Result<(), EndReason> {
        let Self { net, vsock, linux, ram, vm, .. } = self;
        if linux.is_none() {
            return Ok(());
        }
        for (index, device) in devices(net, vsock, linux) {
            if device.take_interrupt(ram.dma())? {
                pulse(vm, virtio_gsi(index))?;
            }
        }
        linux.as_mut().map_or(Ok(()), |linux| {
            linux.pc.log_console();
            linux.pc.raise_serial(vm)
        })
    }

    /// Ends a guest that has used up its time. What counts is what it ran: on a busy host it may get
    /// little, and is not to blame.
    fn watch(&mut self) -> Result<(), EndReason> {
        let now = processor_time()?;
        if now.saturating_sub(*self.kicked_at.get_or_insert(now)) < self.watchdog {
            return Ok(());
        }
        let budget_ms = self.watchdog.as_millis() as u64;
        Err(EndReason::Watchdog { rip: self.rip(), budget_ms })
    }

    /// Where the guest is.
    pub fn rip(&self) -> u64 {
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

/// All virtio devices, each with the number of its register page.
fn devices<'a>(
    net: &'a mut Net,
    vsock: &'a mut Vsock,
    linux: &'a mut Option<Linux>,
) -> impl Iterator<Item = (u8, &'a mut dyn Device)> {
    let of_all: [(u8, &mut dyn Device); 2] = [(0, net), (1, vsock)];
    of_all.into_iter().chain(linux.iter_mut().flat_map(|linux| linux.pc.devices()))
}

/// The device at an address, and the register's offset.
fn device<'a>(
    net: &'a mut Net,
    vsock: &'a mut Vsock,
    linux: &'a mut Option<Linux>,
    address: u64,
) -> Option<(&'a mut dyn Device, u64)> {
    let offset = address.checked_sub(NET_MMIO)?;
    let (page, offset) = (offset / MMIO_BYTES, offset % MMIO_BYTES);
    let found = devices(net, vsock, linux).find(|(index, _)| u64::from(*index) == page);
    found.map(|(_, device)| (device, offset))
}

const _: () = assert!(VSOCK_MMIO == NET_MMIO + MMIO_BYTES);

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
