//! Starts the microVMs, one after the other, each with a first call to its tenant's Redis.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use warren_abi::probe::{self, Endpoint, Operation, Outcome};
use warren_bench::figures::{Figures, Stage};
use warren_netns::capture::{Capture, vni};
use warren_netns::fleet::VPCS;
use warren_netns::topology::{HOST, SERVER, UNDERLAY};
use warren_proto::v1;

use crate::scene::Scene;
use crate::step;

const REDIS: Endpoint = Endpoint { address: SERVER.octets(), port: 6379 };

/// A start and what came of it.
pub struct Start {
    /// Instance.
    pub id: String,
    /// The instance as the host described it.
    pub instance: v1::Instance,
    /// 0 or 1.
    pub tenant: usize,
    /// Where Redis saw it: the shared address and a port.
    pub seen: Endpoint,
    timings: v1::StartTimings,
    guest: probe::Timings,
}

/// All of them, still running.
pub struct Starts(Vec<Start>);

impl Start {
    /// From the request at the agent to the first byte of Redis's reply in the guest.
    fn first_reply_us(&self) -> f64 {
        us(self.timings.released_ns + self.guest.first_byte_ns)
    }

    /// The stages, from the request at the agent on.
    pub fn stages(&self) -> Vec<Stage> {
        let t = &self.timings;
        let guest = |ns| t.released_ns + ns;
        let stage = |name, from, to| Stage { name, start_us: us(from), end_us: us(to) };
        vec![
            stage("clone from the pool", 0, t.cloned_ns),
            stage("attach to the VPC", t.attach_start_ns, t.attach_end_ns),
            stage("identity, barrier", t.attach_end_ns, t.released_ns),
            stage("guest acknowledges", t.released_ns, t.ready_ns),
            stage("invocation", t.ready_ns, guest(self.guest.start_ns)),
            stage("TCP connect", guest(self.guest.start_ns), guest(self.guest.connected_ns)),
            stage("first reply", guest(self.guest.connected_ns), guest(self.guest.first_byte_ns)),
        ]
    }
}

impl Starts {
    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// One of a tenant's.
    pub fn of(&self, tenant: usize) -> &Start {
        self.0.iter().find(|start| start.tenant == tenant).expect("each tenant has some")
    }

    /// The one whose first reply took the median time.
    pub fn median(&self) -> &Start {
        let mut sorted: Vec<_> = self.0.iter().collect();
        sorted.sort_by(|a, b| a.first_reply_us().total_cmp(&b.first_reply_us()));
        sorted[(sorted.len() - 1) / 2]
    }

    /// The one whose first reply took longest.
    pub fn slowest(&self) -> &Start {
        let by_time = |a: &&Start, b: &&Start| a.first_reply_us().total_cmp(&b.first_reply_us());
        self.0.iter().max_by(by_time).expect("there are starts")
    }
}

