//! What a sender is told of a packet that went no further.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use warren_abi::icmp::{TIME_EXCEEDED, UNREACHABLE};
use warren_abi::wire::{GATEWAY, GATEWAY_MAC};
use warren_dataplane::datapath::{DropReason, PortRange};
use warren_netns::netns::Namespace;
use warren_netns::topology::{SERVER, SHARED};

use crate::bed::{Bed, PORTS, VNI_A, eventually};
use crate::guest::{KernelGuest, PATIENCE, RawGuest, SILENCE, frame};
use crate::icmp::{checksum, error};

const PORT: u16 = 7000;
/// The largest IP packet of a guest, in the topology.
const MTU: u16 = 1450;

/// Expects the answer to `sent`, of which it embeds so many bytes.
fn expect(guest: &RawGuest, kind: [u8; 2], mtu: u16, sent: &[u8], embedded: usize) {
    let got = guest.receive(PATIENCE).expect("the answer comes");
    let macs = (GATEWAY_MAC.octets(), guest.mac);
    let mut expected = error(macs, (GATEWAY, guest.address), kind, sent, embedded);
    expected[15] = 0xc0;
    expected[20] = 0x40;
    expected[38..42].copy_from_slice(&[[0, 0], mtu.to_be_bytes()].concat());
    // All as expected, but for the checksums: they are right.
    assert_eq!(checksum(&got[14..34]), 0);
    assert_eq!(checksum(&got[34..]), 0);
    let l4 = match sent[23] {
        6 => 78,
        17 => 68,
        _ => 64,
    };
    for at in [24, 36, l4] {
        expected[at..at + 2].copy_from_slice(&got[at..at + 2]);
    }
    assert_eq!(got, expected, "{kind:?} about {sent:02x?}");
}

#[test]
fn a_guest_is_told_why_its_packet_went_no_further() {
    let bed = Bed::new();
    bed.apply_host(VNI_A, PortRange { base: 8192, count: 64 });
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let payload = [7; 1423];
    let udp = |ttl, payload: &[u8]| frame(guest.packet(SERVER, ttl).udp(1000, PORT), payload);
    let tcp = |ttl, payload: &[u8]| {
        frame(guest.packet(SERVER, ttl).tcp(1000, PORT, 1, 512).syn(), payload)
    };
    let echo =
        |ttl, payload: &[u8]| frame(guest.packet(SERVER, ttl).icmpv4_echo_request(1, 1), payload);
    for (sent, embedded) in [(udp(1, b""), 28), (tcp(1, b"odd"), 40), (echo(1, b"x"), 28)] {
        guest.send(&sent);
        expect(&guest, [TIME_EXCEEDED, 0], 0, &sent, embedded);
    }
    assert_eq!(bed.host_drops(1, DropReason::TtlExceeded), 3);
    for (sent, embedded) in [(udp(64, &payload), 28), (tcp(64, &payload), 40)] {
        guest.send(&sent);
        expect(&guest, [UNREACHABLE, 4], MTU, &sent, embedded);
    }
    assert_eq!(bed.host_drops(1, DropReason::TooBig), 2);
    // Neither began a flow.
    assert_eq!(bed.host().flows().expect("flows can be counted"), 0);

    // The proxy drops these, for it knows of other ports: nothing comes but answers.
    for port in 1..=64 {
        guest.send(&frame(guest.packet(SERVER, 64).udp(port, PORT), b""));
    }
    let sent = frame(guest.packet(SERVER, 64).udp(65, PORT), b"one too many");
    guest.send(&sent);
    expect(&guest, [UNREACHABLE, 13], 0, &sent, 28);
    assert_eq!(bed.host_drops(1, DropReason::PortsExhausted), 1);
}

