//! What lies on the stack, of which a program and the functions that it calls have 512 bytes, each
//! function's rounded up: to 16 bytes, and to 32 before Linux 6.8.

use core::arch::asm;
use core::mem::MaybeUninit;

/// Makes all of it zero, by stores: `memset` would be one more function.
#[inline(always)]
pub fn zero<const WORDS: usize>(words: &mut MaybeUninit<[u64; WORDS]>) -> &mut [u64; WORDS] {
    let first = words.as_mut_ptr().cast::<u64>();
    for word in 0..WORDS {
        // SAFETY: it is one of the words. Not volatile, they would become a `memset` again.
        unsafe { first.add(word).write_volatile(0) };
    }
    // SAFETY: each word was written.
    unsafe { words.assume_init_mut() }
}

/// The same word, of which the compiler does not know what it is: where it knew of a zero beside
/// another, it would set both by `memset`.
#[inline(always)]
pub fn opaque(mut word: u64) -> u64 {
    // SAFETY: no instruction.
    unsafe { asm!("/* {word} */", word = inout(reg) word) };
    word
}
