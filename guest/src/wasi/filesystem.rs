//! wasi:filesystem: the package's files, read-only, and /tmp in memory.

mod files;

use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;

use wasmtime::Result;
use wasmtime::component::Resource;

use super::bindings::wasi::clocks::wall_clock::Datetime;
use super::bindings::wasi::filesystem::preopens;
use super::bindings::wasi::filesystem::types::{
    self, Advice, DescriptorFlags, DescriptorStat, DescriptorType, DirectoryEntry, ErrorCode,
    MetadataHashValue, NewTimestamp, OpenFlags, PathFlags,
};
use super::io::{InputStream, IoError, OutputStream};
use super::{Failure, State};
use crate::machine::Machine;
use crate::single::Single;
use crate::stream::{Broken, End, Sink, Source};

pub use files::Files;
use files::Node;

pub type FileError = Failure<ErrorCode>;

/// The most that is read or written at once, in bytes.
const PIECE: usize = 64 * 1024;

impl From<ErrorCode> for FileError {
    fn from(error: ErrorCode) -> Self {
        Self::Error(error)
    }
}

/// An open file or directory.
pub struct Descriptor {
    node: Single<Rc<Node>>,
    flags: DescriptorFlags,
}

/// What of a directory was not told yet.
pub struct Entries(vec::IntoIter<DirectoryEntry>);

/// A file that is read from a place on.
struct Reader {
    node: Rc<Node>,
    offset: u64,
}

impl Source for Reader {
    fn read(&mut self, _: &mut Machine, limit: usize) -> Result<Vec<u8>, End> {
        let bytes = self.node.read(self.offset, limit.min(PIECE)).map_err(broken)?;
        if bytes.is_empty() && limit > 0 {
            return Err(End::Closed);
        }
        self.offset += bytes.len() as u64;
        Ok(bytes)
    }

    fn is_ready(&mut self, _: &mut Machine) -> bool {
        true
    }
}

/// A file that is written from a place on, or at its end.
struct Writer {
    node: Rc<Node>,
    offset: Option<u64>,
}

impl Sink for Writer {
    fn room(&mut self, _: &mut Machine) -> Result<usize, End> {
        Ok(PIECE)
    }

    fn write(&mut self, machine: &mut Machine, bytes: &[u8]) -> Result<(), End> {
        let offset = self.offset.unwrap_or(self.node.size());
        self.node.write(offset, bytes, machine.wall_clock_ns()).map_err(broken)?;
        self.offset = self.offset.map(|offset| offset + bytes.len() as u64);
        Ok(())
    }
}

fn broken(error: ErrorCode) -> End {
    End::Failed(Broken::Other(error.to_string()))
}

fn datetime(ns: u64) -> Datetime {
    Datetime { seconds: ns / 1_000_000_000, nanoseconds: (ns % 1_000_000_000) as u32 }
}

fn stat(node: &Node) -> DescriptorStat {
    let time = Some(datetime(node.modified_ns()));
    DescriptorStat {
        type_: node.kind(),
        link_count: 1,
        size: node.size(),
        data_access_timestamp: time,
        data_modification_timestamp: time,
        status_change_timestamp: time,
    }
}

fn hash(node: &Node) -> MetadataHashValue {
    MetadataHashValue { lower: node.serial, upper: node.modified_ns() }
}

impl State {
    fn node(&self, descriptor: &Resource<Descriptor>) -> Result<Rc<Node>> {
        Ok(self.table.get(descriptor)?.node.0.clone())
    }

    fn has(
        &self,
        descriptor: &Resource<Descriptor>,
        flags: DescriptorFlags,
    ) -> Result<(), FileError> {
        match self.table.get(descriptor)?.flags.contains(flags) {
            true => Ok(()),
            false => Err(ErrorCode::NotPermitted.into()),
        }
    }

    fn descriptor(
        &mut self,
        node: Rc<Node>,
        flags: DescriptorFlags,
    ) -> Result<Resource<Descriptor>> {
        Ok(self.table.push(Descriptor { node: Single(node), flags })?)
    }
}

impl preopens::Host for State {
    fn get_directories(&mut self) -> Result<Vec<(Resource<Descriptor>, String)>> {
        let root = self.files.root();
        let flags = DescriptorFlags::READ | DescriptorFlags::MUTATE_DIRECTORY;
        Ok(vec![(self.descriptor(root, flags)?, "/".to_string())])
    }
}

impl types::Host for State {
    fn filesystem_error_code(&mut self, _: Resource<IoError>) -> Result<Option<ErrorCode>> {
        Ok(None)
    }

