//! The four paths that are compared, each on namespaces of its own: guest, host, underlay, proxy or
//! router, the VPC's server.

use std::fs::File;
use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use warren_abi::wire::{GATEWAY, slot_address, slot_mac};
use warren_dataplane::datapath::{
    HostDatapath, HostOptions, HostVpc, PortRange, ProxyDatapath, ProxyOptions, ProxyVpc,
};
use warren_netns::netns::Namespace;
use warren_netns::process::Process;
use warren_netns::rundir::RunDir;
use warren_netns::servers;
use warren_netns::topology::{CIDR, HOST, PROXY, SHARED, Topology, UNDERLAY, VPC_INTERFACES};

use super::pump::Pump;
use crate::options;
use crate::tap;

/// Largest IP packet of a guest, on all paths: what fits the tunnels.
pub const MTU: u16 = 1450;
/// The guest behind a pump.
const PUMPED: u32 = 1;
/// The microVM.
pub const MICROVM: u32 = 2;

const VNI: u32 = 4096;
const PORTS: PortRange = PortRange { base: 1024, count: 64_512 };
/// Addresses of the VXLAN devices' ends, beside the VPC's.
const VXLAN_HOST: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
const VXLAN_ROUTER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);

/// What is between guest and VPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Warren.
    Warren,
    /// The kernels of host and router forward; nothing is translated.
    Routed,
    /// As `Routed`, and nftables masquerades on the host.
    RoutedNft,
    /// nftables masquerades on the host, and a VXLAN device leads to the router.
    VxlanNft,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Warren, Self::Routed, Self::RoutedNft, Self::VxlanNft];

    /// Key of its figures.
    pub fn key(self) -> &'static str {
        match self {
            Self::Warren => "warren",
            Self::Routed => "routed",
            Self::RoutedNft => "routed_nft",
            Self::VxlanNft => "vxlan_nft",
        }
    }
}

/// A path, up.
pub struct Path {
    pub kind: Kind,
    /// The namespace of the guest behind the pump.
    pub guest: Namespace,
    // In the order in which they must go: the pump has TAPs open.
    _pump: Pump,
    /// The microVM's TAP, until it is taken.
    microvm_tap: Option<File>,
    _iperf3: Process,
    warren: Option<Warren>,
    topology: Topology,
}

impl Path {
    /// Makes everything of it. Logs go to `run`.
    pub fn open(kind: Kind, run: &RunDir) -> Result<Self> {
        let topology = Topology::new()?;
        let (warren, taps) = match kind {
            Kind::Warren => {
                let warren = Warren::open(&topology, run)?;
                let open = |slot| warren.datapath.open_tap(slot).map(File::from);
                let taps = topology.host.run(|| [PUMPED, MICROVM].map(open));
                let [pumped, microvm] = taps;
                (Some(warren), [pumped?, microvm?])
            }
            _ => (None, forwarding(kind, &topology)?),
        };
        let [host_tap, microvm_tap] = taps;
        let guest = Namespace::new("guest")?;
        let guest_tap = tap::make(&guest, "eth0")?;
        let pump = Pump::start(&guest_tap, &host_tap)?;
        configure(&guest)?;
        let dir = run.path().join(kind.key());
        std::fs::create_dir(&dir)?;
        Ok(Self {
            kind,
            guest,
            _pump: pump,
            microvm_tap: Some(microvm_tap),
            _iperf3: servers::iperf3(&topology.vpcs[0], &dir)?,
            warren,
            topology,
        })
    }

    /// Where the server is.
    pub fn vpc(&self) -> &Namespace {
        &self.topology.vpcs[0]
    }

    /// The TAP for a microVM in slot [`MICROVM`], as its VMM wants it.
    pub fn take_microvm_tap(&mut self) -> Result<File> {
        self.microvm_tap.take().context("the microVM's TAP was taken before")
    }

    /// What `warrend` does every few seconds.
    pub fn sweep(&self) -> Result<()> {
        if let Some(warren) = &self.warren {
            self.topology.host.run(|| warren.datapath.sweep())?;
        }
        Ok(())
    }
}

/// Warren's data paths; uninstalled when dropped.
struct Warren {
    datapath: HostDatapath,
    host: (HostOptions, Namespace),
    proxy: (ProxyOptions, Namespace),
}

