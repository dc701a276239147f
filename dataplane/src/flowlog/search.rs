//! Who had a port of a shared address: the log of flows, read again.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::IpAddr;
use std::time::UNIX_EPOCH;

use jiff::{SignedDuration, Timestamp};
use memchr::memmem::Finder;

use super::file::Files;
use super::record::{Line, Record};

/// The beginning of a flow that is told at its end is known to a tick only.
const BLUR: SignedDuration = SignedDuration::from_millis(2200);

/// Time stamps of files are late by less than this.
const LAG: SignedDuration = SignedDuration::from_secs(1);

/// What is looked for.
#[derive(Clone, Debug)]
pub struct Query {
    /// The VPC.
    pub vnis: BTreeSet<u32>,
    /// The port, or ICMP echo identifier.
    pub port: u16,
    /// `tcp`, `udp` or `icmp`; none: all.
    pub protocol: Option<String>,
    /// Those that were there at some time from this one on,
    pub since: Timestamp,
    /// up to this one.
    pub until: Timestamp,
}

/// Who had the port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// As the log has it; at the end of a flow that goes on, there is none.
    pub record: Record,
    /// Whether it goes on.
    pub live: bool,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Flows and mappings by their beginning.
    pub mappings: Vec<Mapping>,
    /// When the oldest line was written that is kept.
    pub log_since: Option<Timestamp>,
    /// Events in the time in question that the log lacks.
    pub lost: u64,
}

/// What tells a flow or a mapping from others at one time.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    slot: Option<u32>,
    generation: u32,
    protocol: String,
    srcport: u16,
    peer: Option<(IpAddr, Option<u16>)>,
}

impl Key {
    fn of(record: &Record) -> Self {
        let Record { slot, generation, srcport, dstaddr, dstport, .. } = *record;
        let peer = dstaddr.map(|address| (address, dstport));
        Self { slot, generation, protocol: record.protocol.clone(), srcport, peer }
    }
}

impl Query {
    fn is_met(&self, record: &Record) -> bool {
        self.vnis.contains(&record.vni)
            && record.nat_srcport == self.port
            && self.protocol.as_ref().is_none_or(|protocol| *protocol == record.protocol)
    }

    fn was_there(&self, record: &Record) -> bool {
        let end = record.end.as_ref().map(|end| end.end);
        record.start <= self.until && end.is_none_or(|end| end >= self.since)
    }
}

/// Looks through the log, and through `live`: what the table of flows held of this port just
/// before, as lines that tell of beginnings.
pub fn search(files: Option<&Files>, live: Vec<Record>, query: &Query) -> io::Result<Found> {
    let mut search = Search {
        query,
        live: live.into_iter().map(|record| (Key::of(&record), record)).collect(),
        begun: HashMap::new(),
        found: Found::default(),
    };
    let mut opened = files.map_or(Ok(Vec::new()), Files::open)?;
    if let Some(oldest) = opened.last() {
        search.found.log_since = first_time(oldest)?;
    }
    opened.reverse();
    for file in opened {
        // What was written before the time in question is about what had ended by then. The kernel's
        // time stamps of files lag behind.
        if modified(&file)?.duration_since(query.since) >= -LAG {
            search.read(BufReader::with_capacity(1 << 16, file))?;
        }
    }
    Ok(search.finish())
}

fn modified(file: &File) -> io::Result<Timestamp> {
    let since_1970 = file.metadata()?.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(Timestamp::from_millisecond(since_1970.as_millis() as i64).unwrap_or(Timestamp::MAX))
}

/// The time of the first line. The file's offset is left where it was.
fn first_time(file: &File) -> io::Result<Option<Timestamp>> {
    use std::os::unix::fs::FileExt;
    let mut start = [0; 4096];
    let length = file.read_at(&mut start, 0)?;
    let line = start[..length].split(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok(match serde_json::from_slice(line) {
        Ok(Line::Flow(record)) => Some(record.time),
        Ok(Line::Lost { time, .. }) => Some(time),
        Err(_) => None,
    })
}

struct Search<'a> {
    query: &'a Query,
    /// What was in the table and was not met in the log yet.
    live: HashMap<Key, Record>,
    /// What began by the log and has not ended yet.
    begun: HashMap<Key, Record>,
    found: Found,
}

