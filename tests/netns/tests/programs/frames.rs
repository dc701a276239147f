//! Frames: valid ones, and what can be made of them.

use etherparse::{IcmpEchoHeader, Icmpv4Type, PacketBuilder, icmpv4};
use proptest::prelude::*;

use crate::run::MTU;

/// The shortest frame that the kernel runs a program on: an Ethernet header, and a byte behind it.
pub const SHORTEST: usize = 15;

/// Whether the kernel runs a program on it: not with less than the IP header that its type names.
/// Shorter ones come by real interfaces only.
pub fn is_runnable(frame: &[u8]) -> bool {
    match frame[12..14] {
        [0x08, 0x00] => frame.len() >= 34,
        [0x86, 0xdd] => frame.len() >= 54,
        _ => frame.len() >= SHORTEST,
    }
}

/// Who sends to whom.
#[derive(Clone, Copy)]
pub struct Way {
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
    pub source: [u8; 4],
    pub destination: [u8; 4],
    pub source_port: u16,
    pub destination_port: u16,
}

impl Way {
    /// A frame of each kind that the programs tell apart, whole and right.
    pub fn frames(&self) -> Vec<Vec<u8>> {
        let ip = || {
            PacketBuilder::ethernet2(self.source_mac, self.destination_mac).ipv4(
                self.source,
                self.destination,
                64,
            )
        };
        let (from, to) = (self.source_port, self.destination_port);
        let mut frames = vec![Vec::new(); 7];
        let whole = "a vector takes everything";
        ip().udp(from, to).write(&mut frames[0], b"payload").expect(whole);
        let options = [
            etherparse::TcpOptionElement::MaximumSegmentSize(1460),
            etherparse::TcpOptionElement::Noop,
            etherparse::TcpOptionElement::WindowScale(7),
        ];
        let syn = ip().tcp(from, to, 1, 64_000).syn().options(&options).expect("they fit");
        syn.write(&mut frames[1], &[]).expect(whole);
        ip().tcp(from, to, 1, 64_000).ack(1).write(&mut frames[2], b"data").expect(whole);
        let echo = IcmpEchoHeader { id: from, seq: 1 };
        ip().icmpv4(Icmpv4Type::EchoRequest(echo)).write(&mut frames[3], b"ping").expect(whole);
        let echo = IcmpEchoHeader { id: to, seq: 1 };
        ip().icmpv4(Icmpv4Type::EchoReply(echo)).write(&mut frames[4], b"pong").expect(whole);
        let mut about = Vec::new();
        PacketBuilder::ipv4(self.destination, self.source, 60)
            .udp(to, from)
            .write(&mut about, b"")
            .expect(whole);
        let port = Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port);
        ip().icmpv4(port).write(&mut frames[5], &about).expect(whole);
        frames[6] = self.arp(1);
        frames
    }

    /// An ARP message for the destination.
    pub fn arp(&self, operation: u8) -> Vec<u8> {
        let mut frame = [self.destination_mac, self.source_mac].concat();
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
        frame.extend(self.source_mac);
        frame.extend(self.source);
        frame.extend([0; 6]);
        frame.extend(self.destination);
        frame
    }
}

/// What may happen to a frame.
#[derive(Clone, Debug)]
pub enum Change {
    /// This byte becomes another.
    Set(prop::sample::Index, u8),
    /// A byte of the headers does.
    SetHeader(usize, u8),
    /// It ends early.
    Cut(prop::sample::Index),
    /// It goes on.
    Extend(Vec<u8>),
    /// Far beyond any MTU here.
    Pad(usize),
    /// It gets a VLAN tag.
    Tag(u16),
    /// It gets two.
    TagTwice,
    /// The IP header's length and fragment fields.
    Lengths(u8, u16, u16),
}

