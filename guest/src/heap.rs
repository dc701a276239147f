//! The heap: a list of free blocks, first fit, so that what is used stays at the beginning.
//!
//! When a function is loaded the heap moves into its data region: what was given out before stays
//! where it is, in the template's memory, and nothing new comes there as long as there is room.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{NonNull, null_mut};

use linked_list_allocator::Heap;

struct GuestHeap(UnsafeCell<Heaps>);

/// The one that blocks are taken from, and the one they were taken from before.
struct Heaps {
    current: Heap,
    former: Heap,
}

impl Heaps {
    /// The one that a block is of.
    fn of(&mut self, block: *mut u8) -> &mut Heap {
        let current = &mut self.current;
        if (current.bottom()..current.top()).contains(&block) { current } else { &mut self.former }
    }
}

// SAFETY: the guest has one thread and no interrupts.
unsafe impl Sync for GuestHeap {}

#[global_allocator]
static HEAP: GuestHeap =
    GuestHeap(UnsafeCell::new(Heaps { current: Heap::empty(), former: Heap::empty() }));

/// Gives the heap its memory, before which every allocation fails, or other memory than it had.
///
/// # Safety
/// Called at most twice; the addresses bound memory that is mapped, writable and used for nothing
/// else.
pub unsafe fn move_to(start: u64, end: u64) {
    // SAFETY: no other reference to the heaps exists (one thread, and no call on the way in).
    let heaps = unsafe { &mut *HEAP.0.get() };
    heaps.former = core::mem::replace(&mut heaps.current, Heap::empty());
    // SAFETY: promised by the caller.
    unsafe { heaps.current.init(start as *mut u8, (end - start) as usize) };
}

/// How much of the memory it was given last is in use, in bytes. First fit keeps it, but for a few
/// holes, at the beginning.
pub fn used() -> u64 {
    // SAFETY: as in `move_to`.
    unsafe { &*HEAP.0.get() }.current.used() as u64
}

// SAFETY: blocks come from a `Heap`, which hands out each at most once, sized and aligned as asked.
unsafe impl GlobalAlloc for GuestHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: one thread, and `Heap` calls nothing that allocates.
        let heaps = unsafe { &mut *self.0.get() };
        let block = heaps.current.allocate_first_fit(layout);
        let block = block.or_else(|()| heaps.former.allocate_first_fit(layout));
        block.map_or(null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`.
        let heaps = unsafe { &mut *self.0.get() };
        if let Some(block) = NonNull::new(block) {
            // SAFETY: the caller promises that `alloc` gave it with this layout.
            unsafe { heaps.of(block.as_ptr()).deallocate(block, layout) };
        }
    }
}
