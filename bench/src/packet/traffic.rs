//! Real traffic over many flows: stand-in guests on the slots' TAPs send datagrams, and a machine
//! in the VPC sends each back.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use etherparse::PacketBuilder;
use warren_abi::wire::GATEWAY_MAC;
use warren_dataplane::datapath::{HostDatapath, Slot};
use warren_netns::capture::Capture;
use warren_netns::netns::Namespace;

/// Guests.
pub const SLOTS: u32 = 4;
/// Ports that each guest sends from: a mapping each.
const GUEST_PORTS: u32 = 64;
const FIRST_PORT: u16 = 10_000;
/// Flows that have a port of a guest's each to one peer.
const PER_PEER: u32 = SLOTS * GUEST_PORTS;
/// Flow-table entries that are mappings, not flows.
pub const MAPPINGS: u32 = PER_PEER;
/// The first of the peers' addresses: behind the VPC's gateway.
pub const PEERS: Ipv4Addr = Ipv4Addr::new(20, 0, 0, 1);
const PEER_PORT: u16 = 7;

/// Payload of a datagram, in bytes.
const PAYLOAD: [u8; 64] = [0; 64];
/// virtio-net header without offloads.
const VNET_HEADER: usize = 12;
/// Datagrams on their way at a time: what no queue on the way is too short for.
const BATCH: usize = 32;
/// What did not arrive by then is lost.
const PATIENCE: Duration = Duration::from_millis(50);

/// The guests and the machine that answers them.
pub struct Traffic {
    guests: Vec<(File, Slot)>,
    vpc: Capture,
    buffer: Vec<u8>,
}

/// What became of datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exchanged {
    /// The guests sent so many.
    pub sent: u64,
    /// So many were sent back, and came to a guest.
    pub answered: u64,
}

impl Traffic {
    /// Opens the slots' TAPs, and the VPC's machine at its interface.
    pub fn open(datapath: &HostDatapath, vpc: &Namespace, interface: &str) -> Result<Self> {
        let mut guests = Vec::new();
        for slot in datapath.slots() {
            guests.push((File::from(datapath.open_tap(slot.number)?), slot.clone()));
        }
        let vpc = Capture::start(vpc, interface)?;
        vpc.ignore_outgoing()?;
        Ok(Self { guests, vpc, buffer: vec![0; 2048] })
    }

    /// Sends a datagram in each of these flows, and its answer back.
    pub fn exchange(&mut self, flows: impl IntoIterator<Item = u32>) -> Result<Exchanged> {
        let mut flows = flows.into_iter();
        let mut exchanged = Exchanged::default();
        let mut frame = Vec::new();
        loop {
            let mut on_the_way = 0;
            for flow in flows.by_ref().take(BATCH) {
                let (tap, slot) = &self.guests[(flow % SLOTS) as usize];
                write_frame(&mut frame, flow, slot);
                (&mut &*tap).write_all(&frame).context("cannot write to a TAP")?;
                on_the_way += 1;
            }
            if on_the_way == 0 {
                return Ok(exchanged);
            }
            exchanged.sent += on_the_way;
            exchanged.answered += self.answer(on_the_way)?;
        }
    }

    /// Sends so many datagrams back; returns how many came to the guests.
    fn answer(&mut self, count: u64) -> Result<u64> {
        let deadline = Instant::now() + PATIENCE;
        let (mut returned, mut received) = (0, 0);
        while received < count {
            let mut idle = true;
            while returned < count {
                let Some(length) = self.vpc.try_next(&mut self.buffer)? else { break };
                if let Some(frame) = self.buffer.get_mut(..length).filter(|f| is_ours(f)) {
                    turn(frame);
                    self.vpc.send(frame)?;
                    returned += 1;
                    idle = false;
                }
            }
            for (tap, _) in &self.guests {
                while let Ok(1..) = (&mut &*tap).read(&mut self.buffer) {
                    received += 1;
                    idle = false;
                }
            }
            if idle && Instant::now() > deadline {
                break;
            }
        }
        Ok(received)
    }
}

/// The frame of a datagram from a guest, behind a virtio-net header.
fn write_frame(frame: &mut Vec<u8>, flow: u32, slot: &Slot) {
    let port = FIRST_PORT + (flow / SLOTS % GUEST_PORTS) as u16;
    let peer = Ipv4Addr::from_bits(PEERS.to_bits() + flow / PER_PEER);
    frame.clear();
    frame.resize(VNET_HEADER, 0);
    PacketBuilder::ethernet2(slot.mac, GATEWAY_MAC.octets())
        .ipv4(slot.address.octets(), peer.octets(), 64)
        .udp(port, PEER_PORT)
        .write(frame, &PAYLOAD)
        .expect("a Vec takes any frame");
}

/// Whether it is a datagram to one of the peers: IPv4 without options.
fn is_ours(frame: &[u8]) -> bool {
    frame.len() >= 42 && frame[12..15] == [8, 0, 0x45] && frame[23] == 17 && frame[30] == 20
}

/// Makes a datagram the answer to it: MAC addresses, addresses and ports change places, which
/// changes no checksum.
fn turn(frame: &mut [u8]) {
    for (a, b, length) in [(0, 6, 6), (26, 30, 4), (34, 36, 2)] {
        let (head, tail) = frame.split_at_mut(b);
        head[a..a + length].swap_with_slice(&mut tail[..length]);
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    use std::net::Ipv6Addr;

    use super::*;

    #[test]
    fn an_answer_is_a_valid_datagram_from_the_peer() {
        let slot = Slot {
            number: 1,
            ifname: String::new(),
            ifindex: 1,
            address: Ipv4Addr::new(169, 254, 2, 1),
            address_v6: Ipv6Addr::LOCALHOST,
            mac: [2, 0, 0, 0, 0, 1],
        };
        let mut frame = Vec::new();
        write_frame(&mut frame, 3 * PER_PEER + SLOTS, &slot);
        let frame = &mut frame[VNET_HEADER..];
        assert!(is_ours(frame));
        turn(frame);
        let sliced = SlicedPacket::from_ethernet(frame).expect("it can be parsed");
        let Some(NetSlice::Ipv4(ip)) = sliced.net else { panic!("not IPv4") };
        let header = ip.header().to_header();
        assert_eq!(header.source, [20, 0, 0, 4]);
        assert_eq!(header.destination, slot.address.octets());
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        let Some(TransportSlice::Udp(udp)) = sliced.transport else { panic!("not UDP") };
        let header = udp.to_header();
        assert_eq!((header.source_port, header.destination_port), (PEER_PORT, FIRST_PORT + 1));
        let sum = header.calc_checksum_ipv4_raw([20, 0, 0, 4], slot.address.octets(), &PAYLOAD);
        assert_eq!(Ok(header.checksum), sum);
    }
}
