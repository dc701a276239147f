//! virtio-blk (virtio 1.2, 5.2) over a [`Disk`].

use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::disk::{BLOCK, Disk, DiskState, SECTOR};
use super::limiter::Limiter;
use super::mmio::{Kind, Mmio, MmioState, QueueKind};
use super::queue::Chain;
use super::uring::{Finished, PARTS_MAX, Uring};
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
    /// Where reads and writes are under way, if they are not waited for.
    uring: Option<Uring<Transfer>>,
}

/// A request that was taken from the queue.
struct Request {
    head: u16,
    /// Where the device may write: data, and one byte of status.
    places: Vec<(GuestAddress, usize)>,
    /// Room for data, in bytes.
    room: usize,
}

/// What a request asks for.
enum Act {
    /// This status and this data at once.
    Answer(u8, Vec<u8>),
    /// So many bytes from there on.
    Read(u64, usize),
    /// These bytes to there.
    Write(u64, Vec<u8>),
}

impl Act {
    /// Bytes that it moves.
    fn bytes(&self) -> usize {
        match self {
            Self::Answer(_, data) | Self::Write(_, data) => data.len(),
            Self::Read(_, length) => *length,
        }
    }
}

/// A request whose data is under way.
struct Transfer {
    request: Request,
    is_write: bool,
    /// The place on the disk, in bytes.
    at: u64,
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
        Self { mmio, disk, id, config, limiter: Limiter::default(), stopped: None, uring: None }
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

    /// Gives the base of its disk back.
    pub fn into_base(self) -> std::fs::File {
        self.disk.into_base()
    }

    /// Saves the device. No request may be under way: see [`Blk::quiesce`]. The content of the
    /// disk's layer is the owner's to copy.
    pub fn save(&self) -> BlkState {
        BlkState { mmio: self.mmio.save(), disk: self.disk.save() }
    }

    /// Limits bytes and requests from now on. A request over the limit waits in its queue.
    pub fn set_limiter(&mut self, limiter: Limiter) {
        self.limiter = limiter;
    }

    /// Lets the kernel read and write while the guest goes on, instead of waiting for it. From then
    /// on [`Blk::poll_fd`] is to be polled, and [`Blk::complete`] to be called when it is readable.
    ///
    /// # Errors
    /// The kernel has no rings, or forbids them: the device goes on without.
    pub fn use_uring(&mut self) -> io::Result<()> {
        self.uring = Some(Uring::new()?);
        Ok(())
    }

