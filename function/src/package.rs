//! A package: one file that all clones of a function map read-only, its code executable, as it is.
//!
//! | offset | what |
//! |---|---|
//! | 0 | [`MAGIC`] |
//! | 8 | version of the format, `u32`, little-endian like all numbers |
//! | 12 | length of the manifest, `u32` |
//! | 16 | the [`Manifest`], in postcard's encoding |
//! | [`Manifest::code`] | code, compiled ahead of time, at a whole page |
//! | each [`File::contents`] | a file |

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

/// The first bytes of a package.
pub const MAGIC: [u8; 8] = *b"WRNFUNC\0";

/// Version of the format.
pub const VERSION: u32 = 1;

/// The most that a function's linear memories may have together, in bytes: with a quarter of it for files,
/// and the heap of its runtime, it is what a microVM can map (`warren_abi::microvm::FUNCTION_BYTES_MAX`).
pub const MEMORY_MAX: u64 = 384 << 20;

/// Where the manifest begins.
const MANIFEST: usize = 16;

/// Size of a page, in bytes.
const PAGE: usize = 4096;

/// A part of the package.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Where it begins, in bytes from the package's beginning.
    pub offset: u32,
    /// How long it is, in bytes.
    pub length: u32,
}

/// A file that the function sees, read-only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Where, below the root: segments with `/` between them.
    pub path: String,
    /// What it contains.
    pub contents: Part,
}

/// What is said of a function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its environment, in order.
    pub environment: Vec<(String, String)>,
    /// The most that its linear memories may have together, in bytes.
    pub memory_bytes: u64,
    /// The longest that a call may take, in milliseconds.
    pub timeout_ms: u32,
    /// No module of it has a start function: to instantiate it runs nothing of its own, and is done
    /// before the image is made.
    pub starts_nothing: bool,
    /// Its instantiation, start functions included, is to be part of the image.
    pub initialise: bool,
    /// It answers any number of calls, one after the other. If not, as with components of most
    /// toolchains, a microVM answers one.
    pub reuse: bool,
    /// The code.
    pub code: Part,
    /// Its files, by path.
    pub files: Vec<File>,
}

/// Why bytes are no package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackageError {
    /// It does not begin as one.
    NotOne,
    /// It is of another version.
    Version(u32),
    /// Its manifest cannot be read.
    Manifest,
    /// A part lies outside of it, or the code not at a page.
    OutOfPlace,
    /// It would be 4 GiB or longer.
    TooLong,
}

impl fmt::Display for PackageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOne => f.write_str("it is no function's package: deploy the function anew"),
            Self::Version(version) => write!(
                f,
                "a function's package of format {version}, and this release reads {VERSION}: deploy the function anew"
            ),
            Self::Manifest => {
                f.write_str("the package's manifest is damaged: deploy the function anew")
            }
            Self::OutOfPlace => {
                f.write_str("the package is cut or damaged: deploy the function anew")
            }
            Self::TooLong => f.write_str("the package would be longer than 4 GiB"),
        }
    }
}

impl core::error::Error for PackageError {}

/// A package that was read.
#[derive(Clone, Debug)]
pub struct Package<'a> {
    /// What is said of the function.
    pub manifest: Manifest,
    bytes: &'a [u8],
}

impl<'a> Package<'a> {
    /// Reads one. More bytes may follow it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, PackageError> {
        let number = |offset: usize| {
            let bytes = bytes.get(offset..offset + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        if !bytes.starts_with(&MAGIC) {
            return Err(PackageError::NotOne);
        }
        match number(8) {
            Some(VERSION) => {}
            Some(version) => return Err(PackageError::Version(version)),
            None => return Err(PackageError::NotOne),
        }
        let length = number(12).ok_or(PackageError::NotOne)? as usize;
        let manifest = bytes.get(MANIFEST..).and_then(|rest| rest.get(..length));
        let manifest = manifest.ok_or(PackageError::OutOfPlace)?;
        let manifest = postcard::from_bytes(manifest).map_err(|_| PackageError::Manifest)?;
        let package = Self { manifest, bytes };
        let Manifest { code, files, .. } = &package.manifest;
        let parts = files.iter().map(|file| &file.contents).chain([code]);
        let whole = parts.into_iter().all(|part| package.get(*part).is_some());
        if !whole || !(code.offset as usize).is_multiple_of(PAGE) {
            return Err(PackageError::OutOfPlace);
        }
        Ok(package)
    }

    fn get(&self, part: Part) -> Option<&'a [u8]> {
        let start = part.offset as usize;
        self.bytes.get(start..start.checked_add(part.length as usize)?)
    }

