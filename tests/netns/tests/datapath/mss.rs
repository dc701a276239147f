//! The maximum segment size, clamped both ways.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use warren_dataplane::datapath::DropReason;
use warren_netns::capture::Capture;
use warren_netns::servers::{bulk_sink, bulk_source};
use warren_netns::topology::{SERVER, SHARED};

use crate::bed::{Bed, VNI_A};
use crate::guest::{KernelGuest, PATIENCE, RawGuest, frame};
use crate::icmp::checksum;

const PORT: u16 = 7000;

/// The options of the TCP header in a frame, whose checksum must be right.
fn options(frame: &[u8]) -> Vec<u8> {
    let segment = &frame[34..14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]))];
    let length = (segment.len() as u16).to_be_bytes();
    let pseudo = [&frame[26..34], &[0, 6], &length].concat();
    assert_eq!(checksum(&[&pseudo, segment].concat()), 0, "{frame:02x?}");
    segment[20..usize::from(segment[12] >> 4) * 4].to_vec()
}

#[test]
fn the_mss_of_a_syn_is_made_to_fit_and_nothing_else_is_changed() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let listener = bed.topology.vpcs[0].run(|| TcpListener::bind(("0.0.0.0", PORT)));
    let _listener = listener.expect("the port is free");
    let capture = Capture::start(&bed.topology.vpcs[0], "eth0").expect("captures can be made");
    let seen = || loop {
        let frame = capture.next(PATIENCE).expect("it can be read").expect("it comes").bytes;
        if frame.len() >= 54 && frame[23] == 6 && frame[26..30] == SHARED.octets() && frame[47] == 2
        {
            return frame;
        }
    };
    let [fits, exact, large, largest] =
        [[2, 4, 3, 232], [2, 4, 5, 130], [2, 4, 5, 131], [2, 4, 255, 255]];
    let window = [3, 3, 7, 0];
    let cases = [
        ([&fits[..], &window].concat(), [&fits[..], &window].concat()),
        ([&exact[..], &window].concat(), [&exact[..], &window].concat()),
        ([&large[..], &window].concat(), [&exact[..], &window].concat()),
        // At an odd place, and at the very end of the longest options.
        ([&[1], &largest[..], &[1, 1, 1]].concat(), [&[1], &exact[..], &[1, 1, 1]].concat()),
        ([&[1; 36][..], &largest].concat(), [&[1; 36][..], &exact].concat()),
        (
            [&[254, 35][..], &[9; 33], &largest, &[1]].concat(),
            [&[254, 35][..], &[9; 33], &exact, &[1]].concat(),
        ),
        // None, or none that counts.
        (vec![], vec![]),
        (window.to_vec(), window.to_vec()),
        ([&[3, 0, 1, 1], &largest[..]].concat(), [&[3, 0, 1, 1], &largest[..]].concat()),
    ];
    for (port, (sent, expected)) in (1000..).zip(cases) {
        let builder = guest.packet(SERVER, 64).tcp(port, PORT, 7, 512).syn();
        let builder = builder.options_raw(&sent).expect("they fit");
        guest.send(&frame(builder, b""));
        assert_eq!(options(&seen()), expected, "{sent:?}");
        if port == 1000 {
            // The server's interface has 1500 bytes, and so has what it announces.
            let answer = guest.receive(PATIENCE).expect("the server answers");
            assert_eq!((answer[47], &options(&answer)[..4]), (0x12, &exact[..]));
        }
    }
}

#[test]
fn a_guest_with_the_vpc_s_mtu_loses_no_segment() {
    let bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    guest.namespace.ip("link set eth0 mtu 1500").expect("it can be set");
    let bytes = 1 << 20;
    let source = bulk_source(&bed.topology.vpcs[0], PORT, bytes, 0).expect("the server starts");
    let sink = bulk_sink(&bed.topology.vpcs[0], PORT + 1).expect("the server starts");
    guest.namespace.run(|| {
        let connect = |port| {
            let stream = TcpStream::connect((SERVER, port)).expect("the server answers");
            stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
            stream
        };
        let mut received = Vec::new();
        connect(PORT).read_to_end(&mut received).expect("the stream is whole");
        assert_eq!(received.len() as u64, bytes);
        let mut stream = connect(PORT + 1);
        stream.write_all(&received).expect("the server reads");
        stream.shutdown(Shutdown::Write).expect("the stream stands");
        assert_eq!(stream.read(&mut [0; 1]).expect("the server closes"), 0);
    });
    assert_eq!(sink.count(), bytes);
    drop(source);
    assert_eq!(bed.host_drops(1, DropReason::TooBig), 0);
    assert_eq!(bed.proxy_drops(VNI_A, DropReason::TooBig), 0);
}