    fn convert_error_code(&mut self, error: FileError) -> Result<ErrorCode> {
        error.convert()
    }
}

impl types::HostDescriptor for State {
    fn read_via_stream(
        &mut self,
        file: Resource<Descriptor>,
        offset: u64,
    ) -> Result<Resource<InputStream>, FileError> {
        self.has(&file, DescriptorFlags::READ)?;
        let reader = Reader { node: self.node(&file)?, offset };
        Ok(self.table.push(InputStream::new(Rc::new(RefCell::new(reader))))?)
    }

    fn write_via_stream(
        &mut self,
        file: Resource<Descriptor>,
        offset: u64,
    ) -> Result<Resource<OutputStream>, FileError> {
        self.has(&file, DescriptorFlags::WRITE)?;
        let writer = Writer { node: self.node(&file)?, offset: Some(offset) };
        Ok(self.table.push(OutputStream::new(Rc::new(RefCell::new(writer))))?)
    }

    fn append_via_stream(
        &mut self,
        file: Resource<Descriptor>,
    ) -> Result<Resource<OutputStream>, FileError> {
        self.has(&file, DescriptorFlags::WRITE)?;
        let writer = Writer { node: self.node(&file)?, offset: None };
        Ok(self.table.push(OutputStream::new(Rc::new(RefCell::new(writer))))?)
    }

    fn advise(
        &mut self,
        _: Resource<Descriptor>,
        _: u64,
        _: u64,
        _: Advice,
    ) -> Result<(), FileError> {
        Ok(())
    }

    fn sync_data(&mut self, _: Resource<Descriptor>) -> Result<(), FileError> {
        Ok(())
    }

    fn get_flags(&mut self, file: Resource<Descriptor>) -> Result<DescriptorFlags, FileError> {
        Ok(self.table.get(&file)?.flags)
    }

    fn get_type(&mut self, file: Resource<Descriptor>) -> Result<DescriptorType, FileError> {
        Ok(self.node(&file)?.kind())
    }

    fn set_size(&mut self, file: Resource<Descriptor>, size: u64) -> Result<(), FileError> {
        self.has(&file, DescriptorFlags::WRITE)?;
        Ok(self.node(&file)?.set_size(size, self.machine.wall_clock_ns())?)
    }

    fn set_times(
        &mut self,
        file: Resource<Descriptor>,
        _: NewTimestamp,
        modified: NewTimestamp,
    ) -> Result<(), FileError> {
        let now = self.machine.wall_clock_ns();
        Ok(self.node(&file)?.set_modified(modified, now)?)
    }

    fn read(
        &mut self,
        file: Resource<Descriptor>,
        length: u64,
        offset: u64,
    ) -> Result<(Vec<u8>, bool), FileError> {
        self.has(&file, DescriptorFlags::READ)?;
        let node = self.node(&file)?;
        let bytes = node.read(offset, length.min(PIECE as u64) as usize)?;
        let is_end = offset.saturating_add(bytes.len() as u64) >= node.size();
        Ok((bytes, is_end))
    }

    fn write(
        &mut self,
        file: Resource<Descriptor>,
        bytes: Vec<u8>,
        offset: u64,
    ) -> Result<u64, FileError> {
        self.has(&file, DescriptorFlags::WRITE)?;
        self.node(&file)?.write(offset, &bytes, self.machine.wall_clock_ns())?;
        Ok(bytes.len() as u64)
    }

    fn read_directory(
        &mut self,
        directory: Resource<Descriptor>,
    ) -> Result<Resource<Entries>, FileError> {
        let entries = self.node(&directory)?.entries()?;
        let entries = entries.into_iter().map(|(name, type_)| DirectoryEntry { type_, name });
        let entries: Vec<_> = entries.collect();
        Ok(self.table.push(Entries(entries.into_iter()))?)
    }

    fn sync(&mut self, _: Resource<Descriptor>) -> Result<(), FileError> {
        Ok(())
    }

    fn create_directory_at(
        &mut self,
        directory: Resource<Descriptor>,
        path: String,
    ) -> Result<(), FileError> {
        let now = self.machine.wall_clock_ns();
        Ok(self.files.create_directory(&self.node(&directory)?, &path, now)?)
    }

    fn stat(&mut self, file: Resource<Descriptor>) -> Result<DescriptorStat, FileError> {
        Ok(stat(&*self.node(&file)?))
    }

    fn stat_at(
        &mut self,
        directory: Resource<Descriptor>,
        _: PathFlags,
        path: String,
    ) -> Result<DescriptorStat, FileError> {
        Ok(stat(&*self.node(&directory)?.find(&path)?))
    }

