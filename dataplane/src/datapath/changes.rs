//! Tables of which programs keep what they found, per CPU, until they are told of a change.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use aya::Pod;
use aya::maps::{HashMap, MapData, MapError};
use warren_abi::maps::{layouts, names};

use super::mapping::Mapping;
use super::programs::{MapSpec, Programs};
use super::{Error, is_missing};

/// How often any of the tables was changed.
#[derive(Clone)]
pub(super) struct Changes(Arc<Mapping>);

impl Changes {
    /// Its map: pinned, since slots beyond the configured number keep programs of former daemons.
    pub fn map_spec() -> MapSpec {
        MapSpec::new::<u32, u64>(names::CHANGES, 1).layout(layouts::CHANGES)
    }

    pub fn open(programs: &mut Programs) -> Result<Self, Error> {
        let map = programs.data(names::CHANGES)?;
        Ok(Self(Arc::new(Mapping::open(names::CHANGES, &map, NonZeroUsize::MIN)?)))
    }

    /// Whatever was written to a table before is seen by whoever sees the new count.
    fn count(&self) {
        if let Some(count) = self.0.word(0) {
            count.fetch_add(1, Ordering::Release);
        }
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
