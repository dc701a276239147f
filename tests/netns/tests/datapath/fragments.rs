//! Fragments, in and out of order, both ways (RFC 4787, REQ-13 and REQ-14).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;

use etherparse::PacketBuilder;
use tokio::sync::oneshot;
use warren_dataplane::datapath::DropReason;
use warren_dataplane::fragments::Fragments;
use warren_netns::capture::Capture;
use warren_netns::netns::Namespace;
use warren_netns::servers::{udp, udp_echo};
use warren_netns::topology::{SERVER, SHARED};

use crate::bed::{Bed, VNI_A, eventually};
use crate::guest::{KernelGuest, PATIENCE, RawGuest, SILENCE, frame};
use crate::icmp::checksum;

const PORT: u16 = 7000;

/// The daemons' part.
pub struct Daemon {
    running: Vec<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Daemon {
    /// Of the host and of the proxy.
    pub fn start(bed: &Bed) -> Self {
        let (host, proxy) = (bed.host(), bed.proxy());
        let running = [
            (&bed.topology.host, host.fragments_device(), host.mtu()),
            (&bed.topology.proxy, proxy.fragments_device(), proxy.mtu()),
        ]
        .map(|(namespace, device, mtu)| run(namespace, device, mtu));
        Self { running: running.into() }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        for (stop, thread) in self.running.drain(..) {
            stop.send(()).ok();
            thread.join().expect("it does not panic");
        }
    }
}

fn run(namespace: &Namespace, device: &str, mtu: u16) -> (oneshot::Sender<()>, JoinHandle<()>) {
    let (stop, stopped) = oneshot::channel();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let name = device.to_owned();
    let thread = namespace.spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime can be made").block_on(async {
            let fragments = Fragments::open(&name, mtu).expect("the device opens");
            ready.send(()).expect("the test waits");
            tokio::select! { () = fragments.run() => {}, _ = stopped => {} }
        });
    });
    is_ready.recv().expect("the device opens");
    // As after `open_tap`: the device sends when the link watch ran.
    namespace.ip(&format!("link show {device}")).expect("it is there");
    (stop, thread)
}

/// What a frame's IP packet is divided into, each of at most `size` bytes of payload.
fn divided(frame: &[u8], id: u16, size: usize) -> Vec<Vec<u8>> {
    let payload = &frame[34..];
    let mut parts = Vec::new();
    for (index, part) in payload.chunks(size).enumerate() {
        let more = (index + 1) * size < payload.len();
        parts.push(piece(frame, id, index * size, more, part));
    }
    parts
}

