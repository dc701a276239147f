//! The scene: a fleet, and real servers in both tenants' VPCs.

use anyhow::{Context, Result, ensure};
use warren_netns::fleet::{Fleet, FleetOptions, GUEST, VPCS};
use warren_netns::process::Process;
use warren_netns::servers::{self, Server};
use warren_proto::v1;

use crate::step;

/// Port of the echo server for datagrams.
pub const ECHO: u16 = 7007;

/// The fleet and the tenants' servers.
pub struct Scene {
    /// Warren.
    pub fleet: Fleet,
    /// The tenants' VPCs, as the control plane knows them.
    pub vpcs: Vec<v1::Vpc>,
    /// A datagram echo server in each VPC, which counts.
    pub echoes: Vec<Server>,
    servers: Vec<Process>,
}

impl Scene {
    /// Starts everything.
    pub async fn set(clones: u32) -> Result<Self> {
        let options = FleetOptions { slots: clones + 16, parked: clones + 8, guest: GUEST };
        let fleet = Fleet::start(options).await?;
        step(
            "namespaces: a host, a proxy node, a control plane, two tenants' VPCs (10.0.0.0/24 each)",
        );
        step(&format!("microVMs parked at their barrier: {}", options.parked));
        let mut processes = Vec::new();
        let mut echoes = Vec::new();
        for (namespace, name) in fleet.topology.vpcs.iter().zip(VPCS) {
            processes.push(servers::redis(namespace, fleet.run.path())?);
            let set = servers::redis_cli(namespace, &["set", "marker", name])?;
            ensure!(set == "OK", "redis in {name} does not take its marker: {set}");
            processes.push(servers::nginx(namespace, fleet.run.path(), name)?);
            echoes.push(servers::udp_echo(namespace, ECHO)?);
        }
        step("a real Redis and a real nginx in each VPC, both at 10.0.0.10");
        let vpcs = fleet.control().await?.list_vpcs(v1::ListVpcsRequest {}).await?;
        let vpcs = vpcs.into_inner().vpcs;
        let vpcs = VPCS.map(|name| vpcs.iter().find(|vpc| vpc.name == name).cloned());
        let vpcs = vpcs.into_iter().collect::<Option<_>>().context("a VPC is not listed")?;
        Ok(Self { fleet, vpcs, echoes, servers: processes })
    }

    /// Ends everything and returns what is left.
    pub fn clear(self) -> Result<Vec<String>> {
        drop((self.servers, self.echoes));
        self.fleet.shut_down()
    }
}
