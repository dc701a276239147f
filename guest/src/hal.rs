//! What `virtio-drivers` must know of the machine: memory is identity-mapped, and devices reach all
//! of the program's.

use core::alloc::Layout;
use core::ptr::NonNull;

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

pub enum GuestHal {}

fn pages_layout(pages: usize) -> Layout {
    // Sizes here are those of virtqueues: a few pages, far from overflow.
    Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).expect("a few pages")
}

// SAFETY: each method keeps what the trait asks, as said there.
unsafe impl Hal for GuestHal {
    // Zeroed, page-aligned, and owned by the caller until it gives it back.
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let layout = pages_layout(pages);
        // SAFETY: the size is not zero, as the caller asks for at least a page.
        match NonNull::new(unsafe { alloc::alloc::alloc_zeroed(layout) }) {
            Some(block) => (block.as_ptr().addr() as PhysAddr, block),
            // Address 0 tells the caller that there is no memory.
            None => (0, NonNull::dangling()),
        }
    }

    unsafe fn dma_dealloc(_: PhysAddr, block: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: the caller promises that `dma_alloc` gave it for as many pages.
        unsafe { alloc::alloc::dealloc(block.as_ptr(), pages_layout(pages)) };
        0
    }

    // Only for PCI, which this machine does not have.
    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).expect("registers do not lie at 0")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr().addr() as PhysAddr
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}
