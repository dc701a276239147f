//! What clones are made from: a template, the machine at its release barrier; and, if they are to be
//! branches of one that ran, a diff against it.
//!
//! [`file`] is the form of both, [`diff`] what is special about the second, `former` what older ones
//! have, [`crypt`] their encryption. What was verified is what fills the sealed memfd that all clones map.

pub mod crypt;
pub mod diff;
mod error;
mod file;
mod former;

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use warren_abi::microvm::ABI_VERSION;

pub use crypt::Key;
pub use error::SnapshotError;
pub use file::VERSION;
use file::{Content, Kind};

use crate::machine::MachineState;
use crate::memory::{Backing, GuestRam, PAGE, Pages, Part};

/// Versions of the guest's ABI that are run. One of 2 takes no function.
const ABI_VERSIONS: RangeInclusive<u32> = 2..=ABI_VERSION;

/// A template's file.
static KIND: Kind = Kind { magic: *b"WARRENVM", name: "template", maker: "`warren-vmm template`" };

/// What a template knows besides its memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`ABI_VERSION`] that the guest was built with.
    pub abi_version: u32,
    /// Processor features that the guest needs.
    pub cpu_features: Vec<String>,
    /// Processor and devices.
    pub machine: MachineState,
    /// BLAKE3 of the disk that a Linux guest was booted with.
    pub disk: Option<[u8; 32]>,
    /// What a clone wrote to until it first had nothing to do, in ascending order.
    pub working_set: Vec<Pages>,
    /// All that was in place then, what it only read among it.
    pub in_place: Vec<Pages>,
}

/// The files that clones are made from.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The template.
    pub template: PathBuf,
    /// A diff against it: clones are branches of the microVM that it was taken of.
    pub diff: Option<PathBuf>,
    /// The disk that a Linux guest's template was made with, if it was.
    pub disk: Option<PathBuf>,
    /// The key of template and diff; without it neither may be encrypted.
    pub key: Option<PathBuf>,
}

impl From<PathBuf> for Sources {
    /// A plain template, and nothing else.
    fn from(template: PathBuf) -> Self {
        Self { template, diff: None, disk: None, key: None }
    }
}

/// A verified template, ready to be cloned.
#[derive(Debug)]
pub struct Template {
    /// Its header; of a diff, if there is one, processor and devices.
    pub header: Header,
    /// Sealed memory.
    pub memory: Backing,
    /// What snapshots of its clones are diffs against.
    pub base: diff::Base,
    /// Checksum of the file that clones come out of: the diff's, if there is one.
    pub origin: [u8; 32],
}

/// Writes a template, atomically: the file is there whole or not at all.
pub fn write(
    path: &Path,
    header: &Header,
    ram: &GuestRam,
    key: Option<&Key>,
) -> Result<(), SnapshotError> {
    let io_error = |source| SnapshotError::Io { path: path.to_owned(), source };
    let pages = used_pages(ram).map_err(io_error)?;
    let header =
        postcard::to_allocvec(header).map_err(|error| io_error(io::Error::other(error)))?;
    let mut bytes = Vec::with_capacity(file::plain_bytes(&header, &pages) as usize);
    file::write(&mut bytes, &KIND, &header, &pages, ram).map_err(io_error)?;
    if let Some(key) = key {
        file::encrypt(&mut bytes, key).map_err(io_error)?;
    }
    file::put(path, &bytes)
}

/// Numbers of the pages that are not zero.
fn used_pages(ram: &GuestRam) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    let mut page = [0; PAGE as usize];
    for number in 0..ram.bytes() / PAGE {
        ram.all().read_slice(&mut page, GuestAddress(number * PAGE)).map_err(io::Error::other)?;
        if page.iter().any(|&byte| byte != 0) {
            numbers.push(number as u32);
        }
    }
    Ok(numbers)
}

/// Memory that was filled before, and sealed.
#[derive(Debug)]
pub struct Given {
    /// Checksum of its template.
    pub template: [u8; 32],
    /// The memory.
    pub memfd: File,
}

/// Reads and verifies a template, and fills a sealed memfd with its memory, unless that was given;
/// with a diff, others with what that adds.
pub fn read(sources: &Sources, given: Option<Given>) -> Result<Template, SnapshotError> {
    let Sources { template: path, diff, key, .. } = sources;
    let key = Key::read_optional(key.as_deref())?;
    let io_error = |source| SnapshotError::Io { path: path.clone(), source };
    let content = Content::read(path, &KIND, key.as_ref())?;
    let header = header(&content)?;
    content.check_pages(&[])?;
    let base = match given {
        Some(Given { template, memfd }) if template == content.checksum => {
            Part { memfd, bytes: content.memory_bytes }
        }
        _ => {
            let base = Part::new("warren-memory", content.memory_bytes).map_err(io_error)?;
            fill(&base.memfd, content.pages()).map_err(io_error)?;
            base
        }
    };
    let mut template = Template {
        base: diff::Base::of(content.checksum, &header),
        header,
        memory: Backing::new(base),
        origin: content.checksum,
    };
    if let Some(diff) = diff {
        diff::apply(diff, key.as_ref(), path, &mut template)?;
    }
    template.memory.seal().map_err(io_error)?;
    Ok(template)
}

/// A template's header, of this version.
fn header(content: &Content) -> Result<Header, SnapshotError> {
    let header: Header = match content.version {
        3 => content.header::<former::Template>()?.into(),
        _ => content.header()?,
    };
    content.check_abi(header.abi_version)?;
    Ok(header)
}

/// Copies pages to where they belong.
fn fill<'p>(memory: &File, mut pages: impl Iterator<Item = (u32, &'p [u8])>) -> io::Result<()> {
    pages.try_for_each(|(number, page)| memory.write_all_at(page, u64::from(number) * PAGE))
}

/// Reads a template or a diff to which the right checksum is added, whatever else is in it; returns how
/// many pages it has. For fuzz targets.
#[doc(hidden)]
pub fn examine(mut bytes: Vec<u8>) -> Result<usize, SnapshotError> {
    let checksum = *blake3::hash(&bytes).as_bytes();
    bytes.extend(checksum);
    let path = Path::new("examined");
    let content = if bytes.starts_with(&diff::KIND.magic) {
        let content = Content::verify(path, &diff::KIND, bytes, None)?;
        diff::header(&content)?;
        content
    } else {
        let content = Content::verify(path, &KIND, bytes, None)?;
        header(&content)?;
        content.check_pages(&[])?;
        content
    };
    Ok(content.pages().count())
}

#[cfg(test)]
mod tests;