/// A fragment with the headers of a frame.
fn piece(frame: &[u8], id: u16, offset: usize, more: bool, payload: &[u8]) -> Vec<u8> {
    let mut bytes = frame[..34].to_vec();
    bytes[16..18].copy_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    bytes[18..20].copy_from_slice(&id.to_be_bytes());
    let fragment = (offset / 8) as u16 | if more { 0x2000 } else { 0 };
    bytes[20..22].copy_from_slice(&fragment.to_be_bytes());
    bytes[24..26].fill(0);
    let sum = checksum(&bytes[14..34]);
    bytes[24..26].copy_from_slice(&sum.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

pub fn payload(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|index| (index as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn guest(bed: &Bed, slot: u32) -> RawGuest {
    bed.host().attach(slot, VNI_A).expect("the slot is free");
    RawGuest::open(bed, slot)
}

fn server(bed: &Bed) -> UdpSocket {
    let server = udp(&bed.topology.vpcs[0], PORT).expect("the port is free");
    server.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    server
}

/// The next datagram, and where it came from.
fn received(server: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 65536];
    let (length, from) = server.recv_from(&mut buffer).expect("it arrives, whole");
    buffer.truncate(length);
    (buffer, from)
}

/// Large datagrams from a guest's kernel to a server, which sends them back. The guest's kernel
/// makes fragments that fit, the server's some that do not.
pub fn large_datagrams(guest: &KernelGuest, server: impl Into<SocketAddr>) {
    let server = server.into();
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    guest.namespace.run(|| {
        let socket = UdpSocket::bind((any, 0)).expect("there is a port");
        socket.set_read_timeout(Some(PATIENCE / 5)).expect("it is not zero");
        socket.connect(server).expect("there is a route");
        // What the server sends in one piece must not be divided: it learns the path's MTU first.
        for length in [4000, 9001, 30_000, 1423, 1480] {
            let sent = payload(length, length as u8);
            let mut buffer = vec![0; 65536];
            let mut received = Err(std::io::ErrorKind::TimedOut.into());
            for _ in 0..3 {
                // A path's MTU that was learned just now is told by an error.
                socket.send(&sent).ok();
                received = socket.recv(&mut buffer);
                if received.is_ok() {
                    break;
                }
            }
            let length = received.expect("it comes back, whole");
            assert!(buffer[..length] == sent, "{length}");
        }
    });
}

#[test]
fn large_datagrams_go_both_ways_between_kernels() {
    let bed = Bed::new();
    let _daemon = Daemon::start(&bed);
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let _echo = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    large_datagrams(&guest, (SERVER, PORT));
}

#[test]
fn a_guest_s_fragments_pass_in_order_without_the_daemon_and_in_any_order_with_it() {
    let bed = Bed::new();
    let (guest, server) = (guest(&bed, 1), server(&bed));
    let sent = payload(4000, 1);
    let whole = frame(guest.packet(SERVER, 64).udp(1000, PORT), &sent);
    for part in divided(&whole, 1, 1408) {
        guest.send(&part);
    }
    let (got, first) = received(&server);
    assert!(got == sent);
    let _daemon = Daemon::start(&bed);
    for (id, order) in [(2, [2, 1, 0]), (3, [1, 0, 2]), (4, [0, 2, 1]), (2, [2, 0, 1])] {
        let parts = divided(&whole, id, 1408);
        for index in order {
            guest.send(&parts[index]);
        }
        let (got, from) = received(&server);
        assert!(got == sent, "{order:?}");
        assert_eq!(from, first, "a fragment has its flow's port");
    }
    assert_eq!(bed.host().drops().expect("counters can be read"), []);
    assert_eq!(bed.proxy().drops().expect("counters can be read"), []);
}

#[test]
fn a_vpc_s_fragments_reach_the_guest_in_any_order_whatever_their_size() {
    let bed = Bed::new();
    let (guest, server) = (guest(&bed, 1), server(&bed));
    guest.send(&frame(guest.packet(SERVER, 64).udp(1000, PORT), b"hello"));
    let (_, from) = received(&server);
    let wire = Capture::start(&bed.topology.vpcs[0], "eth0").expect("captures can be made");
    server.send_to(b"hello", from).expect("there is a route");
    guest.receive(PATIENCE).expect("it comes");
    let seen = loop {
        let seen = wire.next(PATIENCE).expect("it can be read").expect("it is there").bytes;
        if seen.len() > 34 && seen[30..34] == SHARED.octets() {
            break seen;
        }
    };
    let mac = |at: usize| seen[at..at + 6].try_into().expect("they are six");
    let _daemon = Daemon::start(&bed);
    let sent = payload(4000, 2);
    let step = PacketBuilder::ethernet2(mac(6), mac(0))
        .ipv4(SERVER.octets(), SHARED.octets(), 64)
        .udp(PORT, from.port());
    let whole = frame(step, &sent);
    // 1480 bytes fill the VPC's MTU, and are more than the tunnel carries.
    for (id, size) in [(1u16, 1408), (2, 1480)] {
        for (turn, order) in [[0, 1, 2], [2, 1, 0], [1, 0, 2]].into_iter().enumerate() {
            let parts = divided(&whole, id + 16 * turn as u16, size);
            for index in order {
                wire.send(&parts[index]).expect("the wire takes it");
            }
            let mut datagram = vec![None; 4008];
            while datagram.iter().any(Option::is_none) {
                let got = guest.receive(PATIENCE).expect("all parts come");
                assert_eq!(checksum(&got[14..34]), 0);
                assert_eq!(&got[30..34], &guest.address.octets()[..]);
                let offset = usize::from(u16::from_be_bytes([got[20] & 0x1f, got[21]])) * 8;
                let length = usize::from(u16::from_be_bytes([got[16], got[17]])) - 20;
                assert!(length <= 1430);
                for (index, byte) in got[34..34 + length].iter().enumerate() {
                    datagram[offset + index] = Some(*byte);
                }
            }
            let datagram: Vec<u8> = datagram.into_iter().flatten().collect();
            assert_eq!(datagram[2..4], 1000u16.to_be_bytes(), "the guest's own port");
            assert!(datagram[8..] == sent, "{size} {order:?}");
            let pseudo = [&SERVER.octets()[..], &guest.address.octets(), &[0, 17]].concat();
            let covered = [&pseudo[..], &4008u16.to_be_bytes(), &datagram].concat();
            assert_eq!(checksum(&covered), 0);
        }
    }
}

/// A socket whose packets may be fragmented on their way.
fn without_df(namespace: &Namespace) -> UdpSocket {
    namespace.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("there is a port");
        let never = libc::IP_PMTUDISC_DONT;
        // SAFETY: the option is an integer, of the size given.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_IP,
                libc::IP_MTU_DISCOVER,
                (&raw const never).cast(),
                size_of_val(&never) as u32,
            )
        };
        assert_eq!(result, 0);
        socket.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        socket
    })
}

