//! Events that were accepted and not yet dealt with, and when timers fired: in a `SQLite` file.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OptionalExtension, params};

use crate::start::lock;

const SCHEMA_VERSION: u32 = 1;
/// A process that is just ending has this long to let go of the file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);
const SCHEMA: &str = "
    CREATE TABLE event (
        id TEXT PRIMARY KEY,
        trigger TEXT NOT NULL,
        headers TEXT NOT NULL,
        body BLOB NOT NULL,
        failed INTEGER NOT NULL,
        due_ms INTEGER NOT NULL,
        dead_letter_of TEXT,
        reason TEXT
    );
    CREATE INDEX event_by_due ON event (due_ms);
    CREATE TABLE timer (name TEXT PRIMARY KEY, fired_ms INTEGER NOT NULL) WITHOUT ROWID;
    PRAGMA user_version = 1;
";

/// An event, as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// A UUID.
    pub id: String,
    /// Name of its trigger, of events or of a timer.
    pub trigger: String,
    /// Header fields for its function.
    pub headers: Vec<(String, String)>,
    /// The request's body.
    pub body: Vec<u8>,
    /// How many deliveries failed.
    pub failed: u32,
    /// When it is to be delivered, in milliseconds since 1970.
    pub due_ms: i64,
    /// The trigger that it was of, if its deliveries failed in the end.
    pub dead_letter_of: Option<String>,
    /// Why the last delivery failed.
    pub reason: Option<String>,
}

