//! A function that counts its calls, keeps what it was called with, and on request runs into a wall.
//!
//! It is linked at the places of functions (guest/function.ld) and uses nothing of the guest's.
#![no_std]
#![no_main]
#![deny(missing_docs)]

use core::cell::UnsafeCell;
use core::panic::PanicInfo;
use core::ptr;

/// What the function keeps between calls, in its data region.
struct Kept(UnsafeCell<Memory>);

struct Memory {
    calls: u64,
    /// Not zero at first: it is of the executable's data, not of its zeroes.
    greeting: [u8; 6],
    last: [u8; 256],
    last_bytes: usize,
}

// SAFETY: a guest has one thread.
unsafe impl Sync for Kept {}

static KEPT: Kept =
    Kept(UnsafeCell::new(Memory { calls: 0, greeting: *b"hello ", last: [0; 256], last_bytes: 0 }));

/// Answers with "hello", how many calls there were before, and what the last one said.
///
/// # Safety
/// As [`warren_abi::microvm::FunctionEntry`].
#[unsafe(no_mangle)]
unsafe extern "C" fn function(
    request: *const u8,
    request_bytes: usize,
    reply: *mut u8,
    room: usize,
) -> usize {
    // SAFETY: promised by the caller.
    let (request, reply) = unsafe {
        (
            core::slice::from_raw_parts(request, request_bytes),
            core::slice::from_raw_parts_mut(reply, room),
        )
    };
    // SAFETY: one thread, and no call on the way in.
    let kept = unsafe { &mut *KEPT.0.get() };
    match request {
        // SAFETY: none. These are the walls, and the microVM ends at them.
        b"write code" => unsafe { (function as *mut u8).write_volatile(0xc3) },
        b"run data" => unsafe {
            kept.last[0] = 0xc3;
            core::mem::transmute::<*const u8, extern "C" fn()>(kept.last.as_ptr())();
        },
        b"read beyond" => unsafe {
            ptr::read_volatile(0x5fff_f000 as *const u8);
        },
        b"reply too long" => return room + 1,
        _ => {}
    }
    let mut length = 0;
    let mut digits = [0; 20];
    let said = &kept.last[..kept.last_bytes];
    for part in [&kept.greeting[..], decimal(kept.calls, &mut digits), b" ", said] {
        reply[length..length + part.len()].copy_from_slice(part);
        length += part.len();
    }
    kept.calls += 1;
    kept.last_bytes = request.len().min(kept.last.len());
    kept.last[..kept.last_bytes].copy_from_slice(&request[..kept.last_bytes]);
    length
}

fn decimal(mut number: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut first = digits.len();
    loop {
        first -= 1;
        digits[first] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[first..];
        }
    }
}

#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    loop {
        // SAFETY: an instruction that is none: the VMM ends the microVM.
        unsafe { core::arch::asm!("ud2") };
    }
}
