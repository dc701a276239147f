//! The built-in function: a network probe, called over the invocation channel.
//!
//! Requests and reports are `postcard` of [`Request`] and [`Reply`]. All times are nanoseconds on
//! the guest's clock, counted from the moment its VMM released it ([`Timed::start_ns`] = 0 there).

use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// An IPv4 address and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Address.
    pub address: [u8; 4],
    /// Port, 1 to 65535.
    pub port: u16,
}

/// What the probe is asked to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Report the identity that the guest applied.
    Identity,
    /// Open a TCP connection and close it.
    TcpConnect {
        /// Server.
        to: Endpoint,
    },
    /// `GET path` over HTTP/1.1; the report holds the head and up to 64 KiB of the body.
    HttpGet {
        /// Server.
        to: Endpoint,
        /// `Host` header.
        host: String,
        /// Request target, such as `/`.
        path: String,
    },
    /// Redis commands on one connection, one reply awaited for each (RESP2).
    Redis {
        /// Server.
        to: Endpoint,
        /// Each command with its arguments.
        commands: Vec<Vec<String>>,
    },
    /// Datagrams with an increasing 8-byte big-endian sequence number, expected back as sent.
    UdpEcho {
        /// Server.
        to: Endpoint,
        /// How many.
        count: u32,
        /// Payload length, 8 to 1400 bytes.
        length: u16,
        /// Time from one to the next, in microseconds; 0 waits for each reply before the next.
        interval_us: u32,
    },
    /// A DNS query for the A records of a name, over UDP.
    DnsQuery {
        /// Server.
        to: Endpoint,
        /// Name.
        name: String,
    },
    /// Send so many bytes on a TCP connection, then close it and wait for the peer to close.
    ///
    /// Byte `n` of the stream is `n % 251`.
    BulkSend {
        /// Server.
        to: Endpoint,
        /// Bytes.
        bytes: u64,
    },
    /// Receive on a TCP connection until the peer closes, or until so many bytes came.
    BulkReceive {
        /// Server.
        to: Endpoint,
        /// At most so many bytes.
        bytes: u64,
    },
    /// Put an Ethernet frame on the wire as it is: what a hostile guest can do.
    SendFrame {
        /// The frame, from the destination MAC on, without FCS.
        frame: Vec<u8>,
    },
    /// Keep this in memory, in place of what was kept before.
    Remember {
        /// What.
        bytes: Vec<u8>,
    },
    /// Report what is kept; nothing, at first.
    Recall,
}

/// A request to the probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// Give up after so many milliseconds.
    pub timeout_ms: u32,
}

/// The identity that a guest runs with, as the guest itself sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityReport {
    /// MAC address in use.
    pub mac: [u8; 6],
    /// Address in use.
    pub ipv4: [u8; 4],
    /// Host name.
    pub hostname: String,
    /// Instance identifier.
    pub instance_id: [u8; 16],
    /// The first 32 bytes drawn from the guest's random generator after release.
    pub random: [u8; 32],
    /// Wall clock now, in nanoseconds since 1970.
    pub wall_clock_ns: u64,
}

/// What an operation yielded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// [`Operation::Identity`].
    Identity(IdentityReport),
    /// The connection stood (and was closed again), or the frame was sent.
    Done,
    /// [`Operation::HttpGet`]: status code and what came after the head.
    Http {
        /// Status code.
        status: u16,
        /// Body, cut at 64 KiB.
        body: Vec<u8>,
    },
    /// [`Operation::Redis`]: the raw RESP2 reply of each command.
    Redis(Vec<Vec<u8>>),
    /// [`Operation::UdpEcho`].
    Udp {
        /// Datagrams sent.
        sent: u32,
        /// Different datagrams that came back.
        received: u32,
        /// Longest time between two that came back, in nanoseconds.
        longest_gap_ns: u64,
    },
    /// [`Operation::DnsQuery`]: the addresses.
    Dns(Vec<[u8; 4]>),
    /// [`Operation::BulkSend`] and [`Operation::BulkReceive`].
    Bulk {
        /// Bytes transferred.
        bytes: u64,
        /// Offset of the first byte that was not `n % 251`, if any (receive only).
        corrupt_at: Option<u64>,
    },
    /// [`Operation::Recall`].
    Recalled(Vec<u8>),
}

/// When things happened, in nanoseconds since release.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// The request was read.
    pub start_ns: u64,
    /// The TCP connection stood; 0 where there is none.
    pub connected_ns: u64,
    /// The first byte (or datagram) of the answer came; 0 where none came.
    pub first_byte_ns: u64,
    /// The operation ended.
    pub end_ns: u64,
}

/// The probe's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The outcome, or why there is none.
    pub outcome: Result<Outcome, String>,
    /// When things happened.
    pub timings: Timings,
}

/// A message that could not be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

impl core::fmt::Display for Malformed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("not a probe message of this version")
    }
}

impl core::error::Error for Malformed {}

/// Encodes a request or a reply.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Only a failing Serialize or a full buffer can fail here; these types and a Vec have neither.
    postcard::to_allocvec(message).unwrap_or_default()
}

/// Decodes a request or a reply that [`encode`] made.
///
/// # Errors
/// [`Malformed`] if the bytes are anything else.
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Malformed> {
    postcard::from_bytes(bytes).map_err(|_| Malformed)
}
