//! Loading the programs, and everything that is pinned: maps by name, one link per hook.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::maps::{Map, MapData, MapError, MapInfo};
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use warren_abi::maps::{Underlay, names};

use super::{Error, verdicts};

/// A link whose pin was removed is detached by the kernel some time later; until then its program
/// cannot be attached to the same interface again.
const DETACH_PATIENCE: Duration = Duration::from_secs(1);

/// A map as this version wants it.
pub(super) struct MapSpec {
    pub name: &'static str,
    pub key_size: usize,
    pub value_size: usize,
    /// Entries, when it is made.
    pub entries: u32,
    /// Entries that one that is pinned must have at least.
    pub needed: u32,
}

impl MapSpec {
    pub fn new<K, V>(name: &'static str, entries: u32) -> Self {
        Self { name, key_size: size_of::<K>(), value_size: size_of::<V>(), entries, needed: 0 }
    }

    pub fn at_least(self, needed: u32) -> Self {
        Self { needed, ..self }
    }
}

/// The directory of pins.
pub(super) struct Pins {
    directory: PathBuf,
}

impl Pins {
    /// The pins under `directory`, which is made if it is missing.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let pins = Self { directory: directory.to_owned() };
        let io = |source| Error::system("make", directory.display(), source);
        // Looked at before anything is made, so that no directory is left on another file system.
        let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(directory);
        let found = statfs(existing).map_err(|error| io(error.into()))?;
        if found.filesystem_type() != BPF_FS_MAGIC {
            return Err(Error::NotBpffs { path: directory.to_owned() });
        }
        fs::create_dir_all(pins.maps()).map_err(io)?;
        fs::create_dir_all(pins.links()).map_err(io)?;
        Ok(pins)
    }

    fn maps(&self) -> PathBuf {
        self.directory.join("maps")
    }

    fn links(&self) -> PathBuf {
        self.directory.join("links")
    }

    /// The names of the links that are pinned.
    pub fn link_names(&self) -> Result<Vec<String>, Error> {
        entries(&self.links())
    }

    /// Unpins a link: its program is detached. No error if there is none.
    pub fn remove_link(&self, name: &str) -> Result<(), Error> {
        remove(&self.links().join(name))
    }

    /// Unpins everything under `directory` and removes it; no error if there is nothing.
    pub fn remove_all(directory: &Path) -> Result<(), Error> {
        let pins = Self { directory: directory.to_owned() };
        for path in [pins.links(), pins.maps()] {
            for name in entries(&path)? {
                remove(&path.join(name))?;
            }
            remove_directory(&path)?;
        }
        remove_directory(directory)
    }
}

fn entries(path: &Path) -> Result<Vec<String>, Error> {
    let error = |source| Error::system("list", path.display(), source);
    let entries = match fs::read_dir(path) {
        Err(missing) if missing.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(error)?,
    };
    entries
        .map(|entry| Ok(entry.map_err(error)?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| Error::system("unpin", path.display(), source)),
    }
}

/// A directory that holds something else, or is a mount point, stays.
fn remove_directory(path: &Path) -> Result<(), Error> {
    match fs::remove_dir(path) {
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ResourceBusy | ErrorKind::DirectoryNotEmpty
            ) =>
        {
            Ok(())
        }
        result => result.map_err(|source| Error::system("remove", path.display(), source)),
    }
}

/// The programs, loaded, over the pinned maps.
pub(super) struct Programs {
    ebpf: Ebpf,
    pins: Pins,
    _reader: Option<verdicts::Reader>,
}

