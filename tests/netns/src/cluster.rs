//! Hosts' data paths and proxies on a [`Grid`]: each proxy is a `warrend` of its own, without a control
//! plane. What that would tell them, the test does.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tokio::runtime::Runtime;
use warren_dataplane::datapath::{
    DEFAULT_FLOWS, FlowLogOptions, HostDatapath, HostOptions, HostVpc, PortRange, Timers,
};
use warren_proto::endpoint::{Endpoint, connect};
use warren_proto::v1;
use warren_proto::v1::agent_service_client::AgentServiceClient;

use crate::fleet::built;
use crate::grid::Grid;
use crate::guest::KernelGuest;
use crate::process::Process;
use crate::rundir::RunDir;
use crate::topology::{CIDR, SHARED, UNDERLAY, VPC_INTERFACES};

/// The VPCs, on the interfaces of the same order.
pub const VNIS: [u32; 2] = [100, 200];
/// The VPCs' second addresses, for who adds them.
pub const MORE_VNIS: [u32; 2] = [101, 201];
/// That address, in both VPCs.
const SECOND: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 101);
/// Ports of each host, in both VPCs.
const PORTS: u32 = 4096;
/// Slots of each host.
const SLOTS: u32 = 4;
const PATIENCE: Duration = Duration::from_secs(20);

/// Hosts, and proxies that serve both VPCs.
pub struct Cluster {
    /// The machines.
    pub grid: Grid,
    run: RunDir,
    runtime: Runtime,
    config: String,
    hosts: Vec<Option<HostDatapath>>,
    proxies: Vec<Option<Process>>,
}

impl Cluster {
    /// Starts everything; the first proxy owns both VPCs' addresses.
    pub fn new(hosts: u8, proxies: u8) -> Result<Self> {
        Self::configured(hosts, proxies, String::new())
    }

    /// The same, with more in the configuration of proxies.
    pub fn configured(hosts: u8, proxies: u8, config: String) -> Result<Self> {
        let mut cluster = Self {
            config,
            grid: Grid::new(hosts, proxies)?,
            run: RunDir::new()?,
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build()?,
            hosts: (0..hosts).map(|_| None).collect(),
            proxies: (0..proxies).map(|_| None).collect(),
        };
        let all: Vec<_> = (0..cluster.proxies.len()).collect();
        for index in &all {
            cluster.start_proxy(*index)?;
        }
        for host in 0..cluster.hosts.len() {
            cluster.open_host(host)?;
        }
        for vni in VNIS {
            cluster.add(vni, &all)?;
        }
        Ok(cluster)
    }

    /// Makes a shared address known to everybody, and waits until the first of these proxies owns it.
    pub fn add(&self, vni: u32, order: &[usize]) -> Result<()> {
        let proxies = self.addresses();
        let (_, shared_address) = place(vni)?;
        for host in 0..self.hosts.len() {
            self.host(host).apply_vpc(&HostVpc {
                vni,
                shared_address,
                shared_address_v6: None,
                ports: ports(host),
                // Until one says that it owns the address: not the first one's.
                proxy_address: order
                    .last()
                    .map(|last| proxies[*last])
                    .context("there is a proxy")?,
                proxies: proxies.clone(),
            })?;
        }
        self.apply(vni, order)?;
        (0..self.hosts.len())
            .try_for_each(|host| wait(|| Ok(self.owner_at(host, vni)? == order[0])))
    }

    /// What the proxies' daemons said.
    pub fn logs(&self) -> String {
        self.proxies.iter().flatten().map(|proxy| proxy.log() + "\n").collect()
    }

    /// Where logs and data may be.
    pub fn run(&self) -> &RunDir {
        &self.run
    }

    /// A host's data path, which is open.
    ///
    /// # Panics
    /// If it was closed.
    pub fn host(&self, index: usize) -> &HostDatapath {
        self.hosts[index].as_ref().expect("it is open")
    }

