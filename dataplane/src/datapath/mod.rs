//! The data path: eBPF programs, their maps, TAP slots and the VXLAN device.
//!
//! Everything it makes outlives the process: programs' links and maps are pinned in a BPF file
//! system, TAPs are persistent. Opening it again adopts what is there and replaces the programs
//! one by one, atomically, under traffic.

use std::fmt::Display;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::thread::ScopedJoinHandle;

use aya::maps::MapError;
use ipnetwork::{Ipv4Network, Ipv6Network};
pub use warren_abi::drop::Drop as DropReason;
use warren_abi::family::{Family, V4, V6};
pub use warren_abi::flow::Timers;
use warren_abi::nat::BLOCK_PORTS;
use warren_abi::wire::Ip;
use warren_proto::route::{InvalidTable, Route};

mod carried;
mod changes;
mod counters;
mod expedited;
mod filter;
mod flow_events;
mod fragments;
mod hook;
mod host;
mod limits;
mod links;
mod live;
mod mapping;
mod migrate;
mod netlink;
mod owners;
mod pins;
mod policy;
mod programs;
mod proxy;
mod reached;
mod routes;
mod services;
mod slots;
mod sweep;
mod sysctl;
mod tables;
mod tap;
mod underlay;
mod undo;
mod verdicts;

pub use carried::Carried;
pub use flow_events::{FlowEvents, FlowLogLevel, FlowLogOptions, FlowTotals};
pub use host::HostDatapath;
pub use limits::{Limits, Usage};
pub use links::{Changed, LinkEvents};
pub use live::{LiveFlow, PortUse};
pub use policy::{OTHERWISE, Policy, PolicyId};
pub use proxy::{Place, ProxyDatapath};

/// How to open a host's data path.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Directory for the pins, on a BPF file system; made if it is missing. One per instance.
    pub bpffs: PathBuf,
    /// The object file with the programs (the `warren-ebpf` binary).
    pub object: Vec<u8>,
    /// Interface that leads to the proxies.
    pub underlay_interface: String,
    /// This host's address on the underlay: the tunnel's source.
    pub underlay_address: IpAddr,
    /// How many slots to have, 1 to [`MAX_SLOTS`]. Slots that exist beyond it are left alone.
    pub slots: u32,
    /// Beginning of the names of interfaces: `wrn` makes `wrn1`, `wrn2` and so on, and
    /// `wrn-vxlan` and `wrn-svc`. 1 to 8 bytes.
    pub interface_prefix: String,
    /// Most flows at one time, over all slots. Fixed when the maps are made.
    pub flows: u32,
    /// How long flows may be idle. Flows that are there keep to the timers of whoever opens the
    /// data path last.
    pub timers: Timers,
    /// What programs tell of flows.
    pub flow_log: FlowLogOptions,
}

/// What [`HostOptions::flows`] is best set to: 131,072, which take about 25 MB.
pub const DEFAULT_FLOWS: u32 = 1 << 17;

/// Most slots of a host: one address of 169.254.0.0/16 each.
pub const MAX_SLOTS: u32 = warren_abi::wire::MAX_SLOTS;

/// How to open a proxy's data path.
#[derive(Clone, Debug)]
pub struct ProxyOptions {
    /// Directory for the pins, on a BPF file system; made if it is missing. One per instance.
    pub bpffs: PathBuf,
    /// The object file with the programs (the `warren-ebpf` binary).
    pub object: Vec<u8>,
    /// Interface that leads to the hosts.
    pub underlay_interface: String,
    /// This proxy's address on the underlay: the tunnel's source.
    pub underlay_address: IpAddr,
    /// Beginning of the name of the VXLAN device, `wrn-vxlan` for `wrn`. 1 to 8 bytes.
    pub interface_prefix: String,
}

/// Where a microVM plugs in: a persistent TAP with an address of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Number, from 1.
    pub number: u32,
    /// Name of the TAP.
    pub ifname: String,
    /// Index of the TAP.
    pub ifindex: u32,
    /// The guest's address, a /32; its gateway is [`warren_abi::wire::GATEWAY`].
    pub address: Ipv4Addr,
    /// The guest's IPv6 address, a /128; its gateway is [`warren_abi::wire::GATEWAY_V6`].
    pub address_v6: Ipv6Addr,
    /// The guest's MAC address.
    pub mac: [u8; 6],
}

