//! Who this clone is, and its random generator.

use alloc::string::String;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use warren_abi::microvm::Identity;

/// Seeds the generator with all of the 64 bytes of entropy.
pub fn random_generator(identity: &Identity) -> ChaCha20Rng {
    let (mut key, mut rest) = ([0; 32], [0; 32]);
    key.copy_from_slice(&identity.entropy[..32]);
    rest.copy_from_slice(&identity.entropy[32..]);
    // The stream of the first half, with the second half added, is the key that is used.
    let mut mixed = [0; 32];
    ChaCha20Rng::from_seed(key).fill_bytes(&mut mixed);
    for (mixed, rest) in mixed.iter_mut().zip(rest) {
        *mixed ^= rest;
    }
    ChaCha20Rng::from_seed(mixed)
}

/// The host name without its padding.
pub fn hostname(identity: &Identity) -> String {
    let end = identity.hostname.iter().position(|&byte| byte == 0).unwrap_or(64);
    String::from_utf8_lossy(&identity.hostname[..end]).into_owned()
}
