//! The guest's devices: virtio-mmio registers, and behind them network and vsock.

pub mod mmio;
pub mod net;
pub mod vsock;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT};
use vm_memory::GuestMemoryMmap;

/// A guest wrote something into a queue that virtio does not allow.
#[derive(Debug, thiserror::Error)]
#[error("virtqueue {queue}: {error}")]
pub struct QueueError {
    /// Device and queue.
    pub queue: &'static str,
    /// What is wrong.
    pub error: String,
}

impl QueueError {
    fn new(queue: &'static str, error: &dyn std::fmt::Display) -> Self {
        Self { queue, error: error.to_string() }
    }
}

/// The next chain that the driver made available, whole and well-formed (virtio 1.2, 2.7.5).
fn next_chain<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemoryMmap,
    name: &'static str,
) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, QueueError> {
    let mut available = queue.iter(memory).map_err(|error| QueueError::new(name, &error))?;
    let Some(chain) = available.next() else { return Ok(None) };
    // The crate ends a chain where it breaks; a driver that meant more is broken or hostile.
    match chain.clone().last() {
        None => Err(QueueError::new(name, &"descriptor index out of range")),
        Some(last) if last.has_next() => Err(QueueError::new(name, &"descriptor chain is broken")),
        Some(_) => Ok(Some(chain)),
    }
}
