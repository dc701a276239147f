//! Between the VMM and the no-OS guest: identity page, ports, vsock ports.

/// The guest's context identifier on its vsock device (virtio 1.2, 5.10.4). Every microVM has the
/// same one: each has a device of its own.
pub const GUEST_CID: u64 = 3;

/// The vsock port on which the guest serves invocations.
///
/// A connection carries any number of exchanges, one after the other: a little-endian `u32` length
/// and that many bytes, answered by the same.
pub const INVOCATION_PORT: u32 = 1024;

/// The largest invocation request or reply, in bytes.
pub const INVOCATION_MAX: u32 = 1 << 20;

/// Who a clone is: written into the guest by the VMM at release, before the guest runs on.
///
/// The guest applies it and acknowledges before it does anything else.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Wall clock (`CLOCK_REALTIME`) at [`Identity::tsc`], in nanoseconds since 1970.
    pub wall_clock_ns: u64,
    /// The guest's time stamp counter when the wall clock was read.
    pub tsc: u64,
    /// Frequency of the time stamp counter, in Hz.
    pub tsc_hz: u64,
    /// Fresh entropy, never given to another clone.
    pub entropy: [u8; 64],
    /// Instance identifier, a version 4 UUID (RFC 9562).
    pub instance_id: [u8; 16],
    /// Host name, UTF-8, padded with zero bytes.
    pub hostname: [u8; 64],
    /// Address of the guest's interface, a /32.
    pub ipv4: [u8; 4],
    /// Default gateway, reached on-link.
    pub gateway: [u8; 4],
    /// MAC address.
    pub mac: [u8; 6],
    /// Largest IP packet the path carries unfragmented, in bytes.
    pub mtu: u16,
}
