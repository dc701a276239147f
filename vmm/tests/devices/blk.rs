//! virtio-blk and its disk.

use std::fs::File;
use std::io::Write;
use std::num::NonZeroU64;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;
use warren_vmm::devices::Device;
use warren_vmm::devices::blk::{Blk, ID_BYTES};
use warren_vmm::devices::disk::{Disk, DiskError};
use warren_vmm::devices::limiter::{Limit, Limiter};

use crate::driver::Driver;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const RO: u64 = 1 << 5;
const ID: [u8; ID_BYTES] = *b"warren-disk-00000001";

/// A base in which each sector has its number in each byte.
fn base(sectors: u8) -> File {
    let mut file = tempfile::tempfile().unwrap();
    for sector in 0..sectors {
        file.write_all(&[sector; 512]).unwrap();
    }
    file
}

fn writable(sectors: u8) -> Driver<Blk> {
    Driver::new(Blk::new(Disk::with_layer_in_memory(base(sectors)).unwrap(), ID), 0)
}

/// Two alike, one that waits for its files and one that does not.
fn both(sectors: u8) -> [Driver<Blk>; 2] {
    let [waits, mut does_not] = [writable(sectors), writable(sectors)];
    does_not.device.use_uring().unwrap();
    [waits, does_not]
}