#[test]
fn what_is_too_big_and_may_be_fragmented_is() {
    let bed = Bed::new();
    let _daemon = Daemon::start(&bed);
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    guest.namespace.ip("link set eth0 mtu 1500").expect("it can be set");
    let server = without_df(&bed.topology.vpcs[0]);
    let to = (SERVER, server.local_addr().expect("it is bound").port());
    let socket = without_df(&guest.namespace);
    let sent = payload(1472, 3);
    guest.namespace.run(|| socket.send_to(&sent, to)).expect("it leaves");
    let (got, from) = received(&server);
    assert!(got == sent);
    server.send_to(&sent, from).expect("it leaves");
    assert!(received(&socket).0 == sent);
    assert_eq!(bed.host_drops(1, DropReason::TooBig), 0);
    assert_eq!(bed.proxy_drops(VNI_A, DropReason::TooBig), 0);
}

#[test]
fn two_guests_datagrams_of_one_identification_are_not_mixed() {
    let bed = Bed::new();
    let (guests, server) = ([guest(&bed, 1), guest(&bed, 2)], server(&bed));
    let sent = [payload(2000, 4), payload(2000, 5)];
    let parts = [0, 1].map(|index| {
        let guest = &guests[index];
        divided(&frame(guest.packet(SERVER, 64).udp(1000, PORT), &sent[index]), 9, 1008)
    });
    for index in 0..2 {
        for (guest, parts) in guests.iter().zip(&parts) {
            guest.send(&parts[index]);
        }
    }
    let mut got = [received(&server).0, received(&server).0];
    got.sort();
    let mut expected = sent.clone();
    expected.sort();
    assert!(got == expected);
}

