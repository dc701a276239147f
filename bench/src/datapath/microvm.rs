//! A real microVM, through Warren and through plain forwarding: what its network probe measures on
//! its own clock.

use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::ProgressIterator;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use warren_abi::probe::{self, Endpoint, Operation, Outcome, Reply};
use warren_abi::wire::GATEWAY;
use warren_bench::figures::Figures;
use warren_bench::interrupt;
use warren_netns::fleet::{GUEST, built, kvm_missing, template};
use warren_netns::netns::Namespace;
use warren_netns::rundir::RunDir;
use warren_netns::servers::{self, Server};
use warren_netns::topology::SERVER;
use warren_vmm::client::{MicroVm, Zygote, ZygoteConfig, invoke};
use warren_vmm::control::{PublicIdentity, ReleaseRequest, Tier, WATCHDOG};
use warren_vmm::jail::JailConfig;
use warren_vmm::rates::Rates;

use super::path::{Kind, MICROVM, MTU, Path, guest_address, guest_mac};
use super::{Sample, medians, ratios};

/// Names of the metrics.
const METRICS: [&str; 4] =
    ["tcp_to_vpc_gbps", "tcp_from_vpc_gbps", "udp_rr_per_s", "tcp_connect_us"];
/// Bytes of each transfer.
const BULK: u64 = 32 << 20;
/// Datagrams of a round, each when the reply to the one before came.
const REQUESTS: u32 = 2000;
/// Bytes of a datagram.
const SMALL: u16 = 64;
/// Connections of a round, one after the other.
const CONNECTIONS: u32 = 50;
const TIMEOUT: Duration = Duration::from_secs(20);

const ECHO_PORT: u16 = 9101;
const SINK_PORT: u16 = 9102;
const SOURCE_PORT: u16 = 9103;

/// Adds `microvm_warren`, `microvm_routed` and their ratio; nothing, and a line in the log, where
/// there is no KVM.
pub fn measure(paths: &mut [Path], run: &RunDir, rounds: u32, figures: &mut Figures) -> Result<()> {
    if let Some(missing) = kvm_missing() {
        tracing::warn!("no figures of microVMs: {missing}");
        return Ok(());
    }
    let template = template(run, GUEST)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut guests = Vec::new();
        for kind in [Kind::Warren, Kind::Routed] {
            let path = paths.iter_mut().find(|path| path.kind == kind).context("no such path")?;
            let run_dir = run.path().join(format!("vmm-{}", kind.key()));
            std::fs::create_dir(&run_dir)?;
            let binary = built("warren-vmm")?;
            let jail =
                JailConfig { cgroup: run.cgroup().join(kind.key()), ..JailConfig::named("") };
            let (sources, rates) = (template.clone().into(), Rates::default());
            let config = ZygoteConfig { binary, sources, run_dir, jail, rates, watchdog: WATCHDOG };
            let tap = path.take_microvm_tap()?.into();
            guests.push(Guest::start(&config, tap, path.vpc()).await?);
        }
        let mut samples = vec![Vec::new(); guests.len()];
        for round in (0..rounds as usize).progress() {
            for turn in 0..guests.len() {
                interrupt::check()?;
                let index = (round + turn) % guests.len();
                samples[index].push(guests[index].sample().await?);
            }
        }
        let named = |values: Sample<{ METRICS.len() }>| METRICS.into_iter().zip(values);
        figures.values("microvm_warren", named(medians(&samples[0])));
        figures.values("microvm_routed", named(medians(&samples[1])));
        let ratio = medians(&ratios(&samples[0], &samples[1]));
        figures.values("microvm_warren_vs_routed", named(ratio));
        Ok(())
    })
}

/// A microVM, running, and its servers; gone when it is dropped.
struct Guest {
    microvm: MicroVm,
    _zygote: Zygote,
    _servers: [Server; 3],
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Its socket is open, so the process is still this one.
        kill(Pid::from_raw(self.microvm.pid()), Signal::SIGKILL).ok();
    }
}

impl Guest {
    async fn start(config: &ZygoteConfig, tap: OwnedFd, vpc: &Namespace) -> Result<Self> {
        let servers = [
            servers::udp_echo(vpc, ECHO_PORT)?,
            servers::bulk_sink(vpc, SINK_PORT)?,
            servers::bulk_source(vpc, SOURCE_PORT, BULK, 0)?,
        ];
        let zygote = Zygote::spawn(config).await?;
        let microvm = zygote.fork(MICROVM, tap, Tier::Shell).await?;
        let mut guest = Self { microvm, _zygote: zygote, _servers: servers };
        let identity = PublicIdentity {
            hostname: "bench".to_owned(),
            mac: guest_mac(MICROVM),
            ipv4: guest_address(MICROVM)?.octets(),
            gateway: GATEWAY.octets(),
            mtu: MTU,
            ..PublicIdentity::default()
        };
        let request = ReleaseRequest { identity, tag: Vec::new() };
        guest.microvm.release(&request).await?;
        Ok(guest)
    }

    /// Measures everything once.
    async fn sample(&self) -> Result<Sample<{ METRICS.len() }>> {
        let to_vpc = self.bulk(Operation::BulkSend { to: at(SINK_PORT), bytes: BULK }).await?;
        let from_vpc =
            self.bulk(Operation::BulkReceive { to: at(SOURCE_PORT), bytes: BULK }).await?;
        let to = at(ECHO_PORT);
        let echo = Operation::UdpEcho { to, count: REQUESTS, length: SMALL, interval_us: 0 };
        let reply = self.call(echo).await?;
        let Ok(Outcome::Udp { received, .. }) = reply.outcome else { bail!(unexpected(&reply)) };
        let took_ns = reply.timings.end_ns - reply.timings.start_ns;
        let per_s = f64::from(received) / took_ns as f64 * 1e9;
        let mut connects = Vec::new();
        for _ in 0..CONNECTIONS {
            let reply = self.call(Operation::TcpConnect { to: at(SINK_PORT) }).await?;
            let (Ok(Outcome::Done), timings) = (&reply.outcome, reply.timings) else {
                bail!(unexpected(&reply))
            };
            connects.push((timings.connected_ns - timings.start_ns) as f64 / 1000.0);
        }
        let connect = warren_bench::figures::median(&connects).context("no connection")?;
        Ok([to_vpc, from_vpc, per_s, connect])
    }

    /// Gigabits per second of a transfer, from the request to the close.
    async fn bulk(&self, operation: Operation) -> Result<f64> {
        let reply = self.call(operation).await?;
        let Ok(Outcome::Bulk { bytes: BULK, corrupt_at: None }) = reply.outcome else {
            bail!(unexpected(&reply))
        };
        let took_ns = reply.timings.end_ns - reply.timings.connected_ns;
        Ok(BULK as f64 * 8.0 / took_ns as f64)
    }

    async fn call(&self, operation: Operation) -> Result<Reply> {
        let timeout_ms = TIMEOUT.as_millis() as u32;
        let request = probe::encode(&probe::Request { operation, timeout_ms });
        let reply = invoke(self.microvm.path(), &request, TIMEOUT * 2).await?;
        Ok(probe::decode(&reply)?)
    }
}

fn at(port: u16) -> Endpoint {
    Endpoint { address: SERVER.octets(), port }
}

fn unexpected(reply: &Reply) -> String {
    format!("the microVM's probe says: {:?}", reply.outcome)
}
