//! Between the VMM and its guests: memory map, boot page, identity page, ports, vsock ports.
//!
//! Both kinds of guest have the two pages, the ports [`BARRIER_PORT`] and [`READY_PORT`], and the
//! devices' registers at the same addresses. In a Linux guest the pages are reserved memory, which
//! the agent maps from `/dev/mem`; the rest of its memory is Linux's.
//!
//! The no-OS guest runs wholly in ring 3 with identity-mapped memory:
//!
//! | address | what |
//! |---|---|
//! | 0 | never mapped |
//! | 0x1000 | the VMM's: descriptor tables, exception stubs and stack (supervisor) |
//! | [`BOOT_ADDRESS`] | [`Boot`], read-only to the guest |
//! | [`IDENTITY_ADDRESS`] | [`Identity`], read-only to the guest |
//! | 0x20000 | page tables (supervisor) |
//! | [`PROGRAM_ADDRESS`] | the program, each segment with its own rights, then the heap |
//! | end of memory - [`STACK_BYTES`] | the stack, with an unmapped page below it |
//! | [`DATA_ADDRESS`] | a function's data, then the heap from when it is loaded on |
//! | [`CODE_ADDRESS`] | a function's code and constants: no clone can write to them, all share them |
//! | [`NET_MMIO`] and up | virtio-mmio registers (virtio 1.2, 4.2.2), one page each |

/// Version of everything in this module except the invocation framing. A guest refuses to boot
/// under another one, and a template records it.
pub const ABI_VERSION: u32 = 4;

/// The first version whose guests take a function.
pub const FUNCTION_ABI: u32 = 4;

/// Where [`Boot`] is.
pub const BOOT_ADDRESS: u64 = 0x1_0000;

/// Where [`Identity`] is.
pub const IDENTITY_ADDRESS: u64 = 0x1_1000;

/// Where programs are linked; below it nothing is the guest's to write.
pub const PROGRAM_ADDRESS: u64 = 0x20_0000;

/// Size of the stack, in bytes, at the end of memory.
pub const STACK_BYTES: u64 = 0xc_0000;

/// Where a function's data begins. Only microVMs of a function's image have memory there.
pub const DATA_ADDRESS: u64 = 0x2000_0000;

/// Where a function's code begins. Only microVMs of a function's image have something there.
pub const CODE_ADDRESS: u64 = 0x4000_0000;

/// The most that a function may have of either, in bytes.
pub const FUNCTION_BYTES_MAX: u64 = 512 << 20;

/// Registers of the network device.
pub const NET_MMIO: u64 = 0xd000_0000;

/// Registers of the vsock device.
pub const VSOCK_MMIO: u64 = 0xd000_1000;

/// Registers of the source of entropy of a Linux guest.
pub const RNG_MMIO: u64 = 0xd000_2000;

/// Registers of the disk of a Linux guest.
pub const BLK_MMIO: u64 = 0xd000_3000;

/// Registers of the console of a Linux guest.
pub const CONSOLE_MMIO: u64 = 0xd000_4000;

/// Size of a device's register window, in bytes.
pub const MMIO_BYTES: u64 = 0x1000;

/// Written (32 bits, any value) when the guest stands at the release barrier. What it is to do next
/// is in [`Boot::command`] when the instruction completes.
pub const BARRIER_PORT: u16 = 0x10;

/// Written (32 bits, any value) when the guest has applied its [`Identity`].
pub const READY_PORT: u16 = 0x11;

/// Kick and wait in one: the VMM serves all queues and completes the instruction when something
/// came for the guest, or after the microseconds that were written (32 bits). [`WAIT_FOREVER`]
/// means no deadline, 0 only serves the queues. Then the guest looks at [`Boot::generation`].
pub const WAIT_PORT: u16 = 0x12;

/// Written (32 bits) with the address of a [`PanicMessage`]; the microVM ends.
pub const PANIC_PORT: u16 = 0x13;

/// No deadline, for [`WAIT_PORT`].
pub const WAIT_FOREVER: u32 = u32::MAX;

/// [`Boot::command`]: come to the barrier again.
pub const COMMAND_PARK: u32 = 0;

/// [`Boot::command`]: write to every page that will be needed soon, then come to the barrier again.
/// In a clone this takes the page faults before anybody waits for it.
pub const COMMAND_PREFAULT: u32 = 1;

/// [`Boot::command`]: apply the [`Identity`], write [`READY_PORT`], and run.
pub const COMMAND_RELEASE: u32 = 2;

/// [`Boot::command`]: a function was put in its place, as [`Boot::function`] says: give out memory of
/// its data region from now on, and come to the barrier again. Nothing of the function runs.
pub const COMMAND_LOAD: u32 = 3;

