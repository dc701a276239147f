//! Values of an array map, mapped into memory: to read or to count costs no system call.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use aya::maps::MapData;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::Error;

/// The values of a map, as words of 64 bits.
pub(super) struct Mapping {
    address: NonNull<c_void>,
    length: NonZeroUsize,
}

// SAFETY: the mapping is no thread's own, and is read and written by atomic instructions only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length; nobody has a pointer into it any more.
        unsafe { munmap(self.address, self.length.get()) }.ok();
    }
}

impl Mapping {
    /// The first `words` of a map, which has at least so many and `BPF_F_MMAPABLE`.
    pub fn open(name: &'static str, map: &MapData, words: NonZeroUsize) -> Result<Self, Error> {
        const WORD: NonZeroUsize = NonZeroUsize::new(size_of::<u64>()).unwrap();
        let length = words.saturating_mul(WORD);
        let (rights, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping, wherever there is room for it.
        let address = unsafe { mmap(None, length, rights, flags, map.fd().as_fd(), 0) };
        let error = |source: nix::Error| Error::system("map into memory", name, source.into());
        Ok(Self { address: address.map_err(error)?, length })
    }

    /// A word; none beyond the last.
    pub fn word(&self, index: usize) -> Option<&AtomicU64> {
        let is_there = index < self.length.get() / size_of::<u64>();
        // SAFETY: it is in the mapping, which is there as long as `self`, and page-aligned.
        is_there
            .then(|| unsafe { AtomicU64::from_ptr(self.address.as_ptr().cast::<u64>().add(index)) })
    }
}
