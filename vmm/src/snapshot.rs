//! The template's file: a machine at its release barrier.
//!
//! All integers are little-endian.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | [`MAGIC`] |
//! | 4 | [`VERSION`] |
//! | 4 | length of the header |
//! | 8 | size of guest memory |
//! | 8 | number of pages that are not zero |
//! | ... | header: postcard of [`Header`] |
//! | 4 each | page numbers, ascending |
//! | 4096 each | the pages |
//! | 32 | BLAKE3 of everything before |
//!
//! A file is read once, whole; what was verified is what is copied into the sealed memfd that all
//! clones map.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use warren_abi::microvm::ABI_VERSION;

use crate::boot::MEMORY_MAX;
use crate::machine::MachineState;
use crate::memory::{GuestRam, PAGE, Pages, create_memfd, seal};

/// What a template begins with.
pub const MAGIC: [u8; 8] = *b"WARRENVM";

/// Version of the format. Raise it together with the layout that the test below pins.
pub const VERSION: u32 = 2;

const FIXED: usize = 8 + 4 + 4 + 8 + 8;
const CHECKSUM: usize = 32;

/// What a template knows besides its memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`ABI_VERSION`] that the guest was built with.
    pub abi_version: u32,
    /// Processor features that the guest needs.
    pub cpu_features: Vec<String>,
    /// Processor and devices.
    pub machine: MachineState,
    /// What a clone wrote to until it first had nothing to do, in ascending order.
    pub working_set: Vec<Pages>,
    /// All that was in place then, what it only read among it.
    pub in_place: Vec<Pages>,
}

/// A verified template, ready to be cloned.
#[derive(Debug)]
pub struct Template {
    /// Its header.
    pub header: Header,
    /// Sealed memory.
    pub memory: File,
    /// Size of the memory.
    pub memory_bytes: u64,
    /// BLAKE3 of its file.
    pub checksum: [u8; CHECKSUM],
}

/// Why a template cannot be used. Each names the file and the remedy.
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
    #[error("{}: not a template; make one with `warren-vmm template`", path.display())]
    NotATemplate {
        /// The file.
        path: PathBuf,
    },
    /// Another version wrote it.
    #[error(
        "{}: template of {what} {found}, this warren-vmm needs {expected}; \
         make it anew with `warren-vmm template`", path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Which version: of the format, or of the guest's ABI.
        what: &'static str,
        /// The file's.
        found: u32,
        /// This program's.
        expected: u32,
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
    /// The checksum is right, the content is not: it was not made by `warren-vmm template`.
    #[error("{}: malformed: {what}; make it anew with `warren-vmm template`", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
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
}

/// Writes a template, atomically: the file is there whole or not at all.
pub fn write(path: &Path, header: &Header, ram: &GuestRam) -> Result<(), SnapshotError> {
    let io_error = |source| SnapshotError::Io { path: path.to_owned(), source };
    let (numbers, pages) = used_pages(ram).map_err(io_error)?;
    let header =
        postcard::to_allocvec(header).map_err(|error| io_error(io::Error::other(error)))?;
    let mut bytes = Vec::with_capacity(FIXED + header.len() + pages.len() + CHECKSUM);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((header.len() as u32).to_le_bytes());
    bytes.extend(ram.bytes().to_le_bytes());
    bytes.extend((numbers.len() as u64).to_le_bytes());
    bytes.extend(header);
    bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    bytes.extend(pages);
    let checksum = blake3::hash(&bytes);
    bytes.extend(checksum.as_bytes());

    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let temporary = PathBuf::from(name);
    let mut file = File::create(&temporary).map_err(io_error)?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(io_error)?;
    std::fs::rename(&temporary, path).map_err(io_error)
}

/// Numbers and content of the pages that are not zero.
fn used_pages(ram: &GuestRam) -> io::Result<(Vec<u32>, Vec<u8>)> {
    let (mut numbers, mut pages) = (Vec::new(), Vec::new());
    let mut page = [0; PAGE as usize];
    for number in 0..ram.bytes() / PAGE {
        ram.all().read_slice(&mut page, GuestAddress(number * PAGE)).map_err(io::Error::other)?;
        if page.iter().any(|&byte| byte != 0) {
            numbers.push(number as u32);
            pages.extend_from_slice(&page);
        }
    }
    Ok((numbers, pages))
}

/// Reads and verifies a template, and fills a sealed memfd with its memory.
pub fn read(path: &Path) -> Result<Template, SnapshotError> {
    let io_error = |source| SnapshotError::Io { path: path.to_owned(), source };
    let file = std::fs::read(path).map_err(io_error)?;
    let content = verify(path, &file)?;
    let memory = create_memfd(content.memory_bytes).map_err(io_error)?;
    for (number, page) in
        content.numbers.chunks_exact(4).zip(content.pages.chunks_exact(PAGE as usize))
    {
        let number = number.try_into().map_or(0, u32::from_le_bytes);
        let offset = u64::from(number) * PAGE;
        std::os::unix::fs::FileExt::write_all_at(&memory, page, offset).map_err(io_error)?;
    }
    seal(&memory).map_err(io_error)?;
    let Content { header, memory_bytes, checksum, .. } = content;
    Ok(Template { header, memory, memory_bytes, checksum })
}