/// Ports `[base, base + count)` of a shared address, both multiples of 64, none below 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRange {
    /// First port.
    pub base: u16,
    /// How many; at most `65536 - base`.
    pub count: u32,
}

/// A VPC, as a host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostVpc {
    /// VXLAN network identifier, 1 to 2^24-1.
    pub vni: u32,
    /// IPv4 address in the VPC that guests appear as.
    pub shared_address: Ipv4Addr,
    /// IPv6 address in the VPC that guests appear as: without one, they have no IPv6 there.
    pub shared_address_v6: Option<Ipv6Addr>,
    /// This host's ports of both addresses.
    pub ports: PortRange,
    /// Underlay address of the proxy that owns the shared addresses, until another claims them
    /// ([`warren_abi::claim`]).
    pub proxy_address: IpAddr,
    /// All that may claim them, and that replies may come from, beside that one.
    pub proxies: Vec<IpAddr>,
}

/// A VPC, as a proxy knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyVpc {
    /// VXLAN network identifier, 1 to 2^24-1.
    pub vni: u32,
    /// Interface of the proxy that stands in the VPC.
    pub interface: String,
    /// IPv4 address in the VPC that guests appear as.
    pub shared_address: Ipv4Addr,
    /// What is on-link on the interface.
    pub cidr: Ipv4Network,
    /// Next hop for what is not in the CIDR.
    pub gateway: Option<Ipv4Addr>,
    /// Its IPv6, if it has any.
    pub v6: Option<ProxyVpcV6>,
    /// Who holds which ports, of the addresses of both families: the underlay addresses of hosts.
    pub holders: Vec<(PortRange, IpAddr)>,
    /// Sequence number of the claim by which this proxy owns the shared addresses. None: another
    /// does, and this one forwards both ways as that does, but answers nobody who asks for them.
    pub claim: Option<u32>,
    /// Its own routes, which come before those of CIDR and gateway; the longest prefix wins.
    pub routes: Vec<Route>,
    /// VNI of the address by which leaves what has no route: another one, without holders, which no
    /// other VPC leaves by. Ports there are those of the shared address.
    pub public: Option<u32>,
}

/// The IPv6 of a VPC, as a proxy knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProxyVpcV6 {
    /// IPv6 address in the VPC that guests appear as.
    pub shared_address: Ipv6Addr,
    /// What is on-link on the interface.
    pub cidr: Ipv6Network,
    /// Next hop for what is not in the CIDR.
    pub gateway: Option<Ipv6Addr>,
}

/// That a slot is connected to a VPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The VPC's network identifier.
    pub vni: u32,
    /// Differs from every other attachment of the slot, before and after.
    pub generation: u32,
}

/// What is in force for a slot; by default, nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restrictions {
    /// Which flows it may have; without one, all.
    pub policy: Option<PolicyId>,
    /// How much it may send, receive and hold.
    pub limits: Limits,
}

/// How many packets were dropped for a reason, since the maps were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropCount {
    /// Number of the slot on a host, VNI on a proxy; 0 where there is none.
    pub scope: u32,
    /// Why.
    pub reason: DropReason,
    /// How many packets; a segmented one (GSO) counts once.
    pub packets: u64,
}

/// What a sweep of the flow table found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Flows that live on.
    pub live: u32,
    /// Flows that were idle for too long, or closed, and are gone.
    pub expired: u32,
    /// Flows of detached slots, which are gone.
    pub stale: u32,
}

