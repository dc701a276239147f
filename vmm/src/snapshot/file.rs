//! The container of templates and diffs: a header, and pages.
//!
//! All integers are little-endian.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | what it is: [`Kind::magic`] |
//! | 4 | one of [`VERSIONS`] |
//! | 4 | 0: plain, 1: encrypted ([`super::crypt`]) |
//! | 8 | size of guest memory |
//! | 4 | length of the header |
//! | 4 | number of pages |
//! | 24 | nonce; zeroes in a plain one |
//! | ... | the body: header (postcard) |
//! | 4 each | the body: page numbers, ascending |
//! | 4096 each | the body: the pages |
//! | 16 | tag, in an encrypted one only |
//! | 32 | BLAKE3 of everything before |
//!
//! A file is read once, whole; what was verified is what is used. The checksum tells damage, and
//! names the file; who made it only an encrypted one proves.

use std::fs::File;
use std::io::{self, Write};
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::crypt::{self, Key, NONCE, TAG};
use super::{ABI_VERSIONS, SnapshotError};
use crate::linux::boot::MEMORY_MAX;
use crate::memory::{GuestRam, PAGE};

/// Version of the format that is written. Raise it together with the layouts that tests pin.
pub const VERSION: u32 = 4;

/// Versions that are read.
pub const VERSIONS: RangeInclusive<u32> = 3..=VERSION;

pub(super) const FIXED: usize = 8 + 4 + 4 + 8 + 4 + 4 + NONCE;
pub(super) const CHECKSUM: usize = 32;

const PLAIN: u32 = 0;
const ENCRYPTED: u32 = 1;

/// Where the cipher's number is.
const CIPHER_AT: usize = 12;

/// What a file is for.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// What the file begins with.
    pub magic: [u8; 8],
    /// Its name.
    pub name: &'static str,
    /// How one is made.
    pub maker: &'static str,
}

/// The fixed part, after version and cipher.
#[derive(Clone, Copy)]
struct Head {
    memory_bytes: u64,
    header: u32,
    pages: u32,
}

impl Head {
    /// Length of the body.
    fn body(self) -> u64 {
        u64::from(self.header) + u64::from(self.pages) * (4 + PAGE)
    }
}

/// Length of a plain file, in bytes.
pub fn plain_bytes(header: &[u8], pages: &[u32]) -> u64 {
    let head = Head { memory_bytes: 0, header: header.len() as u32, pages: pages.len() as u32 };
    FIXED as u64 + head.body() + CHECKSUM as u64
}

/// The longest file, in bytes.
pub const BYTES_MAX: u64 = MEMORY_MAX / PAGE * (4 + PAGE) + (1 << 20);

/// Writes a plain file: this header, and these pages of memory.
pub fn write(
    out: &mut dyn Write,
    kind: &Kind,
    header: &[u8],
    pages: &[u32],
    ram: &GuestRam,
) -> io::Result<()> {
    let mut hasher = blake3::Hasher::new();
    let mut put = |bytes: &[u8]| {
        hasher.update(bytes);
        out.write_all(bytes)
    };
    put(&kind.magic)?;
    put(&VERSION.to_le_bytes())?;
    put(&PLAIN.to_le_bytes())?;
    put(&ram.bytes().to_le_bytes())?;
    put(&(header.len() as u32).to_le_bytes())?;
    put(&(pages.len() as u32).to_le_bytes())?;
    put(&[0; NONCE])?;
    put(header)?;
    for number in pages {
        put(&number.to_le_bytes())?;
    }
    let mut page = [0; PAGE as usize];
    for &number in pages {
        ram.read_page(number, &mut page)?;
        put(&page)?;
    }
    let checksum = hasher.finalize();
    out.write_all(checksum.as_bytes())
}

/// Encrypts a whole plain file.
pub fn encrypt(file: &mut Vec<u8>, key: &Key) -> io::Result<()> {
    let nonce = crypt::nonce()?;
    file.truncate(file.len().saturating_sub(CHECKSUM));
    let (fixed, body) = file.split_at_mut(FIXED);
    fixed[CIPHER_AT..CIPHER_AT + 4].copy_from_slice(&ENCRYPTED.to_le_bytes());
    fixed[FIXED - NONCE..].copy_from_slice(&nonce);
    let tag = key.encrypt(nonce, fixed, body)?;
    file.extend(tag);
    let checksum = blake3::hash(file);
    file.extend(checksum.as_bytes());
    Ok(())
}

/// Puts a file in its place, atomically: it is there whole or not at all.
pub fn put(path: &Path, bytes: &[u8]) -> Result<(), SnapshotError> {
    let io_error = |source| SnapshotError::Io { path: path.to_owned(), source };
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let temporary = PathBuf::from(name);
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    });
    written.map_err(|error| {
        let _ = std::fs::remove_file(&temporary);
        io_error(error)
    })
}

/// A file that was verified, and decrypted.
#[derive(Debug)]
pub struct Content {
    path: PathBuf,
    kind: &'static Kind,
    /// Version of its format.
    pub version: u32,
    bytes: Vec<u8>,
    header: usize,
    pages: usize,
    /// Size of guest memory.
    pub memory_bytes: u64,
    /// The file's checksum: its name.
    pub checksum: [u8; 32],
}

impl Content {
    /// Reads a file.
    pub fn read(
        path: &Path,
        kind: &'static Kind,
        key: Option<&Key>,
    ) -> Result<Self, SnapshotError> {
        let bytes = std::fs::read(path)
            .map_err(|source| SnapshotError::Io { path: path.to_owned(), source })?;
        Self::verify(path, kind, bytes, key)
    }

