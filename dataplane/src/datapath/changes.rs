//! Tables of which programs keep what they found, per CPU, until they are told of a change.

use std::sync::{Arc, Mutex, PoisonError};

use aya::Pod;
use aya::maps::{Array, HashMap, MapData, MapError};
use warren_abi::maps::names;

use super::programs::{MapSpec, Programs};
use super::{Error, is_missing};

/// How often any of the tables was changed.
#[derive(Clone)]
pub(super) struct Changes(Arc<Mutex<Counter>>);

struct Counter {
    map: Array<MapData, u64>,
    count: u64,
}

impl Changes {
    /// Its map: pinned, since slots beyond the configured number keep programs of former daemons.
    pub fn map_spec() -> MapSpec {
        MapSpec::new::<u32, u64>(names::CHANGES, 1)
    }

    pub fn open(programs: &mut Programs) -> Result<Self, Error> {
        let map: Array<_, u64> = programs.map(names::CHANGES)?;
        let count = map.get(&0, 0).map_err(|source| Error::map(names::CHANGES, source))?;
        Ok(Self(Arc::new(Mutex::new(Counter { map, count }))))
    }

    fn count(&self) -> Result<(), Error> {
        let mut counter = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counter.count += 1;
        let count = counter.count;
        counter.map.set(0, count, 0).map_err(|source| Error::map(names::CHANGES, source))
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

    pub fn keys(&self) -> impl Iterator<Item = Result<K, MapError>> {
        self.map.keys()
    }

    pub fn iter(&self) -> impl Iterator<Item = Result<(K, V), MapError>> {
        self.map.iter()
    }

    pub fn insert(&mut self, key: &K, value: &V) -> Result<(), Error> {
        self.map.insert(key, value, 0).map_err(|source| Error::map(self.name, source))?;
        self.changes.count()
    }

    /// Nothing if there is no such entry.
    pub fn remove(&mut self, key: &K) -> Result<(), Error> {
        match self.map.remove(key) {
            Err(error) if !is_missing(&error) => Err(Error::map(self.name, error)),
            _ => self.changes.count(),
        }
    }
}
