//! The tree of files. There are no links: a path is its segments, and none leads out of where it begins.

use alloc::collections::BTreeMap;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};

use warren_function::package::Package;

use super::{DescriptorType, ErrorCode, NewTimestamp};

/// A file or directory.
pub struct Node {
    /// Of no other node.
    pub serial: u64,
    modified_ns: Cell<u64>,
    contents: Contents,
    /// How much may still be written, in bytes, by all files together; none: to this nothing may be.
    space: Option<Rc<Cell<u64>>>,
}

enum Contents {
    Directory(RefCell<BTreeMap<String, Rc<Node>>>),
    /// A file of the package's, where it is mapped.
    Mapped(&'static [u8]),
    Memory(RefCell<Vec<u8>>),
}

/// All of them.
pub struct Files {
    root: Rc<Node>,
    next: u64,
}

type Result<T> = core::result::Result<T, ErrorCode>;

impl Files {
    /// A package's files and an empty /tmp, in which may be a quarter of the function's memory.
    pub fn of(package: &Package<'static>) -> Self {
        let space = Rc::new(Cell::new(package.manifest.memory_bytes / 4));
        let mut files = Self { root: Rc::new(Node::new(0, 0, directory(), None)), next: 1 };
        for file in &package.manifest.files {
            let contents = Contents::Mapped(package.contents(file));
            // Who published it has seen to it that paths are such, and that none is another's directory.
            let _ = files.add(&file.path, contents);
        }
        let tmp = Rc::new(Node::new(files.serial(), 0, directory(), Some(space)));
        let _ = files.root.insert("tmp", tmp);
        files
    }

    pub fn root(&self) -> Rc<Node> {
        self.root.clone()
    }

    fn serial(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    fn add(&mut self, path: &str, contents: Contents) -> Result<()> {
        let mut at = self.root();
        let (directories, name) = path.rsplit_once('/').unwrap_or(("", path));
        for segment in directories.split('/').filter(|segment| !segment.is_empty()) {
            at = match at.find(segment) {
                Ok(node) => node,
                Err(_) => {
                    let node = Rc::new(Node::new(self.serial(), 0, directory(), None));
                    at.insert(segment, node.clone())?;
                    node
                }
            };
        }
        let node = Rc::new(Node::new(self.serial(), 0, contents, None));
        at.insert(name, node)
    }

    fn create(
        &mut self,
        base: &Rc<Node>,
        path: &str,
        contents: Contents,
        now: u64,
    ) -> Result<Rc<Node>> {
        let (parent, name) = base.parent(path)?;
        let space = parent.space.clone().ok_or(ErrorCode::ReadOnly)?;
        let node = Rc::new(Node::new(self.serial(), now, contents, Some(space)));
        parent.insert(&name, node.clone())?;
        parent.modified_ns.set(now);
        Ok(node)
    }

    /// An empty file, where none is.
    pub fn create_file(&mut self, base: &Rc<Node>, path: &str, now: u64) -> Result<Rc<Node>> {
        self.create(base, path, Contents::Memory(RefCell::default()), now)
    }

    pub fn create_directory(&mut self, base: &Rc<Node>, path: &str, now: u64) -> Result<()> {
        self.create(base, path, directory(), now).map(drop)
    }
}

fn directory() -> Contents {
    Contents::Directory(RefCell::default())
}

/// Gives a file or directory another name. What has that name goes, if it is of the same kind, and not
/// a directory in which something is.
pub fn rename(from: &Rc<Node>, old: &str, to: &Rc<Node>, new: &str, now: u64) -> Result<()> {
    let ((old_parent, old_name), (parent, name)) = (from.parent(old)?, to.parent(new)?);
    let node = old_parent.find(&old_name)?;
    if old_parent.is_read_only() || parent.is_read_only() || node.is_read_only() {
        return Err(ErrorCode::ReadOnly);
    }
    // A directory cannot be put into itself.
    if parent.is_within(&node) {
        return Err(ErrorCode::Invalid);
    }
    match parent.find(&name) {
        Ok(there) if Rc::ptr_eq(&there, &node) => return Ok(()),
        Ok(_) => parent.remove(&name, node.kind(), now)?,
        Err(ErrorCode::NoEntry) => {}
        Err(error) => return Err(error),
    }
    old_parent.listing()?.borrow_mut().remove(&old_name);
    old_parent.modified_ns.set(now);
    parent.modified_ns.set(now);
    parent.insert(&name, node)
}

impl Node {
    fn new(serial: u64, now: u64, contents: Contents, space: Option<Rc<Cell<u64>>>) -> Self {
        Self { serial, modified_ns: Cell::new(now), contents, space }
    }

    pub fn kind(&self) -> DescriptorType {
        match self.contents {
            Contents::Directory(_) => DescriptorType::Directory,
            Contents::Mapped(_) | Contents::Memory(_) => DescriptorType::RegularFile,
        }
    }

    pub fn is_read_only(&self) -> bool {
        self.space.is_none()
    }

    pub fn modified_ns(&self) -> u64 {
        self.modified_ns.get()
    }

    pub fn set_modified(&self, time: NewTimestamp, now: u64) -> Result<()> {
        if self.is_read_only() {
            return Err(ErrorCode::ReadOnly);
        }
        match time {
            NewTimestamp::NoChange => {}
            NewTimestamp::Now => self.modified_ns.set(now),
            NewTimestamp::Timestamp(time) => {
                let ns = time.seconds.saturating_mul(1_000_000_000);
                self.modified_ns.set(ns.saturating_add(u64::from(time.nanoseconds)));
            }
        }
        Ok(())
    }