    /// Opens a host's data path, as by a daemon that starts.
    pub fn open_host(&mut self, index: usize) -> Result<()> {
        let machine = &self.grid.hosts[index];
        let options = HostOptions {
            bpffs: self.run.bpf().join(machine.namespace.name()),
            object: std::fs::read(built("warren-ebpf.o")?)?,
            underlay_interface: UNDERLAY.to_owned(),
            underlay_address: machine.address.into(),
            slots: SLOTS,
            interface_prefix: "wrn".to_owned(),
            flows: DEFAULT_FLOWS,
            timers: Timers::DEFAULT,
            flow_log: FlowLogOptions::default(),
        };
        self.hosts[index] = Some(machine.namespace.run(|| HostDatapath::open(&options))?);
        Ok(())
    }

    /// Leaves a host's data path as a killed daemon does.
    pub fn close_host(&mut self, index: usize) {
        self.hosts[index] = None;
    }

    /// Starts the daemon of a proxy, and waits until it serves.
    pub fn start_proxy(&mut self, index: usize) -> Result<()> {
        let machine = &self.grid.proxies[index];
        let (dir, socket) = (self.dir(index), self.socket(index));
        std::fs::create_dir_all(&dir)?;
        let config = format!(
            "name = '{name}'\nlisten = ['unix:{socket}']\nrun_dir = '{dir}'\nbpffs = '{bpf}/{name}'\n\
             programs = '{programs}'\n[underlay]\ninterface = '{UNDERLAY}'\naddress = '{address}'\n{more}",
            more = self.config,
            name = machine.namespace.name(),
            socket = socket.display(),
            dir = dir.display(),
            bpf = self.run.bpf().display(),
            programs = built("warren-ebpf.o")?.display(),
            address = machine.address,
        );
        let path = dir.join("warrend.toml");
        std::fs::write(&path, config)?;
        let mut command = machine.namespace.command(built("warrend")?);
        command.args(["--role", "proxy", "--config"]).arg(path);
        let mut process =
            Process::start(machine.namespace.name(), command, &dir.join("warrend.log"))?;
        process
            .wait_until(PATIENCE, || std::os::unix::net::UnixStream::connect(&socket).is_ok())?;
        self.proxies[index] = Some(process);
        Ok(())
    }

    /// Kills the daemon of a proxy; its programs stay.
    pub fn kill_proxy(&mut self, index: usize) -> Result<()> {
        self.proxies[index].take().context("it is not there")?.kill().map(drop)
    }

    /// Whether the daemon of a proxy is there.
    pub fn has_proxy(&self, index: usize) -> bool {
        self.proxies[index].is_some()
    }

    /// Sends a signal to the daemon of a proxy.
    pub fn signal_proxy(&self, index: usize, signal: Signal) -> Result<()> {
        self.proxies[index].as_ref().context("it is not there")?.signal(signal)
    }

    /// Makes a VPC known to all proxies whose daemon is there; these may own its address, in this
    /// order.
    pub fn apply(&self, vni: u32, order: &[usize]) -> Result<()> {
        let there = |index: &usize| self.has_proxy(*index);
        (0..self.proxies.len()).filter(there).try_for_each(|index| self.apply_at(index, vni, order))
    }

    /// The same, to one proxy.
    pub fn apply_at(&self, index: usize, vni: u32, order: &[usize]) -> Result<()> {
        self.send(index, self.request(vni, order)?)
    }

    /// What [`Cluster::apply`] tells a proxy of a VPC.
    pub fn request(&self, vni: u32, order: &[usize]) -> Result<v1::ApplyVpcRequest> {
        let (place, shared_address) = place(vni)?;
        let addresses = self.addresses();
        let holders = self.grid.hosts.iter().enumerate().map(|(host, machine)| {
            let PortRange { base, count } = ports(host);
            let ports = Some(v1::PortRange { base: base.into(), count });
            v1::PortHolder { ports, host_address: machine.address.to_string() }
        });
        let vpc = v1::ProxyVpc {
            interface: VPC_INTERFACES[place].to_owned(),
            cidr: CIDR.to_owned(),
            holders: holders.collect(),
            proxies: order.iter().map(|index| addresses[*index].to_string()).collect(),
            ..v1::ProxyVpc::default()
        };
        Ok(v1::ApplyVpcRequest {
            vpc: VPC_INTERFACES[place].to_owned(),
            vni,
            shared_address: shared_address.to_string(),
            role: Some(v1::apply_vpc_request::Role::Proxy(vpc)),
            ..v1::ApplyVpcRequest::default()
        })
    }

