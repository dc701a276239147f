//! The store in one `SQLite` file: for one replica.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OptionalExtension, Transaction, params};
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::{COMMIT_LIMIT, Entry, Event, Events, Precondition, Revision, Store, StoreError, Write};

const SCHEMA_VERSION: u32 = 1;
/// A process that is just ending has this long to let go of the file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// A deleted key stays with a NULL value, so that its deletion, too, is an event.
const SCHEMA: &str = "
    CREATE TABLE kv (key TEXT PRIMARY KEY, value BLOB, revision INTEGER NOT NULL) WITHOUT ROWID;
    CREATE INDEX kv_by_revision ON kv (revision);
    PRAGMA user_version = 1;
";

/// [`Store`] in a `SQLite` file that one process has open.
#[derive(Clone, Debug)]
pub struct SqliteStore {
    connection: Arc<Mutex<Connection>>,
    /// The last commit.
    revision: Arc<watch::Sender<Revision>>,
}

impl SqliteStore {
    /// Opens the file, and makes it and its directory if they are missing.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let path = path.to_owned();
        blocking(move || {
            open(&path)
                .map_err(|problem| StoreError::Open { path: path.display().to_string(), problem })
        })
        .await
    }

    /// Runs database work where it may block.
    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let connection = self.connection.clone();
        // A panic in the middle rolled its transaction back: the connection is as good as before.
        blocking(move || work(&mut connection.lock().unwrap_or_else(PoisonError::into_inner))).await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(StoreError::Database(error.to_string())),
    }
}

fn open(path: &Path) -> Result<SqliteStore, String> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)
            .map_err(|error| format!("its directory cannot be made: {error}"))?;
    }
    let explain = |error: rusqlite::Error| match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy) => "another warren-control uses it; stop that one".to_owned(),
        Some(ErrorCode::NotADatabase) => "it is not a SQLite file; choose another".to_owned(),
        _ => error.to_string(),
    };
    let connection = Connection::open(path).map_err(explain)?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(explain)?;
    // Exclusive: a second control plane on the same file would not see this one's leases. Full:
    // what a commit acknowledged survives a power cut.
    connection
        .execute_batch(
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;",
        )
        .map_err(explain)?;
    let version: u32 =
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(explain)?;
    match version {
        0 => connection.execute_batch(&format!("BEGIN; {SCHEMA} COMMIT;")).map_err(explain)?,
        SCHEMA_VERSION => {}
        newer => {
            return Err(format!(
                "its schema {newer} is not known to this version (which knows {SCHEMA_VERSION}); \
                 use the version that wrote it, or choose another file"
            ));
        }
    }
    let revision = last_revision(&connection).map_err(|error| error.to_string())?;
    Ok(SqliteStore {
        connection: Arc::new(Mutex::new(connection)),
        revision: Arc::new(watch::Sender::new(revision)),
    })
}