struct Content<'a> {
    header: Header,
    memory_bytes: u64,
    checksum: [u8; CHECKSUM],
    numbers: &'a [u8],
    pages: &'a [u8],
}

/// Checks everything before anything is used, the cheapest first.
fn verify<'a>(path: &Path, file: &'a [u8]) -> Result<Content<'a>, SnapshotError> {
    let path = || path.to_owned();
    let malformed = |what| SnapshotError::Malformed { path: path(), what };
    if !file.starts_with(&MAGIC) {
        return Err(SnapshotError::NotATemplate { path: path() });
    }
    let length =
        |expected| SnapshotError::Length { path: path(), found: file.len() as u64, expected };
    let too_short = length((FIXED + CHECKSUM) as u64);
    let Some((_, fixed)) = file.split_first_chunk::<8>() else { return Err(too_short) };
    let Some((version, fixed)) = fixed.split_first_chunk() else { return Err(too_short) };
    let found = u32::from_le_bytes(*version);
    if found != VERSION {
        let what = "format";
        return Err(SnapshotError::Version { path: path(), what, found, expected: VERSION });
    }
    let Some((header_len, fixed)) = fixed.split_first_chunk() else { return Err(too_short) };
    let Some((memory_bytes, fixed)) = fixed.split_first_chunk() else { return Err(too_short) };
    let Some((page_count, body)) = fixed.split_first_chunk() else { return Err(too_short) };
    let header_len = u64::from(u32::from_le_bytes(*header_len));
    let memory_bytes = u64::from_le_bytes(*memory_bytes);
    let page_count = u64::from_le_bytes(*page_count);
    let expected = page_count
        .checked_mul(4 + PAGE)
        .and_then(|pages| pages.checked_add(FIXED as u64 + header_len + CHECKSUM as u64))
        .unwrap_or(u64::MAX);
    if expected != file.len() as u64 {
        return Err(length(expected));
    }
    // The lengths are right, so these cannot be out of range.
    let (content, checksum) = file.split_at(file.len() - CHECKSUM);
    let hash = *blake3::hash(content).as_bytes();
    if hash != checksum {
        return Err(SnapshotError::Checksum { path: path() });
    }
    let (header, body) = body.split_at(header_len as usize);
    let (numbers, body) = body.split_at(page_count as usize * 4);
    let pages = &body[..body.len() - CHECKSUM];
    let header: Header = postcard::from_bytes(header).map_err(|_| malformed("header"))?;
    if header.abi_version != ABI_VERSION {
        let (what, found) = ("guest ABI", header.abi_version);
        return Err(SnapshotError::Version { path: path(), what, found, expected: ABI_VERSION });
    }
    if memory_bytes > MEMORY_MAX || memory_bytes % PAGE != 0 {
        return Err(malformed("size of memory"));
    }
    let in_memory = |number: &[u8]| {
        number.try_into().is_ok_and(|n| u64::from(u32::from_le_bytes(n)) < memory_bytes / PAGE)
    };
    if !numbers.chunks_exact(4).all(in_memory) {
        return Err(malformed("page outside of memory"));
    }
    Ok(Content { header, memory_bytes, checksum: hash, numbers, pages })
}

#[cfg(test)]
mod tests {

    use kvm_bindings::{kvm_regs, kvm_sregs};

    use super::*;
    use crate::cpu::{CpuState, missing_features};
    use crate::devices::mmio::Mmio;
    use crate::devices::{net, vsock};

    /// BLAKE3 of an encoded [`Header`] whose fields all differ from each other. If this test fails
    /// the format has changed: raise [`VERSION`], then put the new value here.
    const LAYOUT: (u32, &str) =
        (2, "593aabd78dca2fe8f034e4a9990e368b12421cea4cf971abf61c901f3f7f5c32");

    fn header() -> Header {
        Header {
            abi_version: ABI_VERSION,
            cpu_features: vec!["avx2".to_owned()],
            machine: MachineState {
                cpu: CpuState {
                    regs: kvm_regs { rax: 1, rip: 2, rflags: 3, ..kvm_regs::default() },
                    sregs: kvm_sregs { cr3: 4, efer: 5, ..kvm_sregs::default() },
                    xcr0: 6,
                    xsave: vec![7, 8, 9],
                },
                net: Mmio::new(&net::KIND).save(),
                vsock: Mmio::new(&vsock::KIND).save(),
            },
            working_set: vec![Pages { first: 10, count: 11 }],
            in_place: vec![Pages { first: 12, count: 13 }],
        }
    }