    pub fn size(&self) -> u64 {
        match &self.contents {
            Contents::Directory(_) => 0,
            Contents::Mapped(bytes) => bytes.len() as u64,
            Contents::Memory(bytes) => bytes.borrow().len() as u64,
        }
    }

    pub fn read(&self, offset: u64, limit: usize) -> Result<Vec<u8>> {
        let part = |bytes: &[u8]| {
            let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
            bytes[start..bytes.len().min(start.saturating_add(limit))].to_vec()
        };
        match &self.contents {
            Contents::Directory(_) => Err(ErrorCode::IsDirectory),
            Contents::Mapped(bytes) => Ok(part(bytes)),
            Contents::Memory(bytes) => Ok(part(&bytes.borrow())),
        }
    }

    pub fn write(&self, offset: u64, bytes: &[u8], now: u64) -> Result<()> {
        let end = offset.checked_add(bytes.len() as u64).ok_or(ErrorCode::FileTooLarge)?;
        if end > self.size() {
            self.set_size(end, now)?;
        }
        match &self.contents {
            Contents::Memory(file) => {
                self.modified_ns.set(now);
                file.borrow_mut()[offset as usize..end as usize].copy_from_slice(bytes);
                Ok(())
            }
            Contents::Mapped(_) => Err(ErrorCode::ReadOnly),
            Contents::Directory(_) => Err(ErrorCode::IsDirectory),
        }
    }

    pub fn set_size(&self, size: u64, now: u64) -> Result<()> {
        let Contents::Memory(file) = &self.contents else {
            return Err(ErrorCode::ReadOnly);
        };
        let mut file = file.borrow_mut();
        let space = self.space.as_ref().ok_or(ErrorCode::ReadOnly)?;
        let left = (space.get() + file.len() as u64).checked_sub(size);
        space.set(left.ok_or(ErrorCode::InsufficientSpace)?);
        self.modified_ns.set(now);
        file.resize(size as usize, 0);
        if size == 0 {
            file.shrink_to_fit();
        }
        Ok(())
    }

    fn listing(&self) -> Result<&RefCell<BTreeMap<String, Rc<Node>>>> {
        match &self.contents {
            Contents::Directory(listing) => Ok(listing),
            _ => Err(ErrorCode::NotDirectory),
        }
    }

    pub fn entries(&self) -> Result<Vec<(String, DescriptorType)>> {
        let listing = self.listing()?.borrow();
        Ok(listing.iter().map(|(name, node)| (name.clone(), node.kind())).collect())
    }

    fn insert(&self, name: &str, node: Rc<Self>) -> Result<()> {
        let mut listing = self.listing()?.borrow_mut();
        if listing.contains_key(name) {
            return Err(ErrorCode::Exist);
        }
        listing.insert(name.to_string(), node);
        Ok(())
    }

    fn is_within(self: &Rc<Self>, other: &Rc<Self>) -> bool {
        Rc::ptr_eq(self, other)
            || other
                .listing()
                .is_ok_and(|listing| listing.borrow().values().any(|node| self.is_within(node)))
    }

    /// What is at a path.
    pub fn find(self: &Rc<Self>, path: &str) -> Result<Rc<Self>> {
        if path.starts_with('/') {
            return Err(ErrorCode::NotPermitted);
        }
        let mut above = vec![self.clone()];
        for segment in path.split('/') {
            let at = above.last().ok_or(ErrorCode::NotPermitted)?;
            match segment {
                "" | "." => drop(at.listing()?),
                ".." => {
                    above.pop();
                    if above.is_empty() {
                        return Err(ErrorCode::NotPermitted);
                    }
                }
                name => {
                    let node = at.listing()?.borrow().get(name).cloned();
                    above.push(node.ok_or(ErrorCode::NoEntry)?);
                }
            }
        }
        above.pop().ok_or(ErrorCode::NotPermitted)
    }

    /// The directory that a path's last segment is in, and that segment.
    fn parent(self: &Rc<Self>, path: &str) -> Result<(Rc<Self>, String)> {
        let path = path.trim_end_matches('/');
        let (directory, name) = path.rsplit_once('/').unwrap_or((".", path));
        if matches!(name, "" | "." | "..") {
            return Err(ErrorCode::Invalid);
        }
        Ok((self.find(directory)?, name.to_string()))
    }

    /// Removes a file, or a directory in which nothing is.
    pub fn remove(self: &Rc<Self>, path: &str, kind: DescriptorType, now: u64) -> Result<()> {
        let (parent, name) = self.parent(path)?;
        let node = parent.find(&name)?;
        match (kind, node.kind()) {
            _ if parent.is_read_only() || node.is_read_only() => return Err(ErrorCode::ReadOnly),
            (DescriptorType::Directory, DescriptorType::Directory) => {
                if !node.listing()?.borrow().is_empty() {
                    return Err(ErrorCode::NotEmpty);
                }
            }
            (DescriptorType::Directory, _) => return Err(ErrorCode::NotDirectory),
            (_, DescriptorType::Directory) => return Err(ErrorCode::IsDirectory),
            _ => {
                // Who has it open reads it on, but its space is another's.
                if let Some(space) = &node.space {
                    space.set(space.get() + node.size());
                }
            }
        }
        parent.listing()?.borrow_mut().remove(&name);
        parent.modified_ns.set(now);
        Ok(())
    }
}
