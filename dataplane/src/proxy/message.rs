//! What proxies tell hosts and each other: [`warren_abi::claim`].

use warren_abi::claim::{Entry, Header, kind};

/// Most entries in one packet between proxies.
const MOST: usize = 150;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// One of [`kind`].
    pub kind: u8,
    /// What it tells of.
    pub entries: Vec<Entry>,
}

impl Message {
    /// What it is on the wire.
    pub fn to_bytes(&self) -> Vec<u8> {
        let count = (self.entries.len() as u16).to_be_bytes();
        let mut bytes = vec![Header::VERSION, self.kind, count[0], count[1]];
        for entry in &self.entries {
            bytes.push(entry.flags);
            bytes.extend(entry.vni);
            bytes.extend(entry.sequence().to_be_bytes());
        }
        bytes
    }

    /// None if it is none.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let ([version, kind, count @ ..], rest) = bytes.split_first_chunk::<4>()?;
        let count = usize::from(u16::from_be_bytes(*count));
        let (entries, rest) = rest.as_chunks::<8>();
        if *version != Header::VERSION || entries.len() != count || !rest.is_empty() {
            return None;
        }
        let entry = |[flags, a, b, c, sequence @ ..]: &[u8; 8]| {
            let vni = u32::from_be_bytes([0, *a, *b, *c]);
            Entry::new(vni, u32::from_be_bytes(*sequence), *flags)
        };
        Some(Self { kind: *kind, entries: entries.iter().map(entry).collect() })
    }

    /// All that a proxy says, in packets.
    pub fn statements(entries: &[Entry]) -> Vec<Self> {
        let message =
            |entries: &[Entry]| Self { kind: kind::STATEMENTS, entries: entries.to_vec() };
        // One that says nothing tells that the proxy is there.
        if entries.is_empty() {
            return vec![message(&[])];
        }
        entries.chunks(MOST).map(message).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry() -> impl Strategy<Value = Entry> {
        (0..1u32 << 24, any::<u32>(), any::<u8>())
            .prop_map(|(vni, sequence, flags)| Entry::new(vni, sequence, flags))
    }

    proptest! {
        #[test]
        fn a_message_is_read_as_it_was_written(
            kind in any::<u8>(), entries in prop::collection::vec(entry(), 0..300),
        ) {
            let message = Message { kind, entries };
            prop_assert_eq!(Message::from_bytes(&message.to_bytes()), Some(message.clone()));
            for packet in Message::statements(&message.entries) {
                prop_assert!(packet.to_bytes().len() <= 1232, "fits any path of IPv6");
            }
        }

        #[test]
        fn whatever_comes_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Some(message) = Message::from_bytes(&bytes) {
                prop_assert_eq!(message.entries.len() * 8 + 4, bytes.len());
            }
        }
    }
}