#[test]
fn fragments_that_cannot_be_judged_are_dropped_and_named() {
    let bed = Bed::new();
    let guest = guest(&bed, 1);
    let wire = Capture::start(&bed.topology.vpcs[0], "eth0").expect("captures can be made");
    wire.drain().expect("it can be read");
    let datagram = frame(guest.packet(SERVER, 64).udp(1000, PORT), &payload(64, 6));
    let tcp = frame(guest.packet(SERVER, 64).tcp(1000, PORT, 7, 512).syn(), &payload(64, 7));
    let mut id = 100;
    let mut expect = |reason, parts: &[(&[u8], usize, bool, usize)]| {
        id += 1;
        let before = bed.host_drops(1, reason);
        for &(whole, offset, more, length) in parts {
            let payload = &whole[34..];
            guest.send(&piece(whole, id, offset, more, &payload[..length]));
        }
        eventually(|| bed.host_drops(1, reason) == before + 1);
    };
    // RFC 1858: the flags are not in the first one; or, RFC 3128, in another one over it.
    expect(DropReason::BadFragment, &[(&tcp, 0, true, 16)]);
    expect(DropReason::BadFragment, &[(&tcp, 8, false, 40)]);
    expect(DropReason::BadFragment, &[(&tcp, 16, false, 40)]);
    // Not a multiple of 8, nothing at all, beyond the largest packet.
    expect(DropReason::BadFragment, &[(&datagram, 0, true, 33)]);
    expect(DropReason::BadFragment, &[(&datagram, 32, true, 0)]);
    expect(DropReason::BadFragment, &[(&datagram, 65_512, false, 40)]);
    // Over the first one, which had more.
    expect(DropReason::BadFragment, &[(&datagram, 0, true, 32), (&datagram, 24, false, 16)]);
    // Its first one is dropped: so are the others, when they waited.
    let _daemon = Daemon::start(&bed);
    expect(DropReason::Fragment, &[(&tcp, 40, false, 24)]);
    let spoofed = frame(
        PacketBuilder::ethernet2(guest.mac, [2; 6])
            .ipv4(SERVER.octets(), SERVER.octets(), 64)
            .udp(1000, PORT),
        &payload(64, 8),
    );
    expect(DropReason::SpoofedAddress, &[(&spoofed, 0, true, 32)]);
    // From the VPC: of no datagram, and to no port of a host's.
    let to_proxy = |id, parts: &[(usize, bool, usize)], reason| {
        let step = PacketBuilder::ethernet2([2; 6], [0xff; 6])
            .ipv4(SERVER.octets(), SHARED.octets(), 64)
            .udp(PORT, 60_000);
        let whole = frame(step, &payload(64, 9));
        let before = bed.proxy_drops(VNI_A, reason);
        for &(offset, more, length) in parts {
            wire.send(&piece(&whole, id, offset, more, &whole[34..34 + length]))
                .expect("it is sent");
        }
        eventually(|| bed.proxy_drops(VNI_A, reason) == before + 1);
    };
    to_proxy(1, &[(32, false, 32)], DropReason::Fragment);
    to_proxy(2, &[(0, true, 32)], DropReason::NoBlockHolder);
    to_proxy(3, &[(0, true, 31)], DropReason::BadFragment);
}

#[test]
fn a_guest_that_sends_too_many_loses_its_own_datagrams_and_nobody_else_s() {
    let bed = Bed::new();
    let ([many, one], server) = ([guest(&bed, 1), guest(&bed, 2)], server(&bed));
    let sent = payload(2000, 10);
    let parts = divided(&frame(one.packet(SERVER, 64).udp(1000, PORT), &sent), 5, 1008);
    one.send(&parts[0]);
    let whole = frame(many.packet(SERVER, 64).udp(1000, PORT), &payload(2000, 11));
    for id in 0..1000 {
        many.send(&divided(&whole, id, 1008)[0]);
    }
    eventually(|| bed.host_drops(1, DropReason::FragmentsExhausted) == 1000 - 32);
    one.send(&parts[1]);
    // On the proxy, both are the VPC's: there, the one gave way.
    let _daemon = Daemon::start(&bed);
    one.send(&parts[0]);
    one.send(&parts[1]);
    assert!(received(&server).0 == sent);
    assert_eq!(bed.host_drops(2, DropReason::FragmentsExhausted), 0);
}

#[test]
fn a_former_tenant_s_fragments_are_not_the_next_one_s() {
    let bed = Bed::new();
    let (former, server) = (guest(&bed, 1), server(&bed));
    let _daemon = Daemon::start(&bed);
    let whole = frame(former.packet(SERVER, 64).udp(1000, PORT), &payload(2000, 12));
    let parts = divided(&whole, 7, 1008);
    // One waits while the slot changes hands; the next tenant's first one does not become its.
    former.send(&parts[1]);
    bed.host().detach(1).expect("the slot can be detached");
    bed.host().attach(1, VNI_A).expect("the slot is free");
    former.send(&parts[0]);
    eventually(|| bed.host_drops(1, DropReason::StaleFlow) == 1);
    server.set_read_timeout(Some(SILENCE)).expect("it is not zero");
    server.recv(&mut [0; 16]).expect_err("nothing whole arrives");
}
