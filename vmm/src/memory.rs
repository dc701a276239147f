//! Guest memory: files that each microVM maps as they are, seen whole by the VMM and in part by the
//! devices.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZero;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use warren_abi::microvm::{CODE_ADDRESS, DATA_ADDRESS, PROGRAM_ADDRESS};

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

impl Pages {
    /// Pages of these numbers, in ascending order, put together where they follow each other.
    pub fn of(numbers: impl IntoIterator<Item = u32>) -> Vec<Self> {
        Self::within(1, numbers)
    }

    /// The same, with those between two that are at most so far from each other.
    pub fn within(distance: u32, numbers: impl IntoIterator<Item = u32>) -> Vec<Self> {
        let mut pages: Vec<Self> = Vec::new();
        for number in numbers {
            match pages.last_mut() {
                Some(row) if number - (row.first + row.count - 1) <= distance => {
                    row.count = number + 1 - row.first;
                }
                _ => pages.push(Self { first: number, count: 1 }),
            }
        }
        pages
    }

    /// The first page's address.
    pub fn address(self) -> u64 {
        u64::from(self.first) * PAGE
    }

    /// Their size, in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.count) * PAGE
    }
}

/// What guest memory is mapped from: files, each as it is.
#[derive(Debug)]
pub struct Backing {
    /// Memory from address 0 on.
    pub base: Part,
    /// Pages that are others than the base's, at their place in a file of the same size.
    pub changes: Option<(File, Vec<Pages>)>,
    /// A function's data.
    pub data: Option<Part>,
    /// A function's code.
    pub code: Option<Part>,
}

/// A memfd and its size.
#[derive(Debug)]
pub struct Part {
    /// The file.
    pub memfd: File,
    /// Its size, in bytes: whole pages.
    pub bytes: u64,
}

impl Part {
    /// Zero-filled, and can be sealed. `/proc/PID/maps` shows the name.
    pub fn new(name: &str, bytes: u64) -> io::Result<Self> {
        Ok(Self { memfd: create_memfd(name, bytes)?, bytes })
    }
}

impl Backing {
    /// Memory without a function.
    pub fn new(base: Part) -> Self {
        Self { base, changes: None, data: None, code: None }
    }

    /// All that a guest can use, in bytes.
    pub fn bytes(&self) -> u64 {
        let of = |part: &Option<Part>| part.as_ref().map_or(0, |part| part.bytes);
        self.base.bytes + of(&self.data) + of(&self.code)
    }

    /// Makes it immutable for ever (`fcntl(2)`, File sealing). Nothing may have it mapped shared.
    pub fn seal(&self) -> io::Result<()> {
        seal(&self.base.memfd)?;
        self.changes.iter().try_for_each(|(memfd, _)| seal(memfd))?;
        self.data.iter().chain(&self.code).try_for_each(|part| seal(&part.memfd))
    }
}

/// Guest memory mapped from memfds.
pub struct GuestRam {
    // Dropped in this order: the views point into the mappings.
    dma: GuestMemoryMmap,
    all: GuestMemoryMmap,
    /// What the guest can write to, in ascending order: memory, and a function's data.
    regions: Vec<Region>,
    code: Option<Mapping>,
}

/// Memory that the guest can write to.
struct Region {
    /// Its first page's number.
    first: u32,
    mapping: Mapping,
    /// What a clone began with.
    image: Option<Mapping>,
}

