//! Hosts and proxies on one underlay, and two tenants' VPCs with the same CIDR: links of their own,
//! on which all proxies stand.
//!
//! ```text
//!   host 1 .1 ──┬── 192.0.2.0/24 ──┬── proxy 1 .101 ──┬── vpc-a ── server 10.0.0.10
//!   host 2 .2 ──┘   (a bridge)     ├── proxy 2 .102 ──┤   (two bridges, 10.0.0.0/24 each)
//!                                  └── proxy 3 .103 ──┴── vpc-b ── server 10.0.0.10
//! ```

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::time::{Instant, timeout_at};
use tokio_tun::Tun;

use crate::netns::{Namespace, veth};
use crate::servers::{Server, TICK};
use crate::topology::{SERVER, UNDERLAY, VPC_INTERFACES};

/// The underlay, and the VPCs.
const BRIDGES: [&str; 3] = ["br0", "br-a", "br-b"];

/// A machine on the underlay.
#[derive(Debug)]
pub struct Machine {
    /// Its network.
    pub namespace: Namespace,
    /// Its address in the underlay.
    pub address: Ipv4Addr,
    /// Its cables: the names of their other ends. That of the underlay is the first one.
    pub cables: Vec<String>,
}

/// The machines, connected.
#[derive(Debug)]
pub struct Grid {
    /// Where `warrend --role host` runs.
    pub hosts: Vec<Machine>,
    /// Where `warrend --role proxy` runs.
    pub proxies: Vec<Machine>,
    /// The tenants' servers, one namespace each.
    pub vpcs: [Namespace; 2],
    fabric: Namespace,
}

/// Counts what blocked cables lose.
const LOST: &str = "lost";
/// How long a detour takes.
const DELAY: Duration = Duration::from_millis(3);
/// What every so many packets of a disturbed cable are, at random: doubled, and late.
const DISTURBED: u32 = 20;

impl Grid {
    /// Makes and connects everything.
    pub fn new(hosts: u8, proxies: u8) -> Result<Self> {
        let fabric = Namespace::new("fabric")?;
        for bridge in BRIDGES {
            fabric.ip(&format!("link add {bridge} type bridge stp_state 0 forward_delay 0"))?;
            fabric.ip(&format!("link set {bridge} up"))?;
        }
        fabric
            .nft(&format!("table netdev block {{ counter {LOST} {{ packets 0 bytes 0; }}; }}"))?;
        // A wire filters nothing. Without the module br_netfilter there is no such switch.
        fabric.sysctl("bridge/bridge-nf-call-iptables", "0").ok();
        let plug = |bridge: &str, cable: &str, machine: &Namespace, interface: &str| {
            veth(&fabric, cable, machine, interface)?;
            fabric.ip(&format!("link set {cable} master {bridge}"))
        };
        let machine = |name: String, last: u8| -> Result<Machine> {
            let address = Ipv4Addr::new(192, 0, 2, last);
            let namespace = Namespace::new(&name)?;
            plug("br0", &name, &namespace, UNDERLAY)?;
            namespace.ip(&format!("addr add {address}/24 dev {UNDERLAY}"))?;
            Ok(Machine { namespace, address, cables: vec![name] })
        };
        let hosts = (1..=hosts).map(|n| machine(format!("host{n}"), n)).collect::<Result<_>>()?;
        let proxies = (1..=proxies).map(|n| {
            let mut proxy = machine(format!("proxy{n}"), 100 + n)?;
            for (bridge, interface) in ["br-a", "br-b"].into_iter().zip(VPC_INTERFACES) {
                let cable = format!("{interface}-{n}");
                plug(bridge, &cable, &proxy.namespace, interface)?;
                proxy.cables.push(cable);
            }
            Ok(proxy)
        });
        let proxies = proxies.collect::<Result<_>>()?;
        let vpcs = [Namespace::new("vpc-a")?, Namespace::new("vpc-b")?];
        for (vpc, bridge) in vpcs.iter().zip(["br-a", "br-b"]) {
            plug(bridge, vpc.name(), vpc, "eth0")?;
            vpc.ip(&format!("addr add {SERVER}/24 dev eth0"))?;
        }
        Ok(Self { hosts, proxies, vpcs, fabric })
    }

    /// Cuts cables: both ends lose their carrier.
    pub fn cut(&self, cables: &[String]) -> Result<()> {
        self.fabric.ip_batch(cables.iter().map(|cable| format!("link set {cable} down")))
    }

    /// Mends cables that were cut.
    pub fn mend(&self, cables: &[String]) -> Result<()> {
        self.fabric.ip_batch(cables.iter().map(|cable| format!("link set {cable} up")))
    }

