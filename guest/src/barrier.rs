//! The release barrier: nothing of the function runs before the VMM lets go of it.

use core::arch::asm;
use core::ptr;

use warren_abi::microvm::{
    BOOT_ADDRESS, Boot, CODE_ADDRESS, COMMAND_LOAD, COMMAND_PREFAULT, COMMAND_RELEASE,
    DATA_ADDRESS, FunctionPlace, IDENTITY_ADDRESS, Identity, STACK_BYTES,
};

use crate::{heap, net, port};

/// How much more of the heap a call with small messages and short connections touches than was used
/// at the barrier, in bytes.
const HOT_HEAP: u64 = 0x8000;

/// How much of the stack below where it is at the barrier, in bytes.
const HOT_STACK: u64 = 0x3000;

/// How much of each large buffer, in bytes.
const HOT_BUFFER: u64 = 0x1000;

/// How much of a function's code, and of its data.
const HOT_FUNCTION: u64 = 0x4_0000;

const PAGE: u64 = 4096;

/// What the VMM has to say.
pub fn boot() -> Boot {
    // SAFETY: the VMM maps the page, has filled it, and changes it only while the guest stands at the
    // barrier or waits.
    unsafe { ptr::read_volatile(BOOT_ADDRESS as *const Boot) }
}

/// Stands at the barrier until it is released, and returns the identity to apply. `load` gets the
/// function that is put into its place meanwhile.
pub fn wait(load: &mut dyn FnMut(FunctionPlace)) -> Identity {
    loop {
        let boot = boot();
        match boot.command {
            COMMAND_PREFAULT => prefault(&boot),
            // SAFETY: given once, to a template's clone, whose heap has moved nowhere yet; the VMM has
            // mapped the region.
            COMMAND_LOAD => {
                unsafe { heap::move_to(boot.function.heap_start, boot.function.heap_end) };
                load(boot.function);
            }
            // SAFETY: the VMM wrote a whole Identity before it gave this command.
            COMMAND_RELEASE => unsafe {
                return ptr::read_volatile(IDENTITY_ADDRESS as *const Identity);
            },
            _ => {}
        }
        port::barrier();
    }
}

/// Touches every page that will be needed soon: in a clone the host then maps it, and copies it if
/// it is to be written, now and not one fault after the other when somebody waits.
fn prefault(boot: &Boot) {
    unsafe extern "C" {
        static text_start: u8;
        static rodata_end: u8;
        static mut data_start: u8;
        static mut bss_start: u8;
        static mut bss_end: u8;
    }
    let stack = stack_pointer();
    let (data, bss, end) = (
        (&raw const data_start) as u64,
        (&raw const bss_start) as u64,
        (&raw const bss_end) as u64,
    );
    let cold = net::cold_buffers();
    look((&raw const text_start) as u64, (&raw const rodata_end) as u64);
    look(IDENTITY_ADDRESS, IDENTITY_ADDRESS + 1);
    touch(data, cold[0].0);
    touch(bss, end);
    for (start, end) in cold {
        touch(start, end.min(start + HOT_BUFFER));
    }
    let heap = match boot.function {
        FunctionPlace { code_end: 0, .. } => boot.heap_start,
        FunctionPlace { code_end, heap_start, .. } => {
            look(CODE_ADDRESS, code_end.min(CODE_ADDRESS + HOT_FUNCTION));
            touch(DATA_ADDRESS, heap_start.min(DATA_ADDRESS + HOT_FUNCTION));
            heap_start
        }
    };
    touch(heap, heap + heap::used() + HOT_HEAP);
    // An unmapped page lies between heap and stack.
    touch(stack - HOT_STACK, boot.heap_end + PAGE + STACK_BYTES);
}

fn stack_pointer() -> u64 {
    let pointer: u64;
    // SAFETY: copies a register.
    unsafe { asm!("mov {}, rsp", out(reg) pointer, options(nomem, nostack, preserves_flags)) };
    pointer
}

fn touch(start: u64, end: u64) {
    let mut page = start & !(PAGE - 1);
    while page < end {
        // SAFETY: `lock or` with 0 leaves what is there as it is, whoever owns it, and the caller
        // names mapped, writable memory. No compiler knows of this access.
        unsafe { asm!("lock or byte ptr [{}], 0", in(reg) page, options(nostack)) };
        page += PAGE;
    }
}

fn look(start: u64, end: u64) {
    let mut page = start & !(PAGE - 1);
    while page < end {
        // SAFETY: the caller names mapped memory.
        unsafe { ptr::read_volatile(page as *const u8) };
        page += PAGE;
    }
}
