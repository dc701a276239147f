//! Guest memory: one mapping, seen whole by the VMM and in part by the devices.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZero;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use warren_abi::microvm::PROGRAM_ADDRESS;

/// Size of a page, in bytes.
pub const PAGE: u64 = 4096;

/// Pages in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// The first one's number: its address divided by [`PAGE`].
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// Guest memory mapped from a memfd.
pub struct GuestRam {
    // Dropped in this order: the views point into the mapping.
    dma: GuestMemoryMmap,
    all: GuestMemoryMmap,
    mapping: Mapping,
}

/// Pages that are unmapped when this goes.
struct Mapping {
    address: NonNull<c_void>,
    size: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by whoever made this, and nothing points into it any more.
        let _ = unsafe { munmap(self.address, self.size) };
    }
}

impl GuestRam {
    /// Maps a memfd whole: shared (the template writes through to it) or private (a clone keeps its
    /// changes to itself). The descriptor is not needed any longer.
    pub fn map(memfd: &File, bytes: u64, shared: bool) -> io::Result<Self> {
        let size = usize::try_from(bytes).map_err(io::Error::other)?;
        let sharing = if shared { MapFlags::MAP_SHARED } else { MapFlags::MAP_PRIVATE };
        let flags = sharing | MapFlags::MAP_NORESERVE;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let length = NonZero::new(size).ok_or_else(|| io::Error::other("there is no memory"))?;
        // SAFETY: the kernel chooses where, so nothing else is mapped there.
        let address = unsafe { mmap(None, length, protection, flags, memfd, 0) }?;
        let mapping = Mapping { address, size };
        let view = |from: u64| {
            let room = size.checked_sub(from as usize).filter(|&room| room > 0);
            let room = room.ok_or_else(|| io::Error::other("memory ends below the program"))?;
            let (protection, flags) = (protection.bits(), flags.bits());
            // SAFETY: from `from` on there are `room` bytes, and `mapping` keeps them mapped for as
            // long as the struct exists that has the view.
            let region = unsafe {
                let start = address.as_ptr().cast::<u8>().add(from as usize);
                MmapRegion::build_raw(start, room, protection, flags)
            };
            let region = Arc::new(region.map_err(io::Error::other)?);
            let region = GuestRegionMmap::with_arc(region, GuestAddress(from))
                .ok_or_else(|| io::Error::other("guest memory wraps around"))?;
            GuestMemoryMmap::from_regions(vec![region]).map_err(io::Error::other)
        };
        Ok(Self { dma: view(PROGRAM_ADDRESS)?, all: view(0)?, mapping })
    }

    /// All of it: for the VMM itself.
    pub fn all(&self) -> &GuestMemoryMmap {
        &self.all
    }

    /// What devices may reach: the program's memory, not the VMM's tables below it.
    pub fn dma(&self) -> &GuestMemoryMmap {
        &self.dma
    }

    /// The pages that this private mapping has of its own, because they were written to, in
    /// ascending order (kernel documentation, admin-guide/mm/pagemap).
    pub fn own_pages(&self) -> io::Result<Vec<Pages>> {
        const PRESENT: u64 = 1 << 63;
        const OF_FILE: u64 = 1 << 61;
        let count = self.bytes() / PAGE;
        let mut entries = vec![0; count as usize * 8];
        let map = File::open("/proc/self/pagemap")?;
        map.read_exact_at(&mut entries, self.host_address() / PAGE * 8)?;
        let mut own: Vec<Pages> = Vec::new();
        for (page, entry) in (0u32..).zip(entries.chunks_exact(8)) {
            let entry = entry.try_into().map_or(0, u64::from_le_bytes);
            if entry & (PRESENT | OF_FILE) != PRESENT {
                continue;
            }
            match own.last_mut() {
                Some(last) if last.first + last.count == page => last.count += 1,
                _ => own.push(Pages { first: page, count: 1 }),
            }
        }
        Ok(own)
    }

    /// Takes the faults of these pages now: they become this private mapping's own
    /// (`MADV_POPULATE_WRITE`, Linux 5.14). Pages outside of memory are ignored.
    pub fn populate(&self, pages: &[Pages]) -> io::Result<()> {
        for &Pages { first, count } in pages {
            let (offset, length) = (u64::from(first) * PAGE, u64::from(count) * PAGE);
            if offset + length > self.bytes() {
                continue;
            }
            // SAFETY: the range lies in the mapping, and becomes no other than it is.
            let done = unsafe {
                libc::madvise(
                    self.mapping.address.as_ptr().add(offset as usize),
                    length as usize,
                    libc::MADV_POPULATE_WRITE,
                )
            };
            nix::errno::Errno::result(done)?;
        }
        Ok(())
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.size as u64
    }

    /// Where it is mapped in this process.
    pub fn host_address(&self) -> u64 {
        self.mapping.address.as_ptr() as u64
    }
}

/// A memfd of this size, zero-filled, that can be sealed.
pub fn create_memfd(bytes: u64) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let memfd: OwnedFd = memfd_create("warren-template", flags)?;
    let file = File::from(memfd);
    file.set_len(bytes)?;
    Ok(file)
}

/// Makes a memfd immutable for ever (`fcntl(2)`, File sealing). It must not be mapped shared.
pub fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_SEAL;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    Ok(())
}