impl Change {
    fn apply(self, frame: &mut Vec<u8>) {
        match self {
            Self::Set(index, value) => *index.get_mut(frame) = value,
            Self::SetHeader(index, value) => {
                if let Some(byte) = frame.get_mut(index) {
                    *byte = value;
                }
            }
            Self::Cut(index) => frame.truncate(index.index(frame.len() + 1).max(SHORTEST)),
            Self::Extend(bytes) => frame.extend(bytes),
            Self::Pad(length) => frame.resize(frame.len().max(length), 0xa5),
            Self::Tag(tag) => {
                frame.splice(12..12, [0x81, 0, (tag >> 8) as u8, tag as u8]);
            }
            Self::TagTwice => {
                frame.splice(12..12, [0x88, 0xa8, 0, 1, 0x81, 0, 0, 1]);
            }
            Self::Lengths(version, total, fragment) => {
                if let Some(header) = frame.get_mut(14..22) {
                    header[0] = version;
                    header[2..4].copy_from_slice(&total.to_be_bytes());
                    header[6..8].copy_from_slice(&fragment.to_be_bytes());
                }
            }
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        any::<(prop::sample::Index, u8)>().prop_map(|(index, value)| Change::Set(index, value)),
        (12..64usize, any::<u8>()).prop_map(|(index, value)| Change::SetHeader(index, value)),
        any::<prop::sample::Index>().prop_map(Change::Cut),
        prop::collection::vec(any::<u8>(), 0..64).prop_map(Change::Extend),
        (SHORTEST..3000usize).prop_map(Change::Pad),
        any::<u16>().prop_map(Change::Tag),
        Just(Change::TagTwice),
        (
            prop_oneof![Just(0x45), any::<u8>()],
            prop_oneof![0..64u16, any::<u16>()],
            prop_oneof![Just(0), Just(0x4000), any::<u16>()]
        )
            .prop_map(|(version, total, fragment)| Change::Lengths(version, total, fragment)),
    ]
}

/// Frames that were valid once, or never.
pub fn malformed(valid: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let changed = (prop::sample::select(valid), prop::collection::vec(change(), 0..4));
    let changed = changed.prop_map(|(mut frame, changes)| {
        for change in changes {
            change.apply(&mut frame);
        }
        frame
    });
    let random = prop::collection::vec(any::<u8>(), SHORTEST..200);
    prop_oneof![8 => changed, 1 => random].prop_filter("too short", |frame| is_runnable(frame))
}

/// Each frame cut off at every length, and with each of its first 64 bytes set to many values.
pub fn exhaustive(valid: &[Vec<u8>]) -> impl Iterator<Item = Vec<u8>> {
    valid.iter().flat_map(|frame| {
        let cut = (SHORTEST..=frame.len()).map(|length| frame[..length].to_vec());
        let set = (12..frame.len().min(64)).flat_map(move |index| {
            (0..=255).step_by(5).map(move |value| {
                let mut frame = frame.clone();
                frame[index] = value;
                frame
            })
        });
        cut.chain(set).filter(|frame| is_runnable(frame))
    })
}

/// An IPv4 packet behind an Ethernet header that a program may pass: the least that must hold.
pub struct Packet<'a>(&'a [u8]);

impl<'a> Packet<'a> {
    /// The packet, if the frame is one: no options, no fragment, as long as it says, of a protocol
    /// that is translated.
    pub fn new(frame: &'a [u8]) -> Option<Self> {
        if frame.len() < 42 || frame[12..15] != [8, 0, 0x45] {
            return None;
        }
        let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        let fragment = u16::from_be_bytes([frame[20], frame[21]]) & 0x3fff;
        let fits = total + 14 <= frame.len() && fragment == 0;
        let headers = match frame[23] {
            17 | 1 => 28,
            6 => 20 + usize::from(*frame.get(46)? >> 4) * 4,
            _ => return None,
        };
        let whole = headers >= 28 && total >= headers && (frame[23] != 6 || headers >= 40);
        (fits && whole).then_some(Self(frame))
    }

    pub fn source_mac(&self) -> &[u8] {
        &self.0[6..12]
    }

    pub fn source(&self) -> &[u8] {
        &self.0[26..30]
    }

    pub fn destination(&self) -> &[u8] {
        &self.0[30..34]
    }

    pub fn ttl(&self) -> u8 {
        self.0[22]
    }

    pub fn total(&self) -> u16 {
        u16::from_be_bytes([self.0[16], self.0[17]])
    }

    /// Type of an ICMP message.
    pub fn icmp(&self) -> Option<u8> {
        (self.0[23] == 1).then(|| self.0[34])
    }

    /// Port of the receiver.
    pub fn destination_port(&self) -> u16 {
        u16::from_be_bytes([self.0[36], self.0[37]])
    }
}

/// Whether it is what a program leaves to those of fragments: a fragment, or too long for the
/// tunnel and without DF; unchanged, but for its tag.
pub fn is_left(frame: &[u8], left: &[u8]) -> bool {
    let fragment = u16::from_be_bytes([frame[20], frame[21]]);
    let is_fragment = fragment & 0x3fff != 0;
    let is_divisible = frame.len() > 14 + usize::from(MTU) && fragment & 0x4000 == 0;
    frame[12..15] == [8, 0, 0x45] && (is_fragment || is_divisible) && frame[12..] == left[12..]
}
