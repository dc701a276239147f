//! virtio-console.

use std::num::NonZeroU64;
use std::time::Instant;

use warren_vmm::devices::console::{Console, INPUT_MAX, OUTPUT_MAX};
use warren_vmm::devices::limiter::{Limit, Limiter};

use crate::driver::Driver;

const RX: usize = 0;
const TX: usize = 1;

#[test]
fn virtio_5_3_6_output_arrives_in_order() {
    let mut driver = Driver::new(Console::new(), 0);
    let first = driver.add(TX, &[b"hello, ", b"world"], &[]);
    let second = driver.add(TX, &[b"\n\0\xff"], &[]);
    driver.kick(TX);
    assert_eq!([driver.used(TX), driver.used(TX)], [Some((first.head, 0)), Some((second.head, 0))]);
    let output = driver.device.take_output();
    assert_eq!((&output.bytes[..], output.lost), (&b"hello, world\n\0\xff"[..], 0));
    assert_eq!(driver.device.take_output().bytes, b"");
}

#[test]
fn virtio_5_3_6_input_waits_for_buffers() {
    let mut driver = Driver::new(Console::new(), 0);
    assert_eq!(driver.device.input(b"reboot\n"), 7);
    driver.device.receive(&driver.memory).unwrap();
    assert_eq!(driver.used(RX), None);
    let short = driver.add(RX, &[], &[4]);
    driver.kick(RX);
    assert_eq!(driver.used(RX), Some((short.head, 4)));
    let long = driver.add(RX, &[], &[2, 100]);
    driver.kick(RX);
    assert_eq!(driver.used(RX), Some((long.head, 3)));
    assert_eq!([driver.written(&short, 4), driver.written(&long, 3)].concat(), b"reboot\n");
    assert_eq!(driver.device.input(&[0; 2 * INPUT_MAX]), INPUT_MAX);
    assert_eq!(driver.device.input(b"x"), 0);
}

/// Linux' driver spins until its output was taken.
#[test]
fn output_never_waits_and_what_is_lost_is_counted() {
    let mut driver = Driver::new(Console::new(), 0);
    for turn in 1..=3u64 {
        driver.add(TX, &[&vec![b'a'; 40_000]], &[]);
        driver.kick(TX);
        assert_eq!(u64::from(driver.used_index(TX)), turn);
    }
    let output = driver.device.take_output();
    assert_eq!((output.bytes.len(), output.lost), (OUTPUT_MAX, 120_000 - OUTPUT_MAX as u64));

    let limit = Limit { per_second: NonZeroU64::new(1).unwrap(), burst: 10 };
    driver.device.set_limiter(Limiter::new(Some(limit), None, Instant::now()));
    for _ in 0..3 {
        driver.add(TX, &[b"0123456789"], &[]);
    }
    driver.kick(TX);
    let output = driver.device.take_output();
    assert_eq!((&output.bytes[..], output.lost), (&b"0123456789"[..], 20));
}

#[test]
fn saved_state_goes_on_where_it_was() {
    let mut driver = Driver::new(Console::new(), 0);
    driver.add(TX, &[b"before"], &[]);
    driver.kick(TX);
    driver.device = Console::load(&driver.device.save(), &driver.memory).unwrap();
    driver.add(TX, &[b"after"], &[]);
    driver.kick(TX);
    assert_eq!(driver.device.take_output().bytes, b"after");
}
