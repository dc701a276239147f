//! virtio-vsock: connections from the host.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use nix::poll::PollFlags;
use warren_vmm::devices::Device;
use warren_vmm::devices::vsock::Vsock;

use crate::driver::Driver;

const RX: usize = 0;
const TX: usize = 1;

const GUEST_PORT: u32 = 52;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;

/// The header of a packet (5.10.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Packet {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Packet {
    fn bytes(self) -> Vec<u8> {
        let mut bytes = [self.src_cid, self.dst_cid].map(u64::to_le_bytes).concat();
        bytes.extend([self.src_port, self.dst_port, self.len].map(u32::to_le_bytes).concat());
        bytes.extend([self.kind, self.op].map(u16::to_le_bytes).concat());
        bytes.extend([self.flags, self.buf_alloc, self.fwd_cnt].map(u32::to_le_bytes).concat());
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: word(28) as u16,
            op: (word(28) >> 16) as u16,
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }
}

struct Bed {
    driver: Driver<Vsock>,
    cid: u64,
    host: UnixStream,
    /// The host's port, once the guest was asked.
    port: u32,
}

impl Bed {
    /// A connection that the guest was asked for.
    fn new() -> Self {
        let mut vsock = Vsock::new();
        vsock.mmio_mut().use_interrupts();
        let mut driver = Driver::new(vsock, 0);
        let (host, stream) = UnixStream::pair().unwrap();
        for end in [&host, &stream] {
            end.set_nonblocking(true).unwrap();
        }
        let mut cid = [0; 8];
        driver.device.read(0x100, &mut cid);
        driver.device.connect(stream, GUEST_PORT);
        let mut bed = Self { driver, cid: u64::from_le_bytes(cid), host, port: 0 };
        let (packet, _) = bed.next().unwrap();
        assert_eq!((packet.op, packet.dst_port, packet.dst_cid), (REQUEST, GUEST_PORT, bed.cid));
        assert_eq!((packet.src_cid, packet.kind), (2, 1));
        bed.port = packet.src_port;
        bed
    }

    /// One that the guest accepted.
    fn established() -> Self {
        let mut bed = Self::new();
        bed.send(RESPONSE, 0, b"");
        assert_eq!(bed.host(), format!("OK {}\n", bed.port).as_bytes());
        bed
    }

    /// The next packet for the guest.
    fn next(&mut self) -> Option<(Packet, Vec<u8>)> {
        let driver = &mut self.driver;
        if driver.device.mmio().queues[RX].in_flight() == 0 && driver.used_index(RX) < u16::MAX {
            driver.add(RX, &[], &[44, 1000]);
        }
        driver.device.receive(&driver.memory).unwrap();
        let (head, length) = driver.used(RX)?;
        // Buffers are used in order, and all alike.
        let bytes = driver.buffer(RX, head, length as usize);
        Some((Packet::parse(&bytes), bytes[44..].to_vec()))
    }

    fn packet(&self, op: u16, flags: u32, data: &[u8]) -> Packet {
        Packet {
            src_cid: self.cid,
            dst_cid: 2,
            src_port: GUEST_PORT,
            dst_port: self.port,
            len: data.len() as u32,
            kind: 1,
            op,
            flags,
            buf_alloc: 5000,
            fwd_cnt: 0,
        }
    }

    fn send(&mut self, op: u16, flags: u32, data: &[u8]) {
        let packet = self.packet(op, flags, data);
        self.send_raw(packet, data);
    }

    fn send_raw(&mut self, packet: Packet, data: &[u8]) {
        let driver = &mut self.driver;
        let header = packet.bytes();
        let parts: &[&[u8]] = if data.is_empty() { &[&header] } else { &[&header, data] };
        let chain = driver.add(TX, parts, &[]);
        driver.kick(TX);
        assert_eq!(driver.used(TX), Some((chain.head, 0)));
    }

    /// What the host's end has received.
    fn host(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = self.host.read_to_end(&mut bytes);
        bytes
    }

    /// The host's end was closed.
    fn is_closed(&mut self) -> bool {
        matches!(self.host.read(&mut [0]), Ok(0))
    }
}

#[test]
fn virtio_5_10_6_bytes_go_both_ways() {
    let mut bed = Bed::established();
    bed.send(RW, 0, b"hello");
    assert_eq!(bed.host(), b"hello");
    bed.host.write_all(b"world").unwrap();
    let (packet, data) = bed.next().unwrap();
    assert_eq!((packet.op, packet.len, &data[..]), (RW, 5, &b"world"[..]));
    assert_eq!(packet.fwd_cnt, 5);
    assert!(bed.driver.interrupted());
}

