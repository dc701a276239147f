//! Puts a program into fresh guest memory: page tables, descriptor tables, exception stubs, the
//! ELF's segments and the boot page.
//!
//! The guest runs in ring 3 from its first instruction. Ring 0 exists only as stubs that report an
//! exception's vector through a port; the processor leaves error code and RIP on their stack.

use elf::ElfBytes;
use elf::abi::{EM_X86_64, ET_EXEC, PF_W, PF_X, PT_LOAD};
use elf::endian::LittleEndian;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use warren_abi::microvm::{
    ABI_VERSION, BARRIER_PORT, BOOT_ADDRESS, Boot, CODE_ADDRESS, COMMAND_PARK, DATA_ADDRESS,
    FUNCTION_BYTES_MAX, FunctionPlace, IDENTITY_ADDRESS, MMIO_BYTES, NET_MMIO, PANIC_PORT,
    PROGRAM_ADDRESS, STACK_BYTES,
};

use crate::memory::{GuestRam, PAGE};

/// The top-level page table: CR3.
pub const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
/// Page directory of the first GiB: memory, and a function's data from its middle on.
const PD_MEMORY: u64 = 0x3000;
/// Page directory and table of the devices' registers.
const PD_MMIO: u64 = 0x4000;
const PT_MMIO: u64 = 0x5000;
/// Page directory of the second GiB: a function's code.
const PD_CODE: u64 = 0x6000;
/// Task state segment: exception stack pointer and I/O permission bitmap.
pub const TSS: u64 = 0x7000;
/// Its last byte's offset.
pub const TSS_LIMIT: u32 = 0xa8;
/// Global descriptor table.
pub const GDT: u64 = 0x7800;
/// Its last byte's offset.
pub const GDT_LIMIT: u16 = 0x4f;
/// Interrupt descriptor table, 32 gates. Anything above raises #GP.
pub const IDT: u64 = 0x8000;
/// Its last byte's offset.
pub const IDT_LIMIT: u16 = 32 * 16 - 1;
const STUBS: u64 = 0x9000;
const STUB_BYTES: u64 = 16;
const EXCEPTION_STACK_TOP: u64 = 0xb000;
/// Page tables of the memory, one for each 2 MiB.
const PAGE_TABLES: u64 = 0x2_0000;

/// An exception stub writes to this port plus its vector.
pub const EXCEPTION_PORT: u16 = 0x40;

/// The largest guest memory: what its page tables' place and one page directory allow, in bytes.
pub const MEMORY_MAX: u64 = 512 << 20;

const _: () = assert!(MEMORY_MAX <= DATA_ADDRESS);

// Page table entry (Intel SDM volume 3, 4.5). Accessed and dirty are set ahead, or the processor
// would write to the tables and so break their sharing among clones.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const UNCACHED: u64 = 0b11 << 3;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// In a page directory: not a table but 2 MiB.
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const TABLE: u64 = PRESENT | WRITABLE | USER | ACCESSED;

/// Why a program cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file is not what the guest target produces.
    #[error("not a static x86-64 ELF executable: {0}; build the guest with `cargo xtask build`")]
    Elf(String),
    /// The program's segments do not fit.
    #[error("the program needs {needed:#x} bytes of memory and has {available:#x}: raise --memory")]
    TooLarge {
        /// Up to the end of its last segment, with the stack.
        needed: u64,
        /// Guest memory.
        available: u64,
    },
    /// The memory's size is not supported.
    #[error("guest memory of {0} bytes: it must be a multiple of 2 MiB, 4 to 512 MiB")]
    MemorySize(u64),
    /// Guest memory could not be written.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Fills guest memory and returns the program's entry point.
pub fn load(ram: &GuestRam, program: &[u8]) -> Result<u64, BootError> {
    let bytes = ram.bytes();
    if !(4 << 20..=MEMORY_MAX).contains(&bytes) || !bytes.is_multiple_of(2 << 20) {
        return Err(BootError::MemorySize(bytes));
    }
    let tables = Tables { ram };
    tables.upper_levels()?;
    tables.map(PAGE, EXCEPTION_STACK_TOP, PRESENT | WRITABLE | NO_EXECUTE)?;
    tables.map(STUBS, STUBS + PAGE, PRESENT)?;
    tables.map(BOOT_ADDRESS, BOOT_ADDRESS + PAGE, PRESENT | USER | NO_EXECUTE)?;
    tables.map(IDENTITY_ADDRESS, IDENTITY_ADDRESS + PAGE, PRESENT | USER | NO_EXECUTE)?;
    descriptor_tables(ram)?;
    let (entry, program_end) = load_elf(ram, &tables, program)?;
    let data = PRESENT | WRITABLE | USER | NO_EXECUTE;
    let stack = bytes - STACK_BYTES;
    tables.map(stack, bytes, data)?;
    let (heap_start, heap_end) = (program_end, stack - PAGE);
    tables.map(heap_start, heap_end, data)?;
    let (abi_version, command, generation) = (ABI_VERSION, COMMAND_PARK, 0);
    let function = FunctionPlace::default();
    let boot = Boot { abi_version, command, heap_start, heap_end, generation, function };
    ram.all().write_slice(&boot_bytes(&boot), GuestAddress(BOOT_ADDRESS))?;
    Ok(entry)
}

