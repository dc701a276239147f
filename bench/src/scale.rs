//! `scale`: what 10,000 hosts and 1,000 VPCs take of a host and a proxy: memory of maps, and time to
//! make everything known, and one change. All through the agents' API.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use aya::maps::MapData;
use indicatif::ProgressIterator;
use tonic::transport::Channel;
use warren_bench::figures::Figures;
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST};
use warren_netns::topology::{HOST, PROXY};
use warren_proto::v1;
use warren_proto::v1::agent_service_client::AgentServiceClient;
use warren_proto::v1::apply_vpc_request::Role;

const HOSTS: u32 = 10_000;
const VPCS: u32 = 1000;
/// Hosts that hold ports in each VPC: so many that each host is in 26.
const HOLDERS: u32 = 260;
/// Changes that are measured.
pub const ROUNDS: u32 = 100;
const SLOTS: u32 = 8;
const PORTS: u32 = 64;
const FIRST_PORT: u32 = 1024;

/// Runs it, with so many changes.
pub async fn run(rounds: u32) -> Result<Figures> {
    let fleet = Fleet::without_vpcs(FleetOptions { slots: SLOTS, parked: 0, guest: GUEST }).await?;
    let proxy = &fleet.topology.proxy;
    // The VPCs' network cards, and a way to hosts, which are not there.
    proxy.ip_batch((0..VPCS).flat_map(|vpc| {
        let name = interface(vpc);
        [
            format!("link add {name} type veth peer name {name}-end"),
            format!("link set {name}-end up"),
            format!("link set {name} up"),
        ]
    }))?;
    proxy.ip(&format!("route add 198.18.0.0/15 via {HOST}"))?;
    let before = [Daemon::Host, Daemon::Proxy].map(|daemon| map_bytes(&fleet, daemon));

    let mut figures = Figures::new("scale");
    figures.count("hosts", HOSTS.into());
    figures.count("vpcs", VPCS.into());
    figures.count("holders", (VPCS * HOLDERS).into());
    for (daemon, before) in [Daemon::Host, Daemon::Proxy].into_iter().zip(before) {
        let name = daemon.name();
        let mut agent = fleet.agent(daemon).await?.max_decoding_message_size(4 << 20);
        let request = |vpc, change| match daemon {
            Daemon::Proxy => of_proxy(vpc, change),
            _ => of_host(vpc, change),
        };
        let start = Instant::now();
        for vpc in (0..VPCS).progress() {
            apply(&mut agent, request(vpc, 0)).await?;
        }
        let full = start.elapsed().as_secs_f64();
        let mut changes = Vec::new();
        for change in (0..rounds).progress() {
            let request = request(change * 7 % VPCS, change + 1);
            let start = Instant::now();
            apply(&mut agent, request).await?;
            changes.push(start.elapsed().as_secs_f64() * 1e3);
        }
        figures.distribution(&format!("{name}_full_s"), vec![full]);
        figures.distribution(&format!("{name}_change_ms"), changes);
        figures.count(&format!("{name}_map_bytes_empty"), before?);
        figures.count(&format!("{name}_map_bytes"), map_bytes(&fleet, daemon)?);
    }
    Ok(figures)
}

async fn apply(
    agent: &mut AgentServiceClient<Channel>,
    request: v1::ApplyVpcRequest,
) -> Result<()> {
    agent.apply_vpc(request).await.context("an agent refuses a VPC").map(drop)
}

fn interface(vpc: u32) -> String {
    format!("vpc{vpc}")
}

fn request(vpc: u32, role: Role) -> v1::ApplyVpcRequest {
    v1::ApplyVpcRequest {
        vpc: interface(vpc),
        vni: vpc + 1,
        shared_address: "10.1.0.9".to_owned(),
        role: Some(role),
        ..v1::ApplyVpcRequest::default()
    }
}

/// A VPC on a host: its range of ports is another one after a change.
fn of_host(vpc: u32, change: u32) -> v1::ApplyVpcRequest {
    let base = FIRST_PORT + change % 512 * PORTS;
    let host = v1::HostVpc {
        ports: Some(v1::PortRange { base, count: PORTS }),
        proxy_address: PROXY.to_string(),
        proxies: vec![PROXY.to_string()],
        ..v1::HostVpc::default()
    };
    request(vpc, Role::Host(host))
}

/// A VPC on a proxy: after a change, one more host holds ports.
fn of_proxy(vpc: u32, change: u32) -> v1::ApplyVpcRequest {
    let holder = |index: u32| {
        let host = (vpc * HOLDERS + index) % HOSTS;
        let base = u32::from(Ipv4Addr::new(198, 18, 0, 0));
        v1::PortHolder {
            ports: Some(v1::PortRange { base: FIRST_PORT + index * PORTS, count: PORTS }),
            host_address: Ipv4Addr::from(base + host).to_string(),
        }
    };
    let proxy = v1::ProxyVpc {
        interface: interface(vpc),
        cidr: "10.1.0.0/16".to_owned(),
        holders: (0..HOLDERS + u32::from(change > 0)).map(holder).collect(),
        ..v1::ProxyVpc::default()
    };
    request(vpc, Role::Proxy(proxy))
}

/// What the kernel holds for a daemon's pinned maps, in bytes.
fn map_bytes(fleet: &Fleet, daemon: Daemon) -> Result<u64> {
    let maps = fleet.run.bpf().join(daemon.name()).join("maps");
    let mut bytes = 0;
    for entry in std::fs::read_dir(maps)? {
        bytes += bytes_of(&entry?.path())?;
    }
    Ok(bytes)
}

fn bytes_of(pin: &Path) -> Result<u64> {
    let map = MapData::from_pin(pin)?;
    let info = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let info = std::fs::read_to_string(info)?;
    let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:"));
    Ok(bytes.context("the kernel does not tell a map's memory")?.trim().parse()?)
}
