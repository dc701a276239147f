//! virtio-rng.

use std::num::NonZeroU64;
use std::time::Instant;

use warren_vmm::devices::Device;
use warren_vmm::devices::limiter::{Limit, Limiter};
use warren_vmm::devices::rng::Rng;

use crate::driver::Driver;

#[test]
fn virtio_5_4_6_2_a_buffer_gets_random_bytes() {
    let mut driver = Driver::new(Rng::new(), 0);
    let short = driver.add(0, &[], &[20, 12]);
    let long = driver.add(0, &[], &[100_000]);
    driver.kick(0);
    assert_eq!(driver.used(0), Some((short.head, 32)));
    let (head, length) = driver.used(0).unwrap();
    assert_eq!((head, length), (long.head, 256), "as much as the kernel gives at once");
    let bytes = [driver.written(&short, 32), driver.written(&long, 256)].concat();
    // Of 288 random bytes some 170 differ; of a pattern fewer.
    let mut different = bytes.clone();
    different.sort_unstable();
    different.dedup();
    assert!(different.len() > 100, "{bytes:?}");
    // Nothing else was written.
    assert!(driver.written(&long, 100_000)[256..].iter().all(|&byte| byte == 0));
    assert!(driver.interrupted());
}

#[test]
fn virtio_5_4_6_1_a_buffer_must_be_writable() {
    let mut driver = Driver::new(Rng::new(), 0);
    driver.add(0, &[&[0; 8]], &[]);
    assert_eq!(driver.try_kick(0).unwrap_err().queue, "rng requests");
}

#[test]
fn requests_over_the_limit_wait() {
    let mut rng = Rng::new();
    let limit = Limit { per_second: NonZeroU64::new(1000).unwrap(), burst: 100 };
    rng.set_limiter(Limiter::new(Some(limit), None, Instant::now()));
    let mut driver = Driver::new(rng, 0);
    for _ in 0..3 {
        driver.add(0, &[], &[64]);
    }
    driver.kick(0);
    assert_eq!(driver.used_index(0), 2);
    let due = driver.device.due().unwrap();
    std::thread::sleep(due.saturating_duration_since(Instant::now()));
    driver.device.serve(&driver.memory).unwrap();
    assert_eq!(driver.used_index(0), 3);
    assert_eq!(driver.device.due(), None);
}

#[test]
fn saved_state_goes_on_where_it_was() {
    let mut driver = Driver::new(Rng::new(), 0);
    driver.add(0, &[], &[64]);
    driver.kick(0);
    driver.device = Rng::load(&driver.device.save(), &driver.memory).unwrap();
    driver.add(0, &[], &[64]);
    driver.kick(0);
    assert_eq!(driver.used_index(0), 2);
}
