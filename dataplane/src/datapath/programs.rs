//! Loading the programs over their pinned maps, and putting them at their hooks.

use std::num::NonZero;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread::available_parallelism;

use aya::maps::{Map, MapData, MapError, MapInfo, ProgramArray};
use aya::programs::{SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use warren_abi::flow::Timers;
use warren_abi::maps::{Underlay, names, tails};

use super::hook::{self, Hook};
use super::pins::Pins;
use super::undo::Undo;
use super::{Error, join, migrate, tables, verdicts};
use crate::clock::monotonic_ns;

/// While a former version's program is at a hook as well, the new one's link has this at the end of
/// its pin's name.
const NEW: &str = "-new";

/// A map as this version wants it.
pub(super) struct MapSpec {
    pub name: &'static str,
    /// Number of its layout, from [`warren_abi::maps::layouts`].
    pub layout: u32,
    pub key_size: usize,
    pub value_size: usize,
    /// Entries, when it is made.
    pub entries: u32,
    /// Entries that one that is pinned must have at least.
    pub needed: u32,
}

impl MapSpec {
    pub fn new<K, V>(name: &'static str, entries: u32) -> Self {
        let (key_size, value_size) = (size_of::<K>(), size_of::<V>());
        Self { name, layout: 1, key_size, value_size, entries, needed: 0 }
    }

    pub fn layout(self, layout: u32) -> Self {
        Self { layout, ..self }
    }

    pub fn at_least(self, needed: u32) -> Self {
        Self { needed, ..self }
    }

    /// The name of its pin, which tells its layout: `CT_OUT-v2`; without a number, it is 1. A BPF
    /// file system takes no dots.
    pub fn pin(&self) -> String {
        match self.layout {
            1 => self.name.to_owned(),
            layout => format!("{}-v{layout}", self.name),
        }
    }
}

/// What the programs find in their read-only data.
pub(super) struct Globals<'a> {
    /// The end of the tunnel here.
    pub underlay: &'a Underlay,
    /// Index of the link-local services' device; 0 on a proxy.
    pub services: u32,
    /// Index of the device for fragments.
    pub fragments: u32,
    /// How long flows may be idle.
    pub timers: Timers,
    /// Which events of flows are told, of [`level`](warren_abi::flowlog::level); none on a proxy.
    pub flow_log: u32,
}

/// The programs, loaded, over the pinned maps.
pub(super) struct Programs {
    ebpf: Ebpf,
    pins: Pins,
    /// Puts everything back if it is dropped before [`Programs::commit`].
    undo: Undo,
    /// Whether a former version's programs stay behind these until its flows are carried over.
    migrating: bool,
    /// Names of the maps' pins.
    maps: Vec<String>,
    _reader: Option<verdicts::Reader>,
}

