//! Atomic instructions on map values: `core`'s of this width do not exist on this target.

use core::arch::asm;

/// Puts `new` in the place of `expected`, unless there is something else: returns whether it did.
///
/// # Safety
/// `word` must point into a map value, to 8 bytes that are so aligned.
#[inline(always)]
pub unsafe fn compare_exchange(word: *mut u64, expected: u64, new: u64) -> bool {
    let found: u64;
    // SAFETY: one atomic instruction on the map value.
    unsafe {
        asm!(
            "r0 = cmpxchg_64({word} + 0, r0, {new})",
            word = in(reg) word,
            new = in(reg) new,
            inlateout("r0") expected => found,
        );
    }
    found == expected
}

/// Adds to a word.
///
/// # Safety
/// As of [`compare_exchange`].
#[inline(always)]
pub unsafe fn add(word: *mut u64, count: u64) {
    // SAFETY: one atomic instruction on the map value.
    unsafe {
        asm!("lock *(u64 *)({word} + 0) += {count}", word = in(reg) word, count = in(reg) count);
    }
}