impl Warren {
    fn open(topology: &Topology, run: &RunDir) -> Result<Self> {
        let (host, proxy) = (options::host(run, MICROVM)?, options::proxy(run)?);
        let datapath = topology.host.run(|| HostDatapath::open(&host))?;
        // From here on, dropping it removes what an error leaves.
        let this = Self {
            datapath,
            host: (host, topology.host.clone()),
            proxy: (proxy, topology.proxy.clone()),
        };
        this.datapath.apply_vpc(&HostVpc {
            vni: VNI,
            shared_address: SHARED,
            shared_address_v6: None,
            ports: PORTS,
            proxy_address: PROXY.into(),
            proxies: Vec::new(),
        })?;
        topology.proxy.run(|| -> Result<()> {
            let vpc = ProxyVpc {
                vni: VNI,
                interface: VPC_INTERFACES[0].to_owned(),
                shared_address: SHARED,
                cidr: CIDR.parse()?,
                gateway: None,
                v6: None,
                holders: vec![(PORTS, HOST.into())],
                claim: Some(1),
                routes: Vec::new(),
                public: None,
            };
            Ok(ProxyDatapath::open(&this.proxy.0)?.apply_vpc(&vpc)?)
        })?;
        for slot in [PUMPED, MICROVM] {
            this.datapath.attach(slot, VNI)?;
        }
        Ok(this)
    }
}

impl Drop for Warren {
    fn drop(&mut self) {
        let (options, namespace) = &self.host;
        let host = namespace.run(|| HostDatapath::uninstall(options));
        let (options, namespace) = &self.proxy;
        let proxy = namespace.run(|| ProxyDatapath::uninstall(options));
        for error in [host, proxy].into_iter().filter_map(Result::err) {
            tracing::error!("cannot uninstall the data path: {error}");
        }
    }
}

/// Has the kernels of host and router forward; returns the host's TAPs, one for each guest.
fn forwarding(kind: Kind, topology: &Topology) -> Result<[File; 2]> {
    let Topology { host, proxy: router, .. } = topology;
    let mut taps = Vec::new();
    for slot in [PUMPED, MICROVM] {
        let name = format!("tap{slot}");
        let tap = tap::make(host, &name)?;
        host.ip(&format!("link set {name} mtu {MTU} up"))?;
        host.ip(&format!("addr add {GATEWAY}/32 dev {name}"))?;
        host.ip(&format!("route add {} dev {name}", guest_address(slot)?))?;
        taps.push(tap);
    }
    for machine in [host, router] {
        machine.sysctl("ipv4/ip_forward", "1")?;
    }
    router.ip(&format!("addr add {SHARED}/24 dev {}", VPC_INTERFACES[0]))?;
    // What the VPC sees as the guest's address, and the interface that it is masqueraded on.
    let (guests, masquerade) = match kind {
        Kind::Warren | Kind::Routed => ("169.254.0.0/16", None),
        Kind::RoutedNft => ("192.0.2.0/24", Some(UNDERLAY)),
        Kind::VxlanNft => ("10.1.0.0/24", Some("vx0")),
    };
    if kind == Kind::VxlanNft {
        let ends = [(host, HOST, PROXY, VXLAN_HOST), (router, PROXY, HOST, VXLAN_ROUTER)];
        for (machine, local, remote, address) in ends {
            machine.ip(&format!(
                "link add vx0 type vxlan id {VNI} local {local} remote {remote} dstport 4789 dev {UNDERLAY}"
            ))?;
            machine.ip(&format!("addr add {address}/24 dev vx0"))?;
            machine.ip(&format!("link set vx0 mtu {MTU} up"))?;
        }
        host.ip(&format!("route add {CIDR} via {VXLAN_ROUTER}"))?;
    } else {
        host.ip(&format!("route add {CIDR} via {PROXY}"))?;
        router.ip(&format!("route add 169.254.0.0/16 via {HOST}"))?;
    }
    topology.vpcs[0].ip(&format!("route add {guests} via {SHARED}"))?;
    if let Some(interface) = masquerade {
        host.nft(&format!(
            "table ip nat {{ chain out {{ type nat hook postrouting priority srcnat; \
             oifname {interface} masquerade; }}; }}"
        ))?;
    }
    taps.try_into().ok().context("two TAPs were made")
}

/// Makes the guest's end what a guest's interface is.
fn configure(guest: &Namespace) -> Result<()> {
    let (address, mac) = (guest_address(PUMPED)?, guest_mac(PUMPED));
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    guest.sysctl("ipv6/conf/eth0/disable_ipv6", "1").ok();
    guest.ip(&format!("link set eth0 address {mac} mtu {MTU} up"))?;
    guest.ip(&format!("addr add {address}/32 dev eth0"))?;
    guest.ip(&format!("route add {GATEWAY} dev eth0"))?;
    guest.ip(&format!("route add default via {GATEWAY}"))?;
    // Connections that closed hold their ports for a minute.
    guest.sysctl("ipv4/ip_local_port_range", "1024 65535")
}

/// Address of the guest in a slot.
pub fn guest_address(slot: u32) -> Result<Ipv4Addr> {
    slot_address(slot).context("no such slot")
}

/// MAC address of the guest in a slot.
pub fn guest_mac(slot: u32) -> [u8; 6] {
    slot_mac(slot).octets()
}