    /// Tells a proxy of a VPC.
    pub fn send(&self, index: usize, request: v1::ApplyVpcRequest) -> Result<()> {
        self.call(index, async |agent| agent.apply_vpc(request).await.map(drop))
    }

    /// Has a proxy forget a VPC.
    pub fn remove_at(&self, index: usize, vni: u32) -> Result<()> {
        let request = v1::RemoveVpcRequest { vni };
        self.call(index, async |agent| agent.remove_vpc(request).await.map(drop))
    }

    /// What a proxy dropped, by VNI and reason.
    pub fn drops_at(&self, index: usize) -> Result<Vec<v1::DropCount>> {
        let mut drops = Vec::new();
        self.call(index, async |agent| {
            drops = agent.list_drops(v1::ListDropsRequest {}).await?.into_inner().drops;
            Ok(())
        })?;
        Ok(drops)
    }

    fn call(
        &self,
        index: usize,
        what: impl AsyncFnOnce(
            &mut AgentServiceClient<tonic::transport::Channel>,
        ) -> Result<(), tonic::Status>,
    ) -> Result<()> {
        let endpoint = Endpoint::Unix(self.socket(index));
        self.runtime.block_on(async {
            let mut agent = AgentServiceClient::new(connect(&endpoint).await?);
            what(&mut agent).await.context("a proxy refuses")
        })
    }

    /// The proxy that a host sends a VPC's packets to.
    pub fn owner_at(&self, host: usize, vni: u32) -> Result<usize> {
        let vpcs = self.host(host).vpcs()?;
        let vpc = vpcs.iter().find(|vpc| vpc.vni == vni).context("there is no such VPC")?;
        let place = self.addresses().iter().position(|it| *it == vpc.proxy_address);
        place.context("it is no proxy's")
    }

    /// The same, of the first host.
    pub fn owner(&self, vni: u32) -> Result<usize> {
        self.owner_at(0, vni)
    }

    /// A guest with a kernel's network stack on a slot of a host, in a VPC.
    pub fn guest(&self, host: usize, slot: u32, vni: u32) -> Result<KernelGuest> {
        let (machine, host) = (&self.grid.hosts[host], self.host(host));
        let mut tap = None;
        // A process that another thread forks has it open until it executes its program.
        wait(|| {
            tap = machine.namespace.run(|| host.open_tap(slot)).ok();
            Ok(tap.is_some())
        })?;
        let known = host.slot(slot)?;
        let tap = tap.context("it was opened")?.into();
        let guest = KernelGuest::plug(tap, known.address, known.mac, host.mtu())?;
        host.attach(slot, vni)?;
        Ok(guest)
    }

    fn addresses(&self) -> Vec<IpAddr> {
        self.grid.proxies.iter().map(|proxy| proxy.address.into()).collect()
    }

    fn dir(&self, index: usize) -> PathBuf {
        self.run.path().join(self.grid.proxies[index].namespace.name())
    }

    fn socket(&self, index: usize) -> PathBuf {
        self.dir(index).join("grpc.sock")
    }
}

/// Which VPC a VNI is of, and with which address.
fn place(vni: u32) -> Result<(usize, Ipv4Addr)> {
    let at = |vnis: [u32; 2]| vnis.iter().position(|it| *it == vni);
    let found = at(VNIS).map(|place| (place, SHARED));
    found.or_else(|| Some((at(MORE_VNIS)?, SECOND))).context("there is no such VPC")
}

/// The ports that a host holds.
fn ports(host: usize) -> PortRange {
    PortRange { base: 4096 * (host as u16 + 1), count: PORTS }
}

/// Waits until something is so that becomes so in a moment.
fn wait(mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !so()? {
        ensure!(Instant::now() < deadline, "it did not become so in {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
