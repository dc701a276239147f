//! A host's and a proxy's data path, open, on the harness's topology.

use std::net::IpAddr;
use std::path::PathBuf;

use warren_dataplane::datapath::{
    DEFAULT_FLOWS, DropCount, DropReason, FlowLogLevel, FlowLogOptions, HostDatapath, HostOptions,
    HostVpc, PortRange, ProxyDatapath, ProxyOptions, ProxyVpc, ProxyVpcV6, Timers,
};
use warren_netns::fleet::built;
use warren_netns::rundir::RunDir;
use warren_netns::topology::{
    CIDR, CIDR_V6, HOST, PROXY, SHARED, SHARED_V6, Topology, UNDERLAY, VPC_INTERFACES,
};

/// VNI of the first VPC.
pub const VNI_A: u32 = 100;
/// VNI of the second VPC.
pub const VNI_B: u32 = 200;
/// The host's ports, in both VPCs.
pub const PORTS: PortRange = PortRange { base: 4096, count: 1024 };
/// Slots of the host.
pub const SLOTS: u32 = 4;

/// Everything that a test of the data path needs. What it made is gone when it is dropped.
pub struct Bed {
    pub topology: Topology,
    pub run: RunDir,
    /// Whether the VPCs have IPv6.
    pub v6: bool,
    /// Underlay addresses of host and proxy.
    ends: [IpAddr; 2],
    /// What the host's data path is opened with.
    pub timers: Timers,
    pub host: Option<HostDatapath>,
    pub proxy: Option<ProxyDatapath>,
    /// Of the host, when it is opened.
    pub flow_log: FlowLogOptions,
}

impl Bed {
    /// Opens both data paths, and makes both VPCs known to both.
    pub fn new() -> Self {
        let mut bed = Self::closed();
        bed.open();
        bed.apply();
        bed
    }

    /// The same, with IPv6 in both VPCs.
    pub fn dual() -> Self {
        let mut bed = Self::closed();
        bed.topology.enable_v6().expect("the kernel has IPv6");
        bed.v6 = true;
        bed.open();
        bed.apply();
        bed
    }

    /// As [`Bed::dual`], over an underlay of IPv6.
    pub fn over_v6() -> Self {
        let mut bed = Self::closed();
        bed.topology.enable_v6().expect("the kernel has IPv6");
        let ends = bed.topology.enable_v6_underlay().expect("the kernel has IPv6");
        (bed.v6, bed.ends) = (true, ends.map(IpAddr::from));
        bed.open();
        bed.apply();
        bed
    }

    /// Makes both VPCs known to both.
    pub fn apply(&self) {
        for vni in [VNI_A, VNI_B] {
            self.apply_host(vni, PORTS);
            self.apply_proxy(vni, vec![(PORTS, self.ends[0])]);
        }
    }

    /// The topology alone.
    pub fn closed() -> Self {
        let topology = Topology::new().expect("the topology can be made");
        let run = RunDir::new().expect("a BPF file system can be mounted");
        let flow_log = FlowLogOptions { events: FlowLogLevel::All, ..FlowLogOptions::default() };
        Self {
            topology,
            run,
            v6: false,
            ends: [HOST.into(), PROXY.into()],
            timers: Timers::DEFAULT,
            host: None,
            proxy: None,
            flow_log,
        }
    }

    /// Opens both data paths, as they would be by a process that starts.
    pub fn open(&mut self) {
        self.reopen_host();
        self.reopen_proxy();
    }

    /// Leaves the host's data path as a killed process does, and opens it anew.
    pub fn reopen_host(&mut self) {
        self.host = None;
        let options = self.host_options();
        let open = || HostDatapath::open(&options);
        self.host = Some(self.topology.host.run(open).expect("the host's data path opens"));
    }

