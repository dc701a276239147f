//! Guest memory: one mapping, seen whole by the VMM and in part by the devices.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZero;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
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
    /// What a clone began with.
    image: Option<Mapping>,
}

/// Pages that are unmapped when this goes.
struct Mapping {
    address: NonNull<c_void>,
    size: usize,
}

impl Mapping {
    fn new(memfd: &File, bytes: u64, rights: ProtFlags, flags: MapFlags) -> io::Result<Self> {
        let size = usize::try_from(bytes).map_err(io::Error::other)?;
        let length = NonZero::new(size).ok_or_else(|| io::Error::other("there is no memory"))?;
        // SAFETY: the kernel chooses where, so nothing else is mapped there.
        let address = unsafe { mmap(None, length, rights, flags, memfd, 0) }?;
        Ok(Self { address, size })
    }

    /// Where a page is; the page must be in the mapping.
    fn page(&self, number: u32) -> *mut u8 {
        self.address.as_ptr().cast::<u8>().wrapping_add(number as usize * PAGE as usize)
    }

    /// `madvise(2)` for pages; those outside of the mapping are ignored.
    fn advise(&self, Pages { first, count }: Pages, advice: libc::c_int) -> io::Result<()> {
        let end = (u64::from(first) + u64::from(count)) * PAGE;
        if count == 0 || end > self.size as u64 {
            return Ok(());
        }
        let length = count as usize * PAGE as usize;
        // SAFETY: the range lies in the mapping, whose bytes this neither frees nor protects.
        Errno::result(unsafe { libc::madvise(self.page(first).cast(), length, advice) })?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by whoever made this, and nothing points into it any more.
        let _ = unsafe { munmap(self.address, self.size) };
    }
}

impl GuestRam {
    /// Maps a memfd whole: shared (the template writes through to it) or private (a clone keeps its
    /// changes to itself, and can go back). The descriptor is not needed any longer.
    pub fn map(memfd: &File, bytes: u64, shared: bool) -> io::Result<Self> {
        let sharing = if shared { MapFlags::MAP_SHARED } else { MapFlags::MAP_PRIVATE };
        let flags = sharing | MapFlags::MAP_NORESERVE;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let mapping = Mapping::new(memfd, bytes, protection, flags)?;
        let image = if shared {
            None
        } else {
            Some(Mapping::new(memfd, bytes, ProtFlags::PROT_READ, flags)?)
        };
        let Mapping { address, size } = mapping;
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
        Ok(Self { dma: view(PROGRAM_ADDRESS)?, all: view(0)?, mapping, image })
    }

    /// All of it: for the VMM itself.
    pub fn all(&self) -> &GuestMemoryMmap {
        &self.all
    }

    /// What devices may reach: the program's memory, not the VMM's tables below it.
    pub fn dma(&self) -> &GuestMemoryMmap {
        &self.dma
    }

    /// Lets devices reach all of it, for a guest that has no tables of the VMM's.
    pub fn open_to_devices(&mut self) {
        self.dma = self.all.clone();
    }

    /// The pages that are in place in this private mapping, in ascending order: those that it has of
    /// its own, because they were written to, and all of them (kernel documentation,
    /// admin-guide/mm/pagemap).
    pub fn pages_in_place(&self) -> io::Result<(Vec<Pages>, Vec<Pages>)> {
        const PRESENT: u64 = 1 << 63;
        const OF_FILE: u64 = 1 << 61;
        fn add(to: &mut Vec<Pages>, page: u32) {
            match to.last_mut() {
                Some(last) if last.first + last.count == page => last.count += 1,
                _ => to.push(Pages { first: page, count: 1 }),
            }
        }
        let count = self.bytes() / PAGE;
        let mut entries = vec![0; count as usize * 8];
        let map = File::open("/proc/self/pagemap")?;
        map.read_exact_at(&mut entries, self.host_address() / PAGE * 8)?;
        let (mut own, mut all) = (Vec::new(), Vec::new());
        for (page, entry) in (0u32..).zip(entries.chunks_exact(8)) {
            let entry = entry.try_into().map_or(0, u64::from_le_bytes);
            if entry & PRESENT != 0 {
                add(&mut all, page);
                if entry & OF_FILE == 0 {
                    add(&mut own, page);
                }
            }
        }
        Ok((own, all))
    }

    /// The pages that differ from what this private mapping began with, in ascending order.
    ///
    /// `mincore(2)` tells which may: a page that is in no memory was not written to, unless it was
    /// swapped out since. Where there is no swap the others are not even looked at, which would
    /// allocate them for good in a template that has nothing there.
    pub fn changed(&self) -> io::Result<Vec<u32>> {
        let Some(image) = &self.image else {
            return Err(io::Error::other("only a clone differs from where it began"));
        };
        let mut resident = vec![0u8; (self.bytes() / PAGE) as usize];
        let start = self.mapping.address.as_ptr();
        // SAFETY: the range is the mapping, and the vector has a byte for each page of it.
        Errno::result(unsafe { libc::mincore(start, self.mapping.size, resident.as_mut_ptr()) })?;
        let has_swap = has_swap()?;
        let may_differ = |page: &(u32, u8)| has_swap || page.1 & 1 != 0;
        let candidates = (0u32..).zip(resident).filter(may_differ).map(|(page, _)| page);
        // SAFETY: whole pages of two mappings that live. The guest, which alone writes to them, does
        // not run while this process does something else.
        let page = |mapping: &Mapping, page| unsafe {
            std::slice::from_raw_parts(mapping.page(page).cast_const(), PAGE as usize)
        };
        Ok(candidates.filter(|&n| page(image, n) != page(&self.mapping, n)).collect())
    }

