//! A function as a file: a package (`warren_function::package`), which is mapped as it is, or a static ELF
//! executable, linked at [`CODE_ADDRESS`](warren_abi::microvm::CODE_ADDRESS) and
//! [`DATA_ADDRESS`](warren_abi::microvm::DATA_ADDRESS), whose entry point is a
//! [`FunctionEntry`](warren_abi::microvm::FunctionEntry).

use std::os::unix::fs::FileExt;

use warren_abi::microvm::{CODE_ADDRESS, DATA_ADDRESS, FUNCTION_BYTES_MAX, FunctionPlace};

use warren_function::package::{self, Package, PackageError};

use crate::boot::{Program, Segment, out_of_place};
use crate::memory::{PAGE, Part};

/// The least heap of a function, in bytes.
const HEAP_MIN: u64 = 1 << 20;

/// What an executable has for data and heap, unless something else is said, in bytes.
const DATA_BYTES: u64 = 16 << 20;

/// The heap of a component's runtime, in bytes: sockets' buffers and what waits to be sent and read.
const RUNTIME_HEAP: u64 = 16 << 20;

/// Why a function cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// The file is not what the guest target produces.
    #[error("neither a function's package nor a static x86-64 ELF executable of a function's: {0}")]
    Elf(String),
    /// The file is a package, but not a whole one.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// It has not so much memory.
    #[error("the function needs {needed:#x} bytes of data and has {available:#x}: raise --memory")]
    TooLarge {
        /// Up to the end of its data, with a heap.
        needed: u64,
        /// Its data region.
        available: u64,
    },
    /// The memory's size is not supported.
    #[error("{0} bytes for a function's data: it must be a multiple of 2 MiB, 2 to 512 MiB")]
    MemorySize(u64),
}

/// A function, read and checked.
pub struct Function<'elf> {
    /// Where it is to be.
    pub place: FunctionPlace,
    code: Vec<Segment<'elf>>,
    /// What is to be written to its data region.
    pub data: Vec<Segment<'elf>>,
}

impl<'elf> Function<'elf> {
    /// Reads a function for a data region of this size, in bytes; `None`: of the size that it needs.
    ///
    /// # Errors
    /// It is none, or does not fit.
    pub fn parse(file: &'elf [u8], data_bytes: Option<u64>) -> Result<Self, FunctionError> {
        if file.starts_with(&package::MAGIC) {
            Self::parse_package(file, data_bytes)
        } else {
            Self::parse_elf(file, data_bytes.unwrap_or(DATA_BYTES))
        }
    }

    /// The size of its data region, in bytes.
    pub fn data_bytes(&self) -> u64 {
        self.place.memory_end - DATA_ADDRESS
    }

    fn parse_package(file: &'elf [u8], data_bytes: Option<u64>) -> Result<Self, FunctionError> {
        let memory_bytes = Package::parse(file)?.manifest.memory_bytes;
        // A quarter for files in memory.
        let heap = (RUNTIME_HEAP + memory_bytes / 4).next_multiple_of(PAGE);
        let needed = heap.saturating_add(memory_bytes).next_multiple_of(2 << 20);
        let available = data_bytes.unwrap_or(needed);
        if needed > available {
            return Err(FunctionError::TooLarge { needed, available });
        }
        check_size(available)?;
        let size = (file.len() as u64).next_multiple_of(PAGE);
        if size > FUNCTION_BYTES_MAX {
            return Err(FunctionError::TooLarge { needed: size, available: FUNCTION_BYTES_MAX });
        }
        let place = FunctionPlace {
            entry: 0,
            code_end: CODE_ADDRESS + size,
            heap_start: DATA_ADDRESS,
            heap_end: DATA_ADDRESS + heap,
            memory_end: DATA_ADDRESS + available,
        };
        let (start, writable, executable) = (CODE_ADDRESS, false, true);
        let code = vec![Segment { start, bytes: file, size, writable, executable }];
        Ok(Self { place, code, data: Vec::new() })
    }

    fn parse_elf(elf: &'elf [u8], data_bytes: u64) -> Result<Self, FunctionError> {
        check_size(data_bytes)?;
        let Program { entry, segments } = Program::parse(elf).map_err(FunctionError::Elf)?;
        let (data, code): (Vec<_>, Vec<_>) = segments.into_iter().partition(|s| s.writable);
        let code_end = end(&code, CODE_ADDRESS)?;
        let heap_start = end(&data, DATA_ADDRESS)?;
        let needed = heap_start - DATA_ADDRESS + HEAP_MIN;
        if needed > data_bytes {
            return Err(FunctionError::TooLarge { needed, available: data_bytes });
        }
        let is_there = |segment: &Segment| {
            segment.executable && (segment.start..segment.start + segment.size).contains(&entry)
        };
        if !code.iter().any(is_there) {
            return Err(FunctionError::Elf("no entry point".to_owned()));
        }
        let heap_end = DATA_ADDRESS + data_bytes;
        let memory_end = heap_end;
        let place = FunctionPlace { entry, code_end, heap_start, heap_end, memory_end };
        Ok(Self { place, code, data })
    }

    /// Its code and constants, to be mapped by all its clones.
    ///
    /// # Errors
    /// There is no memory for them.
    pub fn code(&self) -> std::io::Result<Part> {
        let part = Part::new("warren-code", self.place.code_end - CODE_ADDRESS)?;
        for segment in &self.code {
            part.memfd.write_all_at(segment.bytes, segment.start - CODE_ADDRESS)?;
        }
        Ok(part)
    }

    /// Numbers of the pages of [`Function::code`].
    pub fn code_pages(&self) -> impl Iterator<Item = u32> {
        (CODE_ADDRESS / PAGE) as u32..(self.place.code_end / PAGE) as u32
    }
}

fn check_size(data_bytes: u64) -> Result<(), FunctionError> {
    let is_size = (2 << 20..=FUNCTION_BYTES_MAX).contains(&data_bytes);
    if is_size && data_bytes.is_multiple_of(2 << 20) {
        return Ok(());
    }
    Err(FunctionError::MemorySize(data_bytes))
}

/// The first page after segments, which are to lie from an address on, in ascending order.
fn end(segments: &[Segment], start: u64) -> Result<u64, FunctionError> {
    segments.iter().try_fold(start, |end, segment| {
        let last = segment.start.checked_add(segment.size);
        let fits = last.is_some_and(|last| last <= start + FUNCTION_BYTES_MAX);
        match last {
            Some(last) if fits && segment.start >= end => Ok(last.next_multiple_of(PAGE)),
            _ => Err(FunctionError::Elf(out_of_place(segment.start))),
        }
    })
}
