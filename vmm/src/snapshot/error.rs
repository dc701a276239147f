//! Why a file cannot be used.

use std::io;
use std::path::PathBuf;

/// Why a template or a diff cannot be used. Each names the file and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is something else.
    #[error("{}: not a {what}; make one with {maker}", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// What it was to be.
        what: &'static str,
        /// How that is made.
        maker: &'static str,
    },
    /// Another version wrote it.
    #[error(
        "{}: {kind} of {what} {found}, this warren-vmm takes {oldest} to {newest}; \
         make it anew with {maker}", path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// What the file is.
        kind: &'static str,
        /// How that is made.
        maker: &'static str,
        /// Which version: of the format, or of the guest's ABI.
        what: &'static str,
        /// The file's.
        found: u32,
        /// The oldest that this program takes.
        oldest: u32,
        /// The newest.
        newest: u32,
    },
    /// Its length is not what its beginning says.
    #[error(
        "{}: {found} bytes instead of {expected}: truncated or damaged; copy or make it anew",
        path.display()
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// The file's length.
        found: u64,
        /// What it must be.
        expected: u64,
    },
    /// Its checksum is not that of its content.
    #[error("{}: wrong checksum: damaged; copy or make it anew", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
    },
    /// The checksum is right, the content is not: this program did not make it.
    #[error("{}: malformed: {what}; make it anew with {maker}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
        /// How such a file is made.
        maker: &'static str,
    },
    /// The guest would not run here.
    #[error(
        "{}: this processor lacks {}; use a host of the template's kind", path.display(),
        missing.join(", ")
    )]
    Cpu {
        /// The file.
        path: PathBuf,
        /// Feature names.
        missing: Vec<String>,
    },
    /// It was taken of a clone of another template.
    #[error(
        "{}: a diff against another template than {}: name the one that it was taken of, as it was",
        path.display(), template.display()
    )]
    Base {
        /// The diff.
        path: PathBuf,
        /// The template.
        template: PathBuf,
    },
    /// It is encrypted, and there is no key.
    #[error("{}: encrypted: name the file of its key with --key", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// It is not encrypted, and there is a key: whoever has one means to trust nothing else.
    #[error(
        "{}: not encrypted, although there is a key: make it anew with --key, or leave --key out",
        path.display()
    )]
    NotEncrypted {
        /// The file.
        path: PathBuf,
    },
    /// It was encrypted with another key, or forged.
    #[error("{}: encrypted with another key: name the file of its own with --key", path.display())]
    WrongKey {
        /// The file.
        path: PathBuf,
    },
    /// A key file is none.
    #[error(
        "{}: a key has 32 bytes, not {found}; make one with `head -c 32 /dev/urandom`",
        path.display()
    )]
    Key {
        /// The key file.
        path: PathBuf,
        /// Its length.
        found: usize,
    },
}
