//! virtio-net with several pairs of queues, on one TAP.

use std::collections::{BTreeSet, VecDeque};
use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;
use warren_vmm::devices::Device;
use warren_vmm::devices::limiter::{Limit, Limiter};
use warren_vmm::devices::net::{Limits, Net, NetState, PAIRS};
use warren_vmm::devices::offload::Header;

use crate::driver::{BASE, Driver, EVENT_IDX, SIZE, VERSION_1, memory};
use crate::net::tap;

const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;

const CONTROL: usize = 2 * PAIRS as usize;
const MQ_CLASS: u8 = 4;
const PAIRS_SET: u8 = 0;

fn rx(pair: u16) -> usize {
    2 * usize::from(pair)
}

fn tx(pair: u16) -> usize {
    2 * usize::from(pair) + 1
}

fn device() -> (Net, UnixDatagram) {
    let (device, host) = tap();
    let mut net = Net::multiqueue();
    net.mmio_mut().use_interrupts();
    net.attach(device);
    (net, host)
}

/// A driver that took several queues, and the host's end of its TAP.
fn driver() -> (Driver<Net>, UnixDatagram) {
    let (net, host) = device();
    (Driver::new(net, CTRL_VQ | MQ), host)
}

/// Sends a command of these bytes; returns the answer, if it came.
fn command(driver: &mut Driver<Net>, queue: usize, bytes: &[u8]) -> Option<u8> {
    // In two buffers wherever there is enough for two, as Linux does it.
    let (head, data) = bytes.split_at(bytes.len().min(2));
    let parts = [head, data];
    let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    let chain = driver.add(queue, &parts, &[1]);
    driver.kick(queue);
    let (used, written) = driver.used(queue)?;
    assert_eq!((used, written), (chain.head, 1));
    Some(driver.written(&chain, 1)[0])
}

/// Asks for so many pairs; returns whether the device agrees.
fn set_pairs(driver: &mut Driver<Net>, pairs: u16) -> bool {
    let [low, high] = pairs.to_le_bytes();
    command(driver, CONTROL, &[MQ_CLASS, PAIRS_SET, low, high]) == Some(0)
}

/// UDP over IPv4 of a flow, from the driver; to it, if `back`.
fn frame(flow: u8, back: bool) -> Vec<u8> {
    let mut frame = vec![0; 60];
    frame[12..14].copy_from_slice(&[8, 0]);
    (frame[14], frame[23]) = (0x45, 17);
    let (us, peer) = ([10, 0, 0, 1, 0x30, flow], [192, 0, 2, 7, 0, 53]);
    let (from, to) = if back { (peer, us) } else { (us, peer) };
    frame[26..30].copy_from_slice(&from[..4]);
    frame[30..34].copy_from_slice(&to[..4]);
    frame[34..36].copy_from_slice(&from[4..]);
    frame[36..38].copy_from_slice(&to[4..]);
    frame
}

fn send(driver: &mut Driver<Net>, pair: u16, frame: &[u8]) {
    driver.add(tx(pair), &[&[0; 12], frame], &[]);
    driver.kick(tx(pair));
}

fn give(host: &UnixDatagram, frame: &[u8]) {
    host.send(&[&Header::default().bytes(), frame].concat()).unwrap();
}

fn receive(driver: &mut Driver<Net>) -> bool {
    driver.device.receive(&driver.memory).unwrap()
}

/// Lets a frame come; returns the pair on which it does. The driver has a buffer on each.
fn comes_on(driver: &mut Driver<Net>, host: &UnixDatagram, frame: &[u8]) -> u16 {
    give(host, frame);
    assert!(receive(driver));
    let on: Vec<_> = (0..PAIRS).filter(|&pair| driver.used(rx(pair)).is_some()).collect();
    let [pair] = on[..] else { panic!("it came on {on:?}") };
    driver.add(rx(pair), &[], &[1600]);
    pair
}

fn with_buffers() -> (Driver<Net>, UnixDatagram) {
    let (mut driver, host) = driver();
    (0..PAIRS).for_each(|pair| drop(driver.add(rx(pair), &[], &[1600])));
    (driver, host)
}

#[test]
fn virtio_5_1_4_the_number_of_pairs_is_in_the_configuration() {
    let mut driver = Driver::reset(device().0);
    assert_eq!(driver.offered() & (CTRL_VQ | MQ), CTRL_VQ | MQ);
    let mut config = [0; 2];
    driver.device.read(0x108, &mut config);
    assert_eq!(u16::from_le_bytes(config), PAIRS);
    // A device with one pair has neither the features nor the queues.
    let mut driver = Driver::reset(Net::new());
    assert_eq!(driver.offered() & (CTRL_VQ | MQ), 0);
    driver.set(0x30, 2);
    assert_eq!(driver.register(0x34), 0);
}

