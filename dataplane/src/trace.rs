//! The stages of a start, as spans for whoever subscribes to them.
//!
//! A microVM goes through most of them in a process of its own, and long before it is asked for: a
//! span is made when its stage is over, and has its beginning and its duration as fields.

use tracing::Span;
use uuid::Uuid;
use warren_proto::v1::StartTimings;
use warren_vmm::control::Timeline;

use crate::clock::Clock;

/// The span `start` of an instance, which all that its start logs is in.
///
/// `slot`, `tier` (empty: the pool was empty) and `duration_ns` (from the request until the guest said
/// that it is ready) are filled in by [`ready`].
pub fn start(id: Uuid, vpc: &str) -> Span {
    use tracing::field::Empty;
    tracing::info_span!(
        "start",
        instance = %id,
        vpc,
        slot = Empty,
        tier = Empty,
        duration_ns = Empty
    )
}

/// The instance is ready: its stages become spans `stage` in that of its start.
pub fn ready(
    start: &Span,
    id: Uuid,
    slot: u32,
    clock: Clock,
    timings: &StartTimings,
    timeline: &Timeline,
) {
    start
        .record("slot", slot)
        .record("tier", &*timings.tier)
        .record("duration_ns", timings.ready_ns);
    // Entered, lest a log of lines lack the outer span in those of the inner ones.
    let _entered = start.enter();
    for Stage { name, start_unix_ns, duration_ns } in stages(clock, timings, timeline) {
        drop(tracing::info_span!(
            "stage",
            stage = name,
            instance = %id,
            start_unix_ns,
            duration_ns
        ));
    }
}

/// A stage that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stage {
    name: &'static str,
    /// Nanoseconds since 1970.
    start_unix_ns: u64,
    duration_ns: u64,
}

/// Those in which the microVM was prepared, before the request or for it, and those of the start:
/// the same as in metrics.
fn stages(clock: Clock, timings: &StartTimings, timeline: &Timeline) -> Vec<Stage> {
    let prepared = timeline.intervals().map(|(name, from_ns, to_ns)| {
        let duration_ns = to_ns.saturating_sub(from_ns);
        Stage { name, start_unix_ns: clock.unix_at(from_ns), duration_ns }
    });
    let started = [
        ("clone", 0, timings.cloned_ns),
        ("attach", timings.attach_start_ns, timings.attach_end_ns),
        ("release", timings.attach_end_ns, timings.released_ns),
        ("ready", timings.released_ns, timings.ready_ns),
    ];
    let started = started.map(|(name, from_ns, to_ns)| {
        let duration_ns = to_ns.saturating_sub(from_ns);
        Stage { name, start_unix_ns: clock.unix_ns + from_ns, duration_ns }
    });
    prepared.chain(started).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use serde_json::Value;
    use tracing_subscriber::fmt::format::FmtSpan;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// As the daemon's JSON log writes them.
    #[test]
    fn a_start_has_a_span_and_each_of_its_stages_has_one_in_it() {
        let (lines, id, clock) = (Lines::default(), Uuid::from_u128(7), Clock::start());
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .with_span_events(FmtSpan::CLOSE)
            .with_writer(move || writer.clone())
            .finish();
        let timings = StartTimings {
            cloned_ns: 20,
            attach_start_ns: 30,
            attach_end_ns: 35,
            released_ns: 100,
            ready_ns: 300,
            tier: "shell".into(),
            ..StartTimings::default()
        };
        // Prepared as a shell a second before, and loaded in its start; it did not park.
        let now = crate::clock::monotonic_ns();
        let then = now - 1_000_000_000;
        let timeline = Timeline {
            asked_ns: then,
            forked_ns: then + 1,
            jailed_ns: then + 3,
            shell_ns: then + 6,
            loading_ns: now,
            loaded_ns: now + 10,
            ..Timeline::default()
        };
        tracing::subscriber::with_default(subscriber, || {
            let span = start(id, "blue");
            ready(&span, id, 4, clock, &timings, &timeline);
        });

        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let closed: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let (whole, stages) = closed.split_last().unwrap();
        let root = &whole["span"];
        assert_eq!((&root["name"], &root["instance"]), (&"start".into(), &id.to_string().into()));
        assert_eq!(
            (&root["vpc"], &root["slot"], &root["tier"]),
            (&"blue".into(), &4.into(), &"shell".into())
        );
        assert_eq!(root["duration_ns"], 300);
        let of = |closed: &Value| {
            let span = &closed["span"];
            assert_eq!((&span["name"], &span["instance"]), (&"stage".into(), &root["instance"]));
            assert_eq!(closed["spans"][0]["name"], "start", "{closed}");
            (span["stage"].as_str().unwrap().to_owned(), span["duration_ns"].as_u64().unwrap())
        };
        let stages_and_times: Vec<_> = stages.iter().map(of).collect();
        let expected = [
            ("fork", 1),
            ("jail", 2),
            ("shell", 3),
            ("load", 10),
            ("clone", 20),
            ("attach", 5),
            ("release", 65),
            ("ready", 200),
        ];
        assert_eq!(stages_and_times, expected.map(|(name, ns)| (name.to_owned(), ns)));
        let begin = |index: usize| stages[index]["span"]["start_unix_ns"].as_u64().unwrap();
        assert!(begin(0) < clock.unix_ns && begin(3) >= clock.unix_ns, "before, and in the start");
        assert_eq!(begin(5), clock.unix_ns + 30);
    }
}
