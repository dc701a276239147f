//! A disk: a base that many microVMs share and none writes, and a layer of one's own over it.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::uring::Part;
use crate::memory::create_memfd;

/// Size of a sector, in bytes (virtio 1.2, 5.2.4).
pub const SECTOR: u64 = 512;

/// What is copied to the layer when a part of it is written, in bytes.
pub const BLOCK: u64 = 4096;

/// Which blocks of a disk are in its layer: one bit each, the first is the lowest of the first word.
pub type Blocks = Vec<u64>;

/// The disk.
pub struct Disk {
    base: File,
    /// Size; a multiple of [`SECTOR`].
    bytes: u64,
    layer: Option<Layer>,
}

/// What was written, in a file as long as the disk, at the same places.
struct Layer {
    file: File,
    blocks: Blocks,
}

/// What a disk's layer holds, saved. The content is the owner's to copy: the layer's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskState {
    bytes: u64,
    blocks: Option<Blocks>,
}

/// Why a disk cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A file cannot be used.
    #[error("{what}: {source}")]
    Io {
        /// Which, and for what.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The base does not consist of whole sectors.
    #[error("the base of a disk has {0} bytes, which is not a multiple of 512")]
    Size(u64),
    /// The state is another disk's.
    #[error("the disk was saved with another size or layer: use the base that it was saved with")]
    State,
}

impl Disk {
    /// A disk that cannot be written.
    ///
    /// # Errors
    /// [`DiskError::Io`], [`DiskError::Size`].
    pub fn read_only(base: File) -> Result<Self, DiskError> {
        let bytes = (&base).seek(SeekFrom::End(0));
        let bytes = bytes.map_err(|source| DiskError::Io { what: "base of a disk", source })?;
        if bytes % SECTOR != 0 {
            return Err(DiskError::Size(bytes));
        }
        Ok(Self { base, bytes, layer: None })
    }

    /// A disk whose writes go to a layer: an empty file that nobody else uses. In a file system it
    /// should be one that takes holes.
    ///
    /// # Errors
    /// As [`Disk::read_only`].
    pub fn with_layer(base: File, layer: File) -> Result<Self, DiskError> {
        let disk = Self::read_only(base)?;
        let sized = layer.set_len(disk.bytes);
        sized.map_err(|source| DiskError::Io { what: "layer of a disk", source })?;
        let blocks = vec![0; disk.bytes.div_ceil(BLOCK).div_ceil(64) as usize];
        Ok(Self { layer: Some(Layer { file: layer, blocks }), ..disk })
    }

    /// A disk whose writes go to a layer in memory, which is counted as this process's.
    ///
    /// # Errors
    /// As [`Disk::read_only`].
    pub fn with_layer_in_memory(base: File) -> Result<Self, DiskError> {
        let layer = create_memfd("warren-disk", 0);
        let layer = layer.map_err(|source| DiskError::Io { what: "memory for a disk", source })?;
        Self::with_layer(base, layer)
    }

    /// A disk in a saved state; `layer` is a copy of its layer's file, if it had one.
    ///
    /// # Errors
    /// As [`Disk::read_only`], and [`DiskError::State`].
    pub fn load(state: &DiskState, base: File, layer: Option<File>) -> Result<Self, DiskError> {
        let disk = match layer {
            Some(layer) => Self::with_layer(base, layer)?,
            None => Self::read_only(base)?,
        };
        let length = |blocks: &Option<Blocks>| blocks.as_ref().map(Vec::len);
        let fresh = disk.save();
        if state.bytes != disk.bytes || length(&state.blocks) != length(&fresh.blocks) {
            return Err(DiskError::State);
        }
        let layer = disk.layer.zip(state.blocks.clone());
        let layer = layer.map(|(layer, blocks)| Layer { blocks, ..layer });
        Ok(Self { layer, ..disk })
    }

    /// Gives the base back.
    pub fn into_base(self) -> File {
        self.base
    }

