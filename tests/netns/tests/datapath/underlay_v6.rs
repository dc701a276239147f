//! An underlay of IPv6, and both families in the VPCs.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, TcpStream};

use warren_netns::capture::Capture;
use warren_netns::netns::Namespace;
use warren_netns::servers::{bulk_sink_at, bulk_source_at, udp_echo, udp_echo_at};
use warren_netns::topology::{SERVER, SERVER_V6, UNDERLAY};

use crate::bed::{Bed, VNI_A};
use crate::guest::{PATIENCE, SILENCE};
use crate::traffic::udp_round_trip;
use crate::v6::{plug, round_trip};

const PORT: u16 = 7000;
const ANY: Ipv6Addr = Ipv6Addr::UNSPECIFIED;
const BYTES: u64 = 4 << 20;

/// Downloads from one port of the server's, and uploads to the next.
fn transfer(guest: &Namespace, server: IpAddr) {
    guest.run(|| {
        let connect = |port| {
            let stream = TcpStream::connect((server, port)).expect("the server answers");
            stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
            stream
        };
        let mut received = Vec::new();
        connect(PORT).read_to_end(&mut received).expect("the stream is whole");
        assert_eq!(received.len() as u64, BYTES);
        assert!(received.iter().zip(0u64..).all(|(&byte, n)| u64::from(byte) == n % 251));
        let mut stream = connect(PORT + 1);
        stream.write_all(&received).expect("the server reads");
        stream.shutdown(Shutdown::Write).expect("the stream stands");
        assert_eq!(stream.read(&mut [0; 1]).expect("the server closes"), 0);
    });
}

#[test]
fn both_families_go_through_a_tunnel_over_ipv6() {
    let bed = Bed::over_v6();
    assert_eq!(bed.host().mtu(), 1430);
    let guest = plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let vpc = &bed.topology.vpcs[0];
    let _echo = udp_echo(vpc, PORT).expect("the server starts");
    let _echo_v6 = udp_echo_at(vpc, (ANY, PORT + 2)).expect("the server starts");
    let capture = Capture::start(&bed.topology.proxy, UNDERLAY).expect("it can be captured");
    assert!(udp_round_trip(&guest.namespace, (SERVER, PORT)));
    assert!(round_trip(&guest.namespace, (SERVER_V6, PORT + 2)));
    // Both ways, both families; UDP without a checksum, and of one family all.
    let (mut inner, mut seen) = (Vec::new(), 0);
    while let Some(frame) = capture.next(SILENCE).expect("it can be read") {
        let bytes = frame.bytes;
        if bytes[12..14] == [0x86, 0xdd] && bytes[20] == 17 && bytes[56..58] == [0x12, 0xb5] {
            assert_eq!(bytes[60..62], [0, 0]);
            assert_eq!(usize::from(u16::from_be_bytes([bytes[18], bytes[19]])), bytes.len() - 54);
            inner.push([bytes[82], bytes[83]]);
            seen += 1;
        }
        assert_ne!(bytes[12..14], [8, 0], "nothing of IPv4 is on the underlay");
    }
    assert!(seen >= 4 && inner.contains(&[8, 0]) && inner.contains(&[0x86, 0xdd]), "{inner:x?}");

    let _source = bulk_source_at(vpc, (ANY, PORT), BYTES, 0).expect("the server starts");
    let sink = bulk_sink_at(vpc, (ANY, PORT + 1)).expect("the server starts");
    transfer(&guest.namespace, SERVER.into());
    transfer(&guest.namespace, SERVER_V6.into());
    assert_eq!(sink.count(), 2 * BYTES);
}

#[test]
fn ends_of_a_tunnel_are_of_one_family() {
    let bed = Bed::over_v6();
    let mut vpc = bed.host().vpcs().expect("VPCs can be read").remove(0);
    vpc.proxy_address = [192, 0, 2, 2].into();
    let error = bed.host().apply_vpc(&vpc).expect_err("it is of the other family").to_string();
    assert!(error.contains("family"), "{error}");
}
