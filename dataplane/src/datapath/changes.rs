//! Tables of which programs keep what they found, per CPU, until they are told of a change.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::Pod;
use aya::maps::{HashMap, MapData, MapError};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use warren_abi::maps::{layouts, names};

use super::programs::{MapSpec, Programs};
use super::{Error, is_missing};

/// How often any of the tables was changed.
#[derive(Clone)]
pub(super) struct Changes(Arc<Mapping>);

/// The map's only value, mapped: to count costs no system call.
struct Mapping {
    address: NonNull<c_void>,
}

// SAFETY: the mapping is no thread's own, and is written by atomic instructions only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    const LENGTH: NonZeroUsize = NonZeroUsize::new(size_of::<u64>()).unwrap();
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length; nobody has a pointer into it any more.
        unsafe { munmap(self.address, Self::LENGTH.get()) }.ok();
    }
}

impl Changes {
    /// Its map: pinned, since slots beyond the configured number keep programs of former daemons.
    pub fn map_spec() -> MapSpec {
        MapSpec::new::<u32, u64>(names::CHANGES, 1).layout(layouts::CHANGES)
    }

    pub fn open(programs: &mut Programs) -> Result<Self, Error> {
        let map = programs.data(names::CHANGES)?;
        let (rights, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping, wherever there is room for it.
        let address = unsafe { mmap(None, Mapping::LENGTH, rights, flags, map.fd().as_fd(), 0) };
        let error =
            |source: nix::Error| Error::system("map into memory", names::CHANGES, source.into());
        Ok(Self(Arc::new(Mapping { address: address.map_err(error)? })))
    }

    /// Whatever was written to a table before is seen by whoever sees the new count.
    fn count(&self) {
        // SAFETY: the mapping is there as long as `self`, page-aligned, and of 8 bytes.
        let count = unsafe { AtomicU64::from_ptr(self.0.address.as_ptr().cast()) };
        count.fetch_add(1, Ordering::Release);
    }
}

/// One of the tables. When a change is done, no program uses what was there before.
pub(super) struct Table<K, V> {
    name: &'static str,
    map: HashMap<MapData, K, V>,
    changes: Changes,
}

impl<K: Pod, V: Pod> Table<K, V> {
    pub fn open(
        programs: &mut Programs,
        name: &'static str,
        changes: &Changes,
    ) -> Result<Self, Error> {
        Ok(Self { name, map: programs.map(name)?, changes: changes.clone() })
    }

    pub fn get(&self, key: &K) -> Result<V, Error> {
        self.map.get(key, 0).map_err(|source| Error::map(self.name, source))
    }

    /// As [`Table::get`]; none if there is no such entry.
    pub fn find(&self, key: &K) -> Result<Option<V>, Error> {
        match self.map.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(Error::map(self.name, error)),
        }
    }

    pub fn keys(&self) -> impl Iterator<Item = Result<K, MapError>> {
        self.map.keys()
    }

    pub fn iter(&self) -> impl Iterator<Item = Result<(K, V), MapError>> {
        self.map.iter()
    }

    pub fn insert(&mut self, key: &K, value: &V) -> Result<(), Error> {
        self.map.insert(key, value, 0).map_err(|source| Error::map(self.name, source))?;
        self.changes.count();
        Ok(())
    }

    /// Nothing if there is no such entry.
    pub fn remove(&mut self, key: &K) -> Result<(), Error> {
        match self.map.remove(key) {
            Err(error) if !is_missing(&error) => return Err(Error::map(self.name, error)),
            _ => self.changes.count(),
        }
        Ok(())
    }
}
