//! A diff: a clone that went on, as what distinguishes it from its template. A function's image is
//! one that stands at the barrier, and has its function; a snapshot is one that ran.
//!
//! It names its template by the checksum of that file, and is nothing without it. A clone of a diff
//! is compared with the template as well: its snapshot holds the pages of the former diff, too, and
//! needs no chain of files. Nothing is copied into one memory: template, what differs from it, the
//! function's data and its code are each mapped as they are.
//!
//! A clone that comes out of a diff stands where the first one waited. The boot page then has
//! another [`Boot::generation`], by which its guest knows that it is somebody else.

use std::fs::File;
use std::io::{self, Write};
use std::mem::offset_of;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use warren_abi::microvm::{
    BOOT_ADDRESS, Boot, CODE_ADDRESS, COMMAND_PARK, DATA_ADDRESS, FUNCTION_BYTES_MAX,
    IDENTITY_ADDRESS,
};

use super::file::{self, Content, Kind};
use super::{Key, SnapshotError, Template, fill, former};
use crate::control::EndReason;
use crate::machine::{Machine, MachineState, host};
use crate::memory::{GuestRam, PAGE, Pages, Part};

/// A diff's file.
pub(super) static KIND: Kind = Kind {
    magic: *b"WARRENDF",
    name: "diff",
    maker: "`warren-vmm image`, or a snapshot of a microVM",
};

/// The longest diff, in bytes.
pub const BYTES_MAX: u64 = file::BYTES_MAX;

/// Pages that differ are of one mapping if so few that do not lie between them.
const GAP: u32 = 8;

/// What a clone's snapshot is a diff against.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Base {
    /// [`super::Header::abi_version`].
    pub abi_version: u32,
    /// Checksum of the template's file.
    pub template: [u8; 32],
    /// Pages that differ from it in all clones, in ascending order: those of the diff that the
    /// clones came out of.
    pub pages: Vec<u32>,
    /// [`super::Header::working_set`].
    pub working_set: Vec<Pages>,
    /// [`super::Header::in_place`].
    pub in_place: Vec<Pages>,
}

impl Base {
    /// Of a template itself.
    pub fn of(template: [u8; 32], header: &super::Header) -> Self {
        let super::Header { abi_version, working_set, in_place, .. } = header.clone();
        Self { abi_version, template, pages: Vec::new(), working_set, in_place }
    }
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
    /// Size of a function's data and code, if there is one.
    pub(super) function: Option<(u64, u64)>,
    /// [`super::Header::working_set`].
    pub(super) working_set: Vec<Pages>,
    /// [`super::Header::in_place`].
    pub(super) in_place: Vec<Pages>,
}

impl Header {
    /// Where pages may be besides memory.
    fn elsewhere(&self) -> Vec<Range<u64>> {
        let of = |address: u64, bytes: u64| address..address + bytes;
        let (data, code) = self.function.unwrap_or_default();
        vec![of(DATA_ADDRESS, data), of(CODE_ADDRESS, code)]
    }
}

/// A snapshot of a machine that stands still.
pub struct Snapshot<'m> {
    header: Vec<u8>,
    pages: Vec<u32>,
    ram: &'m GuestRam,
}

impl<'m> Snapshot<'m> {
    /// Takes one of a machine whose guest waits, or stands at the barrier.
    pub fn take(machine: &'m mut Machine, base: &Base) -> Result<Self, EndReason> {
        let header = Header {
            abi_version: base.abi_version,
            template: base.template,
            machine: machine.save()?,
            function: machine.ram.function_bytes(),
            working_set: base.working_set.clone(),
            in_place: base.in_place.clone(),
        };
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

pub(super) fn header(content: &Content) -> Result<Header, SnapshotError> {
    let header = match content.version {
        3 => content.header::<former::Diff>()?.into(),
        _ => content.header::<Header>()?,
    };
    content.check_abi(header.abi_version)?;
    let fits = |bytes: u64| (1..=FUNCTION_BYTES_MAX).contains(&bytes) && bytes.is_multiple_of(PAGE);
    if let Some((data, code)) = header.function
        && !(fits(data) && fits(code) && content.memory_bytes <= DATA_ADDRESS)
    {
        return Err(content.malformed("size of the function"));
    }
    content.check_pages(&header.elsewhere())?;
    Ok(header)
}

/// Makes clones of a template clones of the one which the diff at `path` was taken of.
pub(super) fn apply(
    path: &Path,
    key: Option<&Key>,
    template_path: &Path,
    template: &mut Template,
) -> Result<(), SnapshotError> {
    let io_error = |source| SnapshotError::Io { path: path.to_owned(), source };
    let content = Content::read(path, &KIND, key)?;
    let header = header(&content)?;
    if header.template != template.base.template {
        let (path, template) = (path.to_owned(), template_path.to_owned());
        return Err(SnapshotError::Base { path, template });
    }
    if template.memory.base.bytes != content.memory_bytes {
        return Err(content.malformed("size of memory"));
    }
    let Template { memory, base, .. } = template;
    memory.changes = Some(changes(&memory.base, &content).map_err(io_error)?);
    if let Some((data, code)) = header.function {
        memory.data = Some(part(&content, "warren-data", DATA_ADDRESS, data).map_err(io_error)?);
        memory.code = Some(part(&content, "warren-code", CODE_ADDRESS, code).map_err(io_error)?);
    }
    base.pages.extend(content.pages().map(|(number, _)| number));
    template.header.machine = header.machine;
    // A diff of version 3 knows nothing of its own of what its clones will use.
    if !header.in_place.is_empty() {
        base.working_set = header.working_set;
        base.in_place = header.in_place;
    }
    template.origin = content.checksum;
    Ok(())
}

/// The pages of memory that differ from the template's. Between those that are close together there
/// are the template's: each row of pages is a mapping of every clone's.
fn changes(base: &Part, content: &Content) -> io::Result<(File, Vec<Pages>)> {
    let Part { memfd, bytes } = Part::new("warren-changes", base.bytes)?;
    let memory = || content.pages().filter(|(number, _)| u64::from(*number) * PAGE < bytes);
    let boot = (BOOT_ADDRESS / PAGE) as u32;
    let mut numbers: Vec<_> = memory().map(|(number, _)| number).chain([boot]).collect();
    numbers.sort_unstable();
    let rows = Pages::within(GAP, numbers);
    for row in &rows {
        let mut pages = vec![0; row.bytes() as usize];
        base.memfd.read_exact_at(&mut pages, row.address())?;
        memfd.write_all_at(&pages, row.address())?;
    }
    fill(&memfd, memory())?;
    begin_anew(&memfd)?;
    Ok((memfd, rows))
}

/// A function's data or code, which begins at this address.
fn part(content: &Content, name: &str, address: u64, bytes: u64) -> io::Result<Part> {
    let part = Part::new(name, bytes)?;
    let first = (address / PAGE) as u32;
    let there = first..first + (bytes / PAGE) as u32;
    let pages = content.pages().filter(|(number, _)| there.contains(number));
    fill(&part.memfd, pages.map(|(number, page)| (number - first, page)))?;
    Ok(part)
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