    /// Loses what comes out of a machine's end of a cable (`ingress`) or what goes into it
    /// (`egress`), or both, and nobody sees that there is no carrier.
    pub fn block(&self, cable: &str, hooks: &[&str]) -> Result<()> {
        hooks.iter().try_for_each(|hook| {
            self.fabric.nft(&format!(
                "table netdev block {{ chain {cable}-{hook} {{ type filter hook {hook} \
                 device \"{cable}\" priority 0; counter name {LOST} drop; }}; }}"
            ))
        })
    }

    /// Undoes [`Grid::block`].
    pub fn unblock(&self, cable: &str, hooks: &[&str]) -> Result<()> {
        let chain = |hook| self.fabric.nft(&format!("delete chain netdev block {cable}-{hook}"));
        hooks.iter().try_for_each(chain)
    }

    /// How many packets cables and machines lost, as far as it is counted.
    pub fn lost(&self) -> Result<u64> {
        let words = ["-j", "list", "counter", "netdev", "block", LOST];
        let output = self.fabric.command("nft").args(words).output()?;
        let listed: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let blocked = listed["nftables"][1]["counter"]["packets"].as_u64();
        let blocked = blocked.context("nft counts them")?;
        let machines = self.hosts.iter().chain(&self.proxies).map(|machine| &machine.namespace);
        let all = machines.chain(&self.vpcs).chain([&self.fabric]);
        all.map(Namespace::lost).try_fold(blocked, |sum, lost| Ok(sum + lost?))
    }

    /// Lays a slow detour on each bridge, for [`Grid::disturb`]: what goes there comes out behind what
    /// came later. They are there until what is returned is dropped.
    pub fn lay_detours(&self) -> Result<Vec<Server>> {
        let lay = |bridge| {
            let detour = detour(bridge);
            let server = delay(&self.fabric, detour.clone())?;
            let slave = "type bridge_slave learning off flood off mcast_flood off bcast_flood off";
            let lines = [
                format!("link set {detour} master {bridge}"),
                format!("link set {detour} {slave}"),
                format!("link set {detour} up"),
            ];
            self.fabric.ip_batch(lines.into_iter())?;
            Ok(server)
        };
        BRIDGES.into_iter().map(lay).collect()
    }

    /// Doubles some of the packets that come out of a machine's end of a cable, and has others overtaken
    /// by later ones.
    pub fn disturb(&self, cable: &str) -> Result<()> {
        let detour = detour(bridge_of(cable));
        // What is for all would come back to who sent it.
        let some = format!(
            "ether daddr & 01:00:00:00:00:00 != 01:00:00:00:00:00 numgen random mod {DISTURBED} 0"
        );
        let rules = format!("{some} dup to \"{detour}\"; {some} fwd to \"{detour}\";");
        self.fabric.nft(&format!(
            "table netdev disturb-{cable} {{ chain ingress {{ type filter hook ingress \
             device \"{cable}\" priority 10; {rules} }}; }}"
        ))
    }

    /// Undoes [`Grid::disturb`].
    pub fn calm(&self, cable: &str) -> Result<()> {
        self.fabric.nft(&format!("delete table netdev disturb-{cable}"))
    }
}

/// The bridge that a cable is plugged into.
fn bridge_of(cable: &str) -> &'static str {
    let [underlay, vpcs @ ..] = BRIDGES;
    let of_vpc = VPC_INTERFACES.iter().position(|interface| cable.starts_with(interface));
    of_vpc.map_or(underlay, |index| vpcs[index])
}

/// A bridge's detour.
fn detour(bridge: &str) -> String {
    format!("tap-{bridge}")
}

/// A TAP from which frames come back after [`DELAY`]. It is without offloads: the kernel divides what is
/// larger than a frame.
fn delay(namespace: &Namespace, name: String) -> Result<Server> {
    let (ready, is_ready) = std::sync::mpsc::channel();
    let server = Server::start(namespace, move |stop, _| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime can be made").block_on(async {
            let opened = Tun::builder().name(&name).tap().up().build();
            let tap = opened.map(|mut taps| taps.remove(0));
            let failed = tap.as_ref().err().map(ToString::to_string);
            ready.send(failed).ok();
            let Ok(tap) = tap else { return };
            let mut frame = [0; 2048];
            let mut held = VecDeque::new();
            while !stop.load(Ordering::SeqCst) {
                let due = held.front().map_or(Instant::now() + TICK, |(due, _)| *due);
                match timeout_at(due, tap.recv(&mut frame)).await {
                    Ok(Ok(length)) => {
                        held.push_back((Instant::now() + DELAY, frame[..length].to_vec()));
                    }
                    // The device is gone.
                    Ok(Err(_)) => return,
                    Err(_) => {}
                }
                while let Some((due, frame)) = held.pop_front() {
                    if due > Instant::now() {
                        held.push_front((due, frame));
                        break;
                    }
                    tap.send(&frame).await.ok();
                }
            }
        });
    });
    match is_ready.recv()? {
        None => Ok(server),
        Some(error) => bail!("a TAP for the detour: {error}"),
    }
}
