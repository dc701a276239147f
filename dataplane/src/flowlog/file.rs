//! A log file that is rotated by its size: `flows.jsonl`, `flows.jsonl.1` (the youngest) and so on.
//!
//! Written here, since a line that could not be written must be known of: crates for rotation pass
//! over a file that cannot be opened, and tear lines.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::config;

/// Where the log is, and how much of it.
#[derive(Clone, Debug)]
pub struct Files {
    /// The file that is written.
    pub path: PathBuf,
    /// A file that would become larger is rotated.
    pub max_bytes: u64,
    /// How many rotated files are kept, at least 1.
    pub keep: u32,
}

impl From<&config::FlowLog> for Files {
    fn from(log: &config::FlowLog) -> Self {
        Self { path: log.path.clone(), max_bytes: log.max_bytes, keep: log.keep }
    }
}

impl Files {
    fn rotated(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }

    /// The files that are there, opened, the youngest first. What is rotated meanwhile is in them
    /// all the same.
    pub fn open(&self) -> io::Result<Vec<File>> {
        let mut found = Vec::new();
        let paths = std::iter::once(self.path.clone());
        for path in paths.chain((1..=self.keep).map(|number| self.rotated(number))) {
            match File::open(path) {
                Ok(file) => found.push(file),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }
}

/// The writing end.
#[derive(Debug)]
pub struct Writer {
    files: Files,
    file: File,
    size: u64,
}

impl Writer {
    /// Goes on where an earlier one stopped.
    pub fn open(files: Files) -> io::Result<Self> {
        if let Some(directory) = files.path.parent() {
            fs::create_dir_all(directory)?;
        }
        let (file, size) = open(&files.path)?;
        Ok(Self { files, file, size })
    }

    /// Appends a line, which ends with a line feed: all of it or nothing.
    pub fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.size > 0 && self.size + line.len() as u64 > self.files.max_bytes {
            self.rotate()?;
        }
        match self.file.write_all(line) {
            Ok(()) => self.size += line.len() as u64,
            Err(error) => {
                // Half a line would spoil the next one.
                self.file.set_len(self.size)?;
                return Err(error);
            }
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        for number in (1..self.files.keep).rev() {
            rename(&self.files.rotated(number), &self.files.rotated(number + 1))?;
        }
        rename(&self.files.path, &self.files.rotated(1))?;
        (self.file, self.size) = open(&self.files.path)?;
        Ok(())
    }
}

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Opens a file to append to it, with its size. A line that a crash of the machine tore is ended.
fn open(path: &Path) -> io::Result<(File, u64)> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
    let mut size = file.metadata()?.len();
    if size > 0 {
        file.seek(SeekFrom::End(-1))?;
        let mut last = [0];
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            file.write_all(b"\n")?;
            size += 1;
        }
    }
    Ok((file, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(directory: &tempfile::TempDir) -> Files {
        Files { path: directory.path().join("log/flows"), max_bytes: 10, keep: 2 }
    }

    fn texts(files: &Files) -> Vec<String> {
        let read = |file| io::read_to_string(file).unwrap();
        files.open().unwrap().into_iter().map(read).collect()
    }

    #[test]
    fn files_are_rotated_before_they_are_too_large_and_the_oldest_goes() {
        let directory = tempfile::tempdir().unwrap();
        let files = files(&directory);
        let mut writer = Writer::open(files.clone()).unwrap();
        for line in ["1111\n", "2222\n", "3333\n", "44444444444\n", "5555\n"] {
            writer.append(line.as_bytes()).unwrap();
        }
        assert_eq!(texts(&files), ["5555\n", "44444444444\n", "3333\n"], "a long line is whole");
        let mut writer = Writer::open(files.clone()).unwrap();
        writer.append(b"6666\n").unwrap();
        writer.append(b"7777\n").unwrap();
        assert_eq!(texts(&files), ["7777\n", "5555\n6666\n", "44444444444\n"]);
    }

    #[test]
    fn a_torn_line_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let files = files(&directory);
        drop(Writer::open(files.clone()).unwrap());
        fs::write(&files.path, "to").unwrap();
        Writer::open(files.clone()).unwrap().append(b"rn\n").unwrap();
        assert_eq!(texts(&files), ["to\nrn\n"]);
    }
}