#[tonic::async_trait]
impl Store for SqliteStore {
    async fn commit(
        &self,
        preconditions: Vec<Precondition>,
        writes: Vec<Write>,
    ) -> Result<Revision, StoreError> {
        let operations = preconditions.len() + writes.len();
        if operations > COMMIT_LIMIT {
            return Err(StoreError::TooLarge(operations));
        }
        let announce = self.revision.clone();
        self.with(move |connection| {
            let transaction = connection.transaction()?;
            let revision = commit(&transaction, &preconditions, &writes)?;
            transaction.commit()?;
            // Here and not after the await: the event is sent even if the caller went away.
            announce.send_if_modified(|last| std::mem::replace(last, revision) != revision);
            Ok(revision)
        })
        .await
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let key = key.to_owned();
        self.with(move |connection| {
            let mut query = connection.prepare_cached(
                "SELECT value, revision FROM kv WHERE key = ?1 AND value IS NOT NULL",
            )?;
            let found = query
                .query_row([&key], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?
                .map(|(value, revision)| Entry { key, value, revision });
            Ok(found)
        })
        .await
    }

    async fn list(&self, prefix: &str) -> Result<(Revision, Vec<Entry>), StoreError> {
        // No key holds the last code point: this is above all keys with the prefix.
        let range = [prefix.to_owned(), format!("{prefix}\u{10ffff}")];
        self.with(move |connection| {
            let mut query = connection.prepare_cached(
                "SELECT key, value, revision FROM kv
                 WHERE key >= ?1 AND key < ?2 AND value IS NOT NULL ORDER BY key",
            )?;
            let entries = query
                .query_map(range, |row| {
                    Ok(Entry { key: row.get(0)?, value: row.get(1)?, revision: row.get(2)? })
                })?
                .collect::<Result<_, _>>()?;
            drop(query);
            Ok((last_revision(connection)?, entries))
        })
        .await
    }

    fn watch(&self, from: Revision) -> Events {
        let store = self.clone();
        let mut last_commit = self.revision.subscribe();
        Box::pin(async_stream::try_stream! {
            let mut seen = from;
            loop {
                // Marks it as seen before reading: a commit in between wakes the next round.
                last_commit.borrow_and_update();
                for event in store.written_after(seen).await? {
                    seen = event.revision;
                    yield event;
                }
                if last_commit.changed().await.is_err() {
                    break;
                }
            }
        })
    }
}

impl SqliteStore {
    async fn written_after(&self, revision: Revision) -> Result<Vec<Event>, StoreError> {
        self.with(move |connection| {
            let mut query = connection.prepare_cached(
                "SELECT key, value, revision FROM kv WHERE revision > ?1 ORDER BY revision, key",
            )?;
            let events = query
                .query_map([revision], |row| {
                    Ok(Event { key: row.get(0)?, value: row.get(1)?, revision: row.get(2)? })
                })?
                .collect::<Result<_, _>>()?;
            Ok(events)
        })
        .await
    }
}

fn commit(
    transaction: &Transaction<'_>,
    preconditions: &[Precondition],
    writes: &[Write],
) -> Result<Revision, StoreError> {
    for Precondition { key, revision } in preconditions {
        let found: Option<Revision> = transaction
            .prepare_cached("SELECT revision FROM kv WHERE key = ?1 AND value IS NOT NULL")?
            .query_row([key], |row| row.get(0))
            .optional()?;
        if found.unwrap_or(0) != *revision {
            return Err(StoreError::Conflict(key.clone()));
        }
    }
    let last = last_revision(transaction)?;
    if writes.is_empty() {
        return Ok(last);
    }
    let revision = last + 1;
    for Write { key, value } in writes {
        transaction
            .prepare_cached("INSERT OR REPLACE INTO kv (key, value, revision) VALUES (?1, ?2, ?3)")?
            .execute(params![key, value, revision])?;
    }
    Ok(revision)
}

fn last_revision(connection: &Connection) -> rusqlite::Result<Revision> {
    connection.query_row("SELECT coalesce(max(revision), 0) FROM kv", [], |row| row.get(0))
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;

    use super::*;

    fn put(key: &str, value: &str) -> Write {
        Write { key: key.into(), value: Some(value.into()) }
    }

    async fn temporary() -> (tempfile::TempDir, SqliteStore) {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("made/state.db")).await.unwrap();
        (directory, store)
    }

    #[tokio::test]
    async fn a_commit_is_all_or_nothing() {
        let (_directory, store) = temporary().await;
        let first = store.commit(vec![], vec![put("a", "1"), put("b", "1")]).await.unwrap();
        let stale =
            vec![Precondition { key: "a".into(), revision: first }, Precondition::absent("b")];
        let error = store.commit(stale, vec![put("a", "2"), put("c", "2")]).await.unwrap_err();
        assert!(matches!(error, StoreError::Conflict(key) if key == "b"));
        assert_eq!(store.get("a").await.unwrap().unwrap().value, b"1");
        assert_eq!(store.get("c").await.unwrap(), None);

        let entry = store.get("a").await.unwrap();
        let holds = vec![Precondition::unchanged("a", entry.as_ref())];
        let second = store.commit(holds.clone(), vec![put("a", "2")]).await.unwrap();
        assert_eq!(second, first + 1);
        assert!(store.commit(holds, vec![]).await.is_err());
    }