#[test]
fn there_is_no_answer_where_none_is_due() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    // Without DF, it is fragmented.
    let mut fragmentable = frame(guest.packet(SERVER, 64).udp(1000, PORT), &[0; 1423]);
    fragmentable[20] = 0;
    guest.send(&fragmentable);
    // Not about an error, not to a group, and of nothing else.
    let about = frame(guest.packet(SERVER, 64).udp(1000, PORT), b"");
    let macs = (guest.mac, GATEWAY_MAC.octets());
    let mut dying = error(macs, (guest.address, SERVER), [UNREACHABLE, 3], &about, 28);
    dying[22] = 1;
    guest.send(&dying);
    let mut to_all = frame(guest.packet(SERVER, 1).udp(1000, PORT), b"");
    to_all[..6].fill(0xff);
    guest.send(&to_all);
    assert_eq!(bed.host_drops(1, DropReason::TtlExceeded), 2);
    guest.send(&frame(guest.packet(SERVER, 64).tcp(1000, PORT, 1, 1).ack(1), b""));
    assert_eq!(bed.host_drops(1, DropReason::NoFlow), 1);
    assert_eq!(guest.receive(SILENCE), None);
}

#[test]
fn an_answer_is_right_where_the_checksum_was_left_to_the_device() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    for (sent, embedded, offset) in [
        (frame(guest.packet(SERVER, 1).udp(1000, PORT), b"payload"), 28, 6),
        (frame(guest.packet(SERVER, 1).tcp(1000, PORT, 1, 512).syn(), b"payload"), 40, 16),
    ] {
        // VIRTIO_NET_HDR_F_NEEDS_CSUM, from the transport's header on, with the checksum there.
        let mut header = [0; 12];
        header[0] = 1;
        header[6..8].copy_from_slice(&34u16.to_le_bytes());
        header[8..10].copy_from_slice(&u16::to_le_bytes(offset));
        guest.send_with(header, &sent);
        expect(&guest, [TIME_EXCEEDED, 0], 0, &sent, embedded);
    }
}

/// Sends a datagram that fits the interface but not the path, until the socket knows better.
fn learns_mtu(namespace: &Namespace, to: (std::net::Ipv4Addr, u16)) -> bool {
    namespace.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("there is a port");
        socket.connect(to).expect("there is a route");
        let only_with_df = libc::IP_PMTUDISC_DO;
        // SAFETY: the option is an integer, of the size given.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_IP,
                libc::IP_MTU_DISCOVER,
                (&raw const only_with_df).cast(),
                size_of_val(&only_with_df) as u32,
            )
        };
        assert_eq!(result, 0);
        (0..100).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            let sent = socket.send(&[0; 1472]);
            let code = sent.err().and_then(|error| error.raw_os_error());
            code == Some(libc::EMSGSIZE)
        })
    })
}

#[test]
fn both_sides_learn_the_path_s_mtu() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    guest.namespace.ip("link set eth0 mtu 1500").expect("it can be set");
    assert!(learns_mtu(&guest.namespace, (SERVER, PORT)));
    assert!(learns_mtu(&bed.topology.vpcs[0], (SHARED, PORTS.base)));
    assert!(bed.host_drops(1, DropReason::TooBig) > 0);
    assert!(bed.proxy_drops(VNI_A, DropReason::TooBig) > 0);
}

#[test]
fn answers_have_a_rate() {
    let bed = Bed::new();
    let guests = [1, 2].map(|slot| {
        bed.host().attach(slot, VNI_A).expect("the slot is free");
        RawGuest::open(&bed, slot)
    });
    let dying = |guest: &RawGuest| frame(guest.packet(SERVER, 1).udp(1000, PORT), b"");
    let sent = dying(&guests[0]);
    // As fast as it can; what is more than it may have is counted, and no answer comes.
    let mut count = 0;
    while bed.host_drops(1, DropReason::AnswerRate) == 0 {
        for _ in 0..100 {
            guests[0].send(&sent);
            count += 1;
        }
        assert!(count < 1 << 20, "there is no limit");
    }
    let unanswered = bed.host_drops(1, DropReason::AnswerRate);
    assert_eq!(bed.host_drops(1, DropReason::TtlExceeded), count);
    let mut answers = 0;
    while guests[0].receive(SILENCE).is_some() {
        answers += 1;
    }
    assert_eq!(answers + unanswered, count);
    assert!(answers >= 250);
    // It costs no other guest its answers, and comes back.
    guests[1].send(&dying(&guests[1]));
    assert!(guests[1].receive(PATIENCE).is_some());
    eventually(|| {
        guests[0].send(&sent);
        guests[0].receive(SILENCE).is_some()
    });
}
