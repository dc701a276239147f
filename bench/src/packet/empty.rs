//! A program that does nothing: what the kernel's account of any program holds besides its work.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use warren_netns::netns::Namespace;

/// Commands of the bpf system call, and what they are told (`<linux/bpf.h>`).
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;

/// `r0 = TCX_NEXT (-1)`, `exit`: the packet goes on.
const NEXT: [u64; 2] = [0xffff_ffff_0000_00b7, 0x95];

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
}

/// The beginning of `union bpf_attr` for `BPF_LINK_CREATE`, for tcx.
#[repr(C)]
struct Link {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    zero: u32,
    revision: u64,
}

/// The program, at the ingress of an interface until this value is dropped.
pub struct Empty {
    program: OwnedFd,
    _link: OwnedFd,
}

impl Empty {
    /// Loads and attaches it.
    pub fn attach(namespace: &Namespace, interface: &str) -> Result<Self> {
        let license = c"GPL";
        let load = Load {
            kind: BPF_PROG_TYPE_SCHED_CLS,
            instruction_count: NEXT.len() as u32,
            instructions: NEXT.as_ptr().addr() as u64,
            license: license.as_ptr().addr() as u64,
        };
        // SAFETY: the instructions and the license outlive the call.
        let program = unsafe { bpf(BPF_PROG_LOAD, &load) }.context("cannot load a program")?;
        let link = namespace.run(|| -> Result<OwnedFd> {
            let link = Link {
                program: program.as_raw_fd() as u32,
                ifindex: nix::net::if_::if_nametoindex(interface)?,
                attach_type: BPF_TCX_INGRESS,
                flags: 0,
                relative: 0,
                zero: 0,
                revision: 0,
            };
            // SAFETY: the command takes no pointers.
            unsafe { bpf(BPF_LINK_CREATE, &link) }.context("cannot attach a program")
        })?;
        Ok(Self { program, _link: link })
    }

    /// The program, for its account.
    pub fn program(&self) -> Result<OwnedFd> {
        Ok(self.program.try_clone()?)
    }
}

/// # Safety
/// `attributes` must be what the command wants, and the command one that returns a descriptor.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the pointer and the size are those of a whole `T`; the rest is the caller's promise.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>())
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
