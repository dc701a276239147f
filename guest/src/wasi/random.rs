//! wasi:random: all of it from the clone's own generator, the insecure one too.

use alloc::vec;
use alloc::vec::Vec;

use rand_chacha::rand_core::Rng;
use wasmtime::Result;

use super::State;
use super::bindings::wasi::random::{insecure, insecure_seed, random};

/// The most that is given at once, in bytes.
const BYTES_MAX: u64 = 1 << 20;

impl State {
    fn random_bytes(&mut self, length: u64) -> Result<Vec<u8>> {
        let machine = self.released("randomness")?;
        if length > BYTES_MAX {
            return Err(wasmtime::Error::msg("it asked for more than 1 MiB of randomness at once"));
        }
        let mut bytes = vec![0; length as usize];
        machine.random.fill_bytes(&mut bytes);
        Ok(bytes)
    }

    fn random_number(&mut self) -> Result<u64> {
        Ok(self.released("randomness")?.random.next_u64())
    }
}

impl random::Host for State {
    fn get_random_bytes(&mut self, length: u64) -> Result<Vec<u8>> {
        self.random_bytes(length)
    }

    fn get_random_u64(&mut self) -> Result<u64> {
        self.random_number()
    }
}

impl insecure::Host for State {
    fn get_insecure_random_bytes(&mut self, length: u64) -> Result<Vec<u8>> {
        self.random_bytes(length)
    }

    fn get_insecure_random_u64(&mut self) -> Result<u64> {
        self.random_number()
    }
}

impl insecure_seed::Host for State {
    fn insecure_seed(&mut self) -> Result<(u64, u64)> {
        Ok((self.random_number()?, self.random_number()?))
    }
}
