//! A guest that turns against its VMM when it is called: for vmm's tests.
//!
//! A request is a line of words: what to do, and on which queue. A deed that does not end the
//! microVM is answered with `survived`; anything else is sent back as it is.
#![no_std]
#![no_main]
#![deny(missing_docs)]

extern crate alloc;

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::arch::asm;
use core::cell::UnsafeCell;
use core::hint::black_box;
use core::ptr;

use warren_abi::microvm::{
    BARRIER_PORT, BOOT_ADDRESS, Boot, NET_MMIO, PANIC_PORT, READY_PORT, STACK_BYTES, VSOCK_MMIO,
    WAIT_PORT,
};
use warren_guest::{Function, Machine};

struct Hostile;

impl Function for Hostile {
    fn call(&mut self, _: &mut Machine, request: &[u8]) -> Vec<u8> {
        let text = core::str::from_utf8(request).unwrap_or_default();
        let mut words = text.split(' ');
        let known = match (words.next(), words.next(), words.next()) {
            (Some("fault"), Some(kind), None) => fault(kind),
            (Some("queue"), Some(name), Some(attack)) => attack_queue(name, attack),
            (Some("port"), Some(kind), None) => misuse_port(kind),
            (Some("loop"), None, None) => loop {
                core::hint::spin_loop();
            },
            (Some("panic"), None, None) => panic!("on\npurpose"),
            (Some("exhaust"), None, None) => {
                let mut hoard = Vec::new();
                loop {
                    hoard.push(black_box(vec![1u8; 1 << 16]));
                }
            }
            _ => false,
        };
        if known { b"survived".to_vec() } else { request.to_vec() }
    }
}

/// Called by the runtime's entry point.
#[unsafe(no_mangle)]
extern "C" fn main() -> ! {
    warren_guest::run(&mut Hostile)
}

/// Raises an exception; `false` if its kind is not known.
fn fault(kind: &str) -> bool {
    // SAFETY: none of this is safe, nor meant to be: every path ends this machine.
    unsafe {
        match kind {
            "divide" => {
                asm!("xor edx, edx", "xor ecx, ecx", "div ecx", out("eax") _, out("ecx") _, out("edx") _);
            }
            "debug" => asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq", "nop", "nop"),
            "breakpoint" => asm!("int3"),
            "overflow" => asm!("int 4"),
            "undefined" => asm!("ud2"),
            "stack-segment" => {
                asm!("mov rbp, {}", "mov rax, [rbp]", in(reg) 1u64 << 63, out("rax") _);
            }
            "software-interrupt" => asm!("int 0x80"),
            "halt" => asm!("hlt"),
            "clear-interrupts" => asm!("cli"),
            "read-cr3" => asm!("mov {}, cr3", out(reg) _),
            "write-cr0" => asm!("mov cr0, {}", in(reg) 0u64),
            "read-msr" => asm!("rdmsr", in("ecx") 0x10, out("eax") _, out("edx") _),
            "non-canonical" => _ = ptr::read_volatile((1u64 << 63) as *const u8),
            "null" => _ = ptr::read_volatile(ptr::without_provenance::<u8>(8)),
            "wild" => _ = ptr::read_volatile(0x1234_5678_9000u64 as *const u8),
            "supervisor" => _ = ptr::read_volatile(0x1000 as *const u8),
            "write-code" => ptr::write_volatile(main as *const () as *mut u8, 0),
            "write-boot-page" => ptr::write_volatile(BOOT_ADDRESS as *mut u8, 0),
            "execute-heap" => {
                let code = Box::new([0xc3u8; 16]);
                core::mem::transmute::<*const u8, extern "C" fn()>(code.as_ptr())();
            }
            "stack-overflow" => _ = black_box(descend(1)),
            "x87" => {
                asm!("fninit", "push 0x340", "fldcw [rsp]", "fld1", "fldz", "fdivp", "fwait", "pop rax", out("rax") _);
            }
            "simd" => {
                asm!("push 0", "ldmxcsr [rsp]", "xorps xmm0, xmm0", "divss xmm0, xmm0", "pop rax", out("rax") _, out("xmm0") _);
            }
            "alignment" => {
                asm!("pushfq", "or qword ptr [rsp], 0x40000", "popfq", "mov rax, rsp", "mov ecx, [rax+1]", out("rax") _, out("ecx") _);
            }
            "syscall" => asm!("syscall", out("rax") _, out("rcx") _, out("r11") _),
            _ => return false,
        }
    }
    true
}

#[expect(unconditional_recursion, reason = "that is the point")]
fn descend(depth: u64) -> u64 {
    let frame = black_box([depth; 128]);
    descend(depth + 1) + frame[depth as usize % 128]
}

fn out(port: u16, value: u32) {
    // SAFETY: the VMM may answer in any way; memory is not assumed to stay as it is.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)) };
}

fn misuse_port(kind: &str) -> bool {
    match kind {
        "barrier" => out(BARRIER_PORT, 0),
        "ready" => out(READY_PORT, 0),
        "panic-outside" => out(PANIC_PORT, 0xffff_fff0),
        "exception" => out(0x4e, 0),
        "unknown" => out(0x1f0, 0),
        // SAFETY: as in `out`.
        "byte" => unsafe { asm!("out dx, al", in("dx") WAIT_PORT, in("al") 0u8) },
        // SAFETY: as in `out`.
        "read" => unsafe { asm!("in eax, dx", in("dx") WAIT_PORT, out("eax") _) },
        "string" => {
            let words = [7u32; 1000];
            // SAFETY: as in `out`; reads only `words`.
            unsafe {
                asm!("rep outsd", in("dx") READY_PORT, inout("rcx") words.len() => _,
                     inout("rsi") words.as_ptr() => _);
            }
        }
        _ => return false,
    }
    true
}