    /// Saves which blocks are in the layer.
    pub fn save(&self) -> DiskState {
        let blocks = self.layer.as_ref().map(|layer| layer.blocks.clone());
        DiskState { bytes: self.bytes, blocks }
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.bytes / SECTOR
    }

    /// Whether it cannot be written.
    pub fn is_read_only(&self) -> bool {
        self.layer.is_none()
    }

    /// Whether so many bytes from there on are on the disk.
    pub fn holds(&self, at: u64, length: u64) -> bool {
        at.checked_add(length).is_some_and(|end| end <= self.bytes)
    }

    /// Reads what lies at `at`, in bytes from the beginning.
    ///
    /// # Errors
    /// It is not on the disk, or a file cannot be read.
    pub fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        if !self.holds(at, buffer.len() as u64) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut rest = buffer;
        for part in self.parts(at, rest.len()) {
            let (bytes, after) = rest.split_at_mut(part.length);
            part.file.read_exact_at(bytes, part.at)?;
            rest = after;
        }
        Ok(())
    }

    /// Where so many bytes from there on are, in order. They must be on the disk.
    pub fn parts(&self, mut at: u64, length: usize) -> Vec<Part<'_>> {
        let (end, mut parts) = (at + length as u64, Vec::with_capacity(1));
        while at < end {
            // As far as one file goes.
            let is_in_layer = |block: u64| self.layer.as_ref().filter(|layer| layer.has(block));
            let layer = is_in_layer(at / BLOCK);
            let mut others = at / BLOCK + 1..end.div_ceil(BLOCK);
            let other = others.find(|&block| is_in_layer(block).is_some() != layer.is_some());
            let next = other.map_or(end, |block| block * BLOCK);
            let file = layer.map_or(&self.base, |layer| &layer.file);
            parts.push(Part { file, at, length: (next - at) as usize });
            at = next;
        }
        parts
    }

    /// Writes to the layer.
    ///
    /// # Errors
    /// The disk cannot be written, it is not on the disk, or a file refuses.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let part = self.prepare(at, bytes.len())?;
        part.file.write_all_at(bytes, part.at)?;
        self.mark(at, bytes.len());
        Ok(())
    }

    /// Prepares to write so many bytes from there on; returns where to. When they are written they
    /// are to be [marked](Self::mark).
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn prepare(&mut self, at: u64, length: usize) -> io::Result<Part<'_>> {
        let bytes = length as u64;
        if !self.holds(at, bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let Some(layer) = &mut self.layer else {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        };
        // Blocks of which a part stays what it was are copied first.
        for block in [at / BLOCK, (at + bytes).saturating_sub(1) / BLOCK] {
            let place = block * BLOCK..((block + 1) * BLOCK).min(self.bytes);
            let is_whole = at <= place.start && place.end <= at + bytes;
            if length > 0 && !is_whole && !layer.has(block) {
                layer.copy(&self.base, place)?;
            }
        }
        Ok(Part { file: &layer.file, at, length })
    }

    /// So many bytes from there on were written to the place that [`Disk::prepare`] said.
    pub fn mark(&mut self, at: u64, length: usize) {
        let Some(layer) = &mut self.layer else { return };
        if length == 0 {
            return;
        }
        let blocks = at / BLOCK..(at + length as u64).div_ceil(BLOCK);
        blocks.for_each(|block| layer.blocks[block as usize / 64] |= 1 << (block % 64));
    }
}

impl Layer {
    fn has(&self, block: u64) -> bool {
        self.blocks[block as usize / 64] >> (block % 64) & 1 != 0
    }

    /// Copies a block of the base's.
    fn copy(&mut self, base: &File, place: Range<u64>) -> io::Result<()> {
        let mut bytes = vec![0; (place.end - place.start) as usize];
        base.read_exact_at(&mut bytes, place.start)?;
        self.file.write_all_at(&bytes, place.start)?;
        let block = place.start / BLOCK;
        self.blocks[block as usize / 64] |= 1 << (block % 64);
        Ok(())
    }
}