    /// Leaves the proxy's data path as a killed process does, and opens it anew.
    pub fn reopen_proxy(&mut self) {
        self.proxy = None;
        let options = self.proxy_options();
        let open = || ProxyDatapath::open(&options);
        self.proxy = Some(self.topology.proxy.run(open).expect("the proxy's data path opens"));
    }

    pub fn host_options(&self) -> HostOptions {
        HostOptions {
            bpffs: self.run.bpf().join("host"),
            object: object(),
            underlay_interface: UNDERLAY.to_owned(),
            underlay_address: self.ends[0],
            slots: SLOTS,
            interface_prefix: "wrn".to_owned(),
            flows: DEFAULT_FLOWS,
            timers: self.timers,
            flow_log: self.flow_log,
        }
    }

    pub fn proxy_options(&self) -> ProxyOptions {
        ProxyOptions {
            bpffs: self.run.bpf().join("proxy"),
            object: object(),
            underlay_interface: UNDERLAY.to_owned(),
            underlay_address: self.ends[1],
            interface_prefix: "wrn".to_owned(),
        }
    }

    pub fn host(&self) -> &HostDatapath {
        self.host.as_ref().expect("the host's data path is open")
    }

    pub fn proxy(&self) -> &ProxyDatapath {
        self.proxy.as_ref().expect("the proxy's data path is open")
    }

    pub fn apply_host(&self, vni: u32, ports: PortRange) {
        let vpc = HostVpc {
            vni,
            shared_address: SHARED,
            shared_address_v6: self.v6.then_some(SHARED_V6),
            ports,
            proxy_address: self.ends[1],
            proxies: Vec::new(),
        };
        self.host().apply_vpc(&vpc).expect("the host takes the VPC");
    }

    pub fn apply_proxy<A: Into<IpAddr>>(&self, vni: u32, holders: Vec<(PortRange, A)>) {
        let v6 = self.v6.then(|| ProxyVpcV6 {
            shared_address: SHARED_V6,
            cidr: CIDR_V6.parse().expect("it is a CIDR"),
            gateway: None,
        });
        let vpc = ProxyVpc { v6, ..proxy_vpc(vni, holders) };
        let apply = || self.proxy().apply_vpc(&vpc);
        self.topology.proxy.run(apply).expect("the proxy takes the VPC");
    }

    /// How many packets the host dropped for a reason, by slot.
    pub fn host_drops(&self, slot: u32, reason: DropReason) -> u64 {
        count(&self.host().drops().expect("counters can be read"), slot, reason)
    }

    /// How many packets the proxy dropped for a reason, by VNI.
    pub fn proxy_drops(&self, vni: u32, reason: DropReason) -> u64 {
        count(&self.proxy().drops().expect("counters can be read"), vni, reason)
    }
}

/// A VPC as the proxy of the topology knows it.
pub fn proxy_vpc<A: Into<IpAddr>>(vni: u32, holders: Vec<(PortRange, A)>) -> ProxyVpc {
    ProxyVpc {
        vni,
        interface: VPC_INTERFACES[usize::from(vni == VNI_B)].to_owned(),
        shared_address: SHARED,
        cidr: CIDR.parse().expect("it is a CIDR"),
        gateway: None,
        v6: None,
        holders: holders.into_iter().map(|(ports, host)| (ports, host.into())).collect(),
        claim: Some(1),
        routes: Vec::new(),
        public: None,
    }
}

fn count(drops: &[DropCount], scope: u32, reason: DropReason) -> u64 {
    let found = drops.iter().find(|drop| drop.scope == scope && drop.reason == reason);
    found.map_or(0, |drop| drop.packets)
}

fn object() -> Vec<u8> {
    let path: PathBuf = built("warren-ebpf.o").expect("the programs are built");
    std::fs::read(path).expect("the programs can be read")
}

/// Waits until something is so that becomes so in a moment.
#[track_caller]
pub fn eventually(mut so: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + crate::guest::PATIENCE;
    while !so() {
        assert!(std::time::Instant::now() < deadline, "it did not become so");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}
