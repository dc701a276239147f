//! Which hosts were told of which claims, and when they are told again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use warren_abi::claim::{Entry, MOST, kind};
use warren_abi::wire::Ip;

use super::message::Message;

/// When a host that does not answer is told again: it may not know of the VPC yet.
const AGAIN: [Duration; 8] = [
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(20),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
];
/// When everyone is told again, whatever became of it.
const REFRESH: Duration = Duration::from_secs(10);

/// What hosts are told.
#[derive(Debug, Default)]
pub struct Told {
    /// What to tell next, and to whom.
    due: BTreeSet<(Instant, Ip, u32)>,
    /// By VNI and host.
    entries: HashMap<u32, BTreeMap<Ip, Telling>>,
}

#[derive(Debug)]
struct Telling {
    sequence: u32,
    due: Instant,
    /// How often it was told in vain.
    times: usize,
}

impl Told {
    /// These are the hosts to be told of a claim, from now on.
    pub fn tell(&mut self, vni: u32, sequence: u32, hosts: &BTreeSet<Ip>, now: Instant) {
        let known = self.entries.entry(vni).or_default();
        known.retain(|host, telling| {
            let stays = hosts.contains(host) && telling.sequence == sequence;
            stays || !self.due.remove(&(telling.due, *host, vni))
        });
        for host in hosts {
            known.entry(*host).or_insert_with(|| {
                self.due.insert((now, *host, vni));
                Telling { sequence, due: now, times: 0 }
            });
        }
    }

    /// Nobody is told of a VPC any more.
    pub fn forget(&mut self, vni: u32) {
        for (host, telling) in self.entries.remove(&vni).unwrap_or_default() {
            self.due.remove(&(telling.due, host, vni));
        }
    }

    /// A host knows of a claim. Whether that is a later one than it was told of.
    pub fn known(&mut self, host: Ip, vni: u32, sequence: u32, now: Instant) -> bool {
        let telling = self.entries.get_mut(&vni).and_then(|hosts| hosts.get_mut(&host));
        let Some(telling) = telling else { return false };
        let ahead = sequence.wrapping_sub(telling.sequence).cast_signed();
        if ahead >= 0 {
            self.due.remove(&(telling.due, host, vni));
            (telling.due, telling.times) = (now + REFRESH, 0);
            self.due.insert((telling.due, host, vni));
        }
        ahead > 0
    }

    /// When something is due next.
    pub fn next(&self) -> Option<Instant> {
        self.due.first().map(|(due, ..)| *due)
    }

    /// What is to be sent now.
    pub fn packets(&mut self, now: Instant) -> Vec<(Ip, Message)> {
        let mut by_host = BTreeMap::<Ip, Vec<Entry>>::new();
        while let Some(&(due, host, vni)) = self.due.first() {
            if due > now {
                break;
            }
            self.due.pop_first();
            let telling = self.entries.get_mut(&vni).and_then(|hosts| hosts.get_mut(&host));
            let Some(telling) = telling else { continue };
            by_host.entry(host).or_default().push(Entry::new(vni, telling.sequence, Entry::OWNER));
            telling.due = now + AGAIN.get(telling.times).copied().unwrap_or(REFRESH);
            telling.times += 1;
            self.due.insert((telling.due, host, vni));
        }
        let packets = by_host.into_iter().flat_map(|(host, entries)| {
            let message =
                |entries: &[Entry]| Message { kind: kind::CLAIMS, entries: entries.to_vec() };
            entries.chunks(MOST).map(|entries| (host, message(entries))).collect::<Vec<_>>()
        });
        packets.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn host(last: u8) -> Ip {
        Ipv4Addr::new(192, 0, 2, last).into()
    }

    #[test]
    fn hosts_are_told_until_they_know_and_now_and_then() {
        let (mut told, start) = (Told::default(), Instant::now());
        told.tell(7, 100, &[host(1), host(2)].into(), start);
        assert_eq!(told.packets(start).len(), 2);
        assert_eq!(told.packets(start), []);
        assert!(!told.known(host(1), 7, 99, start), "of before");
        assert!(!told.known(host(1), 7, 100, start));
        let soon = start + AGAIN[0];
        assert_eq!(told.packets(soon).iter().map(|(host, _)| *host).collect::<Vec<_>>(), [host(2)]);
        let mut count = 0;
        let mut now = soon;
        while let Some(next) = told.next().filter(|next| *next < start + REFRESH) {
            now = next;
            count += told.packets(now).len();
        }
        assert_eq!(count, AGAIN.len() - 1, "until {:?}", now - start);
        assert_eq!(told.packets(start + REFRESH).len(), 1, "who knew is told again");
    }

    #[test]
    fn a_new_claim_takes_the_place_of_the_former_and_a_new_host_is_told() {
        let (mut told, now) = (Told::default(), Instant::now());
        told.tell(7, 100, &[host(1)].into(), now);
        told.packets(now);
        assert!(told.known(host(1), 7, 101, now), "another claimed it");
        told.tell(7, 100, &[host(1), host(2)].into(), now);
        assert_eq!(told.packets(now).len(), 1, "the one that is new");
        told.tell(7, 101, &[host(2)].into(), now);
        let [(to, message)] = &told.packets(now)[..] else { panic!() };
        assert_eq!((*to, message.entries[0].sequence()), (host(2), 101));
        told.forget(7);
        assert_eq!((told.next(), told.packets(now + REFRESH)), (None, vec![]));
    }

    #[test]
    fn what_one_host_is_told_of_goes_in_few_packets() {
        let (mut told, now) = (Told::default(), Instant::now());
        for vni in 1..=40 {
            told.tell(vni, 1, &[host(1)].into(), now);
        }
        let counts: Vec<_> =
            told.packets(now).iter().map(|(_, message)| message.entries.len()).collect();
        assert_eq!(counts, [16, 16, 8]);
    }
}
