//! What Prometheus is told: how starts went, how things stand, what was dropped.
//!
//! Starts are counted as they happen. Everything else is read at the moment of a scrape, where it
//! is kept anyway. [`http`] serves it.

pub mod flows;
pub mod http;

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use warren_abi::drop::Drop as DropReason;
use warren_proto::v1;
use warren_vmm::control::Timeline;

use crate::datapath::DropCount;
use crate::pool::Level;

/// In front of every name.
const PREFIX: &str = "warren";
/// Upper bounds of the histograms' buckets, in seconds: a restored clone takes microseconds, a
/// guest that hangs takes seconds.
const BUCKETS: [f64; 19] = [
    10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3,
    250e-3, 500e-3, 1.0, 2.5, 5.0, 10.0,
];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Stage {
    stage: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

const POOL: Outcome = Outcome { outcome: "pool" };
const COLD: Outcome = Outcome { outcome: "cold" };
const FAILED: Outcome = Outcome { outcome: "failed" };

/// How the starts of instances went. Clones count together.
#[derive(Clone, Debug)]
pub struct Starts {
    stages: Family<Stage, Histogram, fn() -> Histogram>,
    prepared: Family<Stage, Histogram, fn() -> Histogram>,
    whole: Histogram,
    outcomes: Family<Outcome, Counter>,
}

impl Default for Starts {
    fn default() -> Self {
        let outcomes = Family::<Outcome, Counter>::default();
        // There from the beginning: a rate over something that appears misses its first.
        for outcome in [POOL, COLD, FAILED] {
            drop(outcomes.get_or_create(&outcome));
        }
        let [stages, prepared] =
            [(); 2].map(|()| Family::new_with_constructor(histogram as fn() -> Histogram));
        Self { stages, prepared, whole: histogram(), outcomes }
    }
}

fn histogram() -> Histogram {
    Histogram::new(BUCKETS)
}

impl Starts {
    /// An instance is ready, whose microVM came about so.
    pub fn ready(&self, timings: &v1::StartTimings, timeline: &Timeline) {
        for (stage, duration_ns) in timeline.stages() {
            self.prepared.get_or_create(&Stage { stage }).observe(seconds(duration_ns));
        }
        for (stage, from_ns, to_ns) in [
            ("clone", 0, timings.cloned_ns),
            ("attach", timings.attach_start_ns, timings.attach_end_ns),
            ("release", timings.attach_end_ns, timings.released_ns),
            ("ready", timings.released_ns, timings.ready_ns),
        ] {
            let histogram = self.stages.get_or_create(&Stage { stage });
            histogram.observe(seconds(to_ns.saturating_sub(from_ns)));
        }
        self.whole.observe(seconds(timings.ready_ns));
        self.outcomes.get_or_create(if timings.cold { &COLD } else { &POOL }).inc();
    }

    /// An instance did not become ready.
    pub fn failed(&self) {
        self.outcomes.get_or_create(&FAILED).inc();
    }

    /// Makes them part of what is scraped.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "start_stage",
            "How long the stages of a start took: a clone taken or made (clone), its slot \
             connected (attach), the guest let go (release), the guest's answer (ready)",
            Unit::Seconds,
            self.stages.clone(),
        );
        registry.register_with_unit(
            "prepare_stage",
            "How long the stages took in which the microVM of an instance was prepared, before or \
             in its start: process made (fork), walls around it (jail), KVM's objects (shell), \
             memory and state (load), run up to its barrier (park)",
            Unit::Seconds,
            self.prepared.clone(),
        );
        registry.register_with_unit(
            "start",
            "Time from the request to the guest's answer that it is ready",
            Unit::Seconds,
            self.whole.clone(),
        );
        registry.register(
            "starts",
            "Starts by outcome: of a pooled microVM (pool), of one made for it (cold), or failed",
            self.outcomes.clone(),
        );
    }
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

/// How a host stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Levels {
    /// Slots in all.
    pub slots: u32,
    /// Slots without a microVM.
    pub free: u32,
    /// MicroVMs that wait for an instance.
    pub pools: Vec<Level>,
    /// Instances that run.
    pub instances: u32,
    /// Flows that the last sweep of the table left in it.
    pub flows: u32,
}

