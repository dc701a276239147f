//! Puts a Linux kernel into fresh guest memory, by the 64-bit boot protocol (Linux,
//! Documentation/arch/x86/boot.rst): `bzImage` or `vmlinux`, initial file system, command line, map of
//! memory, ACPI tables.

use std::io::Cursor;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{self, BzImage, Elf, KernelLoader};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};
use warren_abi::microvm::{
    ABI_VERSION, BOOT_ADDRESS, Boot, COMMAND_PARK, FunctionPlace, IDENTITY_ADDRESS, NET_MMIO,
};

use super::acpi;
use super::pc::GENERATION_ADDRESS;
use crate::boot::boot_bytes;
use crate::memory::{GuestRam, PAGE};

/// Global descriptor table, four entries.
pub const GDT: u64 = 0x500;
/// Its last byte's offset.
pub const GDT_LIMIT: u16 = 4 * 8 - 1;
/// `struct boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the stack that the kernel begins with.
pub const BOOT_STACK: u64 = 0x8ff0;
/// The top-level page table: CR3.
pub const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
/// Page directories of the first 4 GiB.
const PAGE_DIRECTORIES: u64 = 0xb000;
const COMMAND_LINE: u64 = 0x2_0000;
/// The end of what a PC calls conventional memory.
const LOW_END: u64 = 0x9_fc00;
/// Where kernels are loaded.
const HIGH: u64 = 0x10_0000;

/// The least memory of a Linux guest, in bytes.
pub const MEMORY_MIN: u64 = 64 << 20;
/// The most: what is below the devices' registers.
pub const MEMORY_MAX: u64 = 3 << 30;
const _: () = assert!(MEMORY_MAX <= NET_MMIO);

// Types of memory (ACPI 6.5, 15).
const RAM: u32 = 1;
const RESERVED: u32 = 2;
const ACPI_DATA: u32 = 3;

/// `bzImage`: the entry of the 64-bit protocol, from where the kernel was loaded, in bytes.
const ENTRY_64: u64 = 0x200;

/// Type of a boot loader that has no number (boot.rst, `type_of_loader`).
const UNKNOWN_LOADER: u8 = 0xff;

/// What the command line begins with: console on the serial port, a panic reboots, which is done by
/// the keyboard controller, and there is no bus to look for.
const COMMAND: &str = "console=ttyS0 reboot=k panic=-1 pci=off";

/// The longest that every kernel takes, in bytes (`COMMAND_LINE_SIZE`).
const COMMAND_MAX: usize = 2048;

/// A Linux guest's parts.
#[derive(Clone, Debug)]
pub struct Program {
    /// `bzImage` or `vmlinux`.
    pub kernel: Vec<u8>,
    /// Initial file system with the agent.
    pub initrd: Vec<u8>,
    /// More of the command line.
    pub arguments: String,
}

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LinuxBootError {
    /// It is no kernel.
    #[error("not a Linux kernel for x86-64: {0}; give a bzImage (vmlinuz) or vmlinux")]
    Kernel(loader::Error),
    /// It has no 64-bit entry.
    #[error(
        "the kernel cannot be entered in 64-bit mode: give one of Linux 3.8 or newer for x86-64"
    )]
    No64,
    /// The memory's size is not supported.
    #[error("Linux guest's memory of {0} bytes: it must be whole pages, 64 MiB to 3 GiB")]
    MemorySize(u64),
    /// Kernel and initial file system do not fit.
    #[error("kernel and initrd need {needed} bytes of memory and have {available}: raise --memory")]
    TooLarge {
        /// With room to unpack them.
        needed: u64,
        /// Guest memory.
        available: u64,
    },
    /// The command line is too long.
    #[error("the kernel's command line has {0} bytes, and at most 2047 are possible")]
    CommandLine(usize),
    /// Guest memory could not be written.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Fills guest memory and returns the kernel's entry point.
