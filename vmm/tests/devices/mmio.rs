//! Registers, negotiation and queues, on the network device.

use std::time::Instant;

use warren_vmm::devices::Device;
use warren_vmm::devices::mmio::{Kind, Mmio, MmioState, QueueKind};
use warren_vmm::devices::net::{self, Net};

use crate::driver::{BASE, Driver, EVENT_IDX, SIZE, VERSION_1, memory};

const RX: usize = 0;
const TX: usize = 1;

/// A frame that is sent to nowhere.
const FRAME: &[&[u8]] = &[&[0; 12], &[0; 60]];

fn with_interrupts() -> Net {
    let mut net = Net::new();
    net.mmio_mut().use_interrupts();
    net
}

#[test]
fn virtio_4_2_2_registers_say_what_the_device_is() {
    let driver = Driver::reset(Net::new());
    let id = [0, 4, 8, 0xc].map(|offset| driver.register(offset));
    assert_eq!(id, [0x7472_6976, 2, 1, u32::from_le_bytes(*b"WRRN")]);
    // No shared memory region: its length is all ones.
    assert_eq!((driver.register(0xb0), driver.register(0xb4)), (u32::MAX, u32::MAX));
}

#[test]
fn virtio_2_2_1_a_driver_that_takes_what_was_not_offered_is_refused() {
    for feature in (0..64).map(|bit| 1 << bit) {
        let mut driver = Driver::reset(Net::new());
        let is_offered = driver.offered() & feature != 0;
        // Dependencies of the network's features are satisfied.
        let agreed = driver.negotiate(VERSION_1 | 3 | feature);
        assert_eq!(agreed, is_offered, "{feature:#x}");
    }
}

#[test]
fn virtio_6_1_a_driver_without_version_1_is_refused() {
    let mut driver = Driver::reset(Net::new());
    assert!(!driver.negotiate(0));
    driver.set(0x70, 15);
    assert_eq!(driver.register(0x70) & 4, 0, "and cannot begin");
}

#[test]
fn virtio_5_1_3_1_segmentation_needs_checksums() {
    for (feature, required) in [(1 << 7, 2), (1 << 8, 2), (1 << 11, 1), (1 << 12, 1)] {
        assert!(!Driver::reset(Net::new()).negotiate(VERSION_1 | feature));
        assert!(Driver::reset(Net::new()).negotiate(VERSION_1 | feature | required));
    }
}

#[test]
fn virtio_2_2_features_cannot_be_changed_after_features_ok() {
    let mut driver = Driver::new(Net::new(), 0);
    driver.negotiate(VERSION_1 | 1);
    assert_eq!(driver.device.mmio().features(), VERSION_1);
    driver.set(0x70, 0);
    assert_eq!(driver.device.mmio().features(), 0);
    driver.negotiate(VERSION_1 | 1);
    assert_eq!(driver.device.mmio().features(), VERSION_1 | 1);
}

#[test]
fn virtio_2_1_2_nothing_is_consumed_before_driver_ok() {
    let mut driver = Driver::reset(Net::new());
    driver.negotiate(VERSION_1);
    driver.set_up_queues();
    driver.add(TX, FRAME, &[]);
    driver.kick(TX);
    assert_eq!(driver.used(TX), None);
    assert!(!driver.interrupted());
    driver.set(0x70, 15);
    driver.kick(TX);
    assert!(driver.used(TX).is_some());
}

#[test]
fn virtio_4_2_2_2_a_ready_queue_cannot_be_moved() {
    let mut driver = Driver::new(Net::new(), 0);
    driver.set(0x30, TX as u32);
    for register in [0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
        driver.set(register, 0xfff0_0000);
    }
    driver.set(0x38, 2);
    let chain = driver.add(TX, FRAME, &[]);
    driver.kick(TX);
    assert_eq!(driver.used(TX), Some((chain.head, 0)));
}

#[test]
fn virtio_4_2_2_2_interrupt_status_stays_until_it_is_acknowledged() {
    let mut driver = Driver::new(with_interrupts(), 0);
    assert_eq!(driver.register(0x60), 0);
    driver.add(TX, FRAME, &[]);
    driver.kick(TX);
    assert!(driver.interrupted());
    assert!(!driver.interrupted(), "once for each use");
    assert_eq!(driver.register(0x60), 1);
    driver.set(0x64, 2);
    assert_eq!(driver.register(0x60), 1);
    driver.set(0x64, 1);
    assert_eq!(driver.register(0x60), 0);
}

