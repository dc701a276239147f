//! `packet`: what each program costs per packet, by the kernel's own account, under real traffic.
//!
//! Guests' datagrams go out to peers in a VPC and come back, through all programs, over more
//! and more live flows.

mod account;
mod empty;
mod traffic;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, ensure};
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use rand_distr::{Distribution, Uniform, Zipf};
use warren_bench::figures::{Figures, grid, median};
use warren_bench::interrupt;
use warren_dataplane::datapath::{
    HostDatapath, HostOptions, HostVpc, PortRange, ProxyDatapath, ProxyOptions, ProxyVpc,
};
use warren_netns::netns::Namespace;
use warren_netns::rundir::RunDir;
use warren_netns::topology::{
    CIDR, HOST, PROXY, SERVER, SHARED, Topology, UNDERLAY, VPC_INTERFACES,
};
use warren_proto::route::{Route, Target};

use crate::options::{self, PREFIX};
use account::{Account, Accounting, Hook, Program};
use empty::Empty;
use traffic::{Exchanged, MAPPINGS, PEERS, SLOTS, Traffic};

/// Rounds of each case, unless more or fewer are asked for.
pub const ROUNDS: u32 = 15;
/// Datagrams of a round, each way.
const PACKETS: usize = 20_000;
/// Flows that are made between two looks at the progress.
const STEP: u32 = 10_000;

const VNI: u32 = 4096;
const PORTS: PortRange = PortRange { base: 1024, count: 64_512 };

/// Flows that are alive, and which of them packets belong to.
struct Case {
    key: &'static str,
    flows: u32,
    /// Exponent of Zipf's law over the flows; 0: all alike.
    zipf: f64,
    /// Routes of the VPC's own.
    routes: u32,
}

/// In the order of their flows, which stay alive.
const CASES: [Case; 5] = [
    Case { key: "flows_1", flows: 1, zipf: 0.0, routes: 0 },
    Case { key: "hot_100k", flows: 100_000, zipf: 1.0, routes: 0 },
    Case { key: "uniform_100k", flows: 100_000, zipf: 0.0, routes: 0 },
    Case { key: "routes_10k", flows: 100_000, zipf: 0.0, routes: 10_000 },
    Case { key: "uniform_1m", flows: 1_000_000, zipf: 0.0, routes: 0 },
];

/// Keys of the programs' figures, and of the empty program's, in the order of [`Bed::hooks`].
const KEYS: [&str; 5] =
    ["tap_ingress_ns", "proxy_out_ns", "proxy_back_ns", "tunnel_ingress_ns", "overhead_ns"];

/// Measures all cases; also returns the table to show.
pub fn run(rounds: u32) -> Result<(Figures, Table)> {
    interrupt::catch()?;
    let topology = Topology::new()?;
    let run = RunDir::new()?;
    let host = HostOptions {
        flows: CASES.iter().map(|case| case.flows).max().unwrap_or(1) + MAPPINGS + 4096,
        ..options::host(&run, SLOTS)?
    };
    let proxy = options::proxy(&run)?;
    let figures = Bed::open(&topology, &host, &proxy).and_then(|mut bed| bed.measure(rounds));
    topology.host.run(|| HostDatapath::uninstall(&host))?;
    topology.proxy.run(|| ProxyDatapath::uninstall(&proxy))?;
    figures
}

/// The data paths, open, with guests attached.
struct Bed {
    datapath: HostDatapath,
    router: Router,
    traffic: Traffic,
    hooks: Vec<Hook>,
    /// Flows that were made so far.
    flows: u32,
    _accounting: Accounting,
    _empty: Empty,
}

impl Bed {
    fn open(topology: &Topology, host: &HostOptions, proxy: &ProxyOptions) -> Result<Self> {
        let datapath = topology.host.run(|| HostDatapath::open(host))?;
        datapath.apply_vpc(&HostVpc {
            vni: VNI,
            shared_address: SHARED,
            shared_address_v6: None,
            ports: PORTS,
            proxy_address: PROXY.into(),
            proxies: Vec::new(),
        })?;
        let proxy = topology.proxy.run(|| ProxyDatapath::open(proxy))?;
        let router = Router { proxy, namespace: topology.proxy.clone() };
        router.apply(0)?;
        for slot in datapath.slots() {
            datapath.attach(slot.number, VNI)?;
        }
        let vpc = &topology.vpcs[0];
        let traffic = topology.host.run(|| Traffic::open(&datapath, vpc, "eth0"))?;
        let empty = Empty::attach(vpc, "eth0")?;
        let tunnel = format!("{PREFIX}-vxlan");
        let at = Program::at_ingress;
        let hooks = vec![
            Hook(vec![at(&topology.host, &format!("{PREFIX}1"))?]),
            Hook(vec![at(&topology.proxy, UNDERLAY)?, at(&topology.proxy, &tunnel)?]),
            Hook(vec![at(&topology.proxy, VPC_INTERFACES[0])?]),
            Hook(vec![at(&topology.host, UNDERLAY)?, at(&topology.host, &tunnel)?]),
            Hook(vec![Program::from_fd(empty.program()?)]),
        ];
        let accounting = Accounting::on()?;
        Ok(Self {
            datapath,
            router,
            traffic,
            hooks,
            flows: 0,
            _accounting: accounting,
            _empty: empty,
        })
    }

