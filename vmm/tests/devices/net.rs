//! virtio-net. A pair of sockets stands for the TAP: it keeps frames apart, too.

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use proptest::prelude::*;
use warren_vmm::devices::Device;
use warren_vmm::devices::limiter::{Limit, Limiter};
use warren_vmm::devices::net::{Limits, Net};
use warren_vmm::devices::offload::{Header, from_driver, from_host, tun_offloads};

use crate::driver::{Driver, EVENT_IDX, SIZE};

pub const RX: usize = 0;
pub const TX: usize = 1;

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
pub const MRG_RXBUF: u64 = 1 << 15;
pub const ALL: u64 =
    CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6 | MRG_RXBUF;

/// Something like a TAP, and the host's end of it.
pub fn tap() -> (OwnedFd, UnixDatagram) {
    // Of these many fit in, other than of datagrams.
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (device, host) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    (device, host.into())
}

/// A driver with these features, and the host's end of its TAP.
fn driver(features: u64) -> (Driver<Net>, UnixDatagram) {
    let (device, host) = tap();
    let mut net = Net::new();
    net.mmio_mut().use_interrupts();
    net.attach(device);
    (Driver::new(net, features), host)
}

/// What the host gets next.
fn sent(host: &UnixDatagram) -> Option<(Header, Vec<u8>)> {
    let mut buffer = vec![0; 70_000];
    let length = host.recv(&mut buffer).ok()?;
    let header = Header::parse(*buffer.first_chunk().unwrap());
    Some((header, buffer[12..length].to_vec()))
}

/// TCP over this version of IP, without options; its payload is so long.
pub fn tcp(version: u8, payload: usize) -> (Header, Vec<u8>) {
    let ip = if version == 4 { 20 } else { 40 };
    let mut frame = vec![0; 14 + ip + 20 + payload];
    let (kind, first) = if version == 4 { ([8, 0], 0x45) } else { ([0x86, 0xdd], 0x60) };
    frame[12..14].copy_from_slice(&kind);
    frame[14] = first;
    frame[14 + if version == 4 { 9 } else { 6 }] = 6;
    frame[14 + ip + 12] = 5 << 4;
    let header = Header {
        flags: 1,
        gso_type: if version == 4 { 1 } else { 4 },
        header_length: (14 + ip + 20) as u16,
        gso_size: 1400,
        checksum_start: (14 + ip) as u16,
        checksum_offset: 16,
        buffers: 0,
    };
    (header, frame)
}

fn send(driver: &mut Driver<Net>, header: Header, frame: &[u8]) {
    let chain = driver.add(TX, &[&header.bytes(), frame], &[]);
    driver.kick(TX);
    assert_eq!(driver.used(TX), Some((chain.head, 0)), "dropped or not, it is used");
}

fn receive(driver: &mut Driver<Net>) -> bool {
    driver.device.receive(&driver.memory).unwrap()
}

fn give(host: &UnixDatagram, header: Header, frame: &[u8]) {
    host.send(&[&header.bytes(), frame].concat()).unwrap();
}

