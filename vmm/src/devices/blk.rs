//! virtio-blk (virtio 1.2, 5.2) over a [`Disk`].

use std::io::{self, Read, Write};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_queue::{Reader, Writer};
use vm_memory::GuestMemoryMmap;

use super::disk::{BLOCK, Disk, DiskState, SECTOR};
use super::limiter::Limiter;
use super::mmio::{Kind, Mmio, MmioState, QueueKind};
use super::{Device, QueueError};

// Features (5.2.3). Discarding and writing of zeroes are not offered: nothing is gained by them in a
// layer that ends with its microVM.
const SIZE_MAX: u64 = 1 << 1;
const SEG_MAX: u64 = 1 << 2;
const RO: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const TOPOLOGY: u64 = 1 << 10;

/// virtio-blk.
pub static KIND: Kind = Kind {
    id: 2,
    features: SIZE_MAX | SEG_MAX | FLUSH | TOPOLOGY,
    optional: RO,
    requires: &[],
    queues: &[QueueKind { name: "blk requests", size: 128, notify: true }],
};
const REQUESTS: usize = 0;

/// Segments of a request, and bytes of each: a request has at most 4 MiB.
const SEGMENTS_MAX: u32 = 64;
const SEGMENT_BYTES_MAX: u32 = 64 * 1024;

// Types of requests, and what becomes of them (5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH_REQUEST: u32 = 4;
const GET_ID: u32 = 8;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Length of a disk's name, in bytes, filled up with zeroes.
pub const ID_BYTES: usize = 20;

/// The block device.
pub struct Blk {
    mmio: Mmio,
    disk: Disk,
    id: [u8; ID_BYTES],
    config: [u8; 36],
    limiter: Limiter,
    /// When requests are served again, if they are not.
    stopped: Option<Instant>,
    /// A part of a request's data.
    buffer: Vec<u8>,
}

/// A block device, saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    /// Its registers and queue.
    pub mmio: MmioState,
    /// What is in its layer.
    pub disk: DiskState,
}

impl Blk {
    /// A device after reset. `id` is what the guest reads as the disk's serial number.
    pub fn new(disk: Disk, id: [u8; ID_BYTES]) -> Self {
        let mut mmio = Mmio::new(&KIND);
        if disk.is_read_only() {
            mmio.offer(RO);
        }
        Self::with(mmio, disk, id)
    }