    fn ram() -> GuestRam {
        let bytes = 4 << 20;
        let ram = GuestRam::map(&create_memfd(bytes).unwrap(), bytes, true).unwrap();
        for (page, byte) in [(0, 1u8), (7, 2), (1023, 3)] {
            ram.all().write_slice(&[byte; 4096], GuestAddress(page * PAGE)).unwrap();
        }
        ram
    }

    fn saved(header: &Header) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("template");
        write(&path, header, &ram()).unwrap();
        (directory, path)
    }

    #[test]
    fn layout_changes_only_together_with_the_version() {
        let hash = blake3::hash(&postcard::to_allocvec(&header()).unwrap());
        assert_eq!((VERSION, hash.to_hex().as_str()), LAYOUT);
    }

    #[test]
    fn what_was_written_is_read_into_sealed_memory() {
        let (_directory, path) = saved(&header());
        let template = read(&path).unwrap();
        assert_eq!(template.header, header());
        let memory = template.memory;
        let clone = GuestRam::map(&memory, template.memory_bytes, false).unwrap();
        for (page, byte) in [(0, 1u8), (1, 0), (7, 2), (1023, 3)] {
            let address = GuestAddress(page * PAGE + 17);
            assert_eq!(clone.all().read_obj::<u8>(address).unwrap(), byte);
            // A clone's change is its own.
            clone.all().write_obj(99u8, address).unwrap();
        }
        let again = GuestRam::map(&memory, template.memory_bytes, false).unwrap();
        assert_eq!(again.all().read_obj::<u8>(GuestAddress(17)).unwrap(), 1);
        assert!(GuestRam::map(&memory, template.memory_bytes, true).is_err());
        assert!((&memory).write_all(b"x").is_err());
        assert!(memory.set_len(1).is_err());
    }

    #[test]
    fn every_truncation_is_refused() {
        let (_directory, path) = saved(&header());
        let whole = std::fs::read(&path).unwrap();
        for length in (0..whole.len()).rev() {
            match verify(&path, &whole[..length]) {
                Err(SnapshotError::NotATemplate { .. }) => assert!(length < 8),
                Err(SnapshotError::Length { found, .. }) => assert_eq!(found, length as u64),
                other => panic!("{length} bytes: {:?}", other.err()),
            }
        }
        let mut longer = whole;
        longer.push(0);
        assert!(matches!(verify(&path, &longer), Err(SnapshotError::Length { .. })));
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let (_directory, path) = saved(&header());
        let mut file = std::fs::read(&path).unwrap();
        for byte in 0..file.len() {
            // Each bit in the head, one in each byte of the rest.
            for bit in if byte < 512 { 0..8 } else { byte % 8..byte % 8 + 1 } {
                file[byte] ^= 1 << bit;
                match (byte, verify(&path, &file)) {
                    (0..8, Err(SnapshotError::NotATemplate { .. }))
                    | (8..12, Err(SnapshotError::Version { .. }))
                    | (12..16 | 24..32, Err(SnapshotError::Length { .. }))
                    | (16..24 | 32.., Err(SnapshotError::Checksum { .. })) => {}
                    (_, result) => panic!("byte {byte} bit {bit}: {:?}", result.err()),
                }
                file[byte] ^= 1 << bit;
            }
        }
        assert!(verify(&path, &file).is_ok());
    }

    #[test]
    fn other_versions_are_named() {
        let (_directory, path) = saved(&Header { abi_version: 77, ..header() });
        let error = read(&path).unwrap_err();
        let SnapshotError::Version { found: 77, expected: ABI_VERSION, .. } = &error else {
            panic!("{error}");
        };
        assert!(error.to_string().contains("guest ABI 77"), "{error}");
    }

    /// A checksum proves no more than that nothing was damaged.
    #[test]
    fn content_that_cannot_be_is_refused_even_with_the_right_checksum() {
        let (_directory, path) = saved(&header());
        let good = std::fs::read(&path).unwrap();
        let header_len = u32::from_le_bytes(good[12..16].try_into().unwrap()) as usize;
        let with = |edit: &dyn Fn(&mut Vec<u8>)| {
            let mut file = good[..good.len() - CHECKSUM].to_vec();
            edit(&mut file);
            let checksum = *blake3::hash(&file).as_bytes();
            file.extend(checksum);
            verify(&path, &file).err()
        };
        assert!(with(&|_| {}).is_none());
        let first_page = FIXED + header_len;
        let outside = with(&|file| file[first_page..first_page + 4].fill(0xff));
        assert!(matches!(outside, Some(SnapshotError::Malformed { .. })), "{outside:?}");
        let huge = with(&|file| file[16..24].fill(0x7f));
        assert!(matches!(huge, Some(SnapshotError::Malformed { .. })), "{huge:?}");
        let header = with(&|file| file[FIXED..first_page].fill(0xff));
        assert!(matches!(header, Some(SnapshotError::Malformed { .. })), "{header:?}");
    }

    #[test]
    fn unknown_processor_features_count_as_missing() {
        assert!(missing_features(&[]).is_empty());
        assert_eq!(missing_features(&["amx-9".to_owned()]), ["amx-9"]);
    }
}