/// What is read at the moment of a scrape.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Of a host; a proxy has none.
    pub levels: Option<Levels>,
    /// What was dropped. None: it could not be read.
    pub drops: Option<Vec<DropCount>>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TemplateLabel {
    template: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct DropLabels {
    reason: &'static str,
    vni: Option<u32>,
}

/// Adds up what was dropped, by reason and VNI. Every reason is there from the beginning.
///
/// Slots are added up, as there may be thousands. VNIs are not: their counters go with their VPC,
/// and a sum that falls would look like a restart.
fn by_reason(drops: &[DropCount], is_host: bool) -> BTreeMap<(&'static str, Option<u32>), u64> {
    let zeroes = DropReason::ALL.iter().map(|reason| ((reason.name(), None), 0));
    let mut sums: BTreeMap<_, _> = zeroes.collect();
    for drop in drops {
        let vni = (!is_host && drop.scope != 0).then_some(drop.scope);
        *sums.entry((drop.reason.name(), vni)).or_insert(0) += drop.packets;
    }
    sums
}

/// A number of a pool.
type OfPool = fn(&Level) -> u32;

/// Reads a snapshot at each scrape.
struct Scraped<F>(F);

impl<F> fmt::Debug for Scraped<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scraped")
    }
}

impl<F: Fn() -> Snapshot + Send + Sync + 'static> Collector for Scraped<F> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Snapshot { levels, drops } = (self.0)();
        let is_host = levels.is_some();
        if let Some(Levels { slots, free, pools, instances, flows }) = levels {
            let levels: [(_, _, OfPool); 4] = [
                ("shell_microvms", "MicroVMs with KVM's objects, not loaded", |it| it.now.shells),
                ("loaded_microvms", "MicroVMs that are loaded and did not run", |it| it.now.loaded),
                ("parked_microvms", "MicroVMs ready at their barrier", |it| it.now.parked),
                ("parked_target", "MicroVMs that are to be parked now", |it| it.parked_target),
            ];
            for (name, help, of) in levels {
                let kind = ConstGauge::<i64>::TYPE;
                let mut family = encoder.encode_descriptor(name, help, None, kind)?;
                for pool in &pools {
                    let label = TemplateLabel { template: pool.template.clone() };
                    let gauge = ConstGauge::new(i64::from(of(pool)));
                    gauge.encode(family.encode_family(&label)?)?;
                }
            }
            for (name, help, level) in [
                ("slots", "TAP slots in all", slots),
                ("free_slots", "Slots without a microVM", free),
                ("instances", "Instances that run", instances),
                ("flows", "Flows that the last sweep left in the table", flows),
            ] {
                let gauge = ConstGauge::new(i64::from(level));
                gauge.encode(encoder.encode_descriptor(
                    name,
                    help,
                    None,
                    gauge.metric_type(),
                )?)?;
            }
        }
        if let Some(drops) = drops {
            let help = "Packets dropped, by reason; on proxies also by VPC, where there is one";
            let kind = ConstCounter::<u64>::TYPE;
            let mut family = encoder.encode_descriptor("dropped_packets", help, None, kind)?;
            for ((reason, vni), packets) in by_reason(&drops, is_host) {
                let labels = DropLabels { reason, vni };
                ConstCounter::new(packets).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// Everything of a daemon: what it is, and what `snapshot` reads at each scrape. A host adds its
/// [`Starts`].
pub fn registry(
    role: &'static str,
    snapshot: impl Fn() -> Snapshot + Send + Sync + 'static,
) -> Registry {
    let mut registry = Registry::with_prefix(PREFIX);
    let build = [("version", env!("CARGO_PKG_VERSION")), ("role", role)];
    registry.register("build", "What runs here", Info::new(build.to_vec()));
    registry.register_collector(Box::new(Scraped(snapshot)));
    registry
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;
    use crate::refill::Tiers;

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        encode(&mut text, registry).unwrap();
        text
    }

    fn assert_lines(text: &str, lines: &[&str]) {
        for line in lines {
            assert!(text.lines().any(|other| other == *line), "no `{line}` in\n{text}");
        }
    }

    #[test]
    fn starts_are_told_by_stage_and_outcome() {
        let starts = Starts::default();
        let mut registry = Registry::with_prefix(PREFIX);
        starts.register(&mut registry);
        assert_lines(&text(&registry), &[r#"warren_starts_total{outcome="failed"} 0"#]);

        let timings = v1::StartTimings {
            cloned_ns: 20_000,
            attach_start_ns: 30_000,
            attach_end_ns: 35_000,
            released_ns: 1_035_000,
            ready_ns: 3_035_000,
            ..v1::StartTimings::default()
        };
        let timeline = Timeline { asked_ns: 1000, forked_ns: 4000, ..Timeline::default() };
        starts.ready(&timings, &timeline);
        let cold = v1::StartTimings { cold: true, cloned_ns: 11_000_000_000, ..timings };
        starts.ready(&cold, &timeline);
        starts.failed();
        assert_lines(
            &text(&registry),
            &[
                "# TYPE warren_start_stage_seconds histogram",
                "# TYPE warren_prepare_stage_seconds histogram",
                r#"warren_prepare_stage_seconds_sum{stage="fork"} 0.000006"#,
                r#"warren_start_stage_seconds_bucket{le="0.00001",stage="clone"} 0"#,
                r#"warren_start_stage_seconds_bucket{le="0.000025",stage="clone"} 1"#,
                r#"warren_start_stage_seconds_bucket{le="10.0",stage="clone"} 1"#,
                r#"warren_start_stage_seconds_bucket{le="+Inf",stage="clone"} 2"#,
                r#"warren_start_stage_seconds_sum{stage="attach"} 0.00001"#,
                r#"warren_start_stage_seconds_sum{stage="release"} 0.002"#,
                r#"warren_start_stage_seconds_sum{stage="ready"} 0.004"#,
                "warren_start_seconds_sum 0.00607",
                r#"warren_starts_total{outcome="pool"} 1"#,
                r#"warren_starts_total{outcome="cold"} 1"#,
                r#"warren_starts_total{outcome="failed"} 1"#,
            ],
        );
    }

    fn drops() -> Vec<DropCount> {
        let count = |scope, reason, packets| DropCount { scope, reason, packets };
        vec![
            count(0, DropReason::NoFlow, 1),
            count(7, DropReason::NoFlow, 2),
            count(8, DropReason::NoFlow, 4),
        ]
    }

    #[test]
    fn a_host_tells_its_levels_and_adds_up_its_slots() {
        let level = |template: &str, parked_target| Level {
            template: template.to_owned(),
            now: Tiers { shells: 2, loaded: 3, parked: 55 },
            parked_target,
        };
        let pools = vec![level("small", 64), level("large", 55)];
        let levels = Levels { slots: 128, free: 60, pools, instances: 8, flows: 9 };
        let registry = registry("host", move || Snapshot {
            levels: Some(levels.clone()),
            drops: Some(drops()),
        });
        assert_lines(
            &text(&registry),
            &[
                concat!(
                    r#"warren_build_info{version=""#,
                    env!("CARGO_PKG_VERSION"),
                    r#"",role="host"} 1"#
                ),
                "# TYPE warren_slots gauge",
                "warren_slots 128",
                "warren_free_slots 60",
                r#"warren_shell_microvms{template="small"} 2"#,
                r#"warren_loaded_microvms{template="small"} 3"#,
                r#"warren_parked_microvms{template="small"} 55"#,
                r#"warren_parked_target{template="small"} 64"#,
                r#"warren_parked_target{template="large"} 55"#,
                "warren_instances 8",
                "warren_flows 9",
                "# TYPE warren_dropped_packets counter",
                r#"warren_dropped_packets_total{reason="no-flow",vni=""} 7"#,
                r#"warren_dropped_packets_total{reason="spoofed-mac",vni=""} 0"#,
            ],
        );
    }

    #[test]
    fn a_proxy_tells_vpcs_apart_and_has_no_levels() {
        let registry = registry("proxy", || Snapshot { levels: None, drops: Some(drops()) });
        let text = text(&registry);
        assert_lines(
            &text,
            &[
                r#"warren_dropped_packets_total{reason="no-flow",vni=""} 1"#,
                r#"warren_dropped_packets_total{reason="no-flow",vni="7"} 2"#,
                r#"warren_dropped_packets_total{reason="no-flow",vni="8"} 4"#,
            ],
        );
        assert!(!text.contains("warren_slots"), "{text}");
    }

    #[test]
    fn counters_that_cannot_be_read_are_left_out() {
        let text = text(&registry("proxy", Snapshot::default));
        assert!(text.contains("warren_build_info") && !text.contains("dropped"), "{text}");
    }
}