#[test]
fn virtio_2_7_7_2_no_interrupt_for_a_driver_that_declines_it() {
    let mut driver = Driver::new(with_interrupts(), 0);
    driver.set_flags(TX, 1);
    driver.add(TX, FRAME, &[]);
    driver.kick(TX);
    assert!(!driver.interrupted());
    assert_eq!(driver.register(0x60), 0);
    // Wanting it later is no wish for what was used before.
    driver.set_flags(TX, 0);
    assert!(!driver.interrupted());
    driver.add(TX, FRAME, &[]);
    driver.kick(TX);
    assert!(driver.interrupted());
}

#[test]
fn virtio_2_7_7_2_interrupt_when_the_used_event_is_passed() {
    let mut driver = Driver::new(with_interrupts(), EVENT_IDX);
    driver.set_used_event(TX, 2);
    for expected in [false, false, true, false] {
        driver.add(TX, FRAME, &[]);
        driver.kick(TX);
        assert_eq!(driver.interrupted(), expected);
    }
    // Several at once.
    driver.set_used_event(TX, 5);
    for _ in 0..4 {
        driver.add(TX, FRAME, &[]);
    }
    driver.kick(TX);
    assert!(driver.interrupted());
}

#[test]
fn virtio_2_7_10_the_device_asks_for_notification_of_the_next_buffer() {
    let mut driver = Driver::new(with_interrupts(), EVENT_IDX);
    for next in 1..40 {
        driver.add(TX, FRAME, &[]);
        driver.kick(TX);
        assert_eq!(driver.avail_event(TX), next);
        driver.set(0x64, 1);
    }
}

#[test]
fn virtio_2_7_6_indices_wrap() {
    for features in [0, EVENT_IDX] {
        let mut driver = Driver::new(with_interrupts(), features);
        let frame = driver.allocate(72);
        driver.descriptor(TX, 0, frame, 72, 0, 0);
        for number in 0..70_000u32 {
            driver.set_used_event(TX, number as u16);
            driver.offer(TX, 0);
            driver.kick(TX);
            assert_eq!(driver.used(TX), Some((0, 0)));
            assert!(driver.interrupted(), "{number}");
        }
    }
}

#[test]
fn virtio_2_7_10_a_driver_that_polls_is_told_not_to_notify() {
    let driver = Driver::new(Net::new(), 0);
    assert_eq!([driver.used_flags(RX), driver.used_flags(TX)], [1, 1]);
    let driver = Driver::new(with_interrupts(), 0);
    assert_eq!([driver.used_flags(RX), driver.used_flags(TX)], [0, 0]);
}

#[test]
fn virtio_2_7_13_3_nothing_is_read_beyond_the_available_index() {
    let mut driver = Driver::new(Net::new(), 0);
    driver.kick(TX);
    driver.kick(RX);
    assert_eq!((driver.used_index(TX), driver.used_index(RX)), (0, 0));
}

/// A driver that always has more gets no more than its queue's size at a time.
#[test]
fn virtio_2_7_13_work_is_done_in_turns() {
    let mut driver = Driver::new(with_interrupts(), 0);
    // The ring's index is far ahead: more than the queue holds is an error of the driver's.
    for _ in 0..SIZE {
        driver.offer(TX, 0);
    }
    driver.descriptor(TX, 0, BASE + 0x8000, 72, 0, 0);
    driver.kick(TX);
    assert_eq!(driver.used_index(TX), SIZE);
    assert_eq!(driver.device.due(), None);
    for _ in 0..=SIZE {
        driver.offer(TX, 0);
    }
    let error = driver.try_kick(TX).unwrap_err();
    assert_eq!(error.queue, "net tx");
}

/// The used ring lies over the available ring: what the device writes makes more available.
#[test]
fn virtio_2_7_13_rings_that_overlap_end_in_a_backlog_not_in_a_loop() {
    let mut driver = Driver::reset(with_interrupts());
    driver.negotiate(VERSION_1);
    driver.set(0x30, TX as u32);
    driver.set(0x38, 1);
    // With one descriptor each used element is written to the same place: over the index of the
    // available ring, which becomes the length written, or the head. It never says that it is over.
    for (register, place) in [(0x80, 0x1000), (0x90, 0x1400), (0xa0, 0x1400)] {
        driver.set(register, (BASE + place) as u32);
    }
    driver.set(0x44, 1);
    driver.set(0x70, 15);
    driver.put(BASE + 0x1000, &(BASE + 0x8000).to_le_bytes());
    driver.put(BASE + 0x1008, &72u32.to_le_bytes());
    driver.put(BASE + 0x1402, &1u16.to_le_bytes());
    let begin = Instant::now();
    let _ = driver.try_kick(TX);
    assert!(begin.elapsed().as_secs() < 5);
}