#[test]
fn virtio_5_1_3_1_several_queues_need_a_control_queue() {
    assert!(!Driver::reset(device().0).negotiate(VERSION_1 | MQ));
    assert!(Driver::reset(device().0).negotiate(VERSION_1 | MQ | CTRL_VQ));
    assert!(Driver::reset(device().0).negotiate(VERSION_1 | CTRL_VQ));
}

#[test]
fn virtio_5_1_2_the_control_queue_is_the_third_of_a_driver_without_several() {
    let mut driver = Driver::new(device().0, CTRL_VQ);
    let refused = command(&mut driver, 2, &[MQ_CLASS, PAIRS_SET, 1, 0]);
    assert_eq!(refused, Some(1), "it has no pairs to set");
    assert_eq!(command(&mut driver, CONTROL, &[MQ_CLASS, PAIRS_SET, 1, 0]), None);
    // One that wants no control queue has two queues.
    let mut driver = Driver::new(device().0, 0);
    assert_eq!(command(&mut driver, 2, &[MQ_CLASS, PAIRS_SET, 1, 0]), None);
}

#[test]
fn virtio_5_1_6_5_6_1_no_pairs_and_more_than_there_are_are_refused() {
    let (mut driver, host) = with_buffers();
    for pairs in 1..=PAIRS {
        assert!(set_pairs(&mut driver, pairs));
    }
    for pairs in [0, PAIRS + 1, 0x100, 0x8000, u16::MAX] {
        assert!(!set_pairs(&mut driver, pairs), "{pairs}");
    }
    // What was set before stays.
    send(&mut driver, PAIRS - 1, &frame(1, false));
    assert_eq!(comes_on(&mut driver, &host, &frame(1, true)), PAIRS - 1);
    assert!(driver.interrupted());
}

#[test]
fn virtio_5_1_6_5_an_unknown_or_malformed_command_is_answered_with_an_error() {
    let (mut driver, host) = with_buffers();
    for class in 0..=u8::MAX {
        for number in [0, 1, 2, u8::MAX] {
            if (class, number) != (MQ_CLASS, PAIRS_SET) {
                assert_eq!(command(&mut driver, CONTROL, &[class, number, 2, 0]), Some(1));
            }
        }
        driver.rewind();
    }
    let whole = [MQ_CLASS, PAIRS_SET, 2, 0, 0, 0];
    for length in [0, 1, 2, 3, 5, 6] {
        assert_eq!(command(&mut driver, CONTROL, &whole[..length]), Some(1), "{length} bytes");
    }
    assert_eq!(comes_on(&mut driver, &host, &frame(1, true)), 0, "nothing was set");
}

#[test]
fn virtio_5_1_6_5_commands_may_lie_in_any_buffers() {
    let (mut driver, _host) = driver();
    // Byte by byte, and with more room for the answer than it takes.
    let chain = driver.add(CONTROL, &[&[4], &[0], &[2], &[0]], &[1, 7]);
    // Several at once, in the order in which they were made available.
    let other = driver.add(CONTROL, &[&[4, 0, 0, 0]], &[1]);
    driver.kick(CONTROL);
    assert_eq!(driver.used(CONTROL), Some((chain.head, 1)));
    assert_eq!(driver.used(CONTROL), Some((other.head, 1)));
    assert_eq!((driver.written(&chain, 1), driver.written(&other, 1)), (vec![0], vec![1]));
    assert!(driver.interrupted());
}

#[test]
fn virtio_5_1_6_5_descriptors_that_are_none_end_the_driver() {
    type Break = fn(&mut Driver<Net>);
    let broken: [(&str, Break); 4] = [
        ("no room for its answer", |driver| drop(driver.add(CONTROL, &[&[4, 0, 1, 0]], &[]))),
        ("broken", |driver| {
            driver.descriptor(CONTROL, 0, BASE + 0xf000, 4, 1, SIZE + 100);
            driver.offer(CONTROL, 0);
        }),
        ("out of range", |driver| driver.offer(CONTROL, SIZE + 1)),
        ("chain", |driver| {
            // In no memory.
            driver.descriptor(CONTROL, 0, 1 << 50, 4, 1, 1);
            driver.descriptor(CONTROL, 1, BASE + 0xf000, 1, 2, 0);
            driver.offer(CONTROL, 0);
        }),
    ];
    for (complaint, make) in broken {
        let (mut driver, _host) = driver();
        make(&mut driver);
        let error = driver.try_kick(CONTROL).unwrap_err().to_string();
        assert!(error.contains("net control") && error.contains(complaint), "{error}");
    }
}