    /// To be polled for input while requests are under way.
    pub fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.uring.as_ref().and_then(Uring::poll_fd)
    }

    /// Gives the requests back that have come to their end, and begins those that waited for it.
    ///
    /// # Errors
    /// As [`Device::notify`].
    pub fn complete(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        self.finish_all(memory)?;
        self.notify(REQUESTS, memory)
    }

    /// Waits until no request is under way.
    ///
    /// # Errors
    /// A place of a request's cannot be written to.
    pub fn quiesce(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        while self.poll_fd().is_some() {
            self.enter(Uring::wait)?;
            self.finish_all(memory)?;
        }
        Ok(())
    }

    fn finish_all(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        while let Some(finished) = self.uring.as_mut().and_then(Uring::finished) {
            let Finished { what: transfer, mut buffer, is_done } = finished;
            let status = self.settle(&transfer, &mut buffer, is_done);
            let data = if transfer.is_write { &[] } else { &buffer[..] };
            self.give_back(memory, &transfer.request, status, data)?;
        }
        Ok(())
    }

    /// After a transfer. What the kernel did not do, or not wholly, is done once more and waited
    /// for: that tells why.
    fn settle(&mut self, transfer: &Transfer, buffer: &mut [u8], is_done: bool) -> u8 {
        let at = transfer.at;
        let result = match (is_done, transfer.is_write) {
            (true, true) => {
                self.disk.mark(at, buffer.len());
                Ok(())
            }
            (true, false) => Ok(()),
            (false, true) => self.disk.write(at, buffer),
            (false, false) => self.disk.read(at, buffer),
        };
        status(result)
    }

    fn enter(
        &mut self,
        how: impl FnOnce(&mut Uring<Transfer>) -> io::Result<()>,
    ) -> Result<(), QueueError> {
        let result = self.uring.as_mut().map_or(Ok(()), how);
        result.map_err(|error| self.mmio.queues[REQUESTS].error(&error))
    }

    /// Takes a request out of its chain, with what it sends along.
    fn parse(&self, chain: Chain, memory: &GuestMemoryMmap) -> Result<(Request, Act), QueueError> {
        let queue = &self.mmio.queues[REQUESTS];
        let head = chain.head_index();
        // Looked at once: a driver may change them at any time.
        let places: Vec<_> =
            chain.clone().writable().map(|place| (place.addr(), place.len() as usize)).collect();
        let writable: usize = places.iter().map(|(_, length)| length).sum();
        let mut reader = chain.reader(memory).map_err(|error| queue.error(&error))?;
        let mut header = [0; 16];
        if reader.read_exact(&mut header).is_err() {
            return Err(queue.error(&"a request is shorter than its header"));
        }
        // The status is the last byte, wherever buffers begin and end (2.7.4).
        let Some(room) = writable.checked_sub(1) else {
            return Err(queue.error(&"a request has no room for its status"));
        };
        let sent = reader.available_bytes();
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let at = u64::from_le_bytes(sector).checked_mul(SECTOR);
        let place = |length: usize| {
            let length = length as u64;
            let most = u64::from(SEGMENTS_MAX * SEGMENT_BYTES_MAX);
            let is_whole = length.is_multiple_of(SECTOR) && length <= most;
            at.filter(|&at| is_whole && self.disk.holds(at, length))
        };
        let act = match u32::from_le_bytes([a, b, c, d]) {
            IN => place(room).map_or(Act::Answer(IO_ERROR, vec![]), |at| Act::Read(at, room)),
            OUT => match place(sent).filter(|_| !self.disk.is_read_only()) {
                Some(at) => {
                    let mut data = vec![0; sent];
                    reader.read_exact(&mut data).map_err(|error| queue.error(&error))?;
                    Act::Write(at, data)
                }
                None => Act::Answer(IO_ERROR, vec![]),
            },
            // A layer lives as long as its microVM: there is nothing that would save it longer.
            FLUSH_REQUEST => Act::Answer(OK, vec![]),
            GET_ID if room >= ID_BYTES => Act::Answer(OK, self.id.to_vec()),
            GET_ID => Act::Answer(IO_ERROR, vec![]),
            _ => Act::Answer(UNSUPPORTED, vec![]),
        };
        Ok((Request { head, places, room }, act))
    }

    /// Does what a request asks for, or begins it.
    fn act(
        &mut self,
        request: Request,
        act: Act,
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        match act {
            Act::Answer(status, data) => self.give_back(memory, &request, status, &data),
            Act::Read(at, length) => {
                let mut buffer = vec![0; length];
                let parts = self.disk.parts(at, length);
                // A read of many small parts is rare, and not worth a larger ring.
                if let Some(uring) =
                    self.uring.as_mut().filter(|_| (1..=PARTS_MAX).contains(&parts.len()))
                {
                    uring.begin(Transfer { request, is_write: false, at }, buffer, false, &parts);
                    return Ok(());
                }
                let status = status(self.disk.read(at, &mut buffer));
                self.give_back(memory, &request, status, &buffer)
            }
            Act::Write(at, data) => {
                if self.is_written_to(at, data.len()) {
                    // To copy the rest of a block while it is written would undo that.
                    self.quiesce(memory)?;
                }
                match (&mut self.uring, self.disk.prepare(at, data.len())) {
                    (Some(uring), Ok(part)) if !data.is_empty() => {
                        uring.begin(Transfer { request, is_write: true, at }, data, true, &[part]);
                        Ok(())
                    }
                    (_, prepared) => {
                        drop(prepared);
                        let status = status(self.disk.write(at, &data));
                        self.give_back(memory, &request, status, &[])
                    }
                }
            }
        }
    }

    /// Whether a write is under way to a block of these.
    fn is_written_to(&self, at: u64, length: usize) -> bool {
        let blocks = |at: u64, length: usize| (at / BLOCK, (at + length as u64).div_ceil(BLOCK));
        let (first, end) = blocks(at, length);
        let mut jobs = self.uring.iter().flat_map(Uring::jobs);
        jobs.any(|(transfer, bytes)| {
            let (other_first, other_end) = blocks(transfer.at, bytes);
            transfer.is_write && first < other_end && other_first < end
        })
    }

    /// Puts data and status where the request wants them, and gives its chain back.
    fn give_back(
        &mut self,
        memory: &GuestMemoryMmap,
        request: &Request,
        status: u8,
        data: &[u8],
    ) -> Result<(), QueueError> {
        let queue = &mut self.mmio.queues[REQUESTS];
        let data = if status == OK { data } else { &[] };
        request.write(0, data, memory).map_err(|error| queue.error(&error))?;
        request.write(request.room, &[status], memory).map_err(|error| queue.error(&error))?;
        // From the first byte on, without a gap: only then is the status one of them.
        let written = data.len() + usize::from(data.len() == request.room);
        queue.add_used(memory, request.head, written as u32)
    }
}

impl Request {
    /// Writes to what the device may write, from this byte of it on.
    fn write(
        &self,
        mut from: usize,
        mut bytes: &[u8],
        memory: &GuestMemoryMmap,
    ) -> Result<(), GuestMemoryError> {
        for &(address, length) in &self.places {
            let skipped = from.min(length);
            let (part, rest) = bytes.split_at(bytes.len().min(length - skipped));
            if !part.is_empty() {
                let place = address.checked_add(skipped as u64);
                let place = place.ok_or(GuestMemoryError::InvalidGuestAddress(address))?;
                memory.write_slice(part, place)?;
            }
            (from, bytes) = (from - skipped, rest);
        }
        Ok(())
    }
}

/// The status of a transfer.
fn status(result: io::Result<()>) -> u8 {
    match result {
        Ok(()) => OK,
        Err(error) => {
            tracing::debug!(%error, "disk");
            IO_ERROR
        }
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
            if self.uring.as_ref().is_some_and(|uring| !uring.has_room()) {
                break;
            }
            let queue = &mut self.mmio.queues[REQUESTS];
            let Some(chain) = queue.next_chain(memory)? else { break };
            let (request, act) = self.parse(chain, memory)?;
            self.limiter.passed(act.bytes());
            self.act(request, act, memory)?;
        }
        self.enter(Uring::submit)
    }

    fn negotiated(&mut self) {
        // The driver has forgotten what is under way; the disk has not.
        while self.poll_fd().is_some() && self.enter(Uring::wait).is_ok() {
            while let Some(finished) = self.uring.as_mut().and_then(Uring::finished) {
                let Finished { what, mut buffer, is_done } = finished;
                self.settle(&what, &mut buffer, is_done);
            }
        }
        if self.poll_fd().is_some() {
            // The ring is broken: nothing of it may come back to the driver that begins now.
            self.uring = None;
        }
    }

    fn due(&self) -> Option<Instant> {
        let backlog = self.mmio.has_backlog().then(Instant::now);
        backlog.or(self.stopped)
    }
}
