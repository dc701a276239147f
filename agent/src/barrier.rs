//! The release barrier, and the pages through which the VMM speaks.

use std::arch::asm;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::{self, NonNull};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use warren_abi::microvm::{
    ABI_VERSION, BARRIER_PORT, BOOT_ADDRESS, Boot, COMMAND_PREFAULT, COMMAND_RELEASE,
    IDENTITY_ADDRESS, Identity, PANIC_PORT, READY_PORT,
};

use crate::error::{AgentError, system};

/// Physical memory. Reserved pages of the first MiB can be mapped from it whatever
/// `CONFIG_STRICT_DEVMEM` says (Linux's arch/x86/mm/init.c, `devmem_is_allowed`).
const MEMORY: &str = "/dev/mem";

const PAGE: NonZeroUsize = NonZeroUsize::new(4096).expect("not 0");

/// The VMM's pages and ports, for the thread that opened them.
pub struct Vmm {
    boot: NonNull<Boot>,
    identity: NonNull<Identity>,
}

impl Vmm {
    /// Maps the pages and gets the ports.
    ///
    /// # Errors
    /// The kernel refuses, or the VMM is of another release.
    pub fn open() -> Result<Self, AgentError> {
        let memory = File::open(MEMORY).map_err(system(MEMORY))?;
        let boot = map::<Boot>(&memory, BOOT_ADDRESS)?;
        let identity = map::<Identity>(&memory, IDENTITY_ADDRESS)?;
        let vmm = Self { boot, identity };
        // SAFETY: the page is mapped for ever, and any bytes are a u32.
        let found = unsafe { ptr::read_volatile(&raw const (*vmm.boot.as_ptr()).abi_version) };
        if found != ABI_VERSION {
            return Err(AgentError::Abi { found, expected: ABI_VERSION });
        }
        // The processor asks for each of the four ports that 32 bits go to.
        let count = u64::from(PANIC_PORT - BARRIER_PORT) + 4;
        // SAFETY: passes integers; the ports are the VMM's, which no driver uses.
        let result = unsafe { libc::ioperm(BARRIER_PORT.into(), count, 1) };
        Errno::result(result).map_err(system("the VMM's ports, by ioperm"))?;
        Ok(vmm)
    }

    /// Comes to the barrier until the VMM lets go: the identity to apply. Each time that the VMM asks
    /// for it, `prefault` touches what will be needed soon.
    pub fn wait(&self, mut prefault: impl FnMut()) -> Identity {
        loop {
            out(BARRIER_PORT);
            // SAFETY: the page is mapped for ever, and the VMM changes it only while this thread is
            // at the barrier.
            let command = unsafe { ptr::read_volatile(&raw const (*self.boot.as_ptr()).command) };
            match command {
                COMMAND_PREFAULT => prefault(),
                // SAFETY: the page is mapped for ever; the VMM wrote a whole Identity before it gave
                // this command, and any bytes are one.
                COMMAND_RELEASE => unsafe { return ptr::read_volatile(self.identity.as_ptr()) },
                _ => {}
            }
        }
    }

    /// Tells the VMM that the identity is applied.
    pub fn ready(&self) {
        out(READY_PORT);
    }
}

fn map<T>(memory: &File, address: u64) -> Result<NonNull<T>, AgentError> {
    const { assert!(size_of::<T>() <= PAGE.get()) };
    // SAFETY: a new mapping, which is never unmapped; it aliases no memory of Rust's.
    let page = unsafe {
        mmap(None, PAGE, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, memory, address as i64)
    };
    let what = || format!("the page at {address:#x} of {MEMORY} (is it reserved memory?)");
    Ok(page.map_err(|error| system(what())(error))?.cast())
}

/// Writes 32 bits. What they are does not matter.
fn out(port: u16) {
    // SAFETY: ioperm gave this thread the port; the VMM reads and changes the two pages only, which
    // are accessed as volatile.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") 0, options(nostack, preserves_flags)) };
}
