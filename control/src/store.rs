//! State that must outlive the process: keys and values, written in atomic commits.
//!
//! Each commit has a revision, one higher than the one before. The written keys are the events:
//! who follows them from a revision on misses nothing, and there is no second log to keep in step.

mod sqlite;

use std::fmt;
use std::pin::Pin;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_stream::Stream;

pub use sqlite::SqliteStore;

/// A commit's number. 0 is before the first.
pub type Revision = u64;

/// At most so many preconditions and writes together in one commit: what etcd takes, too.
pub const COMMIT_LIMIT: usize = 100;

/// A key that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Key, such as `vpc/blue`.
    pub key: String,
    /// Value.
    pub value: Vec<u8>,
    /// The commit that wrote it.
    pub revision: Revision,
}

/// What must hold for a commit to happen: the key was last written by this revision, or, if it is
/// 0, the key does not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Precondition {
    /// Key.
    pub key: String,
    /// Revision.
    pub revision: Revision,
}

/// One write of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Key.
    pub key: String,
    /// The new value; `None` deletes the key.
    pub value: Option<Vec<u8>>,
}

/// A key was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Key.
    pub key: String,
    /// Its value; `None`: it was deleted.
    pub value: Option<Vec<u8>>,
    /// The commit that did it.
    pub revision: Revision,
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A precondition did not hold: read again and decide anew.
    #[error("\"{0}\" was changed by someone else meanwhile")]
    Conflict(String),
    /// Over [`COMMIT_LIMIT`].
    #[error("a commit of {0} operations: at most {COMMIT_LIMIT} are allowed; split it")]
    TooLarge(usize),
    /// The state cannot be opened.
    #[error("cannot open the state {path}: {problem}")]
    Open {
        /// File.
        path: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A value that this version cannot read.
    #[error("the state's \"{key}\" cannot be read: {problem}; was it written by a newer version?")]
    Value {
        /// Key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The database failed.
    #[error("the state database failed: {0}; check its disk")]
    Database(String),
}

/// A [`Store::watch`]'s events.
pub type Events = Pin<Box<dyn Stream<Item = Result<Event, StoreError>> + Send>>;

/// State in keys and values, the same for each engine.
#[tonic::async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// Writes all or nothing, and returns when it is on disk. Without writes, only the
    /// preconditions are checked.
    async fn commit(
        &self,
        preconditions: Vec<Precondition>,
        writes: Vec<Write>,
    ) -> Result<Revision, StoreError>;

    /// The key's entry, if it exists.
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;

    /// The keys that start with `prefix`, in order, and the revision they were read at.
    async fn list(&self, prefix: &str) -> Result<(Revision, Vec<Entry>), StoreError>;

    /// The keys written after revision `from`, in the order of their revisions, and then each one
    /// as it is written; never ends. Of a key written several times in between, only the last
    /// event is sure to come.
    fn watch(&self, from: Revision) -> Events;
}

impl Precondition {
    /// The key does not exist.
    pub fn absent(key: impl Into<String>) -> Self {
        Self { key: key.into(), revision: 0 }
    }

    /// The key is as it was read: `entry`, or absent.
    pub fn unchanged(key: impl Into<String>, entry: Option<&Entry>) -> Self {
        Self { key: key.into(), revision: entry.map_or(0, |entry| entry.revision) }
    }
}

impl Write {
    /// Sets the key to the value, as JSON.
    pub fn put<T: Serialize>(key: impl Into<String>, value: &T) -> Result<Self, StoreError> {
        let key = key.into();
        match serde_json::to_vec(value) {
            Ok(value) => Ok(Self { key, value: Some(value) }),
            Err(error) => Err(StoreError::Value { key, problem: error.to_string() }),
        }
    }
}

/// Reads a value that [`Write::put`] wrote.
pub fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(value)
        .map_err(|error| StoreError::Value { key: key.to_owned(), problem: error.to_string() })
}