impl Programs {
    /// Loads the `wanted` programs from the object. Maps in `maps` are the pinned ones, made if
    /// missing; the other role's are made small, and go with this process.
    pub fn load(
        object: &[u8],
        globals: &Globals<'_>,
        pins: Pins,
        maps: &[MapSpec],
        wanted: &[&'static str],
    ) -> Result<Self, Error> {
        let migrating = migrate::is_needed(&pins, maps)?;
        let mut undo = Undo::default();
        let mut loader = EbpfLoader::new();
        loader
            .btf(None)
            .override_global("UNDERLAY", globals.underlay, true)
            .override_global("SERVICES", &globals.services, true)
            .override_global("FRAGMENTS", &globals.fragments, true)
            .override_global("TIMERS", &globals.timers, true)
            .override_global("FLOW_LOG", &globals.flow_log, true);
        if migrating {
            loader.map_max_entries(names::PASSED, migrate::PASSED);
        }
        // Of its own for each version: programs at their hooks go on with those that they know.
        let tails = format!("{}-{:x}", names::TAILS, monotonic_ns());
        let path = pins.maps().join(&tails);
        undo.pin(path.clone());
        loader.map_pin_path(names::TAILS, path);
        for spec in maps {
            let path = pins.maps().join(spec.pin());
            if !check(&path, spec)? {
                undo.pin(path.clone());
            }
            loader.map_max_entries(spec.name, spec.entries).map_pin_path(spec.name, path);
        }
        let mut ebpf = loader.load(object).map_err(|source| Error::Load(Box::new(source)))?;
        tables::carry_over(&pins.maps(), maps)?;
        let reader = verdicts::Reader::start(&mut ebpf)?;
        let maps = maps.iter().map(MapSpec::pin).chain([tails]).collect();
        let mut programs = Self { ebpf, pins, undo, migrating, maps, _reader: reader };
        programs.verify(wanted)?;
        programs.enter_tails(wanted)?;
        Ok(programs)
    }

    /// Has the kernel take the programs: most of a start is spent in its verifier. Where programs
    /// are at their hooks, half of the processors are left to the traffic.
    fn verify(&mut self, wanted: &[&'static str]) -> Result<(), Error> {
        let has_traffic = !self.pins.link_names()?.is_empty();
        for name in wanted {
            self.program(name)?;
        }
        let programs = self.ebpf.programs_mut().filter_map(|(name, program)| {
            let name = *wanted.iter().find(|wanted| **wanted == name)?;
            Some((name, <&mut SchedClassifier>::try_from(program).ok()?))
        });
        let programs: Vec<_> = programs.collect();
        let processors = available_parallelism().map_or(1, NonZero::get);
        let threads = if has_traffic { processors.div_ceil(2) } else { processors };
        let queue = Mutex::new(programs.into_iter());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let load = || {
            if has_traffic {
                give_way();
            }
            while let Some((name, program)) = next() {
                program.load().map_err(|source| Error::program("load program", name, source))?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(load)).collect();
            threads.into_iter().try_for_each(join)
        })
    }

    /// Enters the programs that others end with, those that are wanted.
    fn enter_tails(&mut self, wanted: &[&'static str]) -> Result<(), Error> {
        let mut tails: ProgramArray<MapData> = self.map(names::TAILS)?;
        for (place, name) in tails::ALL {
            if wanted.contains(&name) {
                let program = self.program(name)?.fd();
                let program = program.map_err(|source| Error::program("open", name, source))?;
                tails.set(place, program, 0).map_err(|source| Error::map(names::TAILS, source))?;
            }
        }
        Ok(())
    }

    /// Whether flows of a former layout are to be carried over: then, a hook's former program
    /// stays behind the new one until [`Programs::commit`].
    pub fn is_migrating(&self) -> bool {
        self.migrating
    }

    /// Everything is in place: from now on, nothing is put back, and what only a former version
    /// needs goes. What was interrupted here is done by the next daemon.
    pub fn commit(&mut self) -> Result<(), Error> {
        self.undo.keep();
        self.migrating = false;
        // Maps first: as long as there is one of a former layout, its programs are needed.
        for name in self.pins.map_names()? {
            if !self.maps.contains(&name) {
                hook::remove(&self.pins.maps().join(name))?;
            }
        }
        for name in self.pins.link_names()? {
            let Some(former) = name.strip_suffix(NEW) else { continue };
            self.pins.rename_link(&name, former)?;
        }
        Ok(())
    }

    /// The pins.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// A program of the object.
    pub fn program(&mut self, name: &'static str) -> Result<&mut SchedClassifier, Error> {
        self.ebpf
            .program_mut(name)
            .and_then(|program| program.try_into().ok())
            .ok_or(Error::MissingInObject { name })
    }

    /// A map of the object, as the type that it has there.
    pub fn map<T>(&mut self, name: &'static str) -> Result<T, Error>
    where
        T: TryFrom<Map, Error = MapError>,
    {
        let map = self.ebpf.take_map(name).ok_or(Error::MissingInObject { name })?;
        T::try_from(map).map_err(|source| Error::map(name, source))
    }

    /// A map of the object, for access that `aya` has no type for.
    pub fn data(&mut self, name: &'static str) -> Result<MapData, Error> {
        match self.ebpf.take_map(name) {
            Some(Map::HashMap(map) | Map::Array(map)) => Ok(map),
            _ => Err(Error::MissingInObject { name }),
        }
    }

    /// Puts a program at the ingress of an interface: in the place of the one that is there, or
    /// anew. It stays when this process ends.
    pub fn attach(
        &mut self,
        program: &'static str,
        link: &str,
        interface: &str,
    ) -> Result<(), Error> {
        self.attach_at(TcAttachType::Ingress, program, link, interface)
    }

    /// The same at either hook.
    pub fn attach_at(
        &mut self,
        at: TcAttachType,
        program: &'static str,
        link: &str,
        interface: &str,
    ) -> Result<(), Error> {
        let pin = if self.migrating { format!("{link}{NEW}") } else { link.to_owned() };
        if self.replace(program, &pin)? {
            return Ok(());
        }
        let path = self.pins.links().join(pin);
        if self.migrating {
            self.undo.pin(path.clone());
        }
        // In front of a former version's.
        let in_front = self.migrating;
        hook::attach(self.program(program)?, &path, interface, at, in_front)
    }

    /// Replaces the program of a pinned hook. False if there is no such pin, or its interface is gone.
    pub fn replace(&mut self, program: &'static str, link: &str) -> Result<bool, Error> {
        let path = self.pins.links().join(link);
        let Some(hook) = Hook::open(&path)? else { return Ok(false) };
        self.undo.hook(&path, &hook)?;
        let program = self.program(program)?;
        let replaced = hook.replace(program, &path)?;
        if !replaced {
            hook::remove(&path)?;
        }
        Ok(replaced)
    }
}

/// Has the calling thread give way to all others: what carries traffic must not wait for the
/// verifier, or its queues overflow.
fn give_way() {
    const LEAST: i32 = 19;
    // SAFETY: the call takes integers. On Linux, it concerns the calling thread alone. If it fails,
    // nothing but time is lost.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, LEAST) };
}

/// Whether a map is pinned there, which then has the layout of `spec`.
fn check(path: &Path, spec: &MapSpec) -> Result<bool, Error> {
    if !path.exists() {
        return Ok(false);
    }
    let map = |source| Error::map(spec.name, source);
    let info: MapInfo = MapData::from_pin(path).and_then(|data| data.info()).map_err(map)?;
    let fits = info.key_size() as usize == spec.key_size
        && info.value_size() as usize == spec.value_size
        && info.max_entries() >= spec.needed;
    if fits { Ok(true) } else { Err(Error::IncompatibleMap { path: path.to_owned() }) }
}