/// [`Boot`] as the guest reads it.
pub fn boot_bytes(boot: &Boot) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of::<Boot>());
    bytes.extend(boot.abi_version.to_le_bytes());
    bytes.extend(boot.command.to_le_bytes());
    bytes.extend(boot.heap_start.to_le_bytes());
    bytes.extend(boot.heap_end.to_le_bytes());
    bytes.extend(boot.generation.to_le_bytes());
    bytes.extend(function_bytes(&boot.function));
    bytes
}

/// [`FunctionPlace`] as the guest reads it.
pub fn function_bytes(place: &FunctionPlace) -> Vec<u8> {
    let FunctionPlace { entry, code_end, heap_start, heap_end, memory_end } = *place;
    [entry, code_end, heap_start, heap_end, memory_end]
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .collect()
}

struct Tables<'a> {
    ram: &'a GuestRam,
}

impl Tables<'_> {
    fn write(&self, address: u64, value: u64) -> Result<(), GuestMemoryError> {
        self.ram.all().write_obj(value, GuestAddress(address))
    }

    fn upper_levels(&self) -> Result<(), GuestMemoryError> {
        self.write(PML4, PDPT | TABLE)?;
        self.write(PDPT, PD_MEMORY | TABLE)?;
        for table in 0..self.ram.bytes() >> 21 {
            self.write(PD_MEMORY + table * 8, (PAGE_TABLES + table * PAGE) | TABLE)?;
        }
        // Whether there is anything is KVM's to know: the tables are the same with every function.
        self.write(PDPT + (CODE_ADDRESS >> 30) * 8, PD_CODE | TABLE)?;
        let user = PRESENT | USER | LARGE | ACCESSED;
        for large in 0..FUNCTION_BYTES_MAX >> 21 {
            let (data, code) = (DATA_ADDRESS + (large << 21), CODE_ADDRESS + (large << 21));
            let entry = |directory, address: u64| directory + ((address >> 21) & 511) * 8;
            let rights = user | WRITABLE | DIRTY | NO_EXECUTE;
            self.write(entry(PD_MEMORY, data), data | rights)?;
            self.write(entry(PD_CODE, code), code | user)?;
        }
        self.write(PDPT + (NET_MMIO >> 30) * 8, PD_MMIO | TABLE)?;
        self.write(PD_MMIO + ((NET_MMIO >> 21) & 511) * 8, PT_MMIO | TABLE)?;
        let registers = PRESENT | WRITABLE | USER | UNCACHED | ACCESSED | DIRTY | NO_EXECUTE;
        for device in 0..2 {
            let address = NET_MMIO + device * MMIO_BYTES;
            self.write(PT_MMIO + ((address >> 12) & 511) * 8, address | registers)?;
        }
        Ok(())
    }

    /// Maps pages to themselves.
    fn map(&self, start: u64, end: u64, rights: u64) -> Result<(), GuestMemoryError> {
        for page in (start / PAGE)..end.div_ceil(PAGE) {
            self.write(PAGE_TABLES + page * 8, (page * PAGE) | rights | ACCESSED | DIRTY)?;
        }
        Ok(())
    }
}