impl Search<'_> {
    fn read(&mut self, mut lines: impl BufRead) -> io::Result<()> {
        let port = format!("\"nat_srcport\":{},", self.query.port);
        let (port, lost) = (Finder::new(&port), Finder::new("\"event\":\"lost\""));
        let mut line = Vec::new();
        loop {
            line.clear();
            if lines.read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            // Reading JSON takes long: only what may be meant is read.
            if port.find(&line).is_none() && lost.find(&line).is_none() {
                continue;
            }
            // A line that a crash tore is none.
            match serde_json::from_slice(&line) {
                Ok(Line::Flow(record)) if self.query.is_met(&record) => self.met(*record),
                Ok(Line::Lost { time, events, .. })
                    if (self.query.since..=self.query.until).contains(&time) =>
                {
                    self.found.lost += events;
                }
                _ => {}
            }
        }
    }

    fn met(&mut self, record: Record) {
        let key = Key::of(&record);
        if record.end.is_none() {
            // One that began there before has ended: that was lost.
            if let Some(former) = self.begun.insert(key, record) {
                self.push(former, false);
            }
            return;
        }
        let mut record = record;
        let is_same = |other: &Record| other.start.duration_since(record.start).abs() <= BLUR;
        if self.live.get(&key).is_some_and(is_same) {
            self.live.remove(&key);
        }
        if let Some(begun) = self.begun.remove(&key) {
            if is_same(&begun) {
                record.start = begun.start;
                record.instance = record.instance.or(begun.instance);
            } else {
                self.push(begun, false);
            }
        }
        self.push(record, false);
    }

    fn push(&mut self, record: Record, live: bool) {
        if self.query.was_there(&record) {
            self.found.mappings.push(Mapping { record, live });
        }
    }

    fn finish(mut self) -> Found {
        for (key, mut record) in std::mem::take(&mut self.live) {
            if let Some(begun) = self.begun.remove(&key) {
                if begun.start.duration_since(record.start).abs() <= BLUR {
                    record.start = begun.start;
                } else {
                    self.push(begun, false);
                }
            }
            self.push(record, true);
        }
        for (_, record) in std::mem::take(&mut self.begun) {
            self.push(record, false);
        }
        self.found.mappings.sort_by_key(|mapping| mapping.record.start);
        self.found
    }
}

#[cfg(test)]
mod tests {
    use warren_abi::flowlog::{FlowEvent, What};
    use warren_abi::maps::{OutKey, Traffic};
    use warren_abi::wire::{Be16, Ip, Ipv4, TCP, UDP};

    use super::*;
    use crate::flowlog::file::Writer;
    use crate::flowlog::owners::{NamedVpc, Names, Owner};
    use crate::flowlog::record::WallClock;

    const VNI: u32 = 100;
    const PORT: u16 = 4100;

    struct Nobody;

    impl Names for Nobody {
        fn owner(&self, ifindex: u32, _: u32) -> Owner {
            Owner { slot: Some(ifindex), ..Owner::default() }
        }
        fn vpc(&self, _: u32) -> Option<NamedVpc> {
            None
        }
    }

    /// A guest's flow with a peer (0: the mapping), as an event at a second.
    #[derive(Clone, Copy)]
    struct Of {
        guest: u32,
        peer: u8,
        port: u16,
        began: u32,
    }

    fn record(clock: WallClock, of: Of, at: u32, what: What) -> Record {
        let peer = match of.peer {
            0 => Ip::UNSPECIFIED,
            last => Ip::v4(Ipv4::new([10, 0, 0, last])),
        };
        let protocol = u32::from(if of.peer == 0 { UDP } else { TCP });
        let event = FlowEvent {
            at_ns: u64::from(at) * warren_abi::flow::TICK_NS,
            sent: Traffic::NONE,
            received: Traffic::NONE,
            key: OutKey {
                ifindex: of.guest,
                generation: 1,
                peer,
                guest_port: Be16::new(1000),
                peer_port: Be16::new(80),
                protocol,
            },
            vni: VNI,
            began: of.began,
            last: at,
            port: Be16::new(of.port),
            what: what as u8,
            reserved: 0,
        };
        Record::new(&event, "h1", &Nobody, clock).expect("it is known")
    }

    struct Log {
        _directory: tempfile::TempDir,
        files: Files,
        writer: Writer,
        clock: WallClock,
    }

    impl Log {
        fn new(max_bytes: u64) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let files = Files { path: directory.path().join("flows"), max_bytes, keep: 100 };
            let writer = Writer::open(files.clone()).unwrap();
            Self { _directory: directory, files, writer, clock: WallClock::now() }
        }

        fn tell(&mut self, of: Of, at: u32, what: What) {
            let line = Line::Flow(Box::new(record(self.clock, of, at, what)));
            let mut line = serde_json::to_vec(&line).unwrap();
            line.push(b'\n');
            self.writer.append(&line).unwrap();
        }