    fn set_times_at(
        &mut self,
        directory: Resource<Descriptor>,
        _: PathFlags,
        path: String,
        _: NewTimestamp,
        modified: NewTimestamp,
    ) -> Result<(), FileError> {
        let now = self.machine.wall_clock_ns();
        Ok(self.node(&directory)?.find(&path)?.set_modified(modified, now)?)
    }

    fn link_at(
        &mut self,
        _: Resource<Descriptor>,
        _: PathFlags,
        _: String,
        _: Resource<Descriptor>,
        _: String,
    ) -> Result<(), FileError> {
        Err(ErrorCode::Unsupported.into())
    }

    fn open_at(
        &mut self,
        directory: Resource<Descriptor>,
        _: PathFlags,
        path: String,
        open: OpenFlags,
        flags: DescriptorFlags,
    ) -> Result<Resource<Descriptor>, FileError> {
        let now = self.machine.wall_clock_ns();
        let base = self.node(&directory)?;
        let node = match base.find(&path) {
            Ok(_) if open.contains(OpenFlags::EXCLUSIVE) => return Err(ErrorCode::Exist.into()),
            Ok(node) => node,
            Err(ErrorCode::NoEntry) if open.contains(OpenFlags::CREATE) => {
                self.files.create_file(&base, &path, now)?
            }
            Err(error) => return Err(error.into()),
        };
        let is_directory = node.kind() == DescriptorType::Directory;
        if open.contains(OpenFlags::DIRECTORY) && !is_directory {
            return Err(ErrorCode::NotDirectory.into());
        }
        if flags.contains(DescriptorFlags::WRITE) {
            if is_directory {
                return Err(ErrorCode::IsDirectory.into());
            }
            if node.is_read_only() {
                return Err(ErrorCode::ReadOnly.into());
            }
        }
        if open.contains(OpenFlags::TRUNCATE) {
            node.set_size(0, now)?;
        }
        Ok(self.descriptor(node, flags)?)
    }

    fn readlink_at(&mut self, _: Resource<Descriptor>, _: String) -> Result<String, FileError> {
        Err(ErrorCode::Invalid.into())
    }

    fn remove_directory_at(
        &mut self,
        directory: Resource<Descriptor>,
        path: String,
    ) -> Result<(), FileError> {
        let now = self.machine.wall_clock_ns();
        Ok(self.node(&directory)?.remove(&path, DescriptorType::Directory, now)?)
    }

    fn rename_at(
        &mut self,
        from: Resource<Descriptor>,
        from_path: String,
        to: Resource<Descriptor>,
        to_path: String,
    ) -> Result<(), FileError> {
        let now = self.machine.wall_clock_ns();
        Ok(files::rename(&self.node(&from)?, &from_path, &self.node(&to)?, &to_path, now)?)
    }

    fn symlink_at(
        &mut self,
        _: Resource<Descriptor>,
        _: String,
        _: String,
    ) -> Result<(), FileError> {
        Err(ErrorCode::Unsupported.into())
    }

    fn unlink_file_at(
        &mut self,
        directory: Resource<Descriptor>,
        path: String,
    ) -> Result<(), FileError> {
        let now = self.machine.wall_clock_ns();
        Ok(self.node(&directory)?.remove(&path, DescriptorType::RegularFile, now)?)
    }

    fn is_same_object(
        &mut self,
        one: Resource<Descriptor>,
        other: Resource<Descriptor>,
    ) -> Result<bool> {
        Ok(Rc::ptr_eq(&self.node(&one)?, &self.node(&other)?))
    }

    fn metadata_hash(
        &mut self,
        file: Resource<Descriptor>,
    ) -> Result<MetadataHashValue, FileError> {
        Ok(hash(&*self.node(&file)?))
    }

    fn metadata_hash_at(
        &mut self,
        directory: Resource<Descriptor>,
        _: PathFlags,
        path: String,
    ) -> Result<MetadataHashValue, FileError> {
        Ok(hash(&*self.node(&directory)?.find(&path)?))
    }

    fn drop(&mut self, descriptor: Resource<Descriptor>) -> Result<()> {
        self.table.delete(descriptor)?;
        Ok(())
    }
}

impl types::HostDirectoryEntryStream for State {
    fn read_directory_entry(
        &mut self,
        entries: Resource<Entries>,
    ) -> Result<Option<DirectoryEntry>, FileError> {
        Ok(self.table.get_mut(&entries)?.0.next())
    }

    fn drop(&mut self, entries: Resource<Entries>) -> Result<()> {
        self.table.delete(entries)?;
        Ok(())
    }
}
