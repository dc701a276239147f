//! A split virtqueue, as its device sees it (virtio 1.2, 2.7).

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::QueueError;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (2.7.6).
const NO_INTERRUPT: u16 = 1;

/// Buffers that the driver makes available as one.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// A queue. What the driver writes into it is checked here, and so is how much of it is done at a
/// time: a driver that fills the queue while it is emptied, or lets the device itself write to the
/// rings, cannot keep the device in a loop.
pub struct Virtqueue {
    name: &'static str,
    queue: Queue,
    /// How many chains more are taken before others get their turn.
    left: u16,
    /// Chains were left for lack of turns.
    has_backlog: bool,
    /// `next_used` when the driver's wish for an interrupt was looked at last.
    signalled: u16,
}

impl Virtqueue {
    /// A queue of this state; `name` is device and queue, for errors.
    pub(super) fn new(name: &'static str, queue: Queue) -> Self {
        let signalled = queue.next_used();
        Self { name, queue, left: 0, has_backlog: false, signalled }
    }

    /// The queue's registers.
    pub(super) fn registers(&self) -> &Queue {
        &self.queue
    }

    /// The queue's registers.
    pub(super) fn registers_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Something is wrong with this queue.
    pub(super) fn error(&self, error: &dyn std::fmt::Display) -> QueueError {
        QueueError::new(self.name, error)
    }

    /// Chains that the device has taken and not yet given back.
    pub fn in_flight(&self) -> u16 {
        self.queue.next_avail().wrapping_sub(self.queue.next_used())
    }

    /// Descriptors, as the driver chose; at least 1.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether chains were left in the last turn, of which no notification will tell.
    pub(super) fn has_backlog(&self) -> bool {
        self.has_backlog
    }

    /// Begins a turn, in which as many chains can be taken as the queue holds.
    pub(super) fn begin(&mut self) {
        self.left = self.queue.size();
        self.has_backlog = false;
    }

    /// Whether the driver has made a chain available. If not, it will notify of the next one.
    pub(super) fn is_available(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let has_chain = self.has_chain(memory)?;
        if has_chain || !self.queue.event_idx_enabled() {
            return Ok(has_chain);
        }
        self.queue.enable_notification(memory).map_err(|error| self.error(&error))
    }

    /// Whether the driver has made a chain available.
    pub(super) fn has_chain(&self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let index = self.queue.avail_idx(memory, Ordering::Acquire);
        Ok(index.map_err(|error| self.error(&error))?.0 != self.queue.next_avail())
    }

    /// The next chain, whole and well-formed (2.7.5). `None` if there is none, or this turn is over.
    pub(super) fn next_chain<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<Chain<'m>>, QueueError> {
        if !self.is_available(memory)? {
            return Ok(None);
        }
        if self.left == 0 {
            self.has_backlog = true;
            return Ok(None);
        }
        let next = self.queue.iter(memory).map(|mut available| available.next());
        let Some(chain) = next.map_err(|error| self.error(&error))? else { return Ok(None) };
        // The crate ends a chain where it breaks; a driver that meant more is broken or hostile.
        let mut last = None;
        for (count, descriptor) in chain.clone().enumerate() {
            // Those of an indirect table, too (2.7.5.3.1).
            if count >= usize::from(self.queue.size()) {
                return Err(self.error(&"descriptor chain is longer than the queue"));
            }
            last = Some(descriptor);
        }
        match last {
            None => Err(self.error(&"descriptor index out of range")),
            Some(last) if last.has_next() => Err(self.error(&"descriptor chain is broken")),
            Some(_) => {
                self.left -= 1;
                Ok(Some(chain))
            }
        }
    }

    /// Makes the last chains that were taken, and not given back, the next ones again.
    pub(super) fn undo(&mut self, chains: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(chains));
        self.left += chains;
    }

    /// Gives a chain back, of which the first `written` bytes that the device may write were
    /// written (2.7.8).
    pub(super) fn add_used(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        self.queue.add_used(memory, head, written).map_err(|error| self.error(&error))
    }

    /// Gives several chains back at once: the driver sees all of them or none.
    pub(super) fn add_used_together(
        &mut self,
        memory: &GuestMemoryMmap,
        chains: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let Some((&(head, written), before)) = chains.split_last() else { return Ok(()) };
        for &(head, written) in before {
            // The index in memory stays what it is until the last one moves it.
            let next = self.queue.next_used();
            let offset = 4 + 8 * u64::from(next % self.queue.size());
            let element = [u32::from(head).to_le(), written.to_le()];
            // `check` at the queue's set-up: the ring lies within memory.
            let address = GuestAddress(self.queue.used_ring() + offset);
            memory.write_obj(element, address).map_err(|error| self.error(&error))?;
            self.queue.set_next_used(next.wrapping_add(1));
        }
        self.add_used(memory, head, written)
    }

    /// Whether the driver wants an interrupt for what was given back since this was last asked
    /// (2.7.7.2).
    pub(super) fn take_interrupt(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let new = self.queue.next_used();
        let old = std::mem::replace(&mut self.signalled, new);
        if new == old {
            return Ok(false);
        }
        // The driver must see the used ring before the device looks whether it sleeps.
        fence(Ordering::SeqCst);
        let load = |offset: u64| {
            let address = GuestAddress(self.queue.avail_ring() + offset);
            let value = memory.load::<u16>(address, Ordering::Relaxed);
            value.map(u16::from_le).map_err(|error| self.error(&error))
        };
        if self.queue.event_idx_enabled() {
            let event = load(4 + 2 * u64::from(self.queue.size()))?;
            return Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
        }
        Ok(load(0)? & NO_INTERRUPT == 0)
    }
}