        /// Who had the port between two ticks: the slot, its beginning and end, whether it lives.
        fn ask(&self, live: &[Of], since: u32, until: u32) -> Vec<(u32, u32, Option<u32>, bool)> {
            let (since, until) = (self.clock.at_tick(since), self.clock.at_tick(until));
            let query = Query { vnis: [VNI].into(), port: PORT, protocol: None, since, until };
            let live = live.iter().map(|of| record(self.clock, *of, of.began, What::Begun));
            let found = search(Some(&self.files), live.collect(), &query).unwrap();
            let tick = |time: Timestamp| {
                let ticks = (0..1000).find(|tick| self.clock.at_tick(*tick) == time);
                ticks.expect("it is a tick's")
            };
            let mapping = |Mapping { record, live }: Mapping| {
                let end = record.end.map(|end| tick(end.end));
                (record.slot.unwrap(), tick(record.start), end, live)
            };
            found.mappings.into_iter().map(mapping).collect()
        }
    }

    #[test]
    fn who_had_a_port_is_found_for_each_time() {
        let mut log = Log::new(1 << 20);
        let (first, second) = (
            Of { guest: 1, peer: 0, port: PORT, began: 10 },
            Of { guest: 2, peer: 0, port: PORT, began: 30 },
        );
        let other = Of { port: PORT + 1, guest: 3, ..first };
        log.tell(first, 10, What::Begun);
        log.tell(other, 11, What::Begun);
        log.tell(first, 20, What::Expired);
        log.tell(second, 30, What::Begun);
        assert_eq!(log.ask(&[second], 0, 9), []);
        assert_eq!(log.ask(&[second], 10, 10), [(1, 10, Some(20), false)]);
        assert_eq!(log.ask(&[second], 15, 16), [(1, 10, Some(20), false)]);
        assert_eq!(log.ask(&[second], 21, 29), []);
        assert_eq!(log.ask(&[second], 500, 500), [(2, 30, None, true)]);
        let both = [(1, 10, Some(20), false), (2, 30, None, true)];
        assert_eq!(log.ask(&[second], 0, 999), both);
        // That it ended was lost: nobody knows when.
        assert_eq!(log.ask(&[], 500, 500), [(2, 30, None, false)]);
        log.tell(second, 40, What::Expired);
        // It ended between a look at the table and one at the log.
        assert_eq!(log.ask(&[second], 35, 500), [(2, 30, Some(40), false)]);
    }

    #[test]
    fn a_beginning_that_is_not_in_the_log_is_known_from_the_end_and_the_table() {
        let mut log = Log::new(1 << 20);
        let ended = Of { guest: 1, peer: 7, port: PORT, began: 5 };
        let lives = Of { guest: 2, peer: 8, port: PORT, began: 6 };
        log.tell(ended, 9, What::Closed);
        let expected = [(1, 5, Some(9), false), (2, 6, None, true)];
        assert_eq!(log.ask(&[lives], 7, 7), expected, "TCP's port serves several");
        assert_eq!(log.ask(&[lives], 4, 5), expected[..1]);
    }

    #[test]
    fn the_same_flow_again_is_another() {
        let mut log = Log::new(1 << 20);
        let one = Of { guest: 1, peer: 7, port: PORT, began: 5 };
        let again = Of { began: 50, ..one };
        log.tell(one, 5, What::Begun);
        log.tell(one, 9, What::Closed);
        log.tell(again, 50, What::Begun);
        assert_eq!(log.ask(&[again], 0, 999), [(1, 5, Some(9), false), (1, 50, None, true)]);
        // The first one's end was lost.
        let mut log = Log::new(1 << 20);
        log.tell(one, 5, What::Begun);
        log.tell(again, 60, What::Closed);
        assert_eq!(log.ask(&[], 0, 999), [(1, 5, None, false), (1, 50, Some(60), false)]);
    }

    #[test]
    fn rotated_files_are_searched_and_torn_lines_passed_over() {
        let mut log = Log::new(600);
        let of = Of { guest: 1, peer: 7, port: PORT, began: 5 };
        log.tell(of, 5, What::Begun);
        log.writer.append(b"{\"nat_srcport\":4100, torn\n").unwrap();
        for filler in 0..10 {
            log.tell(Of { port: 9000 + filler, ..of }, 6, What::Begun);
        }
        log.tell(of, 300, What::Expired);
        assert!(log.files.open().unwrap().len() > 4);
        assert_eq!(log.ask(&[], 7, 7), [(1, 5, Some(300), false)]);
        let lost = Line::lost("h1", 12, WallClock::now());
        let mut line = serde_json::to_vec(&lost).unwrap();
        line.push(b'\n');
        log.writer.append(&line).unwrap();
        let now = Timestamp::now();
        let minute = SignedDuration::from_secs(60);
        let (since, until) = (now - minute, now + minute);
        let query =
            Query { vnis: [VNI].into(), port: PORT, protocol: Some("udp".into()), since, until };
        let found = search(Some(&log.files), vec![], &query).unwrap();
        assert_eq!((found.lost, found.mappings.len()), (12, 0), "a flow of TCP");
        assert_eq!(found.log_since, Some(log.clock.at_tick(5)));
    }

    #[test]
    fn files_that_were_written_before_are_not_read() {
        let mut log = Log::new(1 << 20);
        log.tell(Of { guest: 1, peer: 7, port: PORT, began: 5 }, 5, What::Begun);
        let since = Timestamp::now() + SignedDuration::from_secs(3600);
        let query = Query { vnis: [VNI].into(), port: PORT, protocol: None, since, until: since };
        assert_eq!(search(Some(&log.files), vec![], &query).unwrap().mappings, []);
        let without = search(None, vec![], &query).unwrap();
        assert_eq!(without, Found::default(), "there is no log");
    }
}
