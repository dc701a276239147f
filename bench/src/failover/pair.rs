//! Two gateways as people build them: the kernel's VXLAN, SNAT by nftables, and keepalived, which moves
//! the addresses on both sides when the master is not heard of any more.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use warren_netns::grid::Grid;
use warren_netns::netns::{Namespace, veth};
use warren_netns::process::Process;
use warren_netns::rundir::RunDir;
use warren_netns::topology::{SHARED, UNDERLAY, VPC_INTERFACES};

/// The gateways' address in the underlay.
const VIRTUAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 200);
/// Seconds between what the master says; three are missed before the other takes over. The least
/// that stands this load without moves that nothing called for.
const ADVERTISEMENT: &str = "0.05";
const PATIENCE: Duration = Duration::from_secs(10);

/// The gateways, and guests whose traffic goes through them.
pub struct Pair {
    pub grid: Grid,
    pub guests: Vec<Namespace>,
    pub run: RunDir,
    _keepers: Vec<Process>,
}

impl Pair {
    pub fn new() -> Result<Self> {
        let (grid, run) = (Grid::new(1, 2)?, RunDir::new()?);
        let host = &grid.hosts[0].namespace;
        let own = grid.hosts[0].address;
        let mut guests = Vec::new();
        host.sysctl("ipv4/ip_forward", "1")?;
        for number in 1..=2 {
            let guest = Namespace::new("guest")?;
            veth(host, &format!("guest{number}"), &guest, "eth0")?;
            host.ip(&format!("addr add 172.17.{number}.1/24 dev guest{number}"))?;
            guest.ip("link set eth0 mtu 1450")?;
            guest.ip(&format!("addr add 172.17.{number}.2/24 dev eth0"))?;
            guest.ip(&format!("route add default via 172.17.{number}.1"))?;
            guests.push(guest);
        }
        tunnel(host, &format!("local {own} remote {VIRTUAL}"), "02:00:00:00:01:01", 1)?;
        host.ip("neigh add 172.16.0.254 lladdr 02:00:00:00:01:fe dev vx0 nud permanent")?;
        host.ip("route add 10.0.0.0/24 via 172.16.0.254")?;
        let mut keepers = Vec::new();
        let interface = VPC_INTERFACES[0];
        for (place, gateway) in grid.proxies.iter().enumerate() {
            let namespace = &gateway.namespace;
            namespace.sysctl("ipv4/ip_forward", "1")?;
            tunnel(namespace, &format!("local {VIRTUAL} remote {own}"), "02:00:00:00:01:fe", 254)?;
            namespace.ip("neigh add 172.16.0.1 lladdr 02:00:00:00:01:01 dev vx0 nud permanent")?;
            namespace.ip("route add 172.17.0.0/16 via 172.16.0.1")?;
            namespace.ip(&format!("addr add 10.0.0.{}/24 dev {interface}", 251 + place))?;
            namespace.nft(&format!(
                "table ip nat {{ chain out {{ type nat hook postrouting priority 100; \
                 oifname \"{interface}\" snat to {SHARED}; }}; }}"
            ))?;
            keepers.push(keepalived(namespace, &run, place)?);
        }
        let pair = Self { grid, guests, run, _keepers: keepers };
        let deadline = Instant::now() + PATIENCE;
        while pair.master().is_err() {
            ensure!(Instant::now() < deadline, "no gateway became master in {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        // The kernel answers for the address from now on.
        std::thread::sleep(Duration::from_secs(1));
        Ok(pair)
    }

    /// The gateway that has the addresses, and whose cables are there.
    pub fn master(&self) -> Result<usize> {
        let mut masters = Vec::new();
        for (place, gateway) in self.grid.proxies.iter().enumerate() {
            let lines = gateway.namespace.ip_lines("-4 addr show")?;
            if lines.iter().any(|line| line.contains(&format!("{VIRTUAL}/"))) {
                masters.push(place);
            }
        }
        ensure!(masters.len() == 1, "{} gateways have the addresses", masters.len());
        Ok(masters[0])
    }
}

fn tunnel(namespace: &Namespace, ends: &str, mac: &str, last: u8) -> Result<()> {
    namespace.ip(&format!(
        "link add vx0 address {mac} mtu 1450 type vxlan id 100 dstport 4789 {ends} dev {UNDERLAY}"
    ))?;
    namespace.ip("link set vx0 up")?;
    namespace.ip(&format!("addr add 172.16.0.{last}/24 dev vx0"))
}

fn keepalived(namespace: &Namespace, run: &RunDir, place: usize) -> Result<Process> {
    let path = |name: &str| run.path().join(format!("keepalived-{place}.{name}"));
    let instance = |name: &str, interface: &str, router: u8, address: String| {
        format!(
            "vrrp_instance {name} {{\n state BACKUP\n nopreempt\n interface {interface}\n \
             virtual_router_id {router}\n priority {}\n advert_int {ADVERTISEMENT}\n \
             garp_master_delay 1\n virtual_ipaddress {{ {address} dev {interface} }}\n }}\n",
            100 + place,
        )
    };
    let interface = VPC_INTERFACES[0];
    let config = format!(
        "global_defs {{\n vrrp_version 3\n vrrp_rt_priority 50\n script_user root\n }}\n\
         vrrp_sync_group both {{ group {{ under\n vpc\n }} }}\n{}{}",
        instance("under", UNDERLAY, 51, format!("{VIRTUAL}/24")),
        instance("vpc", interface, 52, format!("{SHARED}/24")),
    );
    std::fs::write(path("conf"), config)?;
    let mut command = namespace.command("keepalived");
    command.args(["--dont-fork", "--log-console", "--vrrp", "--use-file"]).arg(path("conf"));
    command.arg("--pid").arg(path("pid")).arg("--vrrp_pid").arg(path("vrrp"));
    Process::start("keepalived", command, &path("log"))
}
