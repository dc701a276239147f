//! Which queue pair a flow's frames go to (virtio 1.2, 5.1.6.5.6): the one on which the driver sent
//! last of it.

/// What is known of flows, which are told apart by a hash of 8 bits: some share their fate.
pub struct Steering([u8; 256]);

impl Default for Steering {
    fn default() -> Self {
        // Flows of which nothing was sent are spread over all pairs.
        Self(std::array::from_fn(|flow| flow as u8))
    }
}

impl Steering {
    /// The driver sent a frame of a flow's on this pair.
    pub fn sent(&mut self, frame: &[u8], pair: u16) {
        // There are far less than 256 pairs.
        self.0[usize::from(flow(frame))] = pair as u8;
    }

    /// The pair, of so many in use (at least 1), that a frame is for.
    pub fn pair(&self, frame: &[u8], pairs: u16) -> u16 {
        u16::from(self.0[usize::from(flow(frame))]) % pairs
    }
}

/// A hash of a frame's flow, the same in both directions: of addresses, and of TCP's and UDP's ports
/// but for fragments. Of other frames than those of IP it is 0.
fn flow(frame: &[u8]) -> u8 {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    let Some((ethernet, packet)) = frame.split_at_checked(14) else { return 0 };
    let (protocol, addresses, transport) = match (&ethernet[12..], packet) {
        ([0x08, 0x00], [first, _, _, _, _, _, a, b, _, protocol, _, _, rest @ ..]) => {
            // More fragments, or not the first one.
            let is_fragment = u16::from_be_bytes([*a, *b]) & 0x3fff != 0;
            let protocol = if is_fragment { 0 } else { *protocol };
            (protocol, rest.get(..8), usize::from(first & 15) * 4)
        }
        ([0x86, 0xdd], [_, _, _, _, _, _, protocol, _, rest @ ..]) => {
            (*protocol, rest.get(..32), 40)
        }
        _ => return 0,
    };
    let Some(addresses) = addresses else { return 0 };
    let ports = packet.get(transport..transport + 4).filter(|_| matches!(protocol, TCP | UDP));
    let words = addresses.as_chunks::<2>().0.iter().chain(ports.unwrap_or(&[]).as_chunks::<2>().0);
    // Source and destination are both in it, in either order.
    let sum = words.fold(0u16, |sum, word| sum ^ u16::from_be_bytes(*word));
    // The upper bits of the product depend on all of the sum's (Fibonacci hashing).
    (u32::from(sum).wrapping_mul(0x9e37_79b1) >> 24) as u8
}