#[test]
fn virtio_5_1_6_5_6_2_only_the_first_pair_is_used_until_the_driver_asks_for_more() {
    let (mut driver, host) = with_buffers();
    let first_only = |driver: &mut Driver<Net>| {
        for flow in 0..64 {
            assert_eq!(comes_on(driver, &host, &frame(flow, true)), 0);
            driver.rewind();
        }
    };
    send(&mut driver, 1, &frame(1, false));
    assert_eq!(driver.used(tx(1)), None);
    first_only(&mut driver);
    // Nor after it went back, or began anew.
    assert!(set_pairs(&mut driver, PAIRS) && set_pairs(&mut driver, 1));
    first_only(&mut driver);
    assert!(set_pairs(&mut driver, PAIRS));
    let (features, device) = (driver.device.mmio().features(), driver.device);
    let mut driver = Driver::new(device, features & !VERSION_1);
    (0..PAIRS).for_each(|pair| drop(driver.add(rx(pair), &[], &[1600])));
    first_only(&mut driver);
}

#[test]
fn virtio_5_1_6_5_6_a_flow_is_received_where_it_was_last_sent() {
    let (mut driver, host) = with_buffers();
    assert!(set_pairs(&mut driver, PAIRS));
    for round in 0..200u16 {
        let (flow, pair) = (round as u8 % 40, round % 7 % PAIRS);
        send(&mut driver, pair, &frame(flow, false));
        assert!(driver.used(tx(pair)).is_some());
        let mut sent = [0; 100];
        let length = host.recv(&mut sent).unwrap();
        assert_eq!(sent[12..length], frame(flow, false), "all pairs send to the TAP");
        assert_eq!(comes_on(&mut driver, &host, &frame(flow, true)), pair, "flow {flow}");
        driver.rewind();
    }
}

#[test]
fn virtio_5_1_6_5_6_flows_of_which_nothing_was_sent_are_spread() {
    let (mut driver, host) = with_buffers();
    assert!(set_pairs(&mut driver, PAIRS));
    let mut pairs = BTreeSet::new();
    for flow in 0..64 {
        let pair = comes_on(&mut driver, &host, &frame(flow, true));
        // Each frame of a flow's on the same.
        assert_eq!(comes_on(&mut driver, &host, &frame(flow, true)), pair);
        pairs.insert(pair);
        driver.rewind();
    }
    assert_eq!(pairs.len(), usize::from(PAIRS));
}

#[test]
fn virtio_5_1_6_5_6_2_a_frame_that_waits_for_a_pair_comes_on_another_when_that_is_given_up() {
    let (mut driver, host) = driver();
    assert!(set_pairs(&mut driver, 2));
    send(&mut driver, 1, &frame(1, false));
    driver.add(rx(0), &[], &[1600]);
    give(&host, &frame(1, true));
    assert!(!receive(&mut driver));
    // It waits for a buffer, and the TAP is not looked at meanwhile.
    assert!(driver.device.poll_fd(&driver.memory).unwrap().is_none());
    assert!(set_pairs(&mut driver, 1));
    assert!(receive(&mut driver));
    assert!(driver.used(rx(0)).is_some() && driver.used(rx(1)).is_none());
}

#[test]
fn virtio_2_7_10_the_driver_is_asked_for_buffers_of_the_pair_that_has_none() {
    let (net, host) = device();
    let mut driver = Driver::new(net, CTRL_VQ | MQ | EVENT_IDX);
    assert!(set_pairs(&mut driver, 2));
    send(&mut driver, 1, &frame(1, false));
    driver.add(rx(0), &[], &[1600]);
    for round in 1..20 {
        driver.add(rx(1), &[], &[1600]);
        give(&host, &frame(1, true));
        driver.kick(rx(1));
        assert!(driver.used(rx(1)).is_some());
        assert_eq!(driver.avail_event(rx(1)), round);
        driver.rewind();
    }
    assert!(driver.device.poll_fd(&driver.memory).unwrap().is_some(), "the other pair has one");
}