#[test]
fn virtio_5_1_4_the_mac_is_offered_only_when_there_is_one() {
    let mut driver = Driver::reset(Net::new());
    assert_eq!(driver.offered() & MAC, 0);
    let mut net = Net::new();
    net.set_mac([2, 3, 4, 5, 6, 7]);
    let mut driver = Driver::reset(net);
    assert_ne!(driver.offered() & MAC, 0);
    let mut config = [0; 8];
    driver.device.read(0x100, &mut config);
    assert_eq!(config, [2, 3, 4, 5, 6, 7, 1, 0]);
    // Byte by byte, and beyond its end.
    let mut byte = [9];
    driver.device.read(0x101, &mut byte);
    assert_eq!(byte, [3]);
    driver.device.read(0x108, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn virtio_5_1_6_2_a_frame_goes_out_with_a_header_of_zeroes() {
    let (mut driver, host) = driver(0);
    let strange = Header::parse([0xff; 12]);
    send(&mut driver, strange, &[7; 100]);
    assert_eq!(sent(&host), Some((Header::default(), vec![7; 100])));
    // What no Ethernet carries is dropped.
    send(&mut driver, Header::default(), &[7; 1519]);
    assert_eq!(sent(&host), None);
}

#[test]
fn virtio_5_1_6_2_1_checksum_fields_must_lie_in_the_frame() {
    let (mut driver, host) = driver(CSUM);
    let header = Header { flags: 1, checksum_start: 34, checksum_offset: 6, ..Header::default() };
    send(&mut driver, header, &[7; 60]);
    assert_eq!(sent(&host), Some((header, vec![7; 60])));
    send(&mut driver, header, &[7; 42]);
    assert_eq!(sent(&host), Some((header, vec![7; 42])));
    send(&mut driver, header, &[7; 41]);
    assert_eq!(sent(&host), None);
    // Bits that are nobody's, and what belongs to no flag, do not pass.
    let strange = Header { flags: 0xfe, ..header };
    send(&mut driver, strange, &[7; 60]);
    assert_eq!(sent(&host), Some((Header::default(), vec![7; 60])));
}

#[test]
fn virtio_5_1_6_2_1_long_segments_pass_as_negotiated() {
    for (version, feature) in [(4, HOST_TSO4), (6, HOST_TSO6)] {
        let (header, frame) = tcp(version, 60_000);
        let (mut with, host) = driver(CSUM | feature);
        send(&mut with, header, &frame);
        assert_eq!(sent(&host), Some((header, frame.clone())));
        let (mut without, host) = driver(CSUM | (HOST_TSO4 | HOST_TSO6) & !feature);
        send(&mut without, header, &frame);
        assert_eq!(sent(&host), None);
    }
}

#[test]
fn virtio_5_1_6_2_1_segmentation_that_is_untrue_of_the_frame_is_dropped() {
    let (header, frame) = tcp(4, 3000);
    let all = CSUM | HOST_TSO4 | HOST_TSO6;
    assert_eq!(from_driver(header, &frame, all), Some(header));
    let wrong = [
        Header { flags: 0, ..header },
        Header { gso_size: 0, ..header },
        Header { gso_type: 4, ..header },
        Header { gso_type: 3, ..header },
        Header { gso_type: 0x81, ..header },
        Header { checksum_offset: 6, ..header },
        Header { checksum_start: 35, ..header },
        Header { checksum_start: u16::MAX, ..header },
    ];
    for header in wrong {
        assert_eq!(from_driver(header, &frame, all), None, "{header:?}");
    }
    let mut udp = frame.clone();
    udp[23] = 17;
    assert_eq!(from_driver(header, &udp, all), None);
    // The driver's length of headers is not taken.
    let lies = Header { header_length: 9999, ..header };
    assert_eq!(from_driver(lies, &frame, all), Some(header));
}

proptest! {
    /// Whatever a driver writes, the host gets what was negotiated and lies in the frame.
    #[test]
    fn virtio_5_1_6_2_no_header_asks_for_more_than_was_negotiated(
        bytes: [u8; 12],
        kind in 0u8..6,
        start in 0u16..80,
        frame in proptest::collection::vec(any::<u8>(), 1..200),
        version in 0usize..3,
        features: u64,
    ) {
        let mut header = Header::parse(bytes);
        (header.gso_type, header.checksum_start) = (kind, start);
        header.checksum_offset %= 20;
        let mut frame = frame;
        if let (Some(place), Some(kind)) =
            (frame.get_mut(12..14), [[8, 0], [0x86, 0xdd]].get(version))
        {
            place.copy_from_slice(kind);
        }
        let Some(passed) = from_driver(header, &frame, features) else { return Ok(()) };
        prop_assert_eq!(Header::parse(passed.bytes()), passed);
        prop_assert!(passed.flags == 0 || features & CSUM != 0);
        prop_assert!(passed.flags <= 1);
        match passed.gso_type {
            0 => {}
            1 => prop_assert!(features & HOST_TSO4 != 0),
            4 => prop_assert!(features & HOST_TSO6 != 0),
            _ => prop_assert!(false),
        }
        if passed.flags == 1 {
            let place = usize::from(passed.checksum_start) + usize::from(passed.checksum_offset);
            prop_assert!(place + 2 <= frame.len());
        }
        prop_assert!(usize::from(passed.header_length) <= frame.len());
        prop_assert_eq!(passed.gso_size > 0, passed.gso_type != 0);
    }
}

#[test]
fn virtio_5_1_6_3_one_buffer_holds_a_frame() {
    let (mut driver, host) = driver(0);
    give(&host, Header::default(), &[5; 1000]);
    assert!(!receive(&mut driver), "there is no buffer");
    let chain = driver.add(RX, &[], &[12, 1600]);
    assert!(receive(&mut driver));
    assert_eq!(driver.used(RX), Some((chain.head, 1012)));
    let packet = driver.written(&chain, 1012);
    // num_buffers is 1 (5.1.6.4.1).
    assert_eq!(packet[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(packet[12..], [5; 1000]);
    assert!(driver.interrupted());
    // A frame that no Ethernet carries does not come through, the next one does.
    give(&host, Header::default(), &[5; 1600]);
    give(&host, Header::default(), &[6; 60]);
    driver.add(RX, &[], &[1600]);
    assert!(receive(&mut driver));
    assert_eq!(driver.used(RX).unwrap().1, 72);
}

#[test]
fn virtio_2_7_10_the_driver_is_asked_for_buffers_when_all_are_used() {
    let (mut driver, host) = driver(EVENT_IDX);
    for round in 1..10 {
        for _ in 0..SIZE {
            driver.add(RX, &[], &[100]);
            give(&host, Header::default(), &[6; 60]);
        }
        driver.kick(RX);
        assert_eq!(driver.used_index(RX), round * SIZE);
        assert_eq!(driver.avail_event(RX), round * SIZE);
        assert!(driver.device.poll_fd(&driver.memory).unwrap().is_none());
    }
}

#[test]
fn virtio_5_1_6_3_1_a_buffer_shorter_than_a_frame_is_an_error() {
    let (mut driver, host) = driver(0);
    driver.add(RX, &[], &[500]);
    give(&host, Header::default(), &[5; 1000]);
    let error = driver.device.receive(&driver.memory).unwrap_err();
    assert_eq!(error.queue, "net rx");
}

#[test]
fn virtio_5_1_6_4_1_a_frame_fills_several_buffers_at_once() {
    let (mut driver, host) = driver(MRG_RXBUF);
    let frame: Vec<u8> = (0..1500).map(|byte| byte as u8).collect();
    give(&host, Header::default(), &frame);
    // Not enough: nothing is used, and the frame waits.
    let first = driver.add(RX, &[], &[512]);
    let second = driver.add(RX, &[], &[500, 12]);
    assert!(!receive(&mut driver));
    assert_eq!(driver.used(RX), None);
    assert!(driver.device.poll_fd(&driver.memory).unwrap().is_none(), "the driver is waited for");
    // Whatever is sent meanwhile.
    send(&mut driver, Header::default(), &[9; 1500]);
    let third = driver.add(RX, &[], &[512]);
    driver.kick(RX);
    let used = [first, second, third].map(|chain| {
        let (head, length) = driver.used(RX).unwrap();
        assert_eq!(head, chain.head);
        driver.written(&chain, length as usize)
    });
    assert_eq!(used.each_ref().map(Vec::len), [512, 512, 488]);
    let packet = used.concat();
    assert_eq!(packet[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    assert_eq!(packet[12..], frame);
    // Polling goes on when there is a buffer.
    assert!(driver.device.poll_fd(&driver.memory).unwrap().is_none());
    driver.add(RX, &[], &[512]);
    assert!(driver.device.poll_fd(&driver.memory).unwrap().is_some());
}

proptest! {
    /// Frames of any lengths through buffers of any lengths: what comes out is what went in.
    #[test]
    fn virtio_5_1_6_4_frames_survive_any_buffers(
        frames in proptest::collection::vec(1usize..1518, 1..6),
        buffers in proptest::collection::vec(12usize..3000, 1..12),
    ) {
        let (mut driver, host) = driver(MRG_RXBUF);
        for (number, &length) in frames.iter().enumerate() {
            give(&host, Header::default(), &vec![number as u8 + 1; length]);
        }
        let mut chains = Vec::new();
        let mut lengths = buffers.iter().cycle();
        let mut packets: Vec<Vec<u8>> = Vec::new();
        let mut missing = 0;
        // Each turn the driver adds one buffer.
        for _ in 0..1000 {
            if packets.len() == frames.len() && missing == 0 {
                break;
            }
            // A driver has no more buffers out than descriptors.
            if driver.device.mmio().queues[RX].in_flight() == 0 {
                chains.push(driver.add(RX, &[], &[*lengths.next().unwrap()]));
            }
            receive(&mut driver);
            while let Some((head, length)) = driver.used(RX) {
                let chain = chains.remove(0);
                prop_assert_eq!(chain.head, head);
                let part = driver.written(&chain, length as usize);
                if missing == 0 {
                    missing = u16::from_le_bytes([part[10], part[11]]);
                    packets.push(part[12..].to_vec());
                } else {
                    packets.last_mut().unwrap().extend(part);
                }
                missing -= 1;
            }
            if chains.len() == usize::from(SIZE) {
                break;
            }
        }
        for (number, packet) in packets.iter().enumerate() {
            prop_assert_eq!(packet, &vec![number as u8 + 1; frames[number]]);
        }
        prop_assert_eq!(missing, 0);
    }
}

#[test]
fn virtio_5_1_6_4_1_what_the_driver_did_not_ask_for_is_dropped() {
    let (header, frame) = tcp(4, 1000);
    let tso = GUEST_CSUM | GUEST_TSO4;
    assert_eq!(from_host(header, frame.len(), tso), Some(header));
    assert_eq!(from_host(header, frame.len(), GUEST_CSUM), None);
    assert_eq!(from_host(header, frame.len(), 0), None);
    let plain = Header { gso_type: 0, ..header };
    assert_eq!(from_host(plain, frame.len(), 0), None, "its checksum is not there");
    assert_eq!(from_host(plain, frame.len(), GUEST_CSUM), Some(plain));
    // A checksum that is known to be right is no matter to who computes it anyhow.
    let valid = Header { flags: 2, ..Header::default() };
    assert_eq!(from_host(valid, frame.len(), 0), Some(Header::default()));
    assert_eq!(from_host(valid, frame.len(), GUEST_CSUM), Some(valid));
    assert_eq!([0, GUEST_CSUM, tso, ALL].map(tun_offloads), [0, 1, 3, 7]);
}

/// This TAP takes no offloads: the device goes on without.
#[test]
fn virtio_2_2_a_feature_need_not_be_used() {
    let (mut driver, host) = driver(ALL);
    driver.add(RX, &[], &[1600]);
    give(&host, Header::default(), &[6; 60]);
    assert!(receive(&mut driver));
    assert_eq!(driver.used(RX).unwrap().1, 72);
    let (header, frame) = tcp(4, 60_000);
    send(&mut driver, header, &frame);
    assert_eq!(sent(&host), Some((header, frame)));
}

#[test]
fn frames_over_the_limit_wait_in_their_queues() {
    let (mut driver, host) = driver(0);
    let limit =
        |per_second, burst| Some(Limit { per_second: NonZeroU64::new(per_second).unwrap(), burst });
    let now = Instant::now();
    let limiter = Limiter::new(None, limit(10, 2), now);
    driver.device.set_limits(Limits { receive: limiter, transmit: limiter });
    for _ in 0..4 {
        driver.add(TX, &[&[0; 12], &[0; 60]], &[]);
        driver.add(RX, &[], &[1600]);
        give(&host, Header::default(), &[6; 60]);
    }
    driver.kick(TX);
    receive(&mut driver);
    assert_eq!((driver.used_index(TX), driver.used_index(RX)), (2, 2));
    assert!(driver.device.poll_fd(&driver.memory).unwrap().is_none(), "no busy loop");
    let due = driver.device.due().unwrap();
    assert!(due > now && due <= Instant::now() + Duration::from_millis(100));
    std::thread::sleep(due - Instant::now());
    driver.device.serve(&driver.memory).unwrap();
    assert!(driver.used_index(TX) >= 3 && driver.used_index(RX) >= 3);
    assert!(driver.used_index(TX) < 4, "one more each 100 ms");
}
