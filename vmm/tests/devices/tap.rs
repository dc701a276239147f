//! virtio-net on a real TAP: what the kernel makes of offloads.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use warren_vmm::devices::Device;
use warren_vmm::devices::net::Net;
use warren_vmm::devices::offload::Header;

use crate::common::{kvm, tap_with};
use crate::driver::Driver;
use crate::net::{ALL, MRG_RXBUF, RX, TX, tcp};

/// By these the test knows its own frames.
const SOURCE: [u8; 6] = [2, 9, 9, 9, 9, 9];

/// A driver with these features on a TAP, and a packet socket on the TAP's interface that speaks of
/// offloads, too (`PACKET_VNET_HDR`, packet(7)).
fn bed(features: u64) -> (Driver<Net>, OwnedFd) {
    let (give, take) = mpsc::channel();
    let tap = tap_with("w0", move || {
        assert!(Command::new("ip").args(["link", "set", "w0", "up"]).status().unwrap().success());
        give.send(packet_socket()).unwrap();
    });
    let mut net = Net::new();
    net.mmio_mut().use_interrupts();
    net.attach(tap.unwrap());
    (Driver::new(net, features), take.recv().unwrap())
}

/// A packet socket on the second interface of this namespace; the first is the loopback.
fn packet_socket() -> OwnedFd {
    let all = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: makes a descriptor.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, all.into()) };
    assert!(fd >= 0);
    // SAFETY: the descriptor was just made.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all of its fields are integers.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all;
    // SAFETY: the name ends with a zero byte.
    address.sll_ifindex = unsafe { libc::if_nametoindex(c"w0".as_ptr()) } as i32;
    let one = 1i32;
    // SAFETY: both structures are as long as is said.
    let results = unsafe {
        [
            libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32),
            libc::setsockopt(
                fd,
                libc::SOL_PACKET,
                libc::PACKET_VNET_HDR,
                (&raw const one).cast(),
                size_of_val(&one) as u32,
            ),
        ]
    };
    assert_eq!(results, [0, 0], "{}", std::io::Error::last_os_error());
    socket
}

/// A segment from us to somebody.
fn segment(version: u8, payload: usize) -> (Header, Vec<u8>) {
    let (header, mut frame) = tcp(version, payload);
    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    frame[6..12].copy_from_slice(&SOURCE);
    let length = (frame.len() - 14) as u16;
    if version == 4 {
        frame[16..18].copy_from_slice(&length.to_be_bytes());
        frame[22] = 64;
    } else {
        frame[18..20].copy_from_slice(&(length - 40).to_be_bytes());
        frame[21] = 64;
    }
    (header, frame)
}

/// Our frames that reach the guest within some time.
fn received(driver: &mut Driver<Net>) -> Vec<(Header, Vec<u8>)> {
    let mut frames = Vec::new();
    for _ in 0..20 {
        driver.device.receive(&driver.memory).unwrap();
        while let Some((head, length)) = driver.used(RX) {
            let packet = driver.buffer(RX, head, length as usize);
            let header = Header::parse(*packet.first_chunk().unwrap());
            if packet[18..24] == SOURCE {
                frames.push((header, packet[12..].to_vec()));
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    frames
}

#[test]
fn virtio_5_1_6_4_long_segments_come_whole_to_a_driver_that_takes_them() {
    if !kvm() {
        return;
    }
    for version in [4, 6] {
        for features in [ALL & !MRG_RXBUF, 0] {
            let (mut driver, socket) = bed(features);
            for _ in 0..8 {
                driver.add(RX, &[], &[70_000]);
            }
            let (header, frame) = segment(version, 4200);
            let packet = [&header.bytes()[..10], &frame].concat();
            nix::unistd::write(&socket, &packet).unwrap();
            let frames = received(&mut driver);
            let payload = frame.len() - 4200;
            if features == 0 {
                // The kernel cut them, and computed the checksums.
                let lengths: Vec<_> = frames.iter().map(|(_, frame)| frame.len()).collect();
                assert_eq!(lengths, [1400 + payload; 3], "version {version}");
                let plain = Header { buffers: 1, ..Header::default() };
                assert!(frames.iter().all(|(header, _)| *header == plain));
            } else {
                let [(got, whole)] = &frames[..] else { panic!("{} frames", frames.len()) };
                assert_eq!(whole.len(), frame.len());
                assert_eq!((got.flags, got.gso_type, got.gso_size), (1, header.gso_type, 1400));
                assert_eq!((got.checksum_start, got.checksum_offset), (header.checksum_start, 16));
            }
        }
    }
}

#[test]
fn virtio_5_1_6_2_long_segments_of_the_driver_reach_the_kernel_whole() {
    if !kvm() {
        return;
    }
    for version in [4, 6] {
        let (mut driver, socket) = bed(ALL);
        let (header, frame) = segment(version, 4200);
        driver.add(TX, &[&header.bytes(), &frame], &[]);
        driver.kick(TX);
        let mut buffer = vec![0; 70_000];
        loop {
            // Sent packets of the kernel's own come here, too.
            let length = nix::unistd::read(&socket, &mut buffer).unwrap();
            if buffer[16..22] != SOURCE {
                continue;
            }
            assert_eq!(length, 10 + frame.len());
            assert_eq!(buffer[..2], [1, header.gso_type]);
            assert_eq!(buffer[4..6], 1400u16.to_le_bytes());
            break;
        }
    }
}
