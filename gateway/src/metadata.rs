//! The copy of functions, triggers and hosts that a gateway works with, and the file that it is
//! kept in, so that a gateway can start without a control plane.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use prost::Message;
use warren_proto::v1::watch_data_flow_response::Change;
use warren_proto::v1::{FleetHost, Function, Trigger, WatchDataFlowResponse};

/// All that is known, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    /// Functions, with their versions and aliases.
    pub functions: BTreeMap<String, Function>,
    /// Triggers.
    pub triggers: BTreeMap<String, Trigger>,
    /// Hosts.
    pub hosts: BTreeMap<String, FleetHost>,
    /// This gateway fires the timers.
    pub fires_timers: bool,
}

/// What a change was about.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Nothing yet: it is part of a new copy that is not complete.
    None,
    /// Everything may be different.
    All,
    /// A function or a trigger.
    Routes,
    /// A host.
    Host(FleetHost),
    /// A host is no more.
    HostRemoved(FleetHost),
    /// Who fires the timers.
    Timers,
}

impl Metadata {
    fn apply(&mut self, change: Change) -> Effect {
        match change {
            Change::Function(function) => {
                self.functions.insert(function.name.clone(), function);
                Effect::Routes
            }
            Change::FunctionRemoved(name) => {
                self.functions.remove(&name);
                Effect::Routes
            }
            Change::Trigger(trigger) => {
                self.triggers.insert(trigger.name.clone(), trigger);
                Effect::Routes
            }
            Change::TriggerRemoved(name) => {
                self.triggers.remove(&name);
                Effect::Routes
            }
            Change::Host(host) => {
                self.hosts.insert(host.name.clone(), host.clone());
                Effect::Host(host)
            }
            Change::HostRemoved(name) => {
                self.hosts.remove(&name).map_or(Effect::None, Effect::HostRemoved)
            }
            Change::FiresTimers(fires) => {
                self.fires_timers = fires;
                Effect::Timers
            }
            Change::Complete(_) => Effect::None,
        }
    }

    fn changes(&self) -> impl Iterator<Item = Change> {
        let functions = self.functions.values().cloned().map(Change::Function);
        let triggers = self.triggers.values().cloned().map(Change::Trigger);
        let hosts = self.hosts.values().cloned().map(Change::Host);
        let end = [Change::FiresTimers(self.fires_timers), Change::Complete(true)];
        functions.chain(triggers).chain(hosts).chain(end)
    }
}

/// [`Metadata`] as streams of changes make it: the last complete one stays in use while another is told.
#[derive(Debug, Default)]
pub struct Replica {
    current: Metadata,
    incoming: Option<Metadata>,
}

impl Replica {
    /// Begins with what is known.
    pub fn new(current: Metadata) -> Self {
        Self { current, incoming: None }
    }

    /// A stream of changes begins, which tells everything first.
    pub fn begin(&mut self) {
        self.incoming = Some(Metadata::default());
    }

    /// The next change of the stream.
    pub fn apply(&mut self, change: Change) -> Effect {
        match (self.incoming.take(), change) {
            (Some(complete), Change::Complete(_)) => {
                self.current = complete;
                Effect::All
            }
            (Some(mut incoming), change) => {
                incoming.apply(change);
                self.incoming = Some(incoming);
                Effect::None
            }
            (None, change) => self.current.apply(change),
        }
    }

    /// What is in use.
    pub fn current(&self) -> &Metadata {
        &self.current
    }
}

/// Why a copy could not be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system refused.
    #[error("cannot use the copy of metadata {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is damaged, or no such file.
    #[error("the copy of metadata {0} is damaged: remove it; the control plane tells it anew")]
    Damaged(PathBuf),
}

/// Reads the copy; without a file an empty one.
pub fn load(path: &Path) -> Result<Metadata, FileError> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Metadata::default()),
        bytes => bytes.map_err(|source| FileError::Io { path: path.to_owned(), source })?,
    };
    let damaged = || FileError::Damaged(path.to_owned());
    let mut replica = Replica::default();
    replica.begin();
    let (mut rest, mut complete) = (&bytes[..], false);
    while !rest.is_empty() {
        let message = WatchDataFlowResponse::decode_length_delimited(&mut rest);
        let change = message.ok().and_then(|message| message.change).ok_or_else(damaged)?;
        complete = replica.apply(change) == Effect::All;
    }
    if complete { Ok(replica.current) } else { Err(damaged()) }
}

/// Keeps the copy: after a crash, this one or the one before is there.
pub fn save(path: &Path, metadata: &Metadata) -> Result<(), FileError> {
    let mut bytes = Vec::new();
    for change in metadata.changes() {
        let message = WatchDataFlowResponse { change: Some(change) };
        bytes.extend(message.encode_length_delimited_to_vec());
    }
    let beside = path.with_extension("new");
    let write = || {
        let mut file = File::create(&beside)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    };
    write().map_err(|source| FileError::Io { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(name: &str) -> Change {
        Change::Function(Function { name: name.to_owned(), ..Default::default() })
    }

    fn host(name: &str, taken: u32) -> FleetHost {
        FleetHost { name: name.to_owned(), taken, ..Default::default() }
    }

    #[test]
    fn a_new_copy_replaces_the_old_one_when_it_is_complete() {
        let mut replica = Replica::default();
        replica.begin();
        for change in [function("a"), function("b"), Change::Host(host("h", 1))] {
            assert_eq!(replica.apply(change), Effect::None);
        }
        assert_eq!(replica.current(), &Metadata::default());
        assert_eq!(replica.apply(Change::Complete(true)), Effect::All);
        assert_eq!(replica.apply(Change::FunctionRemoved("a".into())), Effect::Routes);
        assert_eq!(replica.apply(Change::Host(host("h", 2))), Effect::Host(host("h", 2)));
        assert_eq!(replica.apply(Change::FiresTimers(true)), Effect::Timers);
        assert_eq!(replica.current().functions.keys().collect::<Vec<_>>(), ["b"]);
        // What went away while nobody watched is not told: it is not in the next copy.
        replica.begin();
        replica.apply(function("c"));
        assert_eq!(replica.current().functions.keys().collect::<Vec<_>>(), ["b"]);
        replica.apply(Change::Complete(true));
        assert_eq!(replica.current().functions.keys().collect::<Vec<_>>(), ["c"]);
        assert!(replica.current().hosts.is_empty() && !replica.current().fires_timers);
    }

    #[test]
    fn the_file_is_whole_or_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metadata");
        assert_eq!(load(&path).unwrap(), Metadata::default());
        let mut metadata = Metadata { fires_timers: true, ..Default::default() };
        metadata.apply(function("a"));
        metadata.apply(Change::Host(host("h", 3)));
        metadata.apply(Change::Trigger(Trigger { name: "t".into(), ..Default::default() }));
        save(&path, &metadata).unwrap();
        assert_eq!(load(&path).unwrap(), metadata);
        let whole = std::fs::read(&path).unwrap();
        for length in 1..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let error = load(&path).unwrap_err().to_string();
            assert!(error.contains("damaged") && error.contains("metadata"), "{error}");
        }
    }
}
