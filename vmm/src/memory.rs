//! Guest memory: one mapping, seen whole by the VMM and in part by the devices.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use warren_abi::microvm::PROGRAM_ADDRESS;

/// Size of a page, in bytes.
pub const PAGE: u64 = 4096;

/// Guest memory mapped from a memfd.
pub struct GuestRam {
    // Declared first, dropped first: it points into `all`'s mapping.
    dma: GuestMemoryMmap,
    all: GuestMemoryMmap,
    region: Arc<MmapRegion>,
}

impl GuestRam {
    /// Maps a memfd whole: shared (the template writes through to it) or private (a clone keeps its
    /// changes to itself).
    pub fn map(memfd: Arc<File>, bytes: u64, shared: bool) -> io::Result<Self> {
        let sharing = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let size = usize::try_from(bytes).map_err(io::Error::other)?;
        let region = MmapRegionBuilder::new(size)
            .with_mmap_prot(protection)
            .with_mmap_flags(sharing | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(memfd, 0))
            .build()
            .map_err(io::Error::other)?;
        let low = PROGRAM_ADDRESS as usize;
        let high = size.checked_sub(low).filter(|&high| high > 0);
        let high = high.ok_or_else(|| io::Error::other("memory ends below the program"))?;
        // SAFETY: the pointer is `low` bytes into the mapping of `size` bytes, which `region` keeps
        // mapped for as long as this struct exists.
        let program =
            unsafe { MmapRegion::build_raw(region.as_ptr().add(low), high, protection, sharing) }
                .map_err(io::Error::other)?;
        let region = Arc::new(region);
        let view = |region, address| {
            let region = GuestRegionMmap::with_arc(region, GuestAddress(address))
                .ok_or_else(|| io::Error::other("guest memory wraps around"))?;
            GuestMemoryMmap::from_regions(vec![region]).map_err(io::Error::other)
        };
        Ok(Self {
            dma: view(Arc::new(program), PROGRAM_ADDRESS)?,
            all: view(region.clone(), 0)?,
            region,
        })
    }

    /// All of it: for the VMM itself.
    pub fn all(&self) -> &GuestMemoryMmap {
        &self.all
    }

    /// What devices may reach: the program's memory, not the VMM's tables below it.
    pub fn dma(&self) -> &GuestMemoryMmap {
        &self.dma
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.region.size() as u64
    }

    /// Where it is mapped in this process.
    pub fn host_address(&self) -> u64 {
        self.region.as_ptr() as u64
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