    /// The compiled code.
    pub fn code(&self) -> &'a [u8] {
        self.get(self.manifest.code).unwrap_or_default()
    }

    /// What a file of this package contains.
    pub fn contents(&self, file: &File) -> &'a [u8] {
        self.get(file.contents).unwrap_or_default()
    }
}

/// Writes a package: places of code and files are found here, whatever the manifest says of them.
pub fn write(
    mut manifest: Manifest,
    code: &[u8],
    mut files: Vec<(String, Vec<u8>)>,
) -> Result<Vec<u8>, PackageError> {
    files.sort();
    // The numbers' encoded length depends on them: room for the longest.
    manifest.files = Vec::new();
    let described: usize = files.iter().map(|(path, _)| path.len() + 16).sum();
    let encoded = postcard::to_allocvec(&manifest).map_err(|_| PackageError::Manifest)?;
    let start = (MANIFEST + encoded.len() + described + 32).next_multiple_of(PAGE);
    let mut body = Vec::new();
    let mut append = |bytes: &[u8], alignment: usize| {
        body.resize(body.len().next_multiple_of(alignment), 0);
        let offset = u32::try_from(start + body.len()).map_err(|_| PackageError::TooLong)?;
        let length = u32::try_from(bytes.len()).map_err(|_| PackageError::TooLong)?;
        body.extend_from_slice(bytes);
        Ok(Part { offset, length })
    };
    manifest.code = append(code, PAGE)?;
    for (path, contents) in files {
        let contents = append(&contents, 16)?;
        manifest.files.push(File { path, contents });
    }
    let encoded = postcard::to_allocvec(&manifest).map_err(|_| PackageError::Manifest)?;
    let mut package = Vec::with_capacity(start + body.len());
    package.extend_from_slice(&MAGIC);
    package.extend_from_slice(&VERSION.to_le_bytes());
    package.extend_from_slice(&(encoded.len() as u32).to_le_bytes());
    package.extend_from_slice(&encoded);
    package.resize(start, 0);
    package.append(&mut body);
    Ok(package)
}

#[cfg(test)]
mod tests {
    use alloc::borrow::ToOwned;
    use alloc::vec;

    use super::*;

    fn written() -> Vec<u8> {
        let manifest = Manifest {
            environment: vec![("A".to_owned(), "b".to_owned())],
            memory_bytes: 1 << 24,
            timeout_ms: 3000,
            ..Manifest::default()
        };
        let files =
            vec![("etc/b".to_owned(), b"second".to_vec()), ("etc/a".to_owned(), b"first".to_vec())];
        write(manifest, b"code", files).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = written();
        let package = Package::parse(&bytes).unwrap();
        assert_eq!(package.code(), b"code");
        let files: Vec<_> =
            package.manifest.files.iter().map(|f| (&f.path[..], package.contents(f))).collect();
        assert_eq!(files, [("etc/a", &b"first"[..]), ("etc/b", b"second")]);
        assert_eq!(package.manifest.timeout_ms, 3000);
        assert_eq!(package.manifest.environment[0].1, "b");
    }

    #[test]
    fn what_is_cut_anywhere_or_of_another_version_is_refused() {
        let bytes = written();
        for length in 0..bytes.len() {
            assert!(Package::parse(&bytes[..length]).is_err(), "cut to {length} bytes");
        }
        let mut other = bytes;
        other[8] = 9;
        assert_eq!(Package::parse(&other).unwrap_err(), PackageError::Version(9));
    }
}