/// Waits for what is under way, as an owner does.
fn finish(driver: &mut Driver<Blk>) {
    while let Some(fd) = driver.device.poll_fd() {
        poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
        driver.device.complete(&driver.memory).unwrap();
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Does one request; returns status, data, and how many bytes the device says that it wrote.
fn request(
    driver: &mut Driver<Blk>,
    kind: u32,
    sector: u64,
    out: &[u8],
    room: usize,
) -> (u8, Vec<u8>, u32) {
    let header = header(kind, sector);
    let readable: &[&[u8]] = if out.is_empty() { &[&header] } else { &[&header, out] };
    let writable: &[usize] = if room == 0 { &[1] } else { &[room, 1] };
    let chain = driver.add(0, readable, writable);
    driver.kick(0);
    finish(driver);
    let (head, length) = driver.used(0).unwrap();
    assert_eq!(head, chain.head);
    let mut data = driver.written(&chain, room + 1);
    (data.pop().unwrap(), data, length)
}

#[test]
fn virtio_5_2_4_the_configuration_says_how_large_the_disk_is() {
    let driver = writable(100);
    let mut config = [0; 36];
    driver.device.read(0x100, &mut config);
    assert_eq!(config[..8], 100u64.to_le_bytes());
    assert_eq!(config[8..16], [0, 0, 1, 0, 64, 0, 0, 0], "size_max and seg_max");
    assert_eq!(config[24..28], [3, 0, 8, 0], "blocks of 4096 bytes");
}

#[test]
fn virtio_5_2_6_what_was_written_is_read() {
    for mut driver in both(64) {
        let before = [[3; 512], [4; 512]].concat();
        assert_eq!(request(&mut driver, IN, 3, &[], 1024), (OK, before, 1025));
        assert_eq!(request(&mut driver, OUT, 3, &[0xee; 512], 0), (OK, vec![], 1));
        let after = [[2; 512], [0xee; 512], [4; 512]].concat();
        assert_eq!(request(&mut driver, IN, 2, &[], 1536), (OK, after, 1537));
        assert!(driver.interrupted());
        // Nothing at all is read and written, too.
        assert_eq!(request(&mut driver, IN, 2, &[], 0), (OK, vec![], 1));
        assert_eq!(request(&mut driver, OUT, 2, &[], 0), (OK, vec![], 1));
    }
}

/// Many at once: whole blocks, and parts of blocks whose rest is copied meanwhile.
#[test]
fn virtio_5_2_6_requests_under_way_do_not_undo_each_other() {
    for mut driver in both(64) {
        for round in 0..50u8 {
            let (whole, part) = (vec![round | 0x80; 4096], [round; 512]);
            driver.add(0, &[&header(OUT, 8), &whole], &[1]);
            driver.add(0, &[&header(OUT, 10), &part], &[1]);
            driver.add(0, &[&header(OUT, 17), &part], &[1]);
            driver.add(0, &[&header(OUT, 19), &part], &[1]);
            driver.kick(0);
            finish(&mut driver);
            let mut expected = whole;
            expected[1024..1536].copy_from_slice(&part);
            for sector in 16..24 {
                expected.extend(if [17, 19].contains(&sector) { part } else { [sector; 512] });
            }
            for _ in 0..4 {
                driver.used(0).unwrap();
            }
            let (status, data, _) = request(&mut driver, IN, 8, &[], 8192);
            assert_eq!((status, data), (OK, expected));
            driver.rewind();
        }
    }
}

#[test]
fn virtio_2_4_reset_forgets_what_is_under_way() {
    let [_, mut driver] = both(64);
    driver.add(0, &[&header(OUT, 8), &[9; 4096]], &[1]);
    driver.kick(0);
    driver.set(0x70, 0);
    assert!(driver.device.poll_fd().is_none());
    let mut driver = Driver::new(driver.device, 0);
    assert_eq!(request(&mut driver, IN, 8, &[], 4096).1, [9; 4096]);
}

#[test]
fn more_requests_than_the_ring_holds_wait_for_others() {
    let [_, mut driver] = both(200);
    // 16 of 4 MiB are more than is under way at a time; the device writes all to the same place.
    let disk = Disk::with_layer_in_memory({
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        file
    });
    driver.device = Blk::new(disk.unwrap(), ID);
    driver.device.use_uring().unwrap();
    let mut driver = Driver::new(driver.device, 0);
    let header = driver.add(0, &[&header(IN, 0)], &[1]);
    driver.kick(0);
    assert_eq!(driver.used(0), Some((header.head, 1)));
    let place = driver.allocate(1 << 20);
    let header_at = crate::driver::BASE + 0x3000;
    driver.put(header_at, &self::header(IN, 0));
    for slot in 0..4u16 {
        // A header, and one megabyte four times.
        let at = 4 * slot;
        driver.descriptor(0, at, header_at, 16, 1, at + 1);
        driver.descriptor(0, at + 1, place, 512 * 1024, 3, at + 2);
        driver.descriptor(0, at + 2, place, 512 * 1024, 3, at + 3);
        driver.descriptor(0, at + 3, header_at + 64, 1, 2, 0);
    }
    for turn in 0..16 {
        driver.offer(0, 4 * (turn % 4));
    }
    driver.kick(0);
    finish(&mut driver);
    assert_eq!(driver.used_index(0), 17);
}

#[test]
fn virtio_5_2_6_flush_is_done_and_the_id_is_told() {
    let mut driver = writable(8);
    assert_eq!(request(&mut driver, FLUSH, 0, &[], 0), (OK, vec![], 1));
    let (status, id, _) = request(&mut driver, GET_ID, 0, &[], ID_BYTES);
    assert_eq!((status, &id[..]), (OK, &ID[..]));
    assert_eq!(request(&mut driver, GET_ID, 0, &[], 19).0, IO_ERROR);
}

#[test]
fn virtio_5_2_6_2_a_read_only_disk_refuses_writes() {
    let mut blk = Driver::reset(Blk::new(Disk::read_only(base(8)).unwrap(), ID));
    assert_ne!(blk.offered() & RO, 0);
    assert_eq!(Driver::reset(writable(8).device).offered() & RO, 0);
    // Taken or not.
    for features in [0, RO] {
        let mut driver = Driver::new(Blk::new(Disk::read_only(base(8)).unwrap(), ID), features);
        assert_eq!(request(&mut driver, OUT, 0, &[1; 512], 0).0, IO_ERROR);
        assert_eq!(request(&mut driver, IN, 1, &[], 512), (OK, vec![1; 512], 513));
    }
}

#[test]
fn virtio_5_2_6_2_unknown_requests_are_unsupported() {
    let mut driver = writable(8);
    // Discarding and writing of zeroes were not offered.
    for kind in [2, 11, 13, 14, u32::MAX] {
        assert_eq!(request(&mut driver, kind, 0, &[0; 16], 0), (UNSUPPORTED, vec![], 1));
    }
}

#[test]
fn virtio_5_2_6_1_what_is_not_on_the_disk_is_an_error() {
    for mut driver in both(8) {
        for (sector, length) in
            [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511)]
        {
            assert_eq!(request(&mut driver, IN, sector, &[], length).0, IO_ERROR, "{sector}");
            assert_eq!(
                request(&mut driver, OUT, sector, &vec![9; length], 0).0,
                IO_ERROR,
                "{sector}"
            );
        }
        let (status, data, length) = request(&mut driver, IN, 7, &[], 1024);
        assert_eq!(
            (status, length),
            (IO_ERROR, 0),
            "the status is not told as written behind a gap"
        );
        assert_eq!(data, [0; 1024]);
        assert_eq!(request(&mut driver, IN, 0, &[], 8 * 512).1, request_all(8));
    }
}

fn request_all(sectors: u8) -> Vec<u8> {
    (0..sectors).flat_map(|sector| [sector; 512]).collect()
}

#[test]
fn virtio_2_7_4_nothing_is_assumed_of_how_a_request_is_cut() {
    let mut driver = writable(64);
    let out = header(OUT, 5);
    // Header and data in odd parts.
    let chain = driver.add(0, &[&out[..7], &out[7..], &[1], &[2; 511]], &[1]);
    driver.kick(0);
    assert_eq!(driver.used(0), Some((chain.head, 1)));
    assert_eq!(driver.written(&chain, 1), [OK]);
    // The status at the end of the data.
    let chain = driver.add(0, &[&header(IN, 5)], &[100, 400, 13]);
    driver.kick(0);
    assert_eq!(driver.used(0), Some((chain.head, 513)));
    assert_eq!(driver.written(&chain, 513), [&[1][..], &[2; 511], &[OK]].concat());
}

#[test]
fn virtio_5_2_6_a_request_without_header_or_status_is_an_error() {
    for (readable, writable_) in [(16, 0), (15, 1), (0, 1)] {
        let mut driver = writable(8);
        let zeroes = vec![0; readable];
        let readable: &[&[u8]] = if zeroes.is_empty() { &[] } else { &[&zeroes] };
        driver.add(0, readable, if writable_ == 0 { &[] } else { &[1] });
        assert_eq!(driver.try_kick(0).unwrap_err().queue, "blk requests");
    }
}

#[test]
fn requests_over_the_limit_wait() {
    let limit =
        |per_second, burst| Some(Limit { per_second: NonZeroU64::new(per_second).unwrap(), burst });
    for (bytes, operations) in [(limit(51_200, 1024), None), (None, limit(100, 2))] {
        let mut driver = writable(64);
        driver.device.set_limiter(Limiter::new(bytes, operations, Instant::now()));
        for sector in 0..3 {
            driver.add(0, &[&header(IN, sector)], &[512, 1]);
        }
        driver.kick(0);
        assert_eq!(driver.used_index(0), 2);
        let due = driver.device.due().unwrap();
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        driver.device.serve(&driver.memory).unwrap();
        assert_eq!(driver.used_index(0), 3);
    }
}

#[test]
fn writes_are_seen_by_no_other_disk_of_the_base() {
    let base = base(64);
    let shared = || base.try_clone().unwrap();
    let mut one = Disk::with_layer_in_memory(shared()).unwrap();
    let other = Disk::with_layer_in_memory(shared()).unwrap();
    one.write(1000, &[0xaa; 9000]).unwrap();
    let mut bytes = vec![0; 64 * 512];
    for disk in [&other, &Disk::read_only(shared()).unwrap()] {
        disk.read(0, &mut bytes).unwrap();
        assert_eq!(bytes[..], request_all(64));
    }
    one.read(0, &mut bytes).unwrap();
    assert_eq!(bytes[1000..10_000], [0xaa; 9000]);
}

#[test]
fn a_saved_disk_goes_on_with_a_copy_of_its_layer() {
    let (base, layer) = (base(64), tempfile::tempfile().unwrap());
    let disk = Disk::with_layer(base.try_clone().unwrap(), layer.try_clone().unwrap()).unwrap();
    let mut driver = Driver::new(Blk::new(disk, ID), 0);
    request(&mut driver, OUT, 9, &[0x77; 512], 0);
    let state = driver.device.save();
    let load = |base: &File, layer: Option<&File>| {
        let layer = layer.map(|layer| layer.try_clone().unwrap());
        Disk::load(&state.disk, base.try_clone().unwrap(), layer)
    };
    let disk = load(&base, Some(&layer)).unwrap();
    driver.device = Blk::load(&state, &driver.memory, disk, ID).unwrap();
    assert_eq!(driver.device.save(), state);
    assert_eq!(request(&mut driver, IN, 9, &[], 512), (OK, vec![0x77; 512], 513));
    assert_eq!(request(&mut driver, IN, 8, &[], 512), (OK, vec![8; 512], 513));
    // With another base, or without its layer.
    assert!(matches!(load(&self::base(63), Some(&layer)), Err(DiskError::State)));
    assert!(matches!(load(&base, None), Err(DiskError::State)));
}

#[test]
fn a_write_of_nothing_changes_nothing() {
    let mut disk = Disk::with_layer_in_memory(base(64)).unwrap();
    disk.write(512, &[]).unwrap();
    let mut read = [0; 4096];
    disk.read(0, &mut read).unwrap();
    assert_eq!(read[..], request_all(64)[..4096]);
}

#[test]
fn a_base_of_half_a_sector_is_refused() {
    let mut file = base(1);
    file.write_all(&[1]).unwrap();
    assert!(matches!(Disk::read_only(file), Err(DiskError::Size(513))));
}

/// A base that became shorter is an error of each read, not the end of the process.
#[test]
fn a_base_that_shrinks_is_an_error() {
    for use_uring in [false, true] {
        let file = base(64);
        let disk = Disk::with_layer_in_memory(file.try_clone().unwrap()).unwrap();
        let mut blk = Blk::new(disk, ID);
        if use_uring {
            blk.use_uring().unwrap();
        }
        let mut driver = Driver::new(blk, 0);
        file.set_len(512).unwrap();
        assert_eq!(request(&mut driver, IN, 0, &[], 512).0, OK);
        assert_eq!(request(&mut driver, IN, 1, &[], 512).0, IO_ERROR);
        assert_eq!(request(&mut driver, OUT, 9, &[1; 512], 0).0, IO_ERROR, "half a block");
        assert_eq!(request(&mut driver, OUT, 8, &[1; 4096], 0).0, OK, "a whole one");
        assert_eq!(request(&mut driver, IN, 8, &[], 4096), (OK, vec![1; 4096], 4097));
    }
}

proptest! {
    /// A device that does not wait does what one does that waits, also if many are under way.
    #[test]
    fn any_requests_end_alike_waited_for_or_not(
        acts in proptest::collection::vec((any::<bool>(), 0u64..70, 0usize..20), 1..40),
        turn in 1usize..4,
    ) {
        let ends = both(64).map(|mut driver| {
            let mut results = Vec::new();
            for acts in acts.chunks(turn) {
                let mut chains = Vec::new();
                for (number, &(is_write, sector, sectors)) in (1u8..).zip(acts) {
                    let data = vec![number + 100; 512 * sectors];
                    // Reads and writes at once may be done in any order: of these only writes.
                    let is_write = is_write || turn > 1;
                    let header = header(if is_write { OUT } else { IN }, sector);
                    chains.push(if is_write {
                        driver.add(0, &[&header, &data], &[1])
                    } else {
                        driver.add(0, &[&header], &[data.len(), 1])
                    });
                }
                driver.kick(0);
                finish(&mut driver);
                for _ in &chains {
                    let (head, length) = driver.used(0).unwrap();
                    let chain = chains.iter().find(|chain| chain.head == head).unwrap();
                    results.push((head, length, driver.written(chain, usize::MAX)));
                }
                driver.rewind();
            }
            results.sort();
            (results, request(&mut driver, IN, 0, &[], 64 * 512).1)
        });
        prop_assert_eq!(&ends[0], &ends[1]);
    }

    /// A disk is what a vector of bytes is.
    #[test]
    fn any_reads_and_writes_agree_with_memory(
        sectors in 1u8..100,
        acts in proptest::collection::vec((any::<bool>(), 0u64..52_000, 0u64..20_000), 1..40),
    ) {
        let mut model = request_all(sectors);
        let mut disk = Disk::with_layer_in_memory(base(sectors)).unwrap();
        for (number, (is_write, at, length)) in (1u8..).zip(acts) {
            let (at, length) = (at % (model.len() as u64 + 1), length);
            let range = at as usize..(at + length) as usize;
            let mut bytes = vec![number + 100; length as usize];
            let result = if is_write { disk.write(at, &bytes) } else { disk.read(at, &mut bytes) };
            let Some(expected) = model.get_mut(range) else {
                prop_assert!(result.is_err());
                continue;
            };
            result.unwrap();
            if is_write {
                expected.copy_from_slice(&bytes);
            }
            prop_assert_eq!(&*expected, &bytes);
        }
        let mut all = vec![0; model.len()];
        disk.read(0, &mut all).unwrap();
        prop_assert_eq!(all, model);
    }
}