impl Programs {
    /// Loads the `wanted` programs from the object. Maps in `maps` are the pinned ones, made if missing; the
    /// other role's are made small, and go with this process. `services` is the index of the
    /// link-local services' device, 0 on a proxy.
    pub fn load(
        object: &[u8],
        underlay: &Underlay,
        services: u32,
        pins: Pins,
        maps: &[MapSpec],
        wanted: &[&'static str],
    ) -> Result<Self, Error> {
        let mut loader = EbpfLoader::new();
        loader.btf(None).override_global("UNDERLAY", underlay, true);
        loader.override_global("SERVICES", &services, true);
        for spec in maps {
            let path = pins.maps().join(spec.name);
            check(&path, spec)?;
            loader.map_max_entries(spec.name, spec.entries).map_pin_path(spec.name, path);
        }
        let mut ebpf = loader.load(object).map_err(|source| Error::Load(Box::new(source)))?;
        let reader = verdicts::Reader::start(&mut ebpf)?;
        let mut programs = Self { ebpf, pins, _reader: reader };
        for name in wanted {
            let program = programs.program(name)?;
            program.load().map_err(|source| Error::program("load program", *name, source))?;
        }
        Ok(programs)
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

    /// The flow table, for access that `aya` has no type for.
    pub fn flows(&mut self) -> Result<MapData, Error> {
        let name = names::CT_OUT;
        match self.ebpf.take_map(name) {
            Some(Map::HashMap(map)) => Ok(map),
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
        if self.replace(program, link)? {
            return Ok(());
        }
        let path = self.pins.links().join(link);
        let error = |source| Error::program("attach a program to", interface, source);
        let program = self.program(program)?;
        let deadline = Instant::now() + DETACH_PATIENCE;
        let attached = loop {
            let options = TcAttachOptions::TcxOrder(LinkOrder::default());
            match program.attach_with_options(interface, TcAttachType::Ingress, options) {
                Err(ProgramError::SyscallError(exists))
                    if exists.io_error.kind() == ErrorKind::AlreadyExists
                        && Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                attached => break attached,
            }
        };
        let attached = attached.and_then(|id| program.take_link(id)).map_err(error)?;
        let pin = |source| Error::system("pin", path.display(), source);
        let attached =
            FdLink::try_from(attached).map_err(|source| pin(io::Error::other(source)))?;
        attached.pin(&path).map(drop).map_err(|source| pin(io::Error::other(source)))
    }

    /// Replaces the program of a pinned link. False if there is no such link, or its interface is
    /// gone.
    pub fn replace(&mut self, program: &'static str, link: &str) -> Result<bool, Error> {
        let path = self.pins.links().join(link);
        let link = |source| Error::system("open pin", path.display(), io::Error::other(source));
        let error = |source| Error::program("replace the program of", path.display(), source);
        let pinned = match PinnedLink::from_pin(&path) {
            Ok(pinned) => pinned,
            Err(LinkError::SyscallError(missing))
                if missing.io_error.kind() == ErrorKind::NotFound =>
            {
                return Ok(false);
            }
            Err(source) => return Err(link(source)),
        };
        let pinned = SchedClassifierLink::try_from(FdLink::from(pinned)).map_err(link)?;
        let program = self.program(program)?;
        match program.attach_to_link(pinned).and_then(|id| program.take_link(id)) {
            // The link's descriptor is closed here; the pin holds the link.
            Ok(_) => Ok(true),
            Err(ProgramError::SyscallError(dead))
                if dead.io_error.raw_os_error() == Some(libc::ENOLINK) =>
            {
                remove(&path)?;
                Ok(false)
            }
            Err(source) => Err(error(source)),
        }
    }
}

/// Whether a pinned map, if there is one, has the layout of `spec`.
fn check(path: &Path, spec: &MapSpec) -> Result<(), Error> {
    if !path.exists() {
        return Ok(());
    }
    let map = |source| Error::map(spec.name, source);
    let info: MapInfo = MapData::from_pin(path).and_then(|data| data.info()).map_err(map)?;
    let fits = info.key_size() as usize == spec.key_size
        && info.value_size() as usize == spec.value_size
        && info.max_entries() >= spec.needed;
    if fits { Ok(()) } else { Err(Error::IncompatibleMap { path: path.to_owned() }) }
}
