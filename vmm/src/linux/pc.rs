//! What a Linux guest's machine has beyond network and vsock: interrupt lines, entropy, disk,
//! console, serial port, and the registers that switch it off.

use std::cell::Cell;
use std::convert::Infallible;
use std::fs::File;

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use warren_abi::microvm::{BLK_MMIO, CONSOLE_MMIO, MMIO_BYTES, NET_MMIO, RNG_MMIO};

use super::log::Log;
use crate::control::EndReason;
use crate::devices::blk::{Blk, BlkState, ID_BYTES};
use crate::devices::console::Console;
use crate::devices::disk::{Disk, DiskError};
use crate::devices::limiter::Limiter;
use crate::devices::mmio::MmioState;
use crate::devices::rng::Rng;
use crate::devices::{Device, QueueError};
use crate::machine::host;

/// How many virtio devices there may be: network, vsock, entropy, disk, console.
pub const VIRTIO_DEVICES: u8 = 5;

/// The I/O APIC's input of a virtio device, numbered as its register page is.
pub const fn virtio_gsi(index: u8) -> u32 {
    16 + index as u32
}

/// The input of the generation counter's event.
pub const GENERATION_GSI: u32 = virtio_gsi(VIRTIO_DEVICES);

/// Where the generation identifier is: reserved memory, 16 bytes.
pub const GENERATION_ADDRESS: u64 = 0x1_2000;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt.
pub const SERIAL_GSI: u32 = 4;

/// ACPI's sleep control register (ACPI 6.5, 4.8.3.7): the guest powers off.
pub const SLEEP_PORT: u16 = 0x600;
/// In it: go to sleep.
const SLEEP_ENABLE: u8 = 1 << 5;

/// The keyboard controller, of which there is what reboots: command and status.
const KEYBOARD_PORT: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
/// It takes commands.
const KEYBOARD_READY: u8 = 0;

/// The devices of a PC that runs Linux.
pub struct Pc {
    rng: Rng,
    blk: Option<Blk>,
    console: Console,
    serial: Serial<Line, NoEvents, Log>,
    console_log: Log,
}

/// These devices, saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PcState {
    rng: MmioState,
    blk: Option<BlkState>,
    console: MmioState,
    /// The serial port's registers, in the order of [`SerialState`]'s fields.
    serial: [u8; 9],
}

/// An interrupt line that somebody wants to be raised.
#[derive(Default)]
struct Line(Cell<bool>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        Ok(())
    }
}

impl Pc {
    /// Devices after reset; the disk is read only.
    ///
    /// # Errors
    /// The file cannot be a disk.
    pub fn new(disk: Option<File>) -> Result<Self, DiskError> {
        let disk = disk.map(Disk::read_only).transpose()?;
        let mut pc = Self {
            rng: Rng::new(),
            blk: disk.map(|disk| Blk::new(disk, DISK_ID)),
            console: Console::new(),
            serial: Serial::new(Line::default(), Log::new("kernel")),
            console_log: Log::new("console"),
        };
        pc.devices().for_each(|(_, device)| device.mmio_mut().use_interrupts());
        Ok(pc)
    }

    /// Devices in a saved state.
    ///
    /// # Errors
    /// The state is not one of these devices in this memory, or of a machine with another disk.
    pub fn load(
        state: &PcState,
        memory: &GuestMemoryMmap,
        disk: Option<File>,
    ) -> Result<Self, QueueError> {
        let refuse = |error: String| QueueError { queue: "blk requests", error };
        let blk = match (&state.blk, disk) {
            (Some(state), Some(disk)) => {
                let disk = Disk::load(&state.disk, disk, None);
                let disk = disk.map_err(|error| refuse(error.to_string()))?;
                Some(Blk::load(state, memory, disk, DISK_ID)?)
            }
            (None, None) => None,
            (Some(_), None) => return Err(refuse("the template's disk was not given".to_owned())),
            (None, Some(_)) => return Err(refuse("the template has no disk".to_owned())),
        };
        let registers = serial_state(&state.serial);
        let serial = Serial::from_state(&registers, Line::default(), NoEvents, Log::new("kernel"));
        let serial =
            serial.map_err(|error| QueueError { queue: "serial", error: format!("{error:?}") })?;
        Ok(Self {
            rng: Rng::load(&state.rng, memory)?,
            blk,
            console: Console::load(&state.console, memory)?,
            serial,
            console_log: Log::new("console"),
        })
    }

