//! Removing flows that ended.
//!
//! This process looks through the table, at leisure; the program decides about what it found, a
//! few flows at a time, for no packet is dealt with on its processor meanwhile.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use nix::time::{ClockId, clock_gettime};
use warren_abi::flow::{Timers, tick};
use warren_abi::maps::{Attachment, Flow, OutKey, Sweep, names, programs};

use super::{Error, SweepReport};

/// Entries that are read at a time: more than there are in any bucket of a hash map.
const BATCH: usize = 4096;

/// Goes through all flows, of which some may come or go meanwhile.
pub(super) fn for_each(
    map: BorrowedFd<'_>,
    mut visit: impl FnMut(&OutKey, &Flow),
) -> Result<(), Error> {
    /// `union bpf_attr`, the part for batches (`linux/bpf.h`).
    #[repr(C)]
    struct Attributes {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        element_flags: u64,
        flags: u64,
    }
    const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

    let mut keys = Vec::<OutKey>::with_capacity(BATCH);
    let mut flows = Vec::<Flow>::with_capacity(BATCH);
    let mut place: Option<u32> = None;
    loop {
        let mut next = 0u32;
        let mut attributes = Attributes {
            in_batch: place.as_ref().map_or(0, |place| &raw const *place as u64),
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: flows.as_mut_ptr() as u64,
            count: BATCH as u32,
            map: map.as_raw_fd() as u32,
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: the buffers have room for the entries that are asked for, of the sizes with
        // which the map was opened; what the kernel filled of them is initialised.
        let result = unsafe {
            let size = size_of::<Attributes>();
            libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut attributes, size)
        };
        let error = (result != 0).then(io::Error::last_os_error);
        let at_end = match error {
            Some(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Some(error) => return Err(Error::system("read map", names::CT_OUT, error)),
            None => false,
        };
        // SAFETY: the kernel wrote back how many entries it filled, at most as many as there is
        // room for. Volatile, since it did so behind the compiler's back.
        let found = unsafe {
            let count = (&raw const attributes.count).read_volatile() as usize;
            keys.set_len(count.min(BATCH));
            flows.set_len(count.min(BATCH));
            keys.iter().zip(&flows)
        };
        for (key, flow) in found {
            visit(key, flow);
        }
        if at_end {
            return Ok(());
        }
        place = Some(next);
    }
}

/// Removes flows that ended, and whose ports rested: idle for longer than `timers`, or begun under
/// an attachment that the interface of that index has no more.
pub(super) fn run(
    program: &SchedClassifier,
    map: BorrowedFd<'_>,
    is_attached: impl Fn(u32, Attachment) -> bool,
    timers: &Timers,
) -> Result<SweepReport, Error> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_err(|error| Error::system("read", "CLOCK_MONOTONIC", error.into()))?;
    let now = tick(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64);
    let mut live = 0;
    let mut ended = Vec::new();
    for_each(map, |key, flow| {
        let attachment = Attachment::new(flow.vni, key.generation);
        let is_stale = !is_attached(key.ifindex, attachment);
        let protocol = key.protocol as u8;
        let is_expired = flow.state.is_expired(protocol, timers, now);
        if flow.state.is_gone(is_stale, protocol, timers, now)
            || is_expired && flow.state.is_counted()
        {
            ended.push(*key);
        } else if !key.is_mapping() && !is_stale && !is_expired {
            live += 1;
        }
    })?;

    let mut report = SweepReport { live, ..SweepReport::default() };
    for some in ended.chunks(Sweep::KEYS) {
        let mut order = Sweep { timers: *timers, count: some.len() as u32, ..Sweep::EMPTY };
        let mut keys = order.keys;
        keys[..some.len()].copy_from_slice(some);
        order.keys = keys;
        let request = order.to_bytes();
        let mut reply = request;
        let mut options = TestRunOptions::new();
        options.data_in = Some(&request);
        options.data_out = Some(&mut reply);
        program
            .test_run(options)
            .map_err(|source| Error::program("run program", programs::SWEEP, source))?;
        let done = Sweep::from_bytes(reply);
        report.expired += done.expired;
        report.stale += done.stale;
    }
    Ok(report)
}
