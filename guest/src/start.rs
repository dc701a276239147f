//! Entry point and panic handler.

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::fmt::{self, Write};
use core::panic::PanicInfo;

use warren_abi::microvm::PanicMessage;

use crate::port;

// The VMM starts the program with its stack pointer at the end of the stack; the System V ABI wants
// it aligned to 16 bytes before the call.
global_asm!(
    ".section .text.start,\"ax\"",
    ".global _start",
    "_start:",
    "and rsp, -16",
    "call main",
    "ud2",
    ".text",
);

/// Static, because a panic may be about the stack.
struct Report(UnsafeCell<PanicMessage>);

// SAFETY: there is one thread, and only the panic handler, which never returns, touches this.
unsafe impl Sync for Report {}

static REPORT: Report = Report(UnsafeCell::new(PanicMessage { length: 0, text: [0; 508] }));

impl Write for PanicWriter<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let used = self.0.length as usize;
        let room = &mut self.0.text[used..];
        let length = text.len().min(room.len());
        room[..length].copy_from_slice(&text.as_bytes()[..length]);
        self.0.length += length as u32;
        Ok(())
    }
}

struct PanicWriter<'a>(&'a mut PanicMessage);

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    // SAFETY: as said at `Report`. A panic while formatting starts over and ends here too.
    let report = unsafe { &mut *REPORT.0.get() };
    report.length = 0;
    let _ = write!(PanicWriter(report), "{info}");
    port::panic(report)
}