/// Guest memory as KVM is to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    /// Address in the guest.
    pub guest_address: u64,
    /// Where it is mapped in this process.
    pub host_address: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// The guest can only read and execute it.
    pub read_only: bool,
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

    /// Maps these pages from another file, where they are at the same place.
    fn replace(&self, memfd: &File, pages: &[Pages], rights: ProtFlags) -> io::Result<()> {
        for pages in pages {
            let end = pages.address() + pages.bytes();
            let length = NonZero::new(pages.bytes() as usize).filter(|_| end <= self.size as u64);
            let length = length.ok_or_else(|| io::Error::other("pages outside of memory"))?;
            let place = NonZero::new(self.page(pages.first) as usize);
            let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
            // SAFETY: the range lies in this mapping, into which nothing points yet.
            unsafe { mmap(place, length, rights, flags, memfd, pages.address() as i64) }?;
        }
        Ok(())
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

impl Region {
    fn new(memfd: &File, address: u64, bytes: u64, shared: bool) -> io::Result<Self> {
        let sharing = if shared { MapFlags::MAP_SHARED } else { MapFlags::MAP_PRIVATE };
        let flags = sharing | MapFlags::MAP_NORESERVE;
        let mapping = Mapping::new(memfd, bytes, READ.union(WRITE), flags)?;
        let image = if shared { None } else { Some(Mapping::new(memfd, bytes, READ, flags)?) };
        Ok(Self { first: (address / PAGE) as u32, mapping, image })
    }

    fn replace(&self, memfd: &File, pages: &[Pages]) -> io::Result<()> {
        self.mapping.replace(memfd, pages, READ.union(WRITE))?;
        self.image.iter().try_for_each(|image| image.replace(memfd, pages, READ))
    }

    fn image(&self) -> io::Result<&Mapping> {
        self.image.as_ref().ok_or_else(|| io::Error::other("only a clone has a beginning"))
    }

    fn pages(&self) -> u32 {
        (self.mapping.size as u64 / PAGE) as u32
    }

    /// A view for devices and the VMM, from this offset on.
    fn view(&self, from: u64) -> io::Result<Arc<GuestRegionMmap>> {
        let Mapping { address, size } = self.mapping;
        let room = size.checked_sub(from as usize).filter(|&room| room > 0);
        let room = room.ok_or_else(|| io::Error::other("memory ends below the program"))?;
        let (protection, flags) = ((READ.union(WRITE)).bits(), MapFlags::MAP_NORESERVE.bits());
        // SAFETY: from `from` on there are `room` bytes, and `mapping` keeps them mapped for as
        // long as the struct exists that has the view.
        let region = unsafe {
            let start = address.as_ptr().cast::<u8>().add(from as usize);
            MmapRegion::build_raw(start, room, protection, flags)
        };
        let region = Arc::new(region.map_err(io::Error::other)?);
        let start = GuestAddress(u64::from(self.first) * PAGE + from);
        let region = GuestRegionMmap::with_arc(region, start);
        Ok(Arc::new(region.ok_or_else(|| io::Error::other("guest memory wraps around"))?))
    }

    /// The pages that are in place in this private mapping: of its own, and all.
    fn in_place(&self, map: &File) -> io::Result<(Vec<u32>, Vec<u32>)> {
        const PRESENT: u64 = 1 << 63;
        const OF_FILE: u64 = 1 << 61;
        let mut entries = vec![0; self.pages() as usize * 8];
        map.read_exact_at(&mut entries, self.mapping.address.as_ptr() as u64 / PAGE * 8)?;
        let (mut own, mut all) = (Vec::new(), Vec::new());
        for (page, entry) in (self.first..).zip(entries.chunks_exact(8)) {
            let entry = entry.try_into().map_or(0, u64::from_le_bytes);
            if entry & PRESENT != 0 {
                all.push(page);
                if entry & OF_FILE == 0 {
                    own.push(page);
                }
            }
        }
        Ok((own, all))
    }

    /// See [`GuestRam::changed`].
    fn changed(&self, has_swap: bool) -> io::Result<Vec<u32>> {
        let image = self.image()?;
        let mut resident = vec![0u8; self.pages() as usize];
        let start = self.mapping.address.as_ptr();
        // SAFETY: the range is the mapping, and the vector has a byte for each page of it.
        Errno::result(unsafe { libc::mincore(start, self.mapping.size, resident.as_mut_ptr()) })?;
        let may_differ = |page: &(u32, u8)| has_swap || page.1 & 1 != 0;
        let candidates = (0u32..).zip(resident).filter(may_differ).map(|(page, _)| page);
        // SAFETY: whole pages of two mappings that live. The guest, which alone writes to them, does
        // not run while this process does something else.
        let page = |mapping: &Mapping, page| unsafe {
            std::slice::from_raw_parts(mapping.page(page).cast_const(), PAGE as usize)
        };
        let differs = |&n: &u32| page(image, n) != page(&self.mapping, n);
        Ok(candidates.filter(differs).map(|page| self.first + page).collect())
    }

    /// See [`GuestRam::reset`].
    fn reset(&self, kept: &[Pages]) -> io::Result<()> {
        let image = self.image()?;
        let end = self.pages();
        let mut next = 0;
        for pages in kept {
            let first = pages.first.saturating_sub(self.first);
            let last = pages.first.saturating_add(pages.count).saturating_sub(self.first).min(end);
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
}

impl GuestRam {
    /// Maps a memfd whole: shared (the template writes through to it) or private (a clone keeps its
    /// changes to itself, and can go back). The descriptor is not needed any longer.
    pub fn map(memfd: &File, bytes: u64, shared: bool) -> io::Result<Self> {
        Self::of_regions(vec![Region::new(memfd, 0, bytes, shared)?], None)
    }

    /// Maps all files of a clone. The descriptors are not needed any longer.
    pub fn clone_of(backing: &Backing) -> io::Result<Self> {
        let Backing { base, changes, data, code } = backing;
        let mut regions = vec![Region::new(&base.memfd, 0, base.bytes, false)?];
        if let Some((memfd, pages)) = changes {
            regions[0].replace(memfd, pages)?;
        }
        if let Some(Part { memfd, bytes }) = data {
            regions.push(Region::new(memfd, DATA_ADDRESS, *bytes, false)?);
        }
        // Who executes it is the guest, by page tables of KVM's.
        let map = |part: &Part| Mapping::new(&part.memfd, part.bytes, READ, MapFlags::MAP_PRIVATE);
        Self::of_regions(regions, code.as_ref().map(map).transpose()?)
    }

    fn of_regions(regions: Vec<Region>, code: Option<Mapping>) -> io::Result<Self> {
        let views = |first: u64| {
            let view = |region: &Region| region.view(if region.first == 0 { first } else { 0 });
            let views = regions.iter().map(view).collect::<io::Result<Vec<_>>>()?;
            GuestMemoryMmap::from_arc_regions(views).map_err(io::Error::other)
        };
        Ok(Self { dma: views(PROGRAM_ADDRESS)?, all: views(0)?, regions, code })
    }

    /// All that the guest can write to: for the VMM itself.
    pub fn all(&self) -> &GuestMemoryMmap {
        &self.all
    }

    /// What devices may reach: the program's memory and the function's data, not the VMM's tables
    /// below them, and not the function's code.
    pub fn dma(&self) -> &GuestMemoryMmap {
        &self.dma
    }

    /// Lets devices reach all of it, for a guest that has no tables of the VMM's.
    pub fn open_to_devices(&mut self) {
        self.dma = self.all.clone();
    }

    /// What KVM is to know.
    pub fn slots(&self) -> impl Iterator<Item = MemorySlot> {
        let slot = |guest_address, mapping: &Mapping, read_only| MemorySlot {
            guest_address,
            host_address: mapping.address.as_ptr() as u64,
            bytes: mapping.size as u64,
            read_only,
        };
        let memory = self.regions.iter();
        let memory =
            memory.map(move |region| slot(u64::from(region.first) * PAGE, &region.mapping, false));
        memory.chain(self.code.iter().map(move |code| slot(CODE_ADDRESS, code, true)))
    }

    /// Reads a whole page, of code as well.
    pub fn read_page(&self, number: u32, page: &mut [u8; PAGE as usize]) -> io::Result<()> {
        let address = u64::from(number) * PAGE;
        let offset = address.checked_sub(CODE_ADDRESS).map(|offset| (offset / PAGE) as u32);
        match (&self.code, offset) {
            (Some(code), Some(offset)) if u64::from(offset) * PAGE < code.size as u64 => {
                // SAFETY: a whole page of a mapping that lives, to which nobody can write.
                unsafe { page.as_mut_ptr().copy_from(code.page(offset), page.len()) };
                Ok(())
            }
            _ => self.all.read_slice(page, GuestAddress(address)).map_err(io::Error::other),
        }
    }

    /// The pages that are in place in a clone, in ascending order: those that it has of its own,
    /// because they were written to, and all of them (kernel documentation, admin-guide/mm/pagemap).
    pub fn pages_in_place(&self) -> io::Result<(Vec<Pages>, Vec<Pages>)> {
        let map = File::open("/proc/self/pagemap")?;
        let (mut own, mut all) = (Vec::new(), Vec::new());
        for region in &self.regions {
            let (mut own_there, mut all_there) = region.in_place(&map)?;
            own.append(&mut own_there);
            all.append(&mut all_there);
        }
        Ok((Pages::of(own), Pages::of(all)))
    }

    /// The pages that differ from what a clone began with, in ascending order.
    ///
    /// `mincore(2)` tells which may: a page that is in no memory was not written to, unless it was
    /// swapped out since. Where there is no swap the others are not even looked at, which would
    /// allocate them for good in a template that has nothing there.
    pub fn changed(&self) -> io::Result<Vec<u32>> {
        let has_swap = has_swap()?;
        let mut changed = Vec::new();
        for region in &self.regions {
            changed.append(&mut region.changed(has_swap)?);
        }
        Ok(changed)
    }

    /// Takes the faults of these pages now: they become a clone's own (`MADV_POPULATE_WRITE`,
    /// Linux 5.14). Pages outside of memory are ignored.
    pub fn populate(&self, pages: &[Pages]) -> io::Result<()> {
        for pages in pages {
            let within = |region: &&Region| region.first <= pages.first;
            if let Some(region) = self.regions.iter().rev().find(within) {
                let there = Pages { first: pages.first - region.first, count: pages.count };
                region.mapping.advise(there, libc::MADV_POPULATE_WRITE)?;
            }
        }
        Ok(())
    }

    /// Makes a clone's memory what it began with. The pages in `kept`, in ascending order, stay in
    /// place, and what differs in them is copied; all others are given back. Nothing may be using the
    /// memory.
    pub fn reset(&self, kept: &[Pages]) -> io::Result<()> {
        self.regions.iter().try_for_each(|region| region.reset(kept))
    }

    /// Size of the memory from address 0 on, in bytes.
    pub fn bytes(&self) -> u64 {
        self.regions[0].mapping.size as u64
    }

    /// Size of a function's data and code, in bytes.
    pub fn function_bytes(&self) -> Option<(u64, u64)> {
        let data = self.regions.get(1)?.mapping.size as u64;
        Some((data, self.code.as_ref()?.size as u64))
    }
}

const READ: ProtFlags = ProtFlags::PROT_READ;
const WRITE: ProtFlags = ProtFlags::PROT_WRITE;

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
pub fn create_memfd(name: &str, bytes: u64) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(name, flags)?);
    file.set_len(bytes)?;
    Ok(file)
}

/// Makes a memfd immutable for ever (`fcntl(2)`, File sealing), if it is not. It must not be mapped
/// shared.
pub fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_SEAL;
    let has = SealFlag::from_bits_truncate(fcntl(file.as_fd(), FcntlArg::F_GET_SEALS)?);
    if !has.contains(seals) {
        fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    const BYTES: u64 = 4 << 20;

    /// Pages in which the changes differ from the base.
    const CHANGED: [Pages; 2] = [Pages { first: 5, count: 3 }, Pages { first: 1023, count: 1 }];

    /// Memory with changes and a function, in which each page differs from all others.
    fn backing() -> Backing {
        let part = |mark: u64| {
            let part = Part::new("test", BYTES).unwrap();
            for page in 0..BYTES / PAGE {
                part.memfd.write_all_at(&(mark + page).to_le_bytes(), page * PAGE).unwrap();
            }
            part
        };
        let changes = Some((part(1 << 32).memfd, CHANGED.to_vec()));
        let (data, code) = (Some(part(2 << 32)), Some(part(3 << 32)));
        let backing = Backing { base: part(0), changes, data, code };
        backing.seal().unwrap();
        backing
    }

    fn content(ram: &GuestRam) -> Vec<u8> {
        let mut content = vec![0; 2 * BYTES as usize];
        let (memory, data) = content.split_at_mut(BYTES as usize);
        ram.all().read_slice(memory, GuestAddress(0)).unwrap();
        ram.all().read_slice(data, GuestAddress(DATA_ADDRESS)).unwrap();
        content
    }

    /// Where a byte of [`content`] is.
    fn place(offset: u64) -> GuestAddress {
        GuestAddress(if offset < BYTES { offset } else { DATA_ADDRESS + offset - BYTES })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever was written where, and whatever is to stay in place, even what is not in order or
        /// out of range: nothing is left of it.
        #[test]
        fn a_reset_leaves_nothing_of_what_was_written(
            written in prop::collection::vec((0..2 * BYTES, any::<u8>()), 0..200),
            kept in prop::collection::vec((any::<bool>(), 0u32..1200, 0u32..100), 0..20),
        ) {
            let ram = GuestRam::clone_of(&backing()).unwrap();
            let began = content(&ram);
            let data = (DATA_ADDRESS / PAGE) as u32;
            let kept = kept.into_iter().map(|(is_data, first, count)| Pages {
                first: if is_data { data + first } else { first },
                count,
            });
            let kept: Vec<_> = kept.collect();
            ram.populate(&kept).unwrap();
            for (offset, byte) in written {
                ram.all().write_obj(byte, place(offset)).unwrap();
            }
            ram.reset(&kept).unwrap();
            prop_assert!(content(&ram) == began);
            prop_assert_eq!(ram.changed().unwrap(), [0u32; 0]);
        }

        #[test]
        fn pages_are_told_that_differ_and_no_others(
            written in prop::collection::btree_set(0..2 * BYTES / PAGE, 0..50),
        ) {
            let ram = GuestRam::clone_of(&backing()).unwrap();
            let mut expected = Vec::new();
            for page in written {
                let address = place(page * PAGE + 100);
                ram.all().write_obj(7u8, address).unwrap();
                expected.push((address.0 / PAGE) as u32);
            }
            prop_assert_eq!(&ram.changed().unwrap(), &expected);
            prop_assert_eq!(ram.pages_in_place().unwrap().0, Pages::of(expected));
        }
    }

    #[test]
    fn every_part_is_where_it_belongs() {
        let ram = GuestRam::clone_of(&backing()).unwrap();
        let mark = |address| ram.all().read_obj::<u64>(GuestAddress(address)).unwrap();
        let changed = |page| CHANGED.iter().any(|p| (p.first..p.first + p.count).contains(&page));
        for page in 0..(BYTES / PAGE) as u32 {
            let expected = if changed(page) { 1 << 32 } else { 0 } + u64::from(page);
            assert_eq!(mark(u64::from(page) * PAGE), expected);
            assert_eq!(mark(DATA_ADDRESS + u64::from(page) * PAGE), (2 << 32) + u64::from(page));
        }
        let code = (CODE_ADDRESS / PAGE) as u32;
        let mut page = [0; PAGE as usize];
        ram.read_page(code + 9, &mut page).unwrap();
        assert_eq!(page.first_chunk(), Some(&((3u64 << 32) + 9).to_le_bytes()));
        let end = code + (BYTES / PAGE) as u32;
        for outside in [code - 1, end, u32::MAX] {
            assert!(ram.read_page(outside, &mut page).is_err(), "{outside:#x}");
        }
        // Devices reach the data, and neither tables nor code.
        assert!(ram.dma().read_obj::<u8>(GuestAddress(DATA_ADDRESS)).is_ok());
        for wall in [0, PROGRAM_ADDRESS - 1, DATA_ADDRESS - 1, CODE_ADDRESS] {
            assert!(ram.dma().read_obj::<u8>(GuestAddress(wall)).is_err(), "{wall:#x}");
        }
    }

    #[test]
    fn pages_that_were_written_to_are_its_own_and_those_that_were_read_in_place() {
        let ram = GuestRam::clone_of(&backing()).unwrap();
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
        let part = Part::new("test", BYTES).unwrap();
        part.memfd.write_all_at(b"template", 7 * PAGE).unwrap();
        let backing = Backing::new(part);
        backing.seal().unwrap();
        let ram = GuestRam::clone_of(&backing).unwrap();
        assert_eq!(ram.changed().unwrap(), [0u32; 0]);
        let write =
            |page, value: u8| ram.all().write_obj(value, GuestAddress(page * PAGE)).unwrap();
        // Zero where there was something, something where there was nothing, the same as before.
        ram.all().write_slice(&[0; 8], GuestAddress(7 * PAGE)).unwrap();
        write(300, 1);
        write(301, 0);
        ram.all().read_obj::<u8>(GuestAddress(302 * PAGE)).unwrap();
        assert_eq!(ram.changed().unwrap(), [7, 300]);
        let other = GuestRam::clone_of(&backing).unwrap();
        assert_eq!(other.changed().unwrap(), [0u32; 0]);
    }

    #[test]
    fn what_is_not_a_clone_cannot_go_back() {
        let ram = GuestRam::map(&Part::new("test", BYTES).unwrap().memfd, BYTES, true).unwrap();
        assert!(ram.reset(&[]).is_err() && ram.changed().is_err());
    }
}