    /// Takes the faults of these pages now: they become this private mapping's own
    /// (`MADV_POPULATE_WRITE`, Linux 5.14). Pages outside of memory are ignored.
    pub fn populate(&self, pages: &[Pages]) -> io::Result<()> {
        for &pages in pages {
            self.mapping.advise(pages, libc::MADV_POPULATE_WRITE)?;
        }
        Ok(())
    }

    /// Makes a clone's memory what it began with. The pages in `kept`, in ascending order, stay in
    /// place, and what differs in them is copied; all others are given back. Nothing may be using the
    /// memory.
    pub fn reset(&self, kept: &[Pages]) -> io::Result<()> {
        let Some(image) = &self.image else {
            return Err(io::Error::other("only a clone can go back to where it began"));
        };
        let end = (self.bytes() / PAGE) as u32;
        let mut next = 0;
        for &Pages { first, count } in kept {
            let last = first.saturating_add(count).min(end);
            let first = first.clamp(next, last.max(next));
            let others = Pages { first: next, count: first - next };
            self.mapping.advise(others, libc::MADV_DONTNEED)?;
            for page in first..last {
                restore(image.page(page), self.mapping.page(page));
            }
            next = last.max(next);
        }
        self.mapping.advise(Pages { first: next, count: end - next }, libc::MADV_DONTNEED)
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

/// Copies a page unless it is the same: then it may still be shared with other clones.
fn restore(from: *const u8, to: *mut u8) {
    // SAFETY: both are whole pages of two mappings that live, and nobody else uses the one that is
    // written to (as `reset` demands).
    unsafe {
        let was = std::slice::from_raw_parts(from, PAGE as usize);
        if was != std::slice::from_raw_parts(to, PAGE as usize) {
            std::ptr::copy_nonoverlapping(from, to, PAGE as usize);
        }
    }
}

/// Whether this host may swap.
fn has_swap() -> io::Result<bool> {
    let mut info = std::mem::MaybeUninit::<libc::sysinfo>::zeroed();
    // SAFETY: the kernel fills a structure of this kind, of which zeroes are a value.
    let info = unsafe {
        Errno::result(libc::sysinfo(info.as_mut_ptr()))?;
        info.assume_init()
    };
    Ok(info.totalswap > 0)
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    const BYTES: u64 = 4 << 20;

    /// A memfd in which each page differs from all others.
    fn image() -> File {
        let memfd = create_memfd(BYTES).unwrap();
        for page in 0..BYTES / PAGE {
            memfd.write_all_at(&page.to_le_bytes(), page * PAGE).unwrap();
        }
        seal(&memfd).unwrap();
        memfd
    }

    fn content(ram: &GuestRam) -> Vec<u8> {
        let mut content = vec![0; BYTES as usize];
        ram.all().read_slice(&mut content, GuestAddress(0)).unwrap();
        content
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever was written where, and whatever is to stay in place, even what is not in order or
        /// out of range: nothing is left of it.
        #[test]
        fn a_reset_leaves_nothing_of_what_was_written(
            written in prop::collection::vec((0..BYTES, any::<u8>()), 0..200),
            kept in prop::collection::vec((0u32..1200, 0u32..100), 0..20),
        ) {
            let memfd = image();
            let ram = GuestRam::map(&memfd, BYTES, false).unwrap();
            let began = content(&ram);
            let kept: Vec<_> =
                kept.into_iter().map(|(first, count)| Pages { first, count }).collect();
            ram.populate(&kept).unwrap();
            for (address, byte) in written {
                ram.all().write_obj(byte, GuestAddress(address)).unwrap();
            }
            ram.reset(&kept).unwrap();
            prop_assert_eq!(content(&ram), began);
        }
    }

    #[test]
    fn pages_that_were_written_to_are_its_own_and_those_that_were_read_in_place() {
        let memfd = image();
        let ram = GuestRam::map(&memfd, BYTES, false).unwrap();
        for page in [3, 4, 200] {
            ram.all().write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
        }
        ram.all().read_obj::<u8>(GuestAddress(100 * PAGE)).unwrap();
        let (own, all) = ram.pages_in_place().unwrap();
        assert_eq!(own, [Pages { first: 3, count: 2 }, Pages { first: 200, count: 1 }]);
        let has = |page| all.iter().any(|p| (p.first..p.first + p.count).contains(&page));
        assert!(has(3) && has(100) && has(200), "{all:?}");
        ram.reset(&[]).unwrap();
        assert_eq!(ram.pages_in_place().unwrap().0, []);
    }

    #[test]
    fn what_differs_is_told_and_what_was_only_read_is_not() {
        let memfd = create_memfd(BYTES).unwrap();
        memfd.write_all_at(b"template", 7 * PAGE).unwrap();
        seal(&memfd).unwrap();
        let ram = GuestRam::map(&memfd, BYTES, false).unwrap();
        assert_eq!(ram.changed().unwrap(), [0u32; 0]);
        let write =
            |page, value: u8| ram.all().write_obj(value, GuestAddress(page * PAGE)).unwrap();
        // Zero where there was something, something where there was nothing, the same as before.
        ram.all().write_slice(&[0; 8], GuestAddress(7 * PAGE)).unwrap();
        write(300, 1);
        write(301, 0);
        ram.all().read_obj::<u8>(GuestAddress(302 * PAGE)).unwrap();
        assert_eq!(ram.changed().unwrap(), [7, 300]);
        let other = GuestRam::map(&memfd, BYTES, false).unwrap();
        assert_eq!(other.changed().unwrap(), [0u32; 0]);
    }

    #[test]
    fn what_is_not_a_clone_cannot_go_back() {
        let memfd = create_memfd(BYTES).unwrap();
        let ram = GuestRam::map(&memfd, BYTES, true).unwrap();
        assert!(ram.reset(&[]).is_err() && ram.changed().is_err());
    }
}
