//! What Prometheus is told.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tokio::net::TcpListener;

use crate::concurrency::Concurrency;
use crate::instances::Level;

/// In front of every name.
const PREFIX: &str = "warren";
/// The text format's name and version.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Upper bounds of the buckets of cold starts, in seconds.
const BUCKETS: [f64; 11] =
    [250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 100e-3, 500e-3, 2.5, 10.0];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfVersion {
    function: String,
    version: u64,
}

/// What a gateway counts as it happens. Clones count together.
#[derive(Clone, Debug)]
pub struct Counts {
    calls: Family<Outcome, Counter>,
    starts: Family<Outcome, Counter>,
    start: Histogram,
    events: Family<Outcome, Counter>,
}

impl Default for Counts {
    fn default() -> Self {
        let [calls, starts, events] = [(); 3].map(|()| Family::default());
        Self { calls, starts, start: Histogram::new(BUCKETS), events }
    }
}

impl Counts {
    /// A call was answered by its function ("answered") or refused (the token of the refusal).
    pub fn call(&self, outcome: &'static str) {
        self.calls.get_or_create(&Outcome { outcome }).inc();
    }

    /// A cold start took so long, and succeeded or not.
    pub fn start(&self, took: Duration, started: bool) {
        let outcome = if started { "started" } else { "failed" };
        self.starts.get_or_create(&Outcome { outcome }).inc();
        if started {
            self.start.observe(took.as_secs_f64());
        }
    }

    /// An event was accepted, delivered, retried, made a dead letter, or dropped.
    pub fn event(&self, outcome: &'static str) {
        self.events.get_or_create(&Outcome { outcome }).inc();
    }
}

/// Everything of a gateway.
pub fn gateway(counts: &Counts, concurrency: Concurrency) -> Registry {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register(
        "calls",
        "Calls by outcome: answered, or the token of the refusal",
        counts.calls.clone(),
    );
    registry.register("cold_starts", "Cold starts by outcome", counts.starts.clone());
    registry.register_with_unit(
        "cold_start",
        "Time from the decision to start an instance until it can be called",
        Unit::Seconds,
        counts.start.clone(),
    );
    registry.register("events", "What became of events", counts.events.clone());
    registry.register_collector(Box::new(Levels(concurrency)));
    registry
}

/// A number of a level.
type OfLevel = fn(&Level) -> u32;

#[derive(Debug)]
struct Levels(Concurrency);

impl Collector for Levels {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let levels = self.0.latest();
        let numbers: [(_, _, OfLevel); 5] = [
            ("function_running_calls", "Calls that have an instance", |level| level.running),
            ("function_waiting_calls", "Calls that wait for one", |level| level.waiting),
            ("function_peak_calls", "Most calls at one time in a second", |level| level.peak),
            ("function_starting_instances", "Starts under way", |level| level.starting),
            ("function_idle_instances", "Instances without a call", |level| level.idle),
        ];
        for (name, help, of) in numbers {
            let kind = ConstGauge::<i64>::TYPE;
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for level in levels.iter() {
                let function = level.version.function.to_string();
                let label = OfVersion { function, version: level.version.number };
                let gauge = ConstGauge::new(i64::from(of(level)));
                gauge.encode(family.encode_family(&label)?)?;
            }
        }
        Ok(())
    }
}

/// What a relay counts. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct RelayCounts(Family<Outcome, Counter>);

impl RelayCounts {
    /// A connection led to an instance ("relayed"), or was refused with a status.
    pub fn connection(&self, outcome: &'static str) {
        self.0.get_or_create(&Outcome { outcome }).inc();
    }

    /// All of it.
    pub fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix(PREFIX);
        let help = "Connections by outcome: relayed, or the status that they were refused with";
        registry.register("relay_connections", help, self.0.clone());
        registry
    }
}

/// Why metrics cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve metrics at {address}: {source}; choose another address")]
pub struct BindError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Answers `GET /metrics` at an address from now on. Must be called in a runtime. Answers the
/// address, with the port that was taken for 0.
pub async fn serve(address: SocketAddr, registry: Registry) -> Result<SocketAddr, BindError> {
    let because = |source| BindError { address, source };
    let listener = TcpListener::bind(address).await.map_err(because)?;
    let bound = listener.local_addr().map_err(because)?;
    tracing::info!(address = %bound, "serving metrics");
    let registry = Arc::new(registry);
    let router =
        Router::new().route("/metrics", get(move || std::future::ready(scrape(&registry))));
    tokio::spawn(async move {
        // It goes on after whatever fails on one connection.
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!("metrics are no longer served: {error}");
        }
    });
    Ok(bound)
}

fn scrape(registry: &Registry) -> Response {
    let mut text = String::new();
    match encode(&mut text, registry) {
        Ok(()) => ([(CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