fn us(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

/// A RESP2 bulk string's content.
fn bulk(reply: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(reply).ok()?;
    let (length, rest) = text.strip_prefix('$')?.split_once("\r\n")?;
    rest.get(..length.parse().ok()?)
}

/// Starts `count` microVMs over both tenants and measures.
pub async fn run(scene: &Scene, count: u32, figures: &mut Figures) -> Result<Starts> {
    let bar = ProgressBar::new(count.into());
    let style = ProgressStyle::with_template("  {bar:40} {pos}/{len} microVMs")?;
    bar.set_style(style);
    let capture = Capture::start(&scene.fleet.topology.proxy, UNDERLAY)?;
    let mut starts = Vec::new();
    let (mut wrong_markers, mut first_packets) = (0, Vec::new());
    for n in 0..count {
        let tenant = (n % 2) as usize;
        capture.drain()?;
        let start = start(scene, n, tenant, &mut wrong_markers).await?;
        let attach = start.timings.requested_unix_ns + start.timings.attach_start_ns;
        first_packets.push(us(first_packet(&capture)?.saturating_sub(attach)));
        starts.push(start);
        bar.inc(1);
    }
    bar.finish_and_clear();
    step(&format!("{count} microVMs cloned; each wrote and read its own key in its own Redis"));

    let each = |f: fn(&Start) -> f64| starts.iter().map(f).collect::<Vec<_>>();
    figures.count("clones", count.into());
    figures.count("tenants", VPCS.len() as u64);
    figures.count("cold_starts", starts.iter().filter(|s| s.timings.cold).count() as u64);
    figures.count("isolation_violations", wrong_markers);
    let seen: HashSet<_> = starts.iter().map(|s| (s.tenant, s.seen.address)).collect();
    figures.count("client_addresses_seen", seen.len() as u64);
    figures.distribution("clone_ready_us", each(|s| us(s.timings.ready_ns)));
    figures.distribution(
        "attach_us",
        each(|s| us(s.timings.attach_end_ns - s.timings.attach_start_ns)),
    );
    figures.distribution("tcp_connect_us", each(|s| us(s.guest.connected_ns - s.guest.start_ns)));
    figures.distribution("first_vpc_reply_us", each(Start::first_reply_us));
    figures.distribution("attach_to_first_packet_at_proxy_us", first_packets);
    figures.count("duplicate_identities", duplicates(scene, &starts).await?);
    step("identities compared: MAC, IP, hostname, instance id, first 32 random bytes");
    Ok(Starts(starts))
}

async fn start(scene: &Scene, n: u32, tenant: usize, wrong: &mut u64) -> Result<Start> {
    let name = VPCS[tenant];
    let (key, value) = (format!("key-{n}"), format!("{name}-{n}"));
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let commands = vec![
        words(&["SET", &key, &value]),
        words(&["GET", &key]),
        words(&["GET", "marker"]),
        words(&["CLIENT", "INFO"]),
    ];
    let operation = Operation::Redis { to: REDIS, commands };
    let (response, reply) = scene.fleet.run(name, Some(operation)).await?;
    let reply = reply.context("no reply to the first call")?;
    let outcome = reply.outcome.map_err(|e| anyhow!("microVM {n} in {name}: {e}"))?;
    let Outcome::Redis(replies) = outcome else { bail!("not a Redis outcome: {outcome:?}") };
    let [set, get, marker, info] = &replies[..] else { bail!("{} replies", replies.len()) };
    ensure!(set == b"+OK\r\n", "SET answered {}", String::from_utf8_lossy(set));
    ensure!(bulk(get) == Some(&value), "GET answered {}", String::from_utf8_lossy(get));
    *wrong += u64::from(bulk(marker) != Some(name));
    let address = bulk(info)
        .and_then(|info| info.split(' ').find_map(|word| word.strip_prefix("addr=")))
        .and_then(|address| address.parse::<std::net::SocketAddrV4>().ok())
        .context("CLIENT INFO holds no address")?;
    let instance = response.instance.context("no instance in the response")?;
    Ok(Start {
        id: instance.id.clone(),
        instance,
        tenant,
        seen: Endpoint { address: address.ip().octets(), port: address.port() },
        timings: response.timings.context("no timings in the response")?,
        guest: reply.timings,
    })
}

/// When the first VXLAN frame of the host arrived at the proxy, since the last drain.
fn first_packet(capture: &Capture) -> Result<u64> {
    while let Some(frame) = capture.next(Duration::from_secs(1))? {
        if vni(&frame.bytes).is_some() && frame.bytes[26..30] == HOST.octets() {
            return Ok(frame.unix_ns);
        }
    }
    bail!("the proxy saw no packet of a microVM that talked to Redis")
}

/// How many values of identity fields are had by more than one microVM.
async fn duplicates(scene: &Scene, starts: &[Start]) -> Result<u64> {
    let mut fields: [HashSet<Vec<u8>>; 5] = Default::default();
    let mut duplicates = 0;
    for start in starts {
        let reply = scene.fleet.probe(&start.id, Operation::Identity).await?;
        let outcome = reply.outcome.map_err(|e| anyhow!("identity of {}: {e}", start.id))?;
        let Outcome::Identity(identity) = outcome else { bail!("not an identity: {outcome:?}") };
        let values = [
            identity.mac.to_vec(),
            identity.ipv4.to_vec(),
            identity.hostname.into_bytes(),
            identity.instance_id.to_vec(),
            identity.random.to_vec(),
        ];
        for (seen, value) in fields.iter_mut().zip(values) {
            duplicates += u64::from(!seen.insert(value));
        }
    }
    Ok(duplicates)
}
