//! A diff: a clone that ran, as what distinguishes it from its template.
//!
//! It names its template by the checksum of that file, and is nothing without it. A clone of a diff
//! is compared with the template as well: its snapshot holds the pages of the former diff, too, and
//! needs no chain of files.
//!
//! A clone that comes out of a diff stands where the first one waited. The boot page then has
//! another [`Boot::generation`], by which its guest knows that it is somebody else.

use std::fs::File;
use std::io::{self, Write};
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use warren_abi::microvm::{ABI_VERSION, BOOT_ADDRESS, Boot, COMMAND_PARK, IDENTITY_ADDRESS};

use super::file::{self, Content, Kind};
use super::{Key, SnapshotError, fill};
use crate::control::EndReason;
use crate::machine::{Machine, MachineState, host};
use crate::memory::{GuestRam, PAGE};

/// A diff's file.
static KIND: Kind = Kind { magic: *b"WARRENDF", name: "diff", maker: "a snapshot of a microVM" };

/// The longest diff, in bytes.
pub const BYTES_MAX: u64 = file::BYTES_MAX;

/// What a clone's snapshot is a diff against.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Base {
    /// Checksum of the template's file.
    pub template: [u8; 32],
    /// Pages that differ from it in all clones, in ascending order: those of the diff that the
    /// clones came out of.
    pub pages: Vec<u32>,
}

/// What a diff knows besides its pages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Header {
    /// [`ABI_VERSION`].
    pub(super) abi_version: u32,
    /// [`Base::template`].
    pub(super) template: [u8; 32],
    /// Processor and devices.
    pub(super) machine: MachineState,
}

/// A snapshot of a machine that stands still.
pub struct Snapshot<'m> {
    header: Vec<u8>,
    pages: Vec<u32>,
    ram: &'m GuestRam,
}

impl<'m> Snapshot<'m> {
    /// Takes one of a machine whose guest waits.
    pub fn take(machine: &'m mut Machine, base: &Base) -> Result<Self, EndReason> {
        let template = base.template;
        let header = Header { abi_version: ABI_VERSION, template, machine: machine.save()? };
        let header = postcard::to_allocvec(&header).map_err(|error| host(&error))?;
        let mut pages = machine.ram.changed().map_err(|error| host(&error))?;
        pages.extend(&base.pages);
        pages.sort_unstable();
        pages.dedup();
        // The entropy that it was given is nobody else's; a clone is given its own.
        pages.retain(|&number| u64::from(number) * PAGE != IDENTITY_ADDRESS);
        Ok(Self { header, pages, ram: &machine.ram })
    }

    /// Length of the file, in bytes.
    pub fn bytes(&self) -> u64 {
        file::plain_bytes(&self.header, &self.pages)
    }

    /// Writes the file.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        file::write(out, &KIND, &self.header, &self.pages, self.ram)
    }
}

/// Keeps what [`Snapshot::write`] wrote, encrypted if there is a key: the file is there whole or not
/// at all. Returns its length, in bytes.
pub fn keep(path: &Path, mut bytes: Vec<u8>, key: Option<&Path>) -> Result<u64, SnapshotError> {
    let key = Key::read_optional(key)?;
    let content = Content::verify(path, &KIND, bytes, None)?;
    header(&content)?;
    bytes = content.into_bytes();
    if let Some(key) = key {
        file::encrypt(&mut bytes, &key)
            .map_err(|source| SnapshotError::Io { path: path.to_owned(), source })?;
    }
    file::put(path, &bytes)?;
    Ok(bytes.len() as u64)
}

fn header(content: &Content) -> Result<Header, SnapshotError> {
    let header: Header = content.header()?;
    content.check_abi(header.abi_version, ABI_VERSION)?;
    Ok(header)
}

/// Makes a template's memory that of the clone which the diff at `path` was taken of. Returns the
/// state of its processor and devices, and adds its pages to `base`.
pub(super) fn apply(
    path: &Path,
    key: Option<&Key>,
    template: &Path,
    base: &mut Base,
    memory: &File,
) -> Result<MachineState, SnapshotError> {
    let io_error = |source| SnapshotError::Io { path: path.to_owned(), source };
    let content = Content::read(path, &KIND, key)?;
    let header = header(&content)?;
    if header.template != base.template {
        let (path, template) = (path.to_owned(), template.to_owned());
        return Err(SnapshotError::Base { path, template });
    }
    if memory.metadata().map_err(io_error)?.len() != content.memory_bytes {
        return Err(content.malformed("size of memory"));
    }
    fill(memory, &content).map_err(io_error)?;
    begin_anew(memory).map_err(io_error)?;
    base.pages.extend(content.pages().map(|(number, _)| number));
    Ok(header.machine)
}

/// Tells the guest, which waits, that it has become another one: it is to come to its barrier.
fn begin_anew(memory: &File) -> io::Result<()> {
    let generation_at = BOOT_ADDRESS + offset_of!(Boot, generation) as u64;
    let mut generation = [0; 8];
    memory.read_exact_at(&mut generation, generation_at)?;
    let next = u64::from_le_bytes(generation).wrapping_add(1);
    memory.write_all_at(&next.to_le_bytes(), generation_at)?;
    let command_at = BOOT_ADDRESS + offset_of!(Boot, command) as u64;
    memory.write_all_at(&COMMAND_PARK.to_le_bytes(), command_at)
}
