//! Link-local services: who is meant, and how much a guest may ask of them.
//!
//! Packets go between the programs and the daemon by a TUN device, stamped with the slot's
//! generation in the identification field of the IP header, which means nothing where nothing is
//! fragmented (RFC 6864, section 4.1): so neither side takes a former tenant's for the next one's.
//!
//! What the daemon itself sends into a VPC has the source 0.V.V.V, where V is the VNI: 0/8 is on no
//! wire (RFC 6890).

use core::net::Ipv4Addr;

use crate::checksum::update;
use crate::maps::Attachment;
use crate::rate::Rate;
use crate::wire::{Be16, IpHeader, Ipv4, TCP, UDP};

/// The metadata service.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The metadata service's port, of TCP.
pub const METADATA_PORT: u16 = 80;
/// The DNS service.
pub const DNS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 253);
/// The DNS service's port, of UDP and TCP.
pub const DNS_PORT: u16 = 53;

/// Whether it is the address of a service.
#[inline(always)]
pub fn is_address(address: Ipv4) -> bool {
    address == METADATA.into() || address == DNS.into()
}

/// Whether there is a service.
#[inline(always)]
pub fn is_open(address: Ipv4, protocol: u8, port: Be16) -> bool {
    match protocol {
        TCP if address == METADATA.into() => port.get() == METADATA_PORT,
        TCP | UDP if address == DNS.into() => port.get() == DNS_PORT,
        _ => false,
    }
}

/// The daemon's address between it and the programs, as seen from a VPC.
#[inline(always)]
pub const fn address_in(vni: u32) -> Ipv4 {
    Ipv4((vni & 0x00ff_ffff).to_be())
}

/// The VPC in which the daemon has this address; none for other addresses.
#[inline(always)]
pub const fn vpc_of(address: Ipv4) -> Option<u32> {
    match address.to_bits() {
        vni @ 1..0x0100_0000 => Some(vni),
        _ => None,
    }
}

/// What the daemon is attached to in a VPC, as if it had a slot there. Its generation tells VPCs
/// apart, and never changes.
#[inline(always)]
pub const fn attachment_in(vni: u32) -> Attachment {
    Attachment::new(vni, vni)
}

/// What stands for an attachment in a packet's identification field.
#[inline(always)]
pub const fn stamp(generation: u32) -> Be16 {
    Be16::new(generation as u16)
}

impl IpHeader {
    /// Sets the identification field, and makes the checksum fit.
    #[inline(always)]
    pub const fn identify(&mut self, identification: Be16) {
        self.checksum = update(self.checksum, [self.identification.0], [identification.0]);
        self.identification = identification;
    }
}

/// What a slot may send to all services: 1,000 packets a second, as cloud providers allow.
pub const SLOT_RATE: Rate = Rate { interval_ns: 1_000_000, burst: 250 };
