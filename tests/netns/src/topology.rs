//! One underlay, one host, one proxy node, and two tenants' VPCs with the same CIDR.
//!
//! ```text
//!            192.0.2.0/24 (underlay, a bridge)
//!   host .1    ──┬── proxy .2 ──┬── vpc-a ── server 10.0.0.10   (10.0.0.0/24)
//!   control .3 ──┤              └── vpc-b ── server 10.0.0.10, 10.0.0.20
//!   rogue .9   ──┘
//! ```

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use crate::netns::{Namespace, enable_v6, veth};

/// Underlay interface of the host, the proxy and the rogue.
pub const UNDERLAY: &str = "under0";
/// Underlay address of the host.
pub const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Underlay address of the proxy.
pub const PROXY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// Underlay address of the control plane.
pub const CONTROL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 3);
/// Underlay address of a machine that is neither.
pub const ROGUE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);
/// CIDR of both VPCs.
pub const CIDR: &str = "10.0.0.0/24";
/// IPv6 CIDR of both VPCs.
pub const CIDR_V6: &str = "2001:db8:1::/64";
/// Shared IPv6 address, in both VPCs.
pub const SHARED_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x100);
/// The server that both VPCs have, at the same IPv6 address.
pub const SERVER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10);
/// Shared address, in both VPCs.
pub const SHARED: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);
/// The server that both VPCs have, at the same address.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 10);
/// A second address of the second VPC's server: the first VPC has nothing there.
pub const ONLY_IN_B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 20);
/// Interfaces of the proxy in the VPCs.
pub const VPC_INTERFACES: [&str; 2] = ["vpc-a", "vpc-b"];
/// The MTU of the underlay and of the VPCs, in bytes.
pub const MTU: u32 = 1500;

/// The namespaces, connected.
#[derive(Debug)]
pub struct Topology {
    /// Where `warrend --role host` runs.
    pub host: Namespace,
    /// Where `warrend --role proxy` runs.
    pub proxy: Namespace,
    /// Where `warren-control` runs.
    pub control: Namespace,
    /// A machine on the underlay that holds no port block.
    pub rogue: Namespace,
    /// The tenants' servers, one namespace each.
    pub vpcs: [Namespace; 2],
    _fabric: Namespace,
}

impl Topology {
    /// Makes and connects everything.
    pub fn new() -> Result<Self> {
        let fabric = Namespace::new("fabric")?;
        fabric.ip("link add br0 type bridge stp_state 0 forward_delay 0")?;
        // A wire filters nothing. Without the module br_netfilter there is no such switch.
        fabric.sysctl("bridge/bridge-nf-call-iptables", "0").ok();
        fabric.ip("link set br0 up")?;
        let mut machines = Vec::new();
        for (name, address) in
            [("host", HOST), ("proxy", PROXY), ("control", CONTROL), ("rogue", ROGUE)]
        {
            let machine = Namespace::new(name)?;
            veth(&fabric, name, &machine, UNDERLAY)?;
            fabric.ip(&format!("link set {name} master br0"))?;
            machine.ip(&format!("addr add {address}/24 dev {UNDERLAY}"))?;
            machines.push(machine);
        }
        let [host, proxy, control, rogue] = machines.try_into().expect("four were made");
        let vpcs = [Namespace::new("vpc-a")?, Namespace::new("vpc-b")?];
        for (vpc, interface) in vpcs.iter().zip(VPC_INTERFACES) {
            veth(&proxy, interface, vpc, "eth0")?;
            vpc.ip(&format!("addr add {SERVER}/24 dev eth0"))?;
        }
        vpcs[1].ip(&format!("addr add {ONLY_IN_B}/24 dev eth0"))?;
        Ok(Self { host, proxy, control, rogue, vpcs, _fabric: fabric })
    }

    /// Gives host and proxy IPv6 addresses on the underlay, and returns them.
    pub fn enable_v6_underlay(&self) -> Result<[Ipv6Addr; 2]> {
        let ends = [1, 2].map(|n| Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, n));
        for (machine, address) in [&self.host, &self.proxy].into_iter().zip(ends) {
            enable_v6(machine, UNDERLAY)?;
            machine.ip(&format!("addr add {address}/64 dev {UNDERLAY} nodad"))?;
        }
        Ok(ends)
    }

    /// Gives the tenants' servers their IPv6 address.
    pub fn enable_v6(&self) -> Result<()> {
        for vpc in &self.vpcs {
            enable_v6(vpc, "eth0")?;
            vpc.ip(&format!("addr add {SERVER_V6}/64 dev eth0 nodad"))?;
        }
        Ok(())
    }
}