fn descriptor_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let write = |address, bytes: &[u8]| ram.all().write_slice(bytes, GuestAddress(address));
    // In Linux's order, as PVM expects: kernel code and data at 0x10 and 0x18, user data at 0x28,
    // user code at 0x30, the task state segment at 0x40.
    let gdt: [u64; 10] = [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0,
        0x0000_8b00_0000_0000 | (TSS & 0xffff) << 16 | TSS_LIMIT as u64,
        0,
    ];
    for (index, entry) in (0u64..).zip(gdt) {
        write(GDT + index * 8, &entry.to_le_bytes())?;
    }
    // RSP0, and the I/O permission bitmap right behind the segment's 0x68 bytes: ring 3 may use the
    // ports of the ABI and no other (IOPL is 0, and PVM ignores it anyway).
    write(TSS + 4, &EXCEPTION_STACK_TOP.to_le_bytes())?;
    write(TSS + 0x66, &0x68u16.to_le_bytes())?;
    let mut bitmap = [0xff; (TSS_LIMIT - 0x68 + 1) as usize];
    for port in BARRIER_PORT..PANIC_PORT + 4 {
        bitmap[usize::from(port / 8)] &= !(1 << (port % 8));
    }
    write(TSS + 0x68, &bitmap)?;
    for vector in 0..32u64 {
        let stub = STUBS + vector * STUB_BYTES;
        // out imm8, eax; then round and round, should the VMM ever let it go on.
        write(stub, &[0xe7, (u64::from(EXCEPTION_PORT) + vector) as u8, 0xeb, 0xfc])?;
        // Interrupt gate; ring 3 may raise breakpoint and overflow by instruction.
        let privilege = if matches!(vector, 3 | 4) { 3u64 } else { 0 };
        let low = (stub & 0xffff) | 0x10 << 16 | (0x8e00 | privilege << 13) << 32;
        write(IDT + vector * 16, &low.to_le_bytes())?;
        write(IDT + vector * 16 + 8, &(stub >> 32).to_le_bytes())?;
    }
    Ok(())
}

/// Loads the segments; returns the entry point and the first page after them.
fn load_elf(ram: &GuestRam, tables: &Tables, program: &[u8]) -> Result<(u64, u64), BootError> {
    let Program { entry, segments } = Program::parse(program).map_err(BootError::Elf)?;
    let available = ram.bytes();
    let mut end = PROGRAM_ADDRESS;
    for segment in segments {
        let Segment { start, bytes, size, writable, executable } = segment;
        if start < end {
            return Err(BootError::Elf(out_of_place(start)));
        }
        // The heap gets at least a megabyte.
        let needed = start.saturating_add(size).saturating_add(STACK_BYTES + (1 << 20));
        if needed > available {
            return Err(BootError::TooLarge { needed, available });
        }
        end = (start + size).next_multiple_of(PAGE);
        ram.all().write_slice(bytes, GuestAddress(start))?;
        let writable = if writable { WRITABLE } else { 0 };
        let executable = if executable { 0 } else { NO_EXECUTE };
        tables.map(start, end, PRESENT | USER | writable | executable)?;
    }
    if entry < PROGRAM_ADDRESS || entry >= end {
        return Err(BootError::Elf("no entry point".to_owned()));
    }
    Ok((entry, end))
}

/// A static executable.
pub struct Program<'elf> {
    /// Where it begins to run.
    pub entry: u64,
    /// What is to be in memory.
    pub segments: Vec<Segment<'elf>>,
}

/// Memory of a program's.
pub struct Segment<'elf> {
    /// Its address, page-aligned.
    pub start: u64,
    /// What it begins with; the rest is zero.
    pub bytes: &'elf [u8],
    /// How long it is, in bytes.
    pub size: u64,
    /// Whether the program may write to it.
    pub writable: bool,
    /// Whether it is code.
    pub executable: bool,
}

impl<'elf> Program<'elf> {
    /// Reads an ELF file.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub fn parse(program: &'elf [u8]) -> Result<Self, String> {
        let file = ElfBytes::<LittleEndian>::minimal_parse(program).map_err(|e| e.to_string())?;
        if file.ehdr.e_type != ET_EXEC || file.ehdr.e_machine != EM_X86_64 {
            return Err("wrong type or machine".to_owned());
        }
        let mut segments = Vec::new();
        for segment in file.segments().ok_or("no segments")? {
            if segment.p_type != PT_LOAD {
                continue;
            }
            let bytes = file.segment_data(&segment).map_err(|error| error.to_string())?;
            let (start, size) = (segment.p_vaddr, segment.p_memsz);
            let (writable, executable) = (segment.p_flags & PF_W != 0, segment.p_flags & PF_X != 0);
            if start % PAGE != 0 || bytes.len() as u64 > size {
                return Err(out_of_place(start));
            }
            if writable && executable {
                return Err("a segment is writable and executable".to_owned());
            }
            segments.push(Segment { start, bytes, size, writable, executable });
        }
        Ok(Self { entry: file.ehdr.e_entry, segments })
    }
}

/// What is said of a segment that lies where it cannot be.
pub fn out_of_place(start: u64) -> String {
    format!("segment at {start:#x} is out of place")
}
