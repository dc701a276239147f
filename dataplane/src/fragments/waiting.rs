//! Fragments that wait for their datagram's first one.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use warren_abi::fragment::Tag;

/// Fragments that wait at one time, at most.
const ROOM: usize = 1024;
/// Of them, of one slot's or VPC's: more than a datagram of 64 KB has in 1,500 bytes each.
const SHARE: usize = 64;

/// Fragments, by when their waiting ends. All memory is bounded: each is as long as the tunnel's
/// MTU, at most.
#[derive(Default)]
pub struct Waiting {
    /// By the end, and by a number that tells equal ones apart.
    frames: BTreeMap<(Instant, u64), (Owner, Vec<u8>)>,
    /// How many are whose.
    shares: HashMap<Owner, usize>,
    count: u64,
}

/// Origin and owner of a [`Tag`].
type Owner = (u8, u32);

impl Waiting {
    /// Has a fragment wait. If there is no room for it, it is returned, as one that has waited long
    /// enough.
    pub fn push(&mut self, now: Instant, tag: Tag, mut frame: Vec<u8>) -> Option<Vec<u8>> {
        let owner = (tag.origin, tag.owner);
        let share = self.shares.entry(owner).or_default();
        if *share >= SHARE || self.frames.len() >= ROOM {
            if *share == 0 {
                self.shares.remove(&owner);
            }
            Tag { attempt: Tag::ATTEMPTS, ..tag }.write(&mut frame);
            return Some(frame);
        }
        *share += 1;
        self.count += 1;
        let due = now + Duration::from_millis(tag.delay_ms());
        self.frames.insert((due, self.count), (owner, frame));
        None
    }

    /// When the next one has waited.
    pub fn next(&self) -> Option<Instant> {
        self.frames.first_key_value().map(|((due, _), _)| *due)
    }

    /// One that has waited until now.
    pub fn due(&mut self, now: Instant) -> Option<Vec<u8>> {
        let first = self.frames.first_entry().filter(|first| first.key().0 <= now)?;
        let (owner, frame) = first.remove();
        if let Some(share) = self.shares.get_mut(&owner) {
            *share -= 1;
            if *share == 0 {
                self.shares.remove(&owner);
            }
        }
        Some(frame)
    }
}

#[cfg(test)]
mod tests {
    use warren_abi::fragment::origin;

    use super::*;

    fn frame(tag: Tag) -> Vec<u8> {
        let mut frame = vec![0; 64];
        tag.write(&mut frame);
        frame
    }

    #[test]
    fn a_fragment_comes_back_when_it_waited_a_second_in_all() {
        let start = Instant::now();
        let (mut waiting, mut now) = (Waiting::default(), start);
        let mut tag = Tag::new(origin::VPC, 7, 0);
        while let Some(again) = tag.again() {
            tag = again;
            assert_eq!(waiting.push(now, tag, frame(tag)), None);
            assert_eq!(waiting.due(now), None);
            now = waiting.next().expect("it waits");
            assert_eq!(waiting.due(now), Some(frame(tag)));
            assert_eq!(waiting.next(), None);
        }
        assert_eq!(now - start, Duration::from_millis(1023));
    }

    #[test]
    fn nobody_takes_more_than_a_share_and_all_together_have_a_bound() {
        let now = Instant::now();
        let mut waiting = Waiting::default();
        let (mut taken, mut refused) = (0, 0);
        for owner in 0..64 {
            let tag = Tag::new(origin::SLOT, owner, 1).again().expect("it is the first time");
            for index in 0..2 * SHARE {
                match waiting.push(now, tag, frame(tag)) {
                    None => taken += 1,
                    Some(back) => {
                        refused += 1;
                        let back = Tag::of_frame(&back).expect("it is tagged");
                        assert_eq!(back.again(), None, "it does not wait again");
                        assert!(index >= SHARE || taken == ROOM);
                    }
                }
            }
        }
        assert_eq!((taken, taken + refused), (ROOM, 64 * 2 * SHARE));
        let later = now + Duration::from_secs(1);
        assert_eq!(std::iter::from_fn(|| waiting.due(later)).count(), ROOM);
        assert!(waiting.shares.is_empty() && waiting.next().is_none());
    }
}
