//! A host's data path and several proxies on a [`Grid`], each proxy at work as a node of its own.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use warren_dataplane::datapath::{
    DEFAULT_FLOWS, FlowLogOptions, HostDatapath, HostOptions, HostVpc, PortRange, ProxyDatapath,
    ProxyOptions, ProxyVpc, Timers,
};
use warren_dataplane::proxy::Proxy;

use crate::fleet::built;
use crate::grid::Grid;
use crate::guest::KernelGuest;
use crate::rundir::RunDir;
use crate::topology::{CIDR, SHARED, UNDERLAY, VPC_INTERFACES};

/// The VPCs, on the interfaces of the same order.
pub const VNIS: [u32; 2] = [100, 200];
/// The host's ports, in both VPCs.
pub const PORTS: PortRange = PortRange { base: 4096, count: 4096 };
/// Slots of the host.
pub const SLOTS: u32 = 4;
const PATIENCE: Duration = Duration::from_secs(20);

/// One host, and proxies that serve both VPCs.
pub struct Cluster {
    /// The machines.
    pub grid: Grid,
    run: RunDir,
    host: Option<HostDatapath>,
    proxies: Vec<Option<Arc<Proxy>>>,
}

impl Cluster {
    /// Starts everything; the first proxy owns both VPCs' addresses.
    pub fn new(proxies: u8) -> Result<Self> {
        let grid = Grid::new(1, proxies)?;
        let proxies = grid.proxies.iter().map(|_| None).collect();
        let mut cluster = Self { grid, run: RunDir::new()?, host: None, proxies };
        cluster.open_host()?;
        let addresses = cluster.addresses();
        for vni in VNIS {
            cluster.host().apply_vpc(&HostVpc {
                vni,
                shared_address: SHARED,
                shared_address_v6: None,
                ports: PORTS,
                proxy_address: addresses[0],
                proxies: addresses.clone(),
            })?;
        }
        let all: Vec<_> = (0..addresses.len()).collect();
        for index in &all {
            cluster.open_proxy(*index)?;
        }
        for vni in VNIS {
            cluster.apply(vni, &all)?;
            wait(|| Ok(cluster.proxy(0)?.owns(vni)))?;
        }
        Ok(cluster)
    }

    /// Where logs and data may be.
    pub fn run(&self) -> &RunDir {
        &self.run
    }

    /// The host's data path, which is open.
    ///
    /// # Panics
    /// If it was closed.
    pub fn host(&self) -> &HostDatapath {
        self.host.as_ref().expect("it is open")
    }

    /// Opens the host's data path, as by a daemon that starts.
    pub fn open_host(&mut self) -> Result<()> {
        let machine = &self.grid.hosts[0];
        let options = HostOptions {
            bpffs: self.run.bpf().join("host"),
            object: std::fs::read(built("warren-ebpf.o")?)?,
            underlay_interface: UNDERLAY.to_owned(),
            underlay_address: machine.address.into(),
            slots: SLOTS,
            interface_prefix: "wrn".to_owned(),
            flows: DEFAULT_FLOWS,
            timers: Timers::DEFAULT,
            flow_log: FlowLogOptions::default(),
        };
        self.host = Some(machine.namespace.run(|| HostDatapath::open(&options))?);
        Ok(())
    }

    /// Leaves the host's data path as a killed daemon does.
    pub fn close_host(&mut self) {
        self.host = None;
    }

    /// Starts the daemon of a proxy.
    pub fn open_proxy(&mut self, index: usize) -> Result<()> {
        let machine = &self.grid.proxies[index];
        let name = machine.namespace.name();
        let options = ProxyOptions {
            bpffs: self.run.bpf().join(name),
            object: std::fs::read(built("warren-ebpf.o")?)?,
            underlay_interface: UNDERLAY.to_owned(),
            underlay_address: machine.address.into(),
            interface_prefix: "wrn".to_owned(),
        };
        let file = self.run.path().join(format!("{name}.json"));
        let proxy = machine.namespace.run(|| -> Result<_> {
            let datapath = Arc::new(ProxyDatapath::open(&options)?);
            Ok(Proxy::start(datapath, machine.address.into(), &file)?)
        });
        self.proxies[index] = Some(proxy?);
        Ok(())
    }

    /// Ends the daemon of a proxy; its programs stay.
    pub fn close_proxy(&mut self, index: usize) -> Result<()> {
        let proxy = self.proxies[index].take().context("it is not there")?;
        let weak = Arc::downgrade(&proxy);
        drop(proxy);
        // Its thread ends its turn.
        wait(|| Ok(weak.strong_count() == 0))
    }

    /// A proxy whose daemon is there.
    pub fn proxy(&self, index: usize) -> Result<&Arc<Proxy>> {
        self.proxies[index].as_ref().context("its daemon is not there")
    }

    /// Makes a VPC known to all proxies whose daemon is there; these may own its address, in this
    /// order.
    pub fn apply(&self, vni: u32, order: &[usize]) -> Result<()> {
        let addresses = self.addresses();
        let order: Vec<_> = order.iter().map(|index| addresses[*index]).collect();
        let place = VNIS.iter().position(|it| *it == vni).context("there is no such VPC")?;
        let vpc = ProxyVpc {
            vni,
            interface: VPC_INTERFACES[place].to_owned(),
            shared_address: SHARED,
            cidr: CIDR.parse()?,
            gateway: None,
            v6: None,
            holders: vec![(PORTS, self.grid.hosts[0].address.into())],
            claim: None,
            routes: Vec::new(),
        };
        for (machine, proxy) in self.grid.proxies.iter().zip(&self.proxies) {
            let Some(proxy) = proxy else { continue };
            machine.namespace.run(|| proxy.apply_vpc(&vpc, &order))?;
        }
        Ok(())
    }

    /// The proxy that the host sends a VPC's packets to.
    pub fn owner(&self, vni: u32) -> Result<usize> {
        let vpcs = self.host().vpcs()?;
        let vpc = vpcs.iter().find(|vpc| vpc.vni == vni).context("there is no such VPC")?;
        let place = self.addresses().iter().position(|it| *it == vpc.proxy_address);
        place.context("it is no proxy's")
    }

    /// A guest with a kernel's network stack on a slot, in a VPC.
    pub fn guest(&self, slot: u32, vni: u32) -> Result<KernelGuest> {
        let (machine, host) = (&self.grid.hosts[0], self.host());
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