#[test]
fn what_waits_on_a_pair_that_is_given_up_is_sent_and_no_pair_waits_for_ever() {
    let (mut driver, host) = driver();
    assert!(set_pairs(&mut driver, 2));
    let limit = Limit { per_second: 100.try_into().unwrap(), burst: 1 };
    let now = std::time::Instant::now();
    let transmit = Limiter::new(None, Some(limit), now);
    driver.device.set_limits(Limits { transmit, ..Limits::default() });
    for number in 0..6 {
        driver.add(tx(0), &[&[0; 12], &frame(number, false)], &[]);
        driver.add(tx(1), &[&[0; 12], &frame(100 + number, false)], &[]);
    }
    driver.kick(tx(0));
    assert!(set_pairs(&mut driver, 1));
    let mut order = Vec::new();
    while order.len() < 12 {
        if let Some(due) = driver.device.due() {
            std::thread::sleep(due.saturating_duration_since(std::time::Instant::now()));
        }
        driver.device.serve(&driver.memory).unwrap();
        let mut sent = [0; 100];
        while host.recv(&mut sent).is_ok() {
            order.push(sent[12 + 35]);
        }
    }
    assert_eq!(driver.device.due(), None);
    let (one, other): (Vec<_>, Vec<_>) = order.iter().partition(|&&flow| flow < 100);
    assert_eq!((one, other), ((0..6).collect(), (100..106).collect()), "each once, in its order");
    assert!(order[..11].iter().any(|&flow| flow >= 100), "{order:?}");
    assert!(order.iter().position(|&flow| flow == 100) < order.iter().position(|&flow| flow == 5));
}

#[test]
fn saved_state_of_several_queues_goes_on_where_it_was() {
    let (mut driver, _host) = with_buffers();
    assert!(set_pairs(&mut driver, 3));
    send(&mut driver, 2, &frame(1, false));
    assert!(driver.used(tx(2)).is_some());
    let state = driver.device.save();
    let (tap, host) = tap();
    driver.device = Net::load(&state, &driver.memory, Some(tap)).unwrap();
    assert_eq!(driver.device.save(), state);
    let mut config = [0; 2];
    driver.device.read(0x108, &mut config);
    assert_eq!(u16::from_le_bytes(config), PAIRS);
    send(&mut driver, 2, &frame(1, false));
    assert!(driver.used(tx(2)).is_some());
    assert_eq!(comes_on(&mut driver, &host, &frame(1, true)), 2);
    assert!(!set_pairs(&mut driver, PAIRS + 1) && set_pairs(&mut driver, PAIRS));
}

#[test]
fn saved_state_with_more_pairs_than_there_are_is_refused() {
    let more = |net: &Net, pairs: u8| {
        // The pairs are the last byte.
        let mut bytes = postcard::to_allocvec(&net.save()).unwrap();
        *bytes.last_mut().unwrap() = pairs;
        let state: NetState = postcard::from_bytes(&bytes).unwrap();
        Net::load(&state, &memory(), None).err().map(|error| error.to_string())
    };
    let driver = driver().0;
    let in_its_memory = |pairs: u8| {
        let mut bytes = postcard::to_allocvec(&driver.device.save()).unwrap();
        *bytes.last_mut().unwrap() = pairs;
        let state: NetState = postcard::from_bytes(&bytes).unwrap();
        Net::load(&state, &driver.memory, None).err().map(|error| error.to_string())
    };
    assert_eq!(in_its_memory(PAIRS as u8), None);
    assert!(in_its_memory(PAIRS as u8 + 1).unwrap().contains("more pairs"));
    // Of a driver that did not ask for several.
    assert_eq!(more(&Net::new(), 1), None);
    assert!(more(&Net::new(), 2).unwrap().contains("more pairs"));
}

proptest! {
    /// Whatever frames come and go, the device steers each to a pair that is used, once.
    #[test]
    fn virtio_5_1_6_5_6_2_every_frame_comes_once_on_a_pair_in_use(
        steps in proptest::collection::vec(
            (0..3u8, 0..PAIRS, proptest::collection::vec(any::<u8>(), 1..120), any::<bool>()),
            1..60,
        ),
    ) {
        let (mut driver, host) = with_buffers();
        let (mut pairs, mut expected) = (1, VecDeque::new());
        for (what, pair, mut bytes, is_ip) in steps {
            if let (true, Some(place)) = (is_ip, bytes.get_mut(12..14)) {
                place.copy_from_slice(if pair % 2 == 0 { &[8, 0] } else { &[0x86, 0xdd] });
            }
            match what {
                0 => {
                    prop_assert!(set_pairs(&mut driver, pair + 1));
                    pairs = pair + 1;
                }
                1 => {
                    send(&mut driver, pair % pairs, &bytes);
                    prop_assert!(driver.used(tx(pair % pairs)).is_some());
                }
                _ => {
                    give(&host, &bytes);
                    expected.push_back(bytes);
                    prop_assert!(receive(&mut driver));
                    for pair in 0..PAIRS {
                        while let Some((head, length)) = driver.used(rx(pair)) {
                            prop_assert!(pair < pairs);
                            let packet = driver.buffer(rx(pair), head, length as usize);
                            prop_assert_eq!(Some(packet[12..].to_vec()), expected.pop_front());
                            driver.add(rx(pair), &[], &[1600]);
                        }
                    }
                }
            }
        }
        prop_assert!(expected.is_empty());
    }
}
