//! Which instances this gateway started and did not end: a file for each, so that those of a
//! gateway that crashed are ended by the next one.

use std::io;
use std::path::{Path, PathBuf};

/// The directory.
#[derive(Clone, Debug)]
pub struct Ledger(PathBuf);

impl Ledger {
    /// Opens the directory, and makes it if it is missing.
    pub fn open(directory: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        Ok(Self(directory.to_owned()))
    }

    /// An instance started; this is its host's agent. It outlives the process, not a power cut:
    /// this is on the way of a cold start.
    pub fn add(&self, id: &str, endpoint: &str) -> io::Result<()> {
        std::fs::write(self.0.join(id), endpoint)
    }

    /// An instance ended.
    pub fn remove(&self, id: &str) {
        // Nothing depends on it: ending an instance twice does nothing.
        let _ = std::fs::remove_file(self.0.join(id));
    }

    /// Ids of all instances, each with its host's agent.
    pub fn all(&self) -> io::Result<Vec<(String, String)>> {
        let entries = std::fs::read_dir(&self.0)?.map(|entry| {
            let entry = entry?;
            let endpoint = std::fs::read_to_string(entry.path())?;
            Ok((entry.file_name().to_string_lossy().into_owned(), endpoint))
        });
        entries.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_and_not_removed_is_there_for_the_next_one() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&directory.path().join("instances")).unwrap();
        ledger.add("one", "http://127.0.0.1:1").unwrap();
        ledger.add("two", "http://127.0.0.1:2").unwrap();
        ledger.remove("one");
        ledger.remove("never");
        let next = Ledger::open(&directory.path().join("instances")).unwrap();
        assert_eq!(next.all().unwrap(), [("two".to_owned(), "http://127.0.0.1:2".to_owned())]);
    }
}