    #[tokio::test]
    async fn deleted_keys_are_absent_and_their_revisions_stay() {
        let (directory, store) = temporary().await;
        store.commit(vec![], vec![put("a", "1")]).await.unwrap();
        let deleted =
            store.commit(vec![], vec![Write { key: "a".into(), value: None }]).await.unwrap();
        assert_eq!(store.get("a").await.unwrap(), None);
        assert_eq!(store.list("").await.unwrap(), (deleted, vec![]));
        drop(store);
        let store = SqliteStore::open(&directory.path().join("made/state.db")).await.unwrap();
        let again = store.commit(vec![Precondition::absent("a")], vec![put("a", "2")]).await;
        assert_eq!(again.unwrap(), deleted + 1);
    }

    #[tokio::test]
    async fn lists_by_prefix_in_order() {
        let (_directory, store) = temporary().await;
        let writes = ["vpc/b", "vpc/a", "vpc", "vpd/a", "%/a"].map(|key| put(key, "")).to_vec();
        store.commit(vec![], writes).await.unwrap();
        let keys =
            |entries: Vec<Entry>| entries.into_iter().map(|entry| entry.key).collect::<Vec<_>>();
        assert_eq!(keys(store.list("vpc/").await.unwrap().1), ["vpc/a", "vpc/b"]);
        assert_eq!(keys(store.list("%").await.unwrap().1), ["%/a"]);
        assert_eq!(store.list("").await.unwrap().1.len(), 5);
    }

    #[tokio::test]
    async fn a_watch_resumes_anywhere_and_goes_on() {
        let (_directory, store) = temporary().await;
        store.commit(vec![], vec![put("a", "1")]).await.unwrap();
        let second = store.commit(vec![], vec![put("b", "1"), put("c", "1")]).await.unwrap();
        let mut all = store.watch(0);
        let mut later = store.watch(second);
        store.commit(vec![], vec![Write { key: "b".into(), value: None }]).await.unwrap();
        store.commit(vec![], vec![put("a", "2")]).await.unwrap();

        let mut keys = Vec::new();
        let mut last = 0;
        while keys.len() < 3 {
            let event = all.next().await.unwrap().unwrap();
            assert!(event.revision >= last, "in the order of revisions");
            last = event.revision;
            keys.push((event.key, event.value));
        }
        // Both keys were written again before the watch was first polled: only the last counts.
        let expected = [("c", Some("1")), ("b", None), ("a", Some("2"))]
            .map(|(key, value)| (key.to_owned(), value.map(|value| value.as_bytes().to_vec())));
        assert_eq!(keys, expected);
        assert_eq!(later.next().await.unwrap().unwrap().key, "b");
        assert_eq!(later.next().await.unwrap().unwrap().key, "a");

        let waiting = tokio::spawn(async move { later.next().await });
        store.commit(vec![], vec![put("d", "1")]).await.unwrap();
        assert_eq!(waiting.await.unwrap().unwrap().unwrap().key, "d");
    }

    #[tokio::test]
    async fn refuses_too_many_operations() {
        let (_directory, store) = temporary().await;
        let writes = |n: usize| (0..n).map(|i| put(&i.to_string(), "")).collect::<Vec<_>>();
        store.commit(vec![], writes(COMMIT_LIMIT)).await.unwrap();
        let error = store.commit(vec![Precondition::absent("x")], writes(COMMIT_LIMIT)).await;
        assert!(matches!(error.unwrap_err(), StoreError::TooLarge(101)));
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_used_is_named() {
        let (directory, store) = temporary().await;
        let path = directory.path().join("made/state.db");
        let error = SqliteStore::open(&path).await.unwrap_err().to_string();
        assert!(error.contains("another warren-control uses it"), "{error}");
        assert!(error.contains("state.db"), "{error}");
        drop(store);

        let newer = Connection::open(&path).unwrap();
        newer.pragma_update(None, "user_version", 7).unwrap();
        drop(newer);
        let error = SqliteStore::open(&path).await.unwrap_err().to_string();
        assert!(error.contains("schema 7"), "{error}");

        let text = directory.path().join("notes.txt");
        std::fs::write(&text, "this is no database, but it is long enough to be looked at")
            .unwrap();
        let error = SqliteStore::open(&text).await.unwrap_err().to_string();
        assert!(error.contains("not a SQLite file"), "{error}");
    }
}
