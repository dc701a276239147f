//! virtio-console (virtio 1.2, 5.3): one port, its output kept for the owner.

use std::collections::VecDeque;
use std::io::{Read, Write};

use vm_memory::GuestMemoryMmap;

use super::limiter::Limiter;
use super::mmio::{Kind, Mmio, MmioState, QueueKind};
use super::{Device, QueueError};

/// virtio-console.
pub static KIND: Kind = Kind {
    id: 3,
    features: 0,
    optional: 0,
    requires: &[],
    queues: &[
        QueueKind { name: "console rx", size: 64, notify: true },
        QueueKind { name: "console tx", size: 64, notify: true },
    ],
};
const RX: usize = 0;
const TX: usize = 1;

/// `struct virtio_console_config` (5.3.4): its fields belong to features that are not offered.
const CONFIG: [u8; 12] = [0; 12];

/// Output that is kept until the owner takes it, in bytes.
pub const OUTPUT_MAX: usize = 64 * 1024;

/// Input that is kept until the guest takes it, in bytes.
pub const INPUT_MAX: usize = 4 * 1024;

/// The console.
///
/// Output never waits: Linux' driver spins until it is taken. What is over the limit, or more than
/// is kept, is lost and counted.
pub struct Console {
    mmio: Mmio,
    output: Output,
    limiter: Limiter,
    input: VecDeque<u8>,
}

/// What came out of a console.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// The guest's bytes: anything, not only text.
    pub bytes: Vec<u8>,
    /// How many more there were, in between or after them.
    pub lost: u64,
}

impl Default for Console {
    fn default() -> Self {
        Self {
            mmio: Mmio::new(&KIND),
            output: Output::default(),
            limiter: Limiter::default(),
            input: VecDeque::new(),
        }
    }
}

impl Console {
    /// A device after reset.
    pub fn new() -> Self {
        Self::default()
    }

    /// A device in a saved state, without what was kept of output and input.
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

    /// Limits bytes and writes from now on.
    pub fn set_limiter(&mut self, limiter: Limiter) {
        self.limiter = limiter;
    }

    /// Takes what came out since the last time.
    pub fn take_output(&mut self) -> Output {
        std::mem::take(&mut self.output)
    }

    /// Types to the guest; returns how many bytes there was room for ([`INPUT_MAX`] in all).
    /// [`Console::receive`] hands them on.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(INPUT_MAX.saturating_sub(self.input.len()));
        self.input.extend(&bytes[..taken]);
        taken
    }

    /// Hands input to the guest while there is any and it has buffers.
    ///
    /// # Errors
    /// A buffer is not what virtio allows.
    pub fn receive(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        if !self.mmio.is_live(RX) {
            return Ok(());
        }
        let queue = &mut self.mmio.queues[RX];
        queue.begin();
        while !self.input.is_empty() {
            let Some(chain) = queue.next_chain(memory)? else { return Ok(()) };
            let head = chain.head_index();
            let mut writer = chain.writer(memory).map_err(|error| queue.error(&error))?;
            let length = writer.available_bytes().min(self.input.len());
            if length == 0 {
                return Err(queue.error(&"a buffer has no room"));
            }
            let bytes: Vec<u8> = self.input.drain(..length).collect();
            writer.write_all(&bytes).map_err(|error| queue.error(&error))?;
            queue.add_used(memory, head, length as u32)?;
        }
        Ok(())
    }

    /// Takes what the guest wrote.
    fn transmit(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        if !self.mmio.is_live(TX) {
            return Ok(());
        }
        let queue = &mut self.mmio.queues[TX];
        queue.begin();
        while let Some(chain) = queue.next_chain(memory)? {
            let head = chain.head_index();
            let reader = chain.reader(memory).map_err(|error| queue.error(&error))?;
            let length = reader.available_bytes();
            let room = OUTPUT_MAX.saturating_sub(self.output.bytes.len());
            let kept = if self.limiter.stopped_until().is_some() { 0 } else { length.min(room) };
            let read = reader.take(kept as u64).read_to_end(&mut self.output.bytes);
            read.map_err(|error| queue.error(&error))?;
            self.output.lost += (length - kept) as u64;
            if kept > 0 {
                self.limiter.passed(kept);
            }
            queue.add_used(memory, head, 0)?;
        }
        Ok(())
    }
}

impl Device for Console {
    fn mmio(&self) -> &Mmio {
        &self.mmio
    }

    fn mmio_mut(&mut self) -> &mut Mmio {
        &mut self.mmio
    }

    fn config(&self) -> &[u8] {
        &CONFIG
    }

    fn notify(&mut self, queue: usize, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        match queue {
            RX => self.receive(memory),
            TX => self.transmit(memory),
            _ => Ok(()),
        }
    }

    fn negotiated(&mut self) {
        self.input.clear();
    }
}