/// The end of memory, where the stack ends.
fn stack_end() -> u64 {
    // SAFETY: the VMM maps this page.
    let boot = unsafe { ptr::read_volatile(BOOT_ADDRESS as *const Boot) };
    boot.heap_end + 4096 + STACK_BYTES
}

/// Entries of the rings below.
const SIZE: usize = 8;

/// A queue in memory (virtio 1.2, 2.7), to be filled with anything.
#[repr(C, align(4096))]
struct Rings {
    descriptors: [Descriptor; SIZE],
    available_flags: u16,
    available_index: u16,
    available: [u16; SIZE],
    used: [u8; 6 + 8 * SIZE],
    padding: [u8; 64],
    buffer: [u8; 2048],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

struct Shared(UnsafeCell<Rings>);

// SAFETY: one thread.
unsafe impl Sync for Shared {}

static RINGS: Shared = Shared(UnsafeCell::new(Rings {
    descriptors: [Descriptor { address: 0, length: 0, flags: 0, next: 0 }; SIZE],
    available_flags: 0,
    available_index: 0,
    available: [0; SIZE],
    used: [0; 6 + 8 * SIZE],
    padding: [0; 64],
    buffer: [0; 2048],
}));

/// Resets a device, gives it one queue of ours and puts nonsense into it.
fn attack_queue(name: &str, attack: &str) -> bool {
    let (device, queue, receives) = match name {
        "net-rx" => (NET_MMIO, 0, true),
        "net-tx" => (NET_MMIO, 1, false),
        "vsock-rx" => (VSOCK_MMIO, 0, true),
        "vsock-tx" => (VSOCK_MMIO, 1, false),
        _ => return false,
    };
    let write = |register: u64, value: u64| {
        // SAFETY: a register of this machine's; whatever comes of it is the purpose.
        unsafe { ptr::write_volatile((device + register) as *mut u32, value as u32) };
    };
    // SAFETY: one thread, and no other reference exists: this function is not entered twice.
    let rings = unsafe { &mut *RINGS.0.get() };
    let flags = if receives { WRITE } else { 0 };
    let buffer = rings.buffer.as_ptr() as u64;
    rings.descriptors = [Descriptor { address: buffer, length: 2048, flags, next: 0 }; SIZE];
    rings.available = [0; SIZE];
    rings.available_index = 1;
    let mut places = [
        (&raw const rings.descriptors) as u64,
        (&raw const rings.available_flags) as u64,
        (&raw const rings.used).addr().next_multiple_of(4) as u64,
    ];
    let mut length = SIZE as u64;
    let first = &mut rings.descriptors[0];
    match attack {
        "address-outside" => first.address = 0x1_0000_0000,
        "address-supervisor" => first.address = 0x1000,
        "address-wraps" => first.address = u64::MAX - 16,
        "address-across-end" => first.address = stack_end() - 16,
        "length-huge" => first.length = u32::MAX,
        "length-zero" => first.length = 0,
        "wrong-direction" => first.flags ^= WRITE,
        "chain-loop" => (first.flags, first.next) = (flags | NEXT, 0),
        "chain-outside" => (first.flags, first.next) = (flags | NEXT, 4096),
        "indirect" => first.flags |= INDIRECT,
        "head-outside" => rings.available = [1000; SIZE],
        "index-jumps" => rings.available_index = 5000,
        "same-head-often" => rings.available_index = SIZE as u16,
        "rings-outside" => places = [0x1_0000_0000; 3],
        "rings-supervisor" => places = [0x1000, 0x2000, 0x3000],
        "rings-wrap" => places = [!0xfff; 3],
        "rings-overlap" => places = [places[0]; 3],
        "size-zero" => length = 0,
        "size-huge" => length = 0xffff_ffff,
        // A vsock header that promises more than there is, of an unknown operation.
        "packet-lies" => rings.buffer[24..28].fill(0xff),
        "packet-unknown" => rings.buffer[..44].fill(0x55),
        _ => return false,
    }
    // As a driver does it up to there (virtio 1.2, 3.1.1): no device serves one that did not.
    write(0x70, 0);
    write(0x70, 3);
    // All features that are offered: there is more to attack.
    for half in 0..2 {
        write(0x14, half);
        write(0x24, half);
        // SAFETY: as above.
        write(0x20, unsafe { ptr::read_volatile((device + 0x10) as *const u32) }.into());
    }
    write(0x70, 11);
    write(0x30, queue);
    write(0x38, length);
    for (place, register) in places.into_iter().zip([0x80, 0x90, 0xa0]) {
        write(register, place);
        write(register + 4, place >> 32);
    }
    write(0x44, 1);
    write(0x70, 15);
    write(0x50, queue);
    write(0x50, 77);
    // Again and again, so that something arrives for a receive queue.
    for _ in 0..if receives { 200 } else { 1 } {
        out(WAIT_PORT, if receives { 10_000 } else { 0 });
    }
    black_box(&RINGS);
    true
}