#[test]
fn virtio_2_7_5_3_1_a_chain_is_not_longer_than_the_queue() {
    const INDIRECT: u16 = 4;
    let mut driver = Driver::new(with_interrupts(), 1 << 28);
    let table = driver.allocate(16 * (usize::from(SIZE) + 1));
    let buffer = driver.allocate(2048);
    for slot in 0..=u64::from(SIZE) {
        let more = u16::from(slot < u64::from(SIZE));
        driver.put(table + 16 * slot, &buffer.to_le_bytes());
        driver.put(table + 16 * slot + 8, &60u32.to_le_bytes());
        driver.put(table + 16 * slot + 12, &more.to_le_bytes());
        driver.put(table + 16 * slot + 14, &(slot as u16 + 1).to_le_bytes());
    }
    driver.descriptor(TX, 0, table + 16, 16 * u32::from(SIZE), INDIRECT, 0);
    // One less, and its indices are off by one: it breaks at its end.
    driver.offer(TX, 0);
    driver.try_kick(TX).unwrap_err();

    let mut driver = Driver::new(with_interrupts(), 1 << 28);
    let table = driver.allocate(16 * (usize::from(SIZE) + 1));
    for slot in 0..=u64::from(SIZE) {
        driver.put(table + 16 * slot, &(table).to_le_bytes());
        driver.put(table + 16 * slot + 8, &60u32.to_le_bytes());
        driver.put(table + 16 * slot + 12, &u16::from(slot < u64::from(SIZE)).to_le_bytes());
        driver.put(table + 16 * slot + 14, &(slot as u16 + 1).to_le_bytes());
    }
    driver.descriptor(TX, 0, table, 16 * (u32::from(SIZE) + 1), INDIRECT, 0);
    driver.offer(TX, 0);
    let error = driver.try_kick(TX).unwrap_err().to_string();
    assert!(error.contains("longer than the queue"), "{error}");
}

#[test]
fn saved_state_goes_on_where_it_was() {
    let mut driver = Driver::new(with_interrupts(), EVENT_IDX | 3);
    driver.set_used_event(TX, 0);
    let first = driver.add(TX, FRAME, &[]);
    driver.kick(TX);
    assert_eq!(driver.used(TX), Some((first.head, 0)));
    assert!(driver.interrupted());
    let state = driver.device.save();
    let (tap, _host) = crate::net::tap();
    driver.device = Net::load(&state, &driver.memory, Some(tap)).unwrap();
    assert_eq!(driver.device.save(), state);
    assert_eq!((driver.register(0x60), driver.register(0x70)), (1, 15));
    assert!(!driver.interrupted());
    let second = driver.add(TX, FRAME, &[]);
    driver.kick(TX);
    assert_eq!(driver.used(TX), Some((second.head, 0)));
    assert_eq!(driver.used(TX), None);
}

#[test]
fn state_of_another_device_or_of_unknown_features_is_refused() {
    static OTHER: Kind = Kind {
        id: 1,
        features: 1 << 40,
        optional: 0,
        requires: &[],
        queues: &[
            QueueKind { name: "other", size: 16, notify: true },
            QueueKind { name: "other", size: 16, notify: true },
        ],
    };
    static FEWER: Kind = Kind {
        id: 1,
        features: 0,
        optional: 0,
        requires: &[],
        queues: &[QueueKind { name: "fewer", size: 16, notify: true }],
    };
    let refused = |state: MmioState| Mmio::load(&net::KIND, &state, &memory()).err().unwrap();
    assert!(refused(Mmio::new(&OTHER).save()).to_string().contains("other features"));
    assert!(refused(Mmio::new(&FEWER).save()).to_string().contains("other queues"));
    // Rings that are not in this memory.
    let driver = Driver::new(Net::new(), 0);
    let state = driver.device.save();
    let elsewhere =
        vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 0x10_0000)])
            .unwrap();
    assert!(Net::load(&state, &elsewhere, None).is_err());
}