#[test]
fn virtio_5_10_6_3_the_guest_gets_no_more_than_it_has_room_for() {
    let mut bed = Bed::established();
    bed.host.write_all(&[1; 8000]).unwrap();
    let mut sum = 0;
    while let Some((packet, _)) = bed.next() {
        sum += packet.len;
    }
    assert_eq!(sum, 5000, "buf_alloc");
    let mut update = bed.packet(CREDIT_UPDATE, 0, b"");
    update.fwd_cnt = 2000;
    bed.send_raw(update, b"");
    while let Some((packet, _)) = bed.next() {
        sum += packet.len;
    }
    assert_eq!(sum, 7000);
}

#[test]
fn virtio_5_10_6_4_1_what_belongs_to_no_connection_is_reset() {
    let mut bed = Bed::new();
    let mut packet = bed.packet(RW, 0, b"");
    packet.dst_port = 9;
    bed.send_raw(packet, b"");
    let (reply, _) = bed.next().unwrap();
    assert_eq!((reply.op, reply.src_port, reply.dst_port), (RST, 9, GUEST_PORT));
    // But a reset is not answered by one.
    bed.send_raw(Packet { op: RST, ..packet }, b"");
    assert_eq!(bed.next(), None);
}

#[test]
fn virtio_5_10_6_4_packets_of_another_are_not_taken() {
    let mut bed = Bed::established();
    let packet = bed.packet(RW, 0, b"x");
    for packet in [
        Packet { src_cid: 77, ..packet },
        Packet { dst_cid: 3, ..packet },
        Packet { kind: 2, ..packet },
    ] {
        bed.send_raw(packet, b"x");
        assert_eq!(bed.host(), b"");
    }
    bed.send(RW, 0, b"y");
    assert_eq!(bed.host(), b"y");
}

#[test]
fn virtio_5_10_6_5_a_shutdown_of_both_directions_ends_the_connection() {
    let mut bed = Bed::established();
    bed.send(SHUTDOWN, 1, b"");
    assert!(!bed.is_closed());
    bed.send(SHUTDOWN, 3, b"");
    assert!(bed.is_closed());
    assert_eq!(bed.next().unwrap().0.op, RST);
    // And from the host, whose end hangs up.
    let mut bed = Bed::established();
    assert_eq!(bed.next(), None);
    bed.host.shutdown(Shutdown::Both).unwrap();
    bed.driver.device.polled([PollFlags::POLLHUP].into_iter());
    let (packet, _) = bed.next().unwrap();
    assert_eq!((packet.op, packet.flags), (SHUTDOWN, 3));
    assert_eq!(bed.next(), None);
}

#[test]
fn virtio_5_10_6_5_either_side_may_end_its_own_direction_first() {
    let mut bed = Bed::established();
    bed.send(RW, 0, b"last words");
    bed.send(SHUTDOWN, 2, b"");
    assert_eq!(bed.host(), b"last words");
    assert!(bed.is_closed());
    // The other direction goes on.
    bed.host.write_all(b"answer").unwrap();
    assert_eq!(bed.next().unwrap().1, b"answer");
    bed.send(SHUTDOWN, 1, b"");
    assert_eq!(bed.next().unwrap().0.op, RST);

    let mut bed = Bed::established();
    bed.host.write_all(b"question").unwrap();
    bed.host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bed.next().unwrap().1, b"question");
    let (packet, _) = bed.next().unwrap();
    assert_eq!((packet.op, packet.flags), (SHUTDOWN, 2));
    bed.send(RW, 0, b"answer");
    assert_eq!(bed.host(), b"answer");
    // That it is gone altogether is told once.
    assert_eq!(bed.driver.device.poll_fds().count(), 1);
    bed.driver.device.polled([PollFlags::POLLHUP].into_iter());
    let (packet, _) = bed.next().unwrap();
    assert_eq!((packet.op, packet.flags), (SHUTDOWN, 3));
    assert_eq!((bed.driver.device.poll_fds().count(), bed.next()), (0, None));
}

#[test]
fn virtio_5_10_6_7_a_clone_hears_that_its_connections_are_gone() {
    const EVENT: usize = 2;
    let mut bed = Bed::established();
    let mut driver = bed.driver;
    let event = driver.add(EVENT, &[], &[8]);
    driver.put(event.place(), &[0xff; 8]);
    driver.device = Vsock::load(&driver.device.save(), &driver.memory).unwrap();
    driver.device.tell_reset(&driver.memory).unwrap();
    assert_eq!(driver.used(EVENT), Some((event.head, 4)));
    assert_eq!(driver.written(&event, 8), [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    assert!(driver.interrupted());
    // Nobody is told who does not listen.
    driver.device.tell_reset(&driver.memory).unwrap();
    assert_eq!(driver.used(EVENT), None);
    bed.driver = driver;
    assert!(bed.is_closed());
    bed.send(RW, 0, b"x");
    assert_eq!(bed.next().unwrap().0.op, RST);
}

#[test]
fn virtio_2_4_reset_ends_all_connections() {
    let mut bed = Bed::established();
    bed.driver.set(0x70, 0);
    assert!(bed.is_closed());
}