/// Why the data path could not be opened or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The pin directory cannot hold pins.
    #[error("{path} is not on a BPF file system: mount one there (mount -t bpf bpf {path})")]
    NotBpffs {
        /// The directory.
        path: PathBuf,
    },
    /// An option or a VPC's description makes no sense.
    #[error("{what} is {value}: {remedy}")]
    Invalid {
        /// Which field.
        what: &'static str,
        /// What it holds.
        value: String,
        /// What it must hold.
        remedy: &'static str,
    },
    /// An interface is missing.
    #[error("interface {name} does not exist here: create it first, or name another")]
    NoInterface {
        /// Its name.
        name: String,
    },
    /// An operation of the kernel failed.
    #[error("{operation} {object}: {source}")]
    System {
        /// What was tried, such as `create TAP`.
        operation: &'static str,
        /// On what.
        object: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no slot of this number.
    #[error("there is no slot {0}: slots are numbered from 1 to the configured count")]
    NoSlot(u32),
    /// The VPC was never applied, or was removed.
    #[error("VPC with VNI {0} is not known here: apply it first")]
    UnknownVpc(u32),
    /// The VPC cannot be removed while slots are attached to it.
    #[error("VPC with VNI {vni} is in use by slot {slot}: detach it first")]
    VpcInUse {
        /// The VPC.
        vni: u32,
        /// One of the slots.
        slot: u32,
    },
    /// The slot is attached already.
    #[error("slot {slot} is attached to the VPC with VNI {vni}: detach it first")]
    SlotInUse {
        /// The slot.
        slot: u32,
        /// The VPC that it is in.
        vni: u32,
    },
    /// The object file does not hold the programs or maps of this version.
    #[error("{name} is missing in the eBPF object: build it from the same source as this program")]
    MissingInObject {
        /// Program or map.
        name: &'static str,
    },
    /// A pinned map has a layout that this version does not know, or less room than it needs.
    #[error(
        "pinned map {path} is a later version's, or too small: start that version, or uninstall the \
         data path, which ends its flows, and open it again"
    )]
    IncompatibleMap {
        /// The pin.
        path: PathBuf,
    },
    /// The kernel or the loader rejected the eBPF object.
    #[error("load the eBPF object: {0}")]
    Load(#[source] Box<aya::EbpfError>),
    /// A program could not be loaded or attached.
    #[error("{operation} {object}: {source}")]
    Program {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// What the kernel said.
        source: Box<aya::programs::ProgramError>,
    },
    /// A map could not be read or written.
    #[error("map {name}: {source}")]
    Map {
        /// Its name.
        name: &'static str,
        /// What the kernel said.
        source: Box<MapError>,
    },
    /// The slot is in no VPC.
    #[error("slot {0} is attached to no VPC: attach it first")]
    Detached(u32),
    /// The policy was removed, or is another host's.
    #[error("the policy of slot {0} is not here: add it first")]
    UnknownPolicy(u32),
    /// A VPC's routes make no table.
    #[error(transparent)]
    Routes(InvalidTable),
}

impl Error {
    pub(crate) fn system(operation: &'static str, object: impl Display, source: io::Error) -> Self {
        Self::System { operation, object: object.to_string(), source }
    }

    fn program(
        operation: &'static str,
        object: impl Display,
        source: aya::programs::ProgramError,
    ) -> Self {
        Self::Program { operation, object: object.to_string(), source: Box::new(source) }
    }

    fn map(name: &'static str, source: MapError) -> Self {
        Self::Map { name, source: Box::new(source) }
    }

    fn invalid(what: &'static str, value: impl Display, remedy: &'static str) -> Self {
        Self::Invalid { what, value: value.to_string(), remedy }
    }
}

impl PortRange {
    /// Checks what its description promises.
    fn check(self) -> Result<(), Error> {
        let aligned = u32::from(self.base).is_multiple_of(BLOCK_PORTS)
            && self.count.is_multiple_of(BLOCK_PORTS);
        let fits =
            self.base >= 1024 && (1..=1 << 16).contains(&self.count) && self.end() <= 1 << 16;
        if aligned && fits {
            return Ok(());
        }
        let value = format!("{} ports from {}", self.count, self.base);
        Err(Error::invalid("port range", value, "give multiples of 64 between 1024 and 65536"))
    }

    /// One beyond the last port.
    fn end(self) -> u32 {
        u32::from(self.base) + self.count
    }
}

/// Checks a VXLAN network identifier.
fn check_vni(vni: u32) -> Result<(), Error> {
    if (1..1 << 24).contains(&vni) {
        Ok(())
    } else {
        Err(Error::invalid("VNI", vni, "give one between 1 and 16777215"))
    }
}

/// Checks the address of a host: what the programs take as a destination.
fn check_address(what: &'static str, address: impl Into<IpAddr>) -> Result<(), Error> {
    let address = address.into();
    let is_valid = match address {
        IpAddr::V4(address) => V4::is_destination(address.into()),
        IpAddr::V6(address) => V6::is_destination(address.into()),
    };
    if is_valid {
        Ok(())
    } else {
        Err(Error::invalid(what, address, "give the unicast address of an interface"))
    }
}

/// Checks the address of a VPC's gateway, which may also be link-local.
fn check_gateway_v6(address: Ipv6Addr) -> Result<(), Error> {
    if Ip::from(address).is_link_local() { Ok(()) } else { check_address("gateway", address) }
}

/// Whether a map lacks the key.
fn is_missing(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

/// What a thread returns, or its panic.
fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
