//! Reads and writes of files that the kernel does while the guest goes on (`io_uring(7)`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};

/// Parts of a job, at most.
pub const PARTS_MAX: usize = 8;

/// Parts of all jobs that may be under way.
const ENTRIES: usize = 128;

/// Bytes of jobs after which no other is begun.
const BYTES_MAX: usize = 8 << 20;

/// Where a part of a job's buffer is to come from, or to go to.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// The file.
    pub file: &'a File,
    /// The place in the file, in bytes.
    pub at: u64,
    /// Bytes.
    pub length: usize,
}

/// A ring, and the jobs that are under way in it, each for a `T`.
pub struct Uring<T> {
    ring: IoUring,
    jobs: Vec<Option<Job<T>>>,
    /// Parts and bytes that are under way.
    parts: usize,
    bytes: usize,
}

struct Job<T> {
    what: T,
    buffer: Vec<u8>,
    /// Parts under way.
    parts: usize,
    is_done: bool,
}

/// A job that came to its end.
pub struct Finished<T> {
    /// What it was for.
    pub what: T,
    /// Its buffer: filled if it was a read.
    pub buffer: Vec<u8>,
    /// All of it was read or written.
    pub is_done: bool,
}

impl<T> Uring<T> {
    /// A ring of this process's: not to be carried over a fork.
    ///
    /// # Errors
    /// The kernel has no rings, or forbids them.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(ENTRIES as u32)?;
        Ok(Self { ring, jobs: Vec::new(), parts: 0, bytes: 0 })
    }

    /// Whether another job can be begun.
    pub fn has_room(&self) -> bool {
        self.parts + PARTS_MAX <= ENTRIES && self.bytes < BYTES_MAX
    }

    /// What is under way, and how many bytes long.
    pub fn jobs(&self) -> impl Iterator<Item = (&T, usize)> {
        self.jobs.iter().flatten().map(|job| (&job.what, job.buffer.len()))
    }

    /// Begins to read, or to write, one part of the buffer after the other. There must be
    /// [room](Self::has_room); the parts, at most [`PARTS_MAX`], are together as long as the buffer,
    /// and none is empty.
    pub fn begin(&mut self, what: T, buffer: Vec<u8>, is_write: bool, parts: &[Part]) {
        debug_assert_eq!(parts.iter().map(|part| part.length).sum::<usize>(), buffer.len());
        let index = self.jobs.iter().position(Option::is_none).unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        self.bytes += buffer.len();
        let job = Job { what, buffer, parts: 0, is_done: true };
        let job = self.jobs[index].insert(job);
        let mut rest = &mut job.buffer[..];
        for part in parts {
            let (bytes, after) = rest.split_at_mut(part.length);
            rest = after;
            // How much is expected comes back with the result.
            let data = (part.length as u64) << 32 | index as u64;
            let entry = entry(bytes, is_write, part).user_data(data);
            // SAFETY: the buffer is on the heap, is neither touched nor freed before its parts have
            // come back (`drop` waits for them), and nothing else refers to it.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            // There is room for as many as may be under way.
            if pushed.is_ok() {
                job.parts += 1;
                self.parts += 1;
            } else {
                job.is_done = false;
            }
        }
    }

    /// Hands what was begun to the kernel.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn submit(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() { Ok(()) } else { self.enter(0) }
    }

    /// Waits until something under way comes back; at once if nothing is.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn wait(&mut self) -> io::Result<()> {
        self.enter(self.parts.min(1))
    }

    fn enter(&mut self, wanted: usize) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(wanted) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(|_| ()),
            }
        }
    }

    /// The next job that came to its end.
    pub fn finished(&mut self) -> Option<Finished<T>> {
        if let Some(index) = self.jobs.iter().position(|job| job.as_ref().is_some_and(Job::ended)) {
            return self.end(index);
        }
        loop {
            let result = self.ring.completion().next()?;
            let (length, index) = (result.user_data() >> 32, result.user_data() as u32 as usize);
            self.parts -= 1;
            let Some(job) = self.jobs.get_mut(index).and_then(Option::as_mut) else { continue };
            job.parts -= 1;
            job.is_done &= u64::try_from(result.result()) == Ok(length);
            if job.ended() {
                return self.end(index);
            }
        }
    }

    fn end(&mut self, index: usize) -> Option<Finished<T>> {
        let Job { what, buffer, is_done, .. } = self.jobs[index].take()?;
        self.bytes -= buffer.len();
        Some(Finished { what, buffer, is_done })
    }

    /// To be polled for input; then something has come back.
    pub fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        (self.parts > 0).then(|| self.as_fd())
    }
}

impl<T> Job<T> {
    fn ended(&self) -> bool {
        self.parts == 0
    }
}

impl<T> AsFd for Uring<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring is open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

fn entry(bytes: &mut [u8], is_write: bool, part: &Part) -> Entry {
    let (file, length) = (types::Fd(part.file.as_raw_fd()), bytes.len() as u32);
    if is_write {
        opcode::Write::new(file, bytes.as_ptr(), length).offset(part.at).build()
    } else {
        opcode::Read::new(file, bytes.as_mut_ptr(), length).offset(part.at).build()
    }
}

impl<T> Drop for Uring<T> {
    fn drop(&mut self) {
        while self.parts > 0 {
            if self.wait().is_err() {
                // The kernel may still write to the buffers: they stay.
                std::mem::forget(std::mem::take(&mut self.jobs));
                return;
            }
            while self.finished().is_some() {}
        }
    }
}
