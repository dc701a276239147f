//! Whether a VPC can be reached, decided without any I/O: by what comes from there, and when nothing
//! does, by asking a neighbour (ARP, whose answer tells of both directions).

use std::time::{Duration, Instant};

/// In a VPC where something was going on, a silence of so long is suspect;
const QUIET: Duration = Duration::from_millis(30);
/// in one where nothing is, neighbours are asked so often.
const IDLE: Duration = Duration::from_secs(1);
/// For so long after a packet, a VPC is one where something is going on.
const BUSY: Duration = Duration::from_secs(1);
/// Between two questions of which the first is not answered yet.
const INTERVAL: Duration = Duration::from_millis(10);
/// The same in a VPC that is not reached.
const SLOW: Duration = Duration::from_millis(200);
/// So many questions in a row go unanswered until a VPC counts as not reached.
const MULTIPLIER: u32 = 6;

/// What is known of one VPC.
#[derive(Debug)]
pub struct Reach {
    /// When something came last, by the programs' clock: it only tells one packet from another.
    heard_ns: u64,
    heard_at: Instant,
    busy_until: Option<Instant>,
    /// Questions since then, and when the next is due.
    asked: u32,
    next: Instant,
}

impl Reach {
    /// Of a VPC from which something came last at `heard_ns`; 0: never.
    pub fn new(heard_ns: u64, now: Instant) -> Self {
        Self { heard_ns, heard_at: now, busy_until: None, asked: 0, next: now }
    }

    /// Takes in when something came last. Whether somebody is to be asked now, if there is anybody.
    pub fn turn(&mut self, heard_ns: u64, is_anybody: bool, now: Instant) -> bool {
        if heard_ns != self.heard_ns {
            // What is not an answer tells that something is going on.
            if self.asked == 0 {
                self.busy_until = Some(now + BUSY);
            }
            (self.heard_ns, self.heard_at, self.asked) = (heard_ns, now, 0);
            return false;
        }
        let is_busy = self.busy_until.is_some_and(|until| now < until);
        let patience = if is_busy { QUIET } else { IDLE };
        let is_due = now >= if self.asked == 0 { self.heard_at + patience } else { self.next };
        if is_due && is_anybody {
            self.asked = self.asked.saturating_add(1);
            self.next = now + if self.is_reached() { INTERVAL } else { SLOW };
        }
        is_due && is_anybody
    }

    /// Something is to be going on from now on.
    pub fn expect(&mut self, now: Instant) {
        self.busy_until = Some(now + BUSY);
    }

    /// How often somebody was asked since something came.
    pub fn asked(&self) -> u32 {
        self.asked
    }

    /// Whether the VPC is reached, as far as is known: where nobody ever was heard, nobody may be.
    pub fn is_reached(&self) -> bool {
        self.heard_ns == 0 || self.asked <= MULTIPLIER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(5);

    /// Turns every 5 ms, for so long; the times at which somebody was asked, in ms.
    fn turns(reach: &mut Reach, from: &mut Instant, heard_ns: u64, time: Duration) -> Vec<u128> {
        let (begin, mut asked) = (*from, Vec::new());
        while *from < begin + time {
            *from += STEP;
            if reach.turn(heard_ns, true, *from) {
                asked.push((*from - begin).as_millis());
            }
        }
        asked
    }

    #[test]
    fn a_busy_vpc_that_falls_silent_is_lost_within_100_ms() {
        let mut now = Instant::now();
        let mut reach = Reach::new(0, now);
        turns(&mut reach, &mut now, 7, STEP);
        let asked = turns(&mut reach, &mut now, 7, Duration::from_millis(60));
        assert_eq!((asked, reach.is_reached()), (vec![30, 40, 50, 60], true));
        turns(&mut reach, &mut now, 7, Duration::from_millis(30));
        assert!(!reach.is_reached());
        let asked = turns(&mut reach, &mut now, 7, Duration::from_secs(2));
        assert!(!reach.is_reached() && asked.len() == 10, "{asked:?}");
        turns(&mut reach, &mut now, 8, STEP);
        assert!(reach.is_reached(), "one answer is enough");
    }

    #[test]
    fn an_idle_vpc_that_fell_silent_is_lost_as_fast_when_something_is_expected() {
        let mut now = Instant::now();
        let mut reach = Reach::new(7, now);
        turns(&mut reach, &mut now, 7, Duration::from_millis(500));
        assert!(reach.is_reached() && reach.asked() == 0);
        reach.expect(now);
        turns(&mut reach, &mut now, 7, Duration::from_millis(90));
        assert!(!reach.is_reached());
    }

    #[test]
    fn a_busy_vpc_is_asked_nothing_and_an_idle_one_now_and_then() {
        let mut now = Instant::now();
        let mut reach = Reach::new(0, now);
        for heard in 1..1000 {
            assert!(turns(&mut reach, &mut now, heard, STEP).is_empty());
        }
        let mut heard = 1000;
        let mut asked = 0;
        for _ in 0..2000 {
            if !turns(&mut reach, &mut now, heard, STEP).is_empty() {
                (asked, heard) = (asked + 1, heard + 1);
            }
        }
        assert!((35..50).contains(&asked), "{asked} in 10 s: for a second often, then once each");
    }

    #[test]
    fn where_nobody_ever_was_nobody_is_missed() {
        let mut now = Instant::now();
        let mut reach = Reach::new(0, now);
        let asked = turns(&mut reach, &mut now, 0, Duration::from_secs(10));
        assert!(reach.is_reached() && asked.len() > 4);
        let mut reach = Reach::new(7, now);
        for _ in 0..1000 {
            now += STEP;
            assert!(!reach.turn(7, false, now) && reach.is_reached(), "nobody can be asked");
        }
    }
}
