//! Seamless BFD (RFC 7880) over UDP (RFC 7881): whoever wants to know whether a node forwards sends
//! it a control packet, which the node's program at its underlay sends back. It does so while the
//! daemon is not there.

use crate::wire::Be16;

/// Where nodes send back what comes (RFC 7881, section 3).
pub const PORT: u16 = 7784;

/// A control packet without authentication (RFC 5880, section 4.1).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    /// Version 1 in the upper three bits; why the session was down, in the others.
    pub version: u8,
    /// State in the upper two bits, and flags.
    pub state: u8,
    /// How many packets in a row may get lost.
    pub multiplier: u8,
    /// Its length, 24.
    pub length: u8,
    /// The sender's session.
    pub mine: [Be16; 2],
    /// The receiver's session.
    pub yours: [Be16; 2],
    /// Microseconds between packets that the sender sends, and that it can receive; and the same of
    /// echo packets, of which there are none.
    pub intervals: [[Be16; 2]; 3],
}

impl Control {
    /// Version 1, no diagnostic.
    pub const VERSION: u8 = 1 << 5;
    /// State: up.
    pub const UP: u8 = 3 << 6;
    /// Flag: the sender is the one that asks (RFC 7880, section 7.3.1).
    pub const DEMAND: u8 = 1 << 1;
    /// Its length, in bytes.
    pub const LENGTH: u8 = size_of::<Self>() as u8;

    /// What asks: of a session, every so many microseconds.
    #[must_use]
    pub const fn request(session: u32, interval_us: u32, multiplier: u8) -> Self {
        let interval = halves(interval_us);
        Self {
            version: Self::VERSION,
            state: Self::UP | Self::DEMAND,
            multiplier,
            length: Self::LENGTH,
            mine: halves(session),
            yours: halves(session),
            intervals: [interval, interval, halves(0)],
        }
    }

    /// Whether it asks for an answer.
    #[inline(always)]
    #[must_use]
    pub const fn is_request(&self) -> bool {
        self.version >> 5 == Self::VERSION >> 5
            && self.length >= Self::LENGTH
            && self.state & Self::DEMAND != 0
    }

    /// The answer (RFC 7880, section 7.2.2).
    #[inline(always)]
    #[must_use]
    pub const fn answer(self) -> Self {
        Self { state: Self::UP, mine: self.yours, yours: self.mine, ..self }
    }

    /// Its bytes.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; size_of::<Self>()] {
        // SAFETY: integers only, no padding (its size is its fields'): every byte is initialised.
        unsafe { core::mem::transmute(self) }
    }

    /// From its bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; size_of::<Self>()]) -> Self {
        // SAFETY: integers only: any bytes are a value.
        unsafe { core::mem::transmute(bytes) }
    }
}

const _: () = assert!(size_of::<Control>() == 24);

const fn halves(word: u32) -> [Be16; 2] {
    [Be16::new((word >> 16) as u16), Be16::new(word as u16)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_gets_an_answer_that_is_no_question() {
        let request = Control::request(0x0102_0304, 10_000, 3);
        assert_eq!(
            request.to_bytes(),
            [0x20, 0xc2, 3, 24, 1, 2, 3, 4, 1, 2, 3, 4, 0, 0, 39, 16, 0, 0, 39, 16, 0, 0, 0, 0]
        );
        assert_eq!(Control::from_bytes(request.to_bytes()), request);
        let answer = request.answer();
        assert!(request.is_request() && !answer.is_request());
        assert_eq!((answer.state, answer.yours), (0xc0, request.mine));
    }
}
