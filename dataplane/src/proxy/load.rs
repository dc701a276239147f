//! How much a proxy has to do, for the control plane: there may have to be more of them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use warren_proto::v1;

use crate::datapath::Carried;

/// Remembers what was counted last.
#[derive(Debug, Default)]
pub(super) struct Meter(Mutex<Option<Counted>>);

#[derive(Debug)]
struct Counted {
    at: Instant,
    carried: HashMap<u32, Carried>,
    /// Of all processors, in ticks: time that was spent, and time in all.
    busy: u64,
    total: u64,
}

impl Meter {
    /// How much there was since the last time, given what interfaces in VPCs carried in all, by their
    /// indices. Nothing the first time.
    pub fn measure(&self, carried: HashMap<u32, Carried>) -> v1::ProxyLoad {
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let (busy, total) = processors(&stat).unwrap_or_default();
        let now = Counted { at: Instant::now(), carried, busy, total };
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let load = last.as_ref().map(|last| now.since(last)).unwrap_or_default();
        *last = Some(now);
        load
    }
}

impl Counted {
    fn since(&self, last: &Self) -> v1::ProxyLoad {
        let seconds = (self.at - last.at).as_secs_f64().max(0.001);
        let both =
            self.carried.iter().filter_map(|(link, now)| Some((now, last.carried.get(link)?)));
        let mut sum = Carried::default();
        for (now, before) in both {
            sum = sum.plus(now.since(*before));
        }
        let rate = |count: u64| (count as f64 / seconds) as u64;
        let (busy, total) = (self.busy - last.busy.min(self.busy), self.total.max(last.total));
        let total = (total - last.total).max(1);
        v1::ProxyLoad {
            bits_per_second: rate((sum.sent.bytes + sum.received.bytes) * 8),
            packets_per_second: rate(sum.sent.packets + sum.received.packets),
            cpu_permille: (busy * 1000 / total).min(1000) as u32,
        }
    }
}

/// The time that all processors spent, and all time, of `/proc/stat` (`proc_stat(5)`).
fn processors(stat: &str) -> Option<(u64, u64)> {
    let numbers = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    let numbers: Vec<u64> = numbers.map(str::parse).collect::<Result<_, _>>().ok()?;
    let [user, nice, system, idle, waiting, interrupts, soft, stolen, ..] = numbers[..] else {
        return None;
    };
    let busy = user + nice + system + interrupts + soft + stolen;
    Some((busy, busy + idle + waiting))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use warren_abi::maps::Traffic;

    use super::*;

    #[test]
    fn rates_are_of_the_time_between_two_counts() {
        let carried = |packets, bytes| {
            let traffic = Traffic { packets, bytes };
            [(7, Carried { sent: traffic, received: traffic })].into()
        };
        let at = Instant::now();
        let last = Counted { at, carried: carried(10, 1000), busy: 100, total: 200 };
        let at = at + Duration::from_secs(2);
        let mut now = Counted { at, carried: carried(20, 3000), busy: 150, total: 400 };
        now.carried.insert(8, Carried::default());
        let load = now.since(&last);
        assert_eq!((load.bits_per_second, load.packets_per_second), (16_000, 10));
        assert_eq!(load.cpu_permille, 250);
    }

    #[test]
    fn proc_stat_is_read() {
        let stat = "cpu  10 1 5 100 3 2 4 1 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(processors(stat), Some((23, 126)));
        assert_eq!(processors("cpu 1 2"), None);
    }
}