/// Where a function is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FunctionPlace {
    /// Its [`FunctionEntry`]; 0: it is a package, not a program.
    pub entry: u64,
    /// End of its code and constants, which begin at [`CODE_ADDRESS`]; 0: there is no function.
    pub code_end: u64,
    /// First byte of the heap behind its data, page-aligned.
    pub heap_start: u64,
    /// End of the heap, page-aligned.
    pub heap_end: u64,
    /// End of what is behind the heap, page-aligned: a component's linear memories.
    pub memory_end: u64,
}

/// A function's entry point, which answers one call: it is given a request and a place for the reply,
/// and returns the reply's length. A longer one than there is room for ends the microVM.
///
/// # Safety
/// The first two arguments bound memory to be read, the last two memory to be written, and nothing
/// else writes to either meanwhile.
pub type FunctionEntry = unsafe extern "C" fn(*const u8, usize, *mut u8, usize) -> usize;

/// What the guest must know to boot.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// [`ABI_VERSION`].
    pub abi_version: u32,
    /// What to do when the barrier's instruction completes: one of the `COMMAND_*`.
    pub command: u32,
    /// First byte of the heap, page-aligned.
    pub heap_start: u64,
    /// End of the heap, page-aligned.
    pub heap_end: u64,
    /// Changes only while the guest stands in [`WAIT_PORT`]: then it has become a clone of the one
    /// that waited. Before it does anything else it follows [`Boot::command`] as at its barrier,
    /// whose connections, frames and calls in progress are not its own.
    pub generation: u64,
    /// The function that was loaded, if one was.
    pub function: FunctionPlace,
}

/// What a panicking guest leaves behind.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PanicMessage {
    /// How many of the bytes are used.
    pub length: u32,
    /// The message, UTF-8, cut at this length.
    pub text: [u8; 508],
}

/// The guest's context identifier on its vsock device (virtio 1.2, 5.10.4). Every microVM has the
/// same one: each has a device of its own.
pub const GUEST_CID: u64 = 3;

/// The vsock port on which the guest serves invocations.
///
/// A connection carries any number of exchanges, one after the other: a little-endian `u32` length
/// and that many bytes, answered by the same.
pub const INVOCATION_PORT: u32 = 1024;

/// The vsock port on which functions serve HTTP/1.1. In a Linux guest each connection becomes one to the
/// function's server, at [`HTTP_PORT`] of its loopback.
pub const HTTP_VSOCK_PORT: u32 = 80;

/// The vsock port of a function's log: who connects is sent its lines. The first one has them.
pub const LOG_VSOCK_PORT: u32 = 514;

/// The field of an answer that Warren gives in the function's place, with the reason in one word.
pub const ERROR_FIELD: &str = "warren-error";

/// Where a Linux function's HTTP server is to listen, on 127.0.0.1 or all addresses. The function
/// has it in its environment, as `PORT`.
pub const HTTP_PORT: u16 = 8080;

/// What a Linux guest's agent runs in the function's image.
pub const FUNCTION_PROGRAM: &str = "/function";

/// The largest invocation request or reply, in bytes.
pub const INVOCATION_MAX: u32 = 1 << 20;

/// Who a clone is: written into the guest by the VMM at release, before the guest runs on.
///
/// The guest applies it and acknowledges before it does anything else.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Wall clock (`CLOCK_REALTIME`) at [`Identity::tsc`], in nanoseconds since 1970.
    pub wall_clock_ns: u64,
    /// The guest's time stamp counter when the wall clock was read: 0 on the guest's own clock.
    pub tsc: u64,
    /// Frequency of the time stamp counter, in Hz.
    pub tsc_hz: u64,
    /// Fresh entropy, never given to another clone.
    pub entropy: [u8; 64],
    /// Instance identifier, a version 4 UUID (RFC 9562).
    pub instance_id: [u8; 16],
    /// Host name, UTF-8, padded with zero bytes.
    pub hostname: [u8; 64],
    /// Address of the guest's interface, a /32.
    pub ipv4: [u8; 4],
    /// Default gateway, reached on-link.
    pub gateway: [u8; 4],
    /// MAC address.
    pub mac: [u8; 6],
    /// Largest IP packet the path carries unfragmented, in bytes.
    pub mtu: u16,
}

impl Identity {
    /// Of a guest that was not released: no address, no time, no entropy.
    pub const NOBODY: Self = Self {
        wall_clock_ns: 0,
        tsc: 0,
        tsc_hz: 0,
        entropy: [0; 64],
        instance_id: [0; 16],
        hostname: [0; 64],
        ipv4: [0; 4],
        gateway: [0; 4],
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
    };
}
