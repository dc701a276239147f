//! Linear memories: each lies at a fixed place and grows there. Nothing is copied, and no page is touched
//! before the function does.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use core::cell::Cell;

use wasmtime::{LinearMemory, MemoryCreator, MemoryType};

use crate::single::Single;

const PAGE: usize = 4096;

/// Memory for linear memories, which is zeroes and given out once.
pub struct Arena(Single<Cell<Rest>>);

#[derive(Clone, Copy)]
struct Rest {
    start: usize,
    end: usize,
    /// How many memories share it.
    memories: usize,
}

impl Arena {
    /// Of the memory between two addresses.
    ///
    /// # Safety
    /// It is mapped, writable, holds zeroes, and is used for nothing else.
    pub unsafe fn new(start: u64, end: u64) -> Self {
        let rest = Rest { start: start as usize, end: end as usize, memories: 1 };
        Self(Single(Cell::new(rest)))
    }

    /// So many memories will share it.
    pub fn divide(&self, memories: usize) {
        self.0.0.set(Rest { memories, ..self.0.0.get() });
    }
}

struct Linear {
    start: *mut u8,
    bytes: usize,
    capacity: usize,
}

// SAFETY: new memories are zeroes, follow each other, and are never given out again.
unsafe impl MemoryCreator for Arena {
    fn new_memory(
        &self,
        _: MemoryType,
        minimum: usize,
        maximum: Option<usize>,
        _: Option<usize>,
        _: usize,
    ) -> Result<Box<dyn LinearMemory>, String> {
        let Rest { start, end, memories } = self.0.0.get();
        let left = end - start;
        let share = (left / memories.max(1)) & !(PAGE - 1);
        let capacity = share.max(minimum).min(maximum.unwrap_or(usize::MAX));
        let capacity = capacity.next_multiple_of(PAGE).min(left);
        if minimum > capacity {
            return Err(format!("a memory of {minimum} bytes, and {left} are left"));
        }
        let memories = memories.saturating_sub(1);
        self.0.0.set(Rest { start: start + capacity, end, memories });
        Ok(Box::new(Single(Linear { start: start as *mut u8, bytes: minimum, capacity })))
    }
}

// SAFETY: the memory stays where it is, and is as large as it is said to be.
unsafe impl LinearMemory for Single<Linear> {
    fn byte_size(&self) -> usize {
        self.0.bytes
    }

    fn byte_capacity(&self) -> usize {
        self.0.capacity
    }

    fn grow_to(&mut self, bytes: usize) -> wasmtime::Result<()> {
        if bytes > self.0.capacity {
            return Err(wasmtime::Error::msg("the function's memory is used up"));
        }
        self.0.bytes = bytes;
        Ok(())
    }

    fn as_ptr(&self) -> *mut u8 {
        self.0.start
    }
}
