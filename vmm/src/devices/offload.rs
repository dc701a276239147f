//! The header in front of each frame, with what driver and device leave to each other: checksums
//! and segmentation (virtio 1.2, 5.1.6). Only what was negotiated, and is true of the frame, passes.

/// Size of `struct virtio_net_hdr_v1`, in bytes.
pub const HEADER: usize = 12;

// Features (5.1.3). Of those there are, UFO and ECN are not offered: no guest of ours needs them.
/// `VIRTIO_NET_F_CSUM`: the device computes checksums.
pub const CSUM: u64 = 1 << 0;
/// `VIRTIO_NET_F_GUEST_CSUM`: the driver takes frames without.
pub const GUEST_CSUM: u64 = 1 << 1;
/// `VIRTIO_NET_F_GUEST_TSO4`: the driver takes long TCP segments.
pub const GUEST_TSO4: u64 = 1 << 7;
/// `VIRTIO_NET_F_GUEST_TSO6`
pub const GUEST_TSO6: u64 = 1 << 8;
/// `VIRTIO_NET_F_HOST_TSO4`: the device takes long TCP segments.
pub const HOST_TSO4: u64 = 1 << 11;
/// `VIRTIO_NET_F_HOST_TSO6`
pub const HOST_TSO6: u64 = 1 << 12;

// Flags and types of segmentation (5.1.6).
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

// TUNSETOFFLOAD (linux/if_tun.h).
const TUN_CSUM: u32 = 1;
const TUN_TSO4: u32 = 2;
const TUN_TSO6: u32 = 4;

/// `struct virtio_net_hdr_v1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Whether the checksum is to be computed, or is known to be right.
    pub flags: u8,
    /// Kind of segmentation.
    pub gso_type: u8,
    /// Length of all headers, in bytes; a hint.
    pub header_length: u16,
    /// Payload of each segment, in bytes.
    pub gso_size: u16,
    /// Where the checksum begins, in bytes from the frame's first.
    pub checksum_start: u16,
    /// Where it is put, in bytes from there.
    pub checksum_offset: u16,
    /// How many buffers the frame fills.
    pub buffers: u16,
}

impl Header {
    /// Reads it.
    pub fn parse(bytes: [u8; HEADER]) -> Self {
        let [flags, gso_type, ..] = bytes;
        let field = |at| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags,
            gso_type,
            header_length: field(2),
            gso_size: field(4),
            checksum_start: field(6),
            checksum_offset: field(8),
            buffers: field(10),
        }
    }

    /// Writes it.
    pub fn bytes(self) -> [u8; HEADER] {
        let mut bytes = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let fields = [
            self.header_length,
            self.gso_size,
            self.checksum_start,
            self.checksum_offset,
            self.buffers,
        ];
        for (place, field) in bytes[2..].as_chunks_mut().0.iter_mut().zip(fields) {
            *place = field.to_le_bytes();
        }
        bytes
    }

    /// Whether the frame is to be cut into segments.
    pub fn is_segmented(self) -> bool {
        self.gso_type != GSO_NONE
    }

    /// Where the checksum is put, if there is to be one, in bytes from the frame's first.
    fn checksum_place(self) -> usize {
        usize::from(self.checksum_start) + usize::from(self.checksum_offset)
    }
}

/// The header that the host gets with a frame of the driver's: what the driver wrote, as far as it
/// was negotiated and the frame bears it out. `None` if that is not so: the frame is dropped.
pub fn from_driver(header: Header, frame: &[u8], features: u64) -> Option<Header> {
    if features & CSUM == 0 {
        // No offload was negotiated: the kernel need not look at what the driver put there.
        return Some(Header::default());
    }
    if header.flags & NEEDS_CSUM == 0 {
        // Segments have checksums of their own to be computed (5.1.6.2.1).
        return (!header.is_segmented()).then(Header::default);
    }
    if header.checksum_place() + 2 > frame.len() {
        return None;
    }
    let clean = Header {
        flags: NEEDS_CSUM,
        checksum_start: header.checksum_start,
        checksum_offset: header.checksum_offset,
        ..Header::default()
    };
    let feature = match header.gso_type {
        GSO_NONE => return Some(clean),
        GSO_TCPV4 => HOST_TSO4,
        GSO_TCPV6 => HOST_TSO6,
        _ => return None,
    };
    let headers = tcp_headers(header, frame)?;
    let is_whole = header.gso_size > 0 && usize::from(headers) <= frame.len();
    (features & feature != 0 && is_whole).then_some(Header {
        gso_type: header.gso_type,
        gso_size: header.gso_size,
        // The driver's own is a hint at best (5.1.6.2.2).
        header_length: headers,
        ..clean
    })
}

/// Length of the headers of a frame that is said to be TCP over this version of IP, in bytes; `None`
/// if it is not.
fn tcp_headers(header: Header, frame: &[u8]) -> Option<u16> {
    const ETHERNET: usize = 14;
    const TCP: u8 = 6;
    let start = usize::from(header.checksum_start);
    let is_tcp = match (header.gso_type, frame.get(12..14)?) {
        (GSO_TCPV4, [0x08, 0x00]) => {
            let length = usize::from(frame.get(ETHERNET)? & 15) * 4;
            length >= 20 && start == ETHERNET + length && *frame.get(ETHERNET + 9)? == TCP
        }
        // There may be extension headers; where TCP begins the driver says.
        (GSO_TCPV6, [0x86, 0xdd]) => start >= ETHERNET + 40,
        _ => false,
    };
    let length = u16::from(frame.get(start + 12)? >> 4) * 4;
    (is_tcp && header.checksum_offset == 16 && length >= 20)
        .then(|| header.checksum_start.checked_add(length))?
}

/// The header that the driver gets with a frame of the host's of this length in bytes, but for the
/// number of buffers. `None` if it is of a kind that the driver did not ask for: what was queued
/// when the TAP had another user.
pub fn from_host(header: Header, length: usize, features: u64) -> Option<Header> {
    let feature = match header.gso_type {
        GSO_NONE => 0,
        GSO_TCPV4 => GUEST_TSO4,
        GSO_TCPV6 => GUEST_TSO6,
        _ => return None,
    };
    if features & feature != feature {
        return None;
    }
    if features & GUEST_CSUM == 0 {
        return (header.flags & NEEDS_CSUM == 0).then(Header::default);
    }
    if header.flags & NEEDS_CSUM != 0 && header.checksum_place() + 2 > length {
        return None;
    }
    Some(Header { flags: header.flags & (NEEDS_CSUM | DATA_VALID), buffers: 0, ..header })
}

/// What a TAP may hand out, for `TUNSETOFFLOAD`, to a driver that negotiated these features.
pub fn tun_offloads(features: u64) -> u32 {
    [(GUEST_CSUM, TUN_CSUM), (GUEST_TSO4, TUN_TSO4), (GUEST_TSO6, TUN_TSO6)]
        .into_iter()
        .filter(|(feature, _)| features & feature != 0)
        .fold(0, |flags, (_, flag)| flags | flag)
}
