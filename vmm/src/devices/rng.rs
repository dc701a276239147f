//! virtio-rng (virtio 1.2, 5.4): randomness from the host's kernel.

use std::io::Write;
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;

use super::limiter::Limiter;
use super::mmio::{Kind, Mmio, MmioState, QueueKind};
use super::{Device, QueueError};

/// virtio-rng.
pub static KIND: Kind = Kind {
    id: 4,
    features: 0,
    optional: 0,
    requires: &[],
    queues: &[QueueKind { name: "rng requests", size: 16, notify: true }],
};
const REQUESTS: usize = 0;

/// What a buffer gets at most, in bytes, however long it is (5.4.6.2 allows less). So much the
/// kernel gives at once, uninterrupted (`getrandom(2)`).
const AT_ONCE: usize = 256;

/// When to ask the kernel again that had none.
const RETRY: Duration = Duration::from_millis(100);

/// The entropy device.
pub struct Rng {
    mmio: Mmio,
    limiter: Limiter,
    /// When requests are served again, if they are not.
    stopped: Option<Instant>,
}

impl Default for Rng {
    fn default() -> Self {
        Self { mmio: Mmio::new(&KIND), limiter: Limiter::default(), stopped: None }
    }
}

impl Rng {
    /// A device after reset.
    pub fn new() -> Self {
        Self::default()
    }

    /// A device in a saved state.
    ///
    /// # Errors
    /// The state is not one of this device in this memory.
    pub fn load(state: &MmioState, memory: &GuestMemoryMmap) -> Result<Self, QueueError> {
        Ok(Self { mmio: Mmio::load(&KIND, state, memory)?, ..Self::default() })
    }

    /// Saves the device.
    pub fn save(&self) -> MmioState {
        self.mmio.save()
    }

    /// Limits bytes and requests from now on. A request over the limit waits in its queue.
    pub fn set_limiter(&mut self, limiter: Limiter) {
        self.limiter = limiter;
    }
}

impl Device for Rng {
    fn mmio(&self) -> &Mmio {
        &self.mmio
    }

    fn mmio_mut(&mut self) -> &mut Mmio {
        &mut self.mmio
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn notify(&mut self, queue: usize, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        if queue != REQUESTS || !self.mmio.is_live(REQUESTS) {
            return Ok(());
        }
        let queue = &mut self.mmio.queues[REQUESTS];
        queue.begin();
        self.stopped = None;
        while queue.is_available(memory)? {
            self.stopped = self.limiter.stopped_until();
            if self.stopped.is_some() {
                break;
            }
            let Some(chain) = queue.next_chain(memory)? else { break };
            let head = chain.head_index();
            let mut writer = chain.writer(memory).map_err(|error| queue.error(&error))?;
            let mut bytes = [0; AT_ONCE];
            let length = writer.available_bytes().min(AT_ONCE);
            if length == 0 {
                return Err(queue.error(&"a buffer has no room"));
            }
            if !getrandom(&mut bytes[..length]) {
                queue.undo(1);
                self.stopped = Some(Instant::now() + RETRY);
                break;
            }
            writer.write_all(&bytes[..length]).map_err(|error| queue.error(&error))?;
            queue.add_used(memory, head, length as u32)?;
            self.limiter.passed(length);
        }
        Ok(())
    }

    fn due(&self) -> Option<Instant> {
        let backlog = self.mmio.has_backlog().then(Instant::now);
        backlog.or(self.stopped)
    }
}

/// Fills at most [`AT_ONCE`] bytes; `false` if the kernel has none.
fn getrandom(bytes: &mut [u8]) -> bool {
    // SAFETY: the buffer has that many bytes.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    usize::try_from(got) == Ok(bytes.len())
}