    fn measure(&mut self, rounds: u32) -> Result<(Figures, Table)> {
        let mut samples: BTreeMap<(usize, &str), Vec<f64>> = BTreeMap::new();
        let mut runs = [0; KEYS.len()];
        let mut exchanged = Exchanged::default();
        // Cases of as many flows take turns, so that they meet the same noise.
        for cases in CASES.chunk_by(|a, b| a.flows == b.flows) {
            self.grow(cases[0].flows)?;
            let bar = progress(u64::from(rounds) * cases.len() as u64, "rounds");
            for _ in 0..rounds {
                for case in cases {
                    interrupt::check()?;
                    self.router.apply(case.routes)?;
                    let flows = case.draw(PACKETS)?;
                    let before = self.accounts()?;
                    let Exchanged { sent, answered } = self.traffic.exchange(flows)?;
                    exchanged.sent += sent;
                    exchanged.answered += answered;
                    for (index, (now, before)) in self.accounts()?.iter().zip(before).enumerate() {
                        runs[index] += now.runs - before.runs;
                        let sample = now.ns_per_run_since(before);
                        samples.entry((index, case.key)).or_default().extend(sample);
                    }
                    bar.inc(1);
                }
            }
            self.router.apply(0)?;
            bar.finish_and_clear();
        }
        let mut figures = Figures::new("packet");
        let mut rows = Vec::new();
        for (index, key) in KEYS.into_iter().enumerate() {
            let of = |case: &Case| Some((case.key, median(samples.get(&(index, case.key))?)?));
            let medians: Vec<(&str, f64)> = CASES.iter().filter_map(of).collect();
            rows.push((key, medians.iter().map(|(_, median)| format!("{median:.0}")).collect()));
            figures.values(key, medians.into_iter().chain([("runs", runs[index] as f64)]));
        }
        figures.count("rounds", u64::from(rounds));
        figures.count("datagrams_sent", exchanged.sent);
        figures.count("datagrams_answered", exchanged.answered);
        Ok((figures, grid(&CASES.map(|case| case.key), rows)))
    }

    fn accounts(&self) -> Result<Vec<Account>> {
        self.hooks.iter().map(Hook::account).collect()
    }

    /// Has so many flows alive.
    fn grow(&mut self, flows: u32) -> Result<()> {
        let bar = progress(u64::from(flows - self.flows), "flows");
        while self.flows < flows {
            interrupt::check()?;
            let next = flows.min(self.flows + STEP);
            self.traffic.exchange(self.flows..next)?;
            bar.inc(u64::from(next - self.flows));
            self.flows = next;
        }
        bar.finish_and_clear();
        let alive = self.datapath.flows()?;
        ensure!(alive == flows, "{alive} flows are alive, not {flows}: some found no room or port");
        Ok(())
    }
}

/// The proxy's data path, open.
struct Router {
    proxy: ProxyDatapath,
    namespace: Namespace,
}

impl Router {
    /// Gives the VPC so many routes: to the first peers, one each, and the gateway for all others.
    fn apply(&self, routes: u32) -> Result<()> {
        let route = |n| Route {
            prefix: IpAddr::from(Ipv4Addr::from_bits(PEERS.to_bits() + n)).into(),
            target: Target::Via(SERVER.into()),
        };
        let vpc = ProxyVpc {
            vni: VNI,
            interface: VPC_INTERFACES[0].to_owned(),
            shared_address: SHARED,
            cidr: CIDR.parse()?,
            // The peers are behind it: one neighbour, however many they are.
            gateway: Some(SERVER),
            v6: None,
            holders: vec![(PORTS, HOST.into())],
            claim: Some(1),
            routes: (0..routes).map(route).collect(),
            public: None,
        };
        Ok(self.namespace.run(|| self.proxy.apply_vpc(&vpc))?)
    }
}

impl Case {
    /// Flows of so many packets.
    fn draw(&self, packets: usize) -> Result<Vec<u32>> {
        let random = rand::rng();
        if self.zipf > 0.0 {
            let law = Zipf::new(f64::from(self.flows), self.zipf)?;
            // Ranks begin at 1; flow 0 is the hottest.
            return Ok(law.sample_iter(random).take(packets).map(|rank| rank as u32 - 1).collect());
        }
        let law = Uniform::new(0, self.flows).context("a case has flows")?;
        Ok(law.sample_iter(random).take(packets).collect())
    }
}

fn progress(length: u64, what: &'static str) -> ProgressBar {
    let template = "{wide_bar} {pos}/{len} {msg}";
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    ProgressBar::new(length).with_style(style).with_message(what)
}
