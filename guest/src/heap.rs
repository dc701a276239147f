//! The heap: a list of free blocks, first fit, so that what is used stays at the beginning.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{NonNull, null_mut};

use linked_list_allocator::Heap;

struct GuestHeap(UnsafeCell<Heap>);

// SAFETY: the guest has one thread and no interrupts.
unsafe impl Sync for GuestHeap {}

#[global_allocator]
static HEAP: GuestHeap = GuestHeap(UnsafeCell::new(Heap::empty()));

/// Gives the heap its memory. Before this every allocation fails.
///
/// # Safety
/// Called once; the addresses bound memory that is mapped, writable and used for nothing else.
pub unsafe fn init(start: u64, end: u64) {
    // SAFETY: no other reference to the heap exists (one thread, and no call on the way in).
    let heap = unsafe { &mut *HEAP.0.get() };
    // SAFETY: promised by the caller.
    unsafe { heap.init(start as *mut u8, (end - start) as usize) };
}

/// How much is in use, in bytes. First fit keeps it, but for a few holes, at the beginning.
pub fn used() -> u64 {
    // SAFETY: as in `init`.
    unsafe { &*HEAP.0.get() }.used() as u64
}

// SAFETY: blocks come from `Heap`, which hands out each at most once, sized and aligned as asked.
unsafe impl GlobalAlloc for GuestHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: one thread, and `Heap` calls nothing that allocates.
        let heap = unsafe { &mut *self.0.get() };
        heap.allocate_first_fit(layout).map_or(null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`.
        let heap = unsafe { &mut *self.0.get() };
        if let Some(block) = NonNull::new(block) {
            // SAFETY: the caller promises that `alloc` gave it with this layout.
            unsafe { heap.deallocate(block, layout) };
        }
    }
}