    /// Checks everything before anything is used, the cheapest first.
    pub fn verify(
        path: &Path,
        kind: &'static Kind,
        mut bytes: Vec<u8>,
        key: Option<&Key>,
    ) -> Result<Self, SnapshotError> {
        let path = path.to_owned();
        if !bytes.starts_with(&kind.magic) {
            let (what, maker) = (kind.name, kind.maker);
            return Err(SnapshotError::Other { path, what, maker });
        }
        let found = bytes.len() as u64;
        let length = |path, expected| SnapshotError::Length { path, found, expected };
        let too_short = |path| length(path, (FIXED + CHECKSUM) as u64);
        let Some(version) = word(&bytes, 8) else { return Err(too_short(path)) };
        if !VERSIONS.contains(&version) {
            return Err(other_version(path, kind, "format", version, VERSIONS));
        }
        let Some((cipher, head)) = fixed(&bytes) else { return Err(too_short(path)) };
        let tag_bytes = if cipher == ENCRYPTED { TAG } else { 0 };
        let expected = head.body() + (FIXED + tag_bytes + CHECKSUM) as u64;
        if expected != found {
            return Err(length(path, expected));
        }
        // The lengths are right, so these cannot be out of range.
        let sealed = bytes.len() - CHECKSUM;
        let checksum = *blake3::hash(&bytes[..sealed]).as_bytes();
        if bytes[sealed..] != checksum {
            return Err(SnapshotError::Checksum { path });
        }
        match (cipher, key) {
            (PLAIN, None) => {}
            (PLAIN, Some(_)) => return Err(SnapshotError::NotEncrypted { path }),
            (ENCRYPTED, None) => return Err(SnapshotError::NoKey { path }),
            (ENCRYPTED, Some(key)) => {
                let (fixed, rest) = bytes[..sealed].split_at_mut(FIXED);
                let (body, tag) = rest.split_at_mut(rest.len() - TAG);
                let nonce = *fixed.last_chunk().unwrap_or(&[0; NONCE]);
                let tag = *tag.first_chunk().unwrap_or(&[0; TAG]);
                if key.decrypt(nonce, fixed, body, tag).is_none() {
                    return Err(SnapshotError::WrongKey { path });
                }
            }
            _ => return Err(malformed(path, kind, "cipher")),
        }
        let Head { memory_bytes, header, pages } = head;
        if memory_bytes > MEMORY_MAX || memory_bytes % PAGE != 0 {
            return Err(malformed(path, kind, "size of memory"));
        }
        let (header, pages) = (header as usize, pages as usize);
        Ok(Self { path, kind, version, bytes, header, pages, memory_bytes, checksum })
    }

    /// Checks that the pages lie in memory, or in one of these ranges of addresses.
    pub fn check_pages(&self, elsewhere: &[Range<u64>]) -> Result<(), SnapshotError> {
        let lies_in_memory = |(number, _): (u32, &[u8])| {
            let address = u64::from(number) * PAGE;
            address < self.memory_bytes || elsewhere.iter().any(|range| range.contains(&address))
        };
        if self.pages().all(lies_in_memory) {
            return Ok(());
        }
        Err(self.malformed("page outside of memory"))
    }

    /// Decodes the header.
    pub fn header<T: for<'a> Deserialize<'a>>(&self) -> Result<T, SnapshotError> {
        let header = &self.bytes[FIXED..FIXED + self.header];
        postcard::from_bytes(header).map_err(|_| self.malformed("header"))
    }

    /// Numbers and content of the pages.
    pub fn pages(&self) -> impl Iterator<Item = (u32, &[u8])> {
        let (numbers, pages) = self.bytes[FIXED + self.header..].split_at(self.pages * 4);
        let numbers = numbers.chunks_exact(4).filter_map(|number| word(number, 0));
        numbers.zip(pages.chunks_exact(PAGE as usize))
    }

    /// The file, decrypted.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The content is not what it must be.
    pub fn malformed(&self, what: &'static str) -> SnapshotError {
        malformed(self.path.clone(), self.kind, what)
    }

    /// Checks the version of the ABI that the guest was built with.
    pub fn check_abi(&self, found: u32) -> Result<(), SnapshotError> {
        if ABI_VERSIONS.contains(&found) {
            return Ok(());
        }
        Err(other_version(self.path.clone(), self.kind, "guest ABI", found, ABI_VERSIONS))
    }
}

fn malformed(path: PathBuf, kind: &Kind, what: &'static str) -> SnapshotError {
    SnapshotError::Malformed { path, what, maker: kind.maker }
}

fn other_version(
    path: PathBuf,
    kind: &Kind,
    what: &'static str,
    found: u32,
    known: RangeInclusive<u32>,
) -> SnapshotError {
    let Kind { name, maker, .. } = kind;
    let (oldest, newest) = known.into_inner();
    SnapshotError::Version { path, kind: name, maker, what, found, oldest, newest }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

/// Cipher and head; `None` if the file ends before the shortest one would.
fn fixed(bytes: &[u8]) -> Option<(u32, Head)> {
    if bytes.len() < FIXED + CHECKSUM {
        return None;
    }
    let memory_bytes = u64::from_le_bytes(*bytes.get(16..)?.first_chunk()?);
    let head = Head { memory_bytes, header: word(bytes, 24)?, pages: word(bytes, 28)? };
    Some((word(bytes, CIPHER_AT)?, head))
}
