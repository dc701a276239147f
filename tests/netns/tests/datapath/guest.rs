//! Stand-ins for microVMs, on the TAP of a slot.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use etherparse::{
    Icmpv4Header, IpHeaders, Ipv4HeaderSlice, NetSlice, PacketBuilder, PacketBuilderStep,
    SlicedPacket, TcpHeader, UdpHeader,
};
use warren_abi::wire::GATEWAY_MAC;
use warren_dataplane::datapath::HostDatapath;
use warren_netns::guest::{self, VNET_HEADER, readable};
use warren_netns::netns::Namespace;

use crate::bed::{Bed, eventually};

/// How long to wait for a packet that must come.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for a packet that must not come.
pub const SILENCE: Duration = Duration::from_millis(300);

/// A guest that a test speaks for, frame by frame.
pub struct RawGuest {
    tap: File,
    pub address: Ipv4Addr,
    pub mac: [u8; 6],
}

impl RawGuest {
    /// Opens the slot's TAP.
    pub fn open(bed: &Bed, slot: u32) -> Self {
        Self::open_on(&bed.topology.host, bed.host(), slot)
    }

    /// Opens the TAP of a slot of any host's.
    pub fn open_on(namespace: &Namespace, host: &HostDatapath, number: u32) -> Self {
        let tap = open_slot(namespace, host, number).into();
        let slot = &host.slots()[number as usize - 1];
        Self { tap, address: slot.address, mac: slot.mac }
    }

    /// Sends a frame. When it returns, the program has dealt with it.
    pub fn send(&self, frame: &[u8]) {
        self.send_with([0; VNET_HEADER], frame);
    }

    /// Sends a frame behind a virtio-net header.
    pub fn send_with(&self, header: [u8; VNET_HEADER], frame: &[u8]) {
        let mut bytes = header.to_vec();
        bytes.extend_from_slice(frame);
        let sent = (&self.tap).write(&bytes).expect("the TAP takes the frame");
        assert_eq!(sent, bytes.len());
    }

    /// The beginning of a packet that this guest may send.
    pub fn packet(&self, to: Ipv4Addr, ttl: u8) -> PacketBuilderStep<IpHeaders> {
        PacketBuilder::ethernet2(self.mac, GATEWAY_MAC.octets()).ipv4(
            self.address.octets(),
            to.octets(),
            ttl,
        )
    }

    /// The next frame that comes, if one does in time.
    pub fn receive(&self, patience: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + patience;
        let mut buffer = vec![0; 65536 + VNET_HEADER];
        loop {
            match (&self.tap).read(&mut buffer) {
                Ok(length) => return Some(buffer[VNET_HEADER..length].to_vec()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => panic!("the TAP cannot be read: {error}"),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            readable(&self.tap, left);
        }
    }
}

/// Opens a slot's TAP as soon as it is free: a process that another test forks has this one's
/// descriptors until it executes its program.
pub fn open_slot(namespace: &Namespace, host: &HostDatapath, slot: u32) -> OwnedFd {
    let mut tap = None;
    eventually(|| {
        tap = namespace.run(|| host.open_tap(slot)).ok();
        tap.is_some()
    });
    tap.expect("it was opened")
}

/// A frame with this payload.
pub fn frame<T>(builder: PacketBuilderStep<T>, payload: &[u8]) -> Vec<u8>
where
    PacketBuilderStep<T>: Build,
{
    builder.build(payload)
}

/// What can be built: every last step of a packet.
pub trait Build {
    fn build(self, payload: &[u8]) -> Vec<u8>;
}

macro_rules! build {
    ($($step:ty),+) => {
        $(
            impl Build for PacketBuilderStep<$step> {
                fn build(self, payload: &[u8]) -> Vec<u8> {
                    let mut frame = Vec::with_capacity(self.size(payload.len()));
                    self.write(&mut frame, payload).expect("a vector takes everything");
                    frame
                }
            }
        )+
    };
}
build!(UdpHeader, TcpHeader, Icmpv4Header);

/// A packet's IPv4 header.
pub fn ipv4<'a>(packet: &'a SlicedPacket<'a>) -> Ipv4HeaderSlice<'a> {
    match &packet.net {
        Some(NetSlice::Ipv4(slice)) => slice.header(),
        _ => panic!("it is no IPv4 packet"),
    }
}

/// A guest with the kernel's network stack: a namespace whose `eth0` is wired to a slot.
pub struct KernelGuest {
    pub namespace: Namespace,
    _wired: guest::KernelGuest,
}

impl KernelGuest {
    /// Wires a namespace to a slot's TAP.
    pub fn plug(bed: &Bed, slot: u32) -> Self {
        let RawGuest { tap, address, mac } = RawGuest::open(bed, slot);
        let wired = guest::KernelGuest::plug(tap, address, mac, bed.host().mtu());
        let wired = wired.expect("the guest can be configured");
        Self { namespace: wired.namespace.clone(), _wired: wired }
    }
}