    /// Saves the devices.
    pub fn save(&self) -> PcState {
        let serial = self.serial.state();
        PcState {
            rng: self.rng.save(),
            blk: self.blk.as_ref().map(Blk::save),
            console: self.console.save(),
            serial: [
                serial.baud_divisor_low,
                serial.baud_divisor_high,
                serial.interrupt_enable,
                serial.interrupt_identification,
                serial.line_control,
                serial.line_status,
                serial.modem_control,
                serial.modem_status,
                serial.scratch,
            ],
        }
    }

    /// Limits what is read from the disk from now on, if there is one.
    pub fn limit_disk(&mut self, limiter: Limiter) {
        if let Some(blk) = &mut self.blk {
            blk.set_limiter(limiter);
        }
    }

    /// The virtio devices, each with its number.
    pub fn devices(&mut self) -> impl Iterator<Item = (u8, &mut dyn Device)> {
        let number = |address: u64| ((address - NET_MMIO) / MMIO_BYTES) as u8;
        let Self { rng, blk, console, .. } = self;
        let rng: &mut dyn Device = rng;
        let console: &mut dyn Device = console;
        let blk = blk.as_mut().map(|blk| (number(BLK_MMIO), blk as &mut dyn Device));
        [(number(RNG_MMIO), rng), (number(CONSOLE_MMIO), console)].into_iter().chain(blk)
    }

    /// The guest wrote to a port.
    ///
    /// # Errors
    /// It switched itself off.
    pub fn write_port(&mut self, port: u16, data: &[u8]) -> Result<(), EndReason> {
        match (port, data) {
            (SERIAL_PORT..=0x3ff, &[byte]) => {
                let written = self.serial.write((port - SERIAL_PORT) as u8, byte);
                written.map_err(|error| host(&format!("serial port: {error:?}")))
            }
            (SLEEP_PORT, &[byte]) if byte & SLEEP_ENABLE != 0 => Err(EndReason::PoweredOff),
            (KEYBOARD_PORT, [KEYBOARD_RESET]) => Err(self.reset()),
            // A PC has many more, which drivers try out.
            _ => {
                tracing::trace!(port, ?data, "nobody is at this port");
                Ok(())
            }
        }
    }

    /// The guest reads a port.
    pub fn read_port(&mut self, port: u16, data: &mut [u8]) {
        // What a bus gives that nobody drives.
        data.fill(0xff);
        match (port, data) {
            (SERIAL_PORT..=0x3ff, [byte]) => *byte = self.serial.read((port - SERIAL_PORT) as u8),
            (SLEEP_PORT, [byte]) => *byte = 0,
            (KEYBOARD_PORT, [byte]) => *byte = KEYBOARD_READY,
            _ => {}
        }
    }

    /// The end of a guest that reset its machine, with what it said before.
    pub fn reset(&self) -> EndReason {
        EndReason::Reset { said: self.serial.writer().last() }
    }

    /// Writes what came out of the console to the log.
    pub fn log_console(&mut self) {
        let output = self.console.take_output();
        self.console_log.take(&output.bytes);
        self.console_log.lost(output.lost);
    }

    /// Raises the serial port's interrupt, if it wants it.
    pub fn raise_serial(&mut self, vm: &VmFd) -> Result<(), EndReason> {
        if self.serial.interrupt_evt().0.take() { pulse(vm, SERIAL_GSI) } else { Ok(()) }
    }

    /// Puts the devices back into a saved state, with the same disk.
    ///
    /// # Errors
    /// As [`Pc::load`].
    pub fn reload(&mut self, state: &PcState, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        let disk = self.blk.take().map(Blk::into_base);
        *self = Self::load(state, memory, disk)?;
        Ok(())
    }
}

/// Raises an edge-triggered interrupt.
pub fn pulse(vm: &VmFd, gsi: u32) -> Result<(), EndReason> {
    let set = |active| vm.set_irq_line(gsi, active).map_err(|error| host(&error));
    set(true)?;
    set(false)
}

/// What the guest sees as the disk's serial number.
const DISK_ID: [u8; ID_BYTES] = *b"function\0\0\0\0\0\0\0\0\0\0\0\0";

fn serial_state(registers: &[u8; 9]) -> SerialState {
    let &[
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
    ] = registers;
    SerialState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        in_buffer: Vec::new(),
    }
}