/// Why events cannot be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be used.
    #[error("cannot use the events' file {path}: {problem}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why, and what to do.
        problem: String,
    },
    /// The database refused.
    #[error("the events' file failed: {0}; is its disk full?")]
    Database(#[from] rusqlite::Error),
    /// The work was broken off.
    #[error("the work on the events' file was broken off: {0}")]
    Task(#[from] tokio::task::JoinError),
    /// As many events as are allowed wait already.
    #[error("{0} events wait already")]
    Full(usize),
}

/// The file, which one process has open. What a call answered survives a crash and a power cut.
#[derive(Clone)]
pub struct EventStore {
    connection: Arc<Mutex<Connection>>,
    most: usize,
}

impl EventStore {
    /// Opens the file, and makes it if it is missing. At most `most` events are kept.
    pub fn open(path: &Path, most: usize) -> Result<Self, StoreError> {
        let connection =
            open(path).map_err(|problem| StoreError::Open { path: path.to_owned(), problem })?;
        Ok(Self { connection: Arc::new(Mutex::new(connection)), most })
    }

    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let connection = self.connection.clone();
        tokio::task::spawn_blocking(move || work(&mut lock(&connection))).await?
    }

    /// Keeps an event.
    pub async fn add(&self, event: Event) -> Result<(), StoreError> {
        let most = self.most;
        self.with(move |connection| {
            let count: usize =
                connection.query_row("SELECT count(*) FROM event", [], |row| row.get(0))?;
            if count >= most {
                return Err(StoreError::Full(count));
            }
            Ok(insert(connection, &event)?)
        })
        .await
    }

    /// Keeps the event of a timer, and that it fired for this time, milliseconds since 1970.
    pub async fn fire(&self, event: Event, fired_ms: i64) -> Result<(), StoreError> {
        self.with(move |connection| {
            let transaction = connection.transaction()?;
            insert(&transaction, &event)?;
            note_fired(&transaction, &event.trigger, fired_ms)?;
            Ok(transaction.commit()?)
        })
        .await
    }

    /// Up to when a timer has fired. One that is new has until `now_ms`.
    pub async fn fired(&self, name: String, now_ms: i64) -> Result<i64, StoreError> {
        self.with(move |connection| {
            let query = "SELECT fired_ms FROM timer WHERE name = ?";
            let fired = connection.query_row(query, [&name], |row| row.get(0)).optional()?;
            if let Some(fired) = fired {
                return Ok(fired);
            }
            note_fired(connection, &name, now_ms)?;
            Ok(now_ms)
        })
        .await
    }

    /// The events that are due, the oldest first.
    pub async fn due(&self, now_ms: i64, limit: usize) -> Result<Vec<Event>, StoreError> {
        self.with(move |connection| {
            let query = "SELECT id, trigger, headers, body, failed, due_ms, dead_letter_of, reason
                FROM event WHERE due_ms <= ? ORDER BY due_ms LIMIT ?";
            let mut statement = connection.prepare_cached(query)?;
            let events = statement.query_map(params![now_ms, limit], |row| {
                let headers: String = row.get(2)?;
                Ok(Event {
                    id: row.get(0)?,
                    trigger: row.get(1)?,
                    // Written by `insert`; of what is not, nothing is passed on.
                    headers: serde_json::from_str(&headers).unwrap_or_default(),
                    body: row.get(3)?,
                    failed: row.get(4)?,
                    due_ms: row.get(5)?,
                    dead_letter_of: row.get(6)?,
                    reason: row.get(7)?,
                })
            })?;
            Ok(events.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// When the next event is due, in milliseconds since 1970, of those after `after_ms`.
    pub async fn next_due(&self, after_ms: i64) -> Result<Option<i64>, StoreError> {
        self.with(move |connection| {
            let query = "SELECT min(due_ms) FROM event WHERE due_ms > ?";
            Ok(connection.query_row(query, [after_ms], |row| row.get(0))?)
        })
        .await
    }

    /// How many events are kept.
    pub async fn count(&self) -> Result<usize, StoreError> {
        self.with(|connection| {
            Ok(connection.query_row("SELECT count(*) FROM event", [], |row| row.get(0))?)
        })
        .await
    }

    /// Replaces what is kept of an event: its delivery failed.
    pub async fn update(&self, event: Event) -> Result<(), StoreError> {
        self.with(move |connection| {
            let update = "UPDATE event SET
                trigger = ?, failed = ?, due_ms = ?, dead_letter_of = ?, reason = ? WHERE id = ?";
            let Event { id, trigger, failed, due_ms, dead_letter_of, reason, .. } = event;
            connection.prepare_cached(update)?.execute(params![
                trigger,
                failed,
                due_ms,
                dead_letter_of,
                reason,
                id
            ])?;
            Ok(())
        })
        .await
    }

    /// Forgets an event.
    pub async fn remove(&self, id: String) -> Result<(), StoreError> {
        self.with(move |connection| {
            connection.prepare_cached("DELETE FROM event WHERE id = ?")?.execute([id])?;
            Ok(())
        })
        .await
    }
}

fn insert(connection: &Connection, event: &Event) -> rusqlite::Result<()> {
    let headers = serde_json::json!(event.headers).to_string();
    let insert = "INSERT INTO event
        (id, trigger, headers, body, failed, due_ms, dead_letter_of, reason)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?)";
    let Event { id, trigger, body, failed, due_ms, dead_letter_of, reason, .. } = event;
    let values = params![id, trigger, headers, body, failed, due_ms, dead_letter_of, reason];
    connection.prepare_cached(insert)?.execute(values)?;
    Ok(())
}

fn note_fired(connection: &Connection, name: &str, fired_ms: i64) -> rusqlite::Result<()> {
    let upsert = "INSERT INTO timer (name, fired_ms) VALUES (?, ?)
        ON CONFLICT (name) DO UPDATE SET fired_ms = excluded.fired_ms";
    connection.execute(upsert, params![name, fired_ms])?;
    Ok(())
}

fn open(path: &Path) -> Result<Connection, String> {
    let explain = |error: rusqlite::Error| match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy) => "another warren-gateway uses it; stop that one".to_owned(),
        Some(ErrorCode::NotADatabase) => "it is not a SQLite file; choose another".to_owned(),
        _ => error.to_string(),
    };
    let connection = Connection::open(path).map_err(explain)?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(explain)?;
    // Exclusive: a second gateway on the same file would deliver everything again.
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
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &str, due_ms: i64) -> Event {
        Event {
            id: id.into(),
            trigger: "t".into(),
            headers: vec![("a".into(), "b".into())],
            body: vec![1, 2],
            failed: 0,
            due_ms,
            dead_letter_of: None,
            reason: None,
        }
    }

    #[tokio::test]
    async fn events_are_there_until_they_are_removed_also_for_the_next_process() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events.db");
        let store = EventStore::open(&path, 2).unwrap();
        store.add(event("one", 10)).await.unwrap();
        store.fire(event("two", 20), 7).await.unwrap();
        assert!(matches!(store.add(event("three", 30)).await, Err(StoreError::Full(2))));
        let error = EventStore::open(&path, 2).err().unwrap().to_string();
        assert!(error.contains("stop that one") && error.contains("events.db"), "{error}");
        drop(store);

        let store = EventStore::open(&path, 2).unwrap();
        assert_eq!(store.due(15, 9).await.unwrap(), [event("one", 10)]);
        assert_eq!(store.next_due(15).await.unwrap(), Some(20));
        let failed = Event { failed: 1, due_ms: 40, reason: Some("x".into()), ..event("one", 0) };
        store.update(failed.clone()).await.unwrap();
        assert_eq!(store.due(50, 9).await.unwrap(), [event("two", 20), failed]);
        assert_eq!(store.due(50, 1).await.unwrap(), [event("two", 20)]);
        store.remove("two".into()).await.unwrap();
        assert_eq!((store.count().await.unwrap(), store.next_due(50).await.unwrap()), (1, None));
    }

    #[tokio::test]
    async fn timers_fired_until_their_last_time_or_until_they_were_made() {
        let directory = tempfile::tempdir().unwrap();
        let store = EventStore::open(&directory.path().join("events.db"), 9).unwrap();
        assert_eq!(store.fired("t".into(), 100).await.unwrap(), 100);
        assert_eq!(store.fired("t".into(), 200).await.unwrap(), 100);
        store.fire(event("one", 10), 160).await.unwrap();
        assert_eq!(store.fired("t".into(), 200).await.unwrap(), 160);
    }
}