pub fn load(ram: &GuestRam, program: &Program) -> Result<u64, LinuxBootError> {
    let (memory, bytes) = (ram.all(), ram.bytes());
    if !(MEMORY_MIN..=MEMORY_MAX).contains(&bytes) || bytes % PAGE != 0 {
        return Err(LinuxBootError::MemorySize(bytes));
    }
    // Twice: a kernel unpacks itself and then the initial file system.
    let needed = 2 * (program.kernel.len() as u64 + program.initrd.len() as u64) + HIGH;
    if needed > bytes {
        return Err(LinuxBootError::TooLarge { needed, available: bytes });
    }
    let (entry, mut params) = load_kernel(ram, &program.kernel)?;

    let initrd = (bytes - program.initrd.len() as u64) / PAGE * PAGE;
    memory.write_slice(&program.initrd, GuestAddress(initrd))?;
    let command = format!("{COMMAND} {}", program.arguments);
    if command.len() >= COMMAND_MAX {
        return Err(LinuxBootError::CommandLine(command.len()));
    }
    memory.write_slice(command.trim_end().as_bytes(), GuestAddress(COMMAND_LINE))?;
    params.hdr.type_of_loader = UNKNOWN_LOADER;
    params.hdr.ramdisk_image = initrd as u32;
    params.hdr.ramdisk_size = program.initrd.len() as u32;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = command.len() as u32;
    params.acpi_rsdp_addr = acpi::write(memory)?;
    let map = [
        (0, BOOT_ADDRESS, RAM),
        (BOOT_ADDRESS, GENERATION_ADDRESS + PAGE, RESERVED),
        (GENERATION_ADDRESS + PAGE, LOW_END, RAM),
        (LOW_END, acpi::TABLES, RESERVED),
        (acpi::TABLES, acpi::TABLES_END, ACPI_DATA),
        (HIGH, bytes, RAM),
    ];
    for (entry, (start, end, r#type)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr: start, size: end - start, r#type };
    }
    params.e820_entries = map.len() as u8;
    memory.write_obj(params, GuestAddress(ZERO_PAGE))?;

    page_tables(ram)?;
    // Code at 0x10 and data at 0x18, as the protocol has it.
    for (index, descriptor) in [(2, 0x00af_9b00_0000_ffff_u64), (3, 0x00cf_9300_0000_ffff)] {
        memory.write_obj(descriptor, GuestAddress(GDT + index * 8))?;
    }
    // The agent has no use for a heap's place.
    let (abi_version, command, generation) = (ABI_VERSION, COMMAND_PARK, 0);
    let function = FunctionPlace::default();
    let boot = Boot { abi_version, command, heap_start: 0, heap_end: 0, generation, function };
    memory.write_slice(&boot_bytes(&boot), GuestAddress(BOOT_ADDRESS))?;
    Ok(entry)
}

const _: () = assert!(IDENTITY_ADDRESS > BOOT_ADDRESS && IDENTITY_ADDRESS < GENERATION_ADDRESS);

/// Loads the kernel; returns its entry point and the parameters that it brings.
fn load_kernel(ram: &GuestRam, kernel: &[u8]) -> Result<(u64, boot_params), LinuxBootError> {
    let mut params = boot_params::default();
    let high = Some(GuestAddress(HIGH));
    let mut image = Cursor::new(kernel);
    if kernel.starts_with(b"\x7fELF") {
        let loaded =
            Elf::load(ram.all(), None, &mut image, high).map_err(LinuxBootError::Kernel)?;
        params.hdr.boot_flag = 0xaa55;
        params.hdr.header = u32::from_le_bytes(*b"HdrS");
        params.hdr.kernel_alignment = 0x100_0000;
        return Ok((loaded.kernel_load.raw_value(), params));
    }
    let loaded =
        BzImage::load(ram.all(), None, &mut image, high).map_err(LinuxBootError::Kernel)?;
    params.hdr = loaded.setup_header.unwrap_or_default();
    // XLF_KERNEL_64
    if params.hdr.version < 0x20c || params.hdr.xloadflags & 1 == 0 {
        return Err(LinuxBootError::No64);
    }
    Ok((loaded.kernel_load.raw_value() + ENTRY_64, params))
}

/// Maps the first 4 GiB to themselves, by pages of 2 MiB.
fn page_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let write = |address, value: u64| ram.all().write_obj(value, GuestAddress(address));
    write(PML4, PDPT | PRESENT_WRITABLE)?;
    for gib in 0..4 {
        let directory = PAGE_DIRECTORIES + gib * PAGE;
        write(PDPT + gib * 8, directory | PRESENT_WRITABLE)?;
        for entry in 0..512 {
            let page = (gib << 30) + (entry << 21);
            write(directory + entry * 8, page | PRESENT_WRITABLE | LARGE)?;
        }
    }
    Ok(())
}