    fn with(mmio: Mmio, disk: Disk, id: [u8; ID_BYTES]) -> Self {
        // struct virtio_blk_config (5.2.4): capacity, size_max, seg_max; then topology, blocks of
        // 8 sectors, so that guests write whole ones.
        let mut config = [0; 36];
        config[..8].copy_from_slice(&disk.sectors().to_le_bytes());
        config[8..12].copy_from_slice(&SEGMENT_BYTES_MAX.to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        config[24] = (BLOCK / SECTOR).ilog2() as u8;
        config[26] = (BLOCK / SECTOR) as u8;
        Self {
            mmio,
            disk,
            id,
            config,
            limiter: Limiter::default(),
            stopped: None,
            buffer: vec![0; SEGMENT_BYTES_MAX as usize],
        }
    }

    /// A device in a saved state; `disk` was [loaded](Disk::load) from the same.
    ///
    /// # Errors
    /// The state is not one of this device in this memory.
    pub fn load(
        state: &BlkState,
        memory: &GuestMemoryMmap,
        disk: Disk,
        id: [u8; ID_BYTES],
    ) -> Result<Self, QueueError> {
        Ok(Self::with(Mmio::load(&KIND, &state.mmio, memory)?, disk, id))
    }

    /// Saves the device. The content of the disk's layer is the owner's to copy.
    pub fn save(&self) -> BlkState {
        BlkState { mmio: self.mmio.save(), disk: self.disk.save() }
    }

    /// Limits bytes and requests from now on. A request over the limit waits in its queue.
    pub fn set_limiter(&mut self, limiter: Limiter) {
        self.limiter = limiter;
    }

    /// Does what a request says; returns its status.
    fn request(&mut self, reader: &mut Reader, writer: &mut Writer, header: [u8; 16]) -> u8 {
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let (read, written) = (reader.available_bytes(), writer.available_bytes());
        let at = u64::from_le_bytes(sector).checked_mul(SECTOR);
        let place = |length: usize| {
            let length = length as u64;
            let most = u64::from(SEGMENTS_MAX * SEGMENT_BYTES_MAX);
            let is_whole = length.is_multiple_of(SECTOR) && length <= most;
            at.filter(|&at| is_whole && self.disk.holds(at, length))
        };
        let result = match u32::from_le_bytes([a, b, c, d]) {
            IN => place(written).map(|at| self.read(at, writer)),
            OUT => place(read).map(|at| self.write(at, reader)),
            // A layer lives as long as its microVM: there is nothing that would save it longer.
            FLUSH_REQUEST => Some(Ok(())),
            GET_ID if written >= ID_BYTES => Some(writer.write_all(&self.id)),
            GET_ID => None,
            _ => return UNSUPPORTED,
        };
        match result {
            Some(Ok(())) => OK,
            Some(Err(error)) => {
                tracing::debug!(%error, "disk");
                IO_ERROR
            }
            None => IO_ERROR,
        }
    }

    fn read(&mut self, mut at: u64, writer: &mut Writer) -> io::Result<()> {
        while writer.available_bytes() > 0 {
            let length = writer.available_bytes().min(self.buffer.len());
            let part = &mut self.buffer[..length];
            self.disk.read(at, part)?;
            writer.write_all(part)?;
            at += length as u64;
        }
        Ok(())
    }

    fn write(&mut self, mut at: u64, reader: &mut Reader) -> io::Result<()> {
        while reader.available_bytes() > 0 {
            let length = reader.available_bytes().min(self.buffer.len());
            let part = &mut self.buffer[..length];
            reader.read_exact(part)?;
            self.disk.write(at, part)?;
            at += length as u64;
        }
        Ok(())
    }
}

impl Device for Blk {
    fn mmio(&self) -> &Mmio {
        &self.mmio
    }

    fn mmio_mut(&mut self) -> &mut Mmio {
        &mut self.mmio
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn notify(&mut self, queue: usize, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        if queue != REQUESTS || !self.mmio.is_live(REQUESTS) {
            return Ok(());
        }
        self.mmio.queues[REQUESTS].begin();
        self.stopped = None;
        while self.mmio.queues[REQUESTS].is_available(memory)? {
            self.stopped = self.limiter.stopped_until();
            if self.stopped.is_some() {
                break;
            }
            let queue = &mut self.mmio.queues[REQUESTS];
            let Some(chain) = queue.next_chain(memory)? else { break };
            let head = chain.head_index();
            let mut reader = chain.clone().reader(memory).map_err(|e| queue.error(&e))?;
            let mut writer = chain.writer(memory).map_err(|e| queue.error(&e))?;
            let mut header = [0; 16];
            if reader.read_exact(&mut header).is_err() {
                return Err(queue.error(&"a request is shorter than its header"));
            }
            // The status is the last byte, wherever buffers begin and end (2.7.4).
            let Some(data) = writer.available_bytes().checked_sub(1) else {
                return Err(queue.error(&"a request has no room for its status"));
            };
            let mut place = writer.split_at(data).map_err(|error| queue.error(&error))?;
            let passing = data + reader.available_bytes();
            let status = self.request(&mut reader, &mut writer, header);
            let queue = &mut self.mmio.queues[REQUESTS];
            place.write_all(&[status]).map_err(|error| queue.error(&error))?;
            // From the first byte on, without a gap: only then is the status one of them.
            let is_whole = writer.available_bytes() == 0;
            let written = writer.bytes_written() + usize::from(is_whole);
            queue.add_used(memory, head, written as u32)?;
            self.limiter.passed(passing);
        }
        Ok(())
    }

    fn due(&self) -> Option<Instant> {
        let backlog = self.mmio.has_backlog().then(Instant::now);
        backlog.or(self.stopped)
    }
}
