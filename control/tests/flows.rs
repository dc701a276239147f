//! Flows of the fleet, as the control plane tells of them.

mod fake;

use fake::{FakeAgent, World};
use tonic::{Code, Status};
use warren_proto::v1::*;

fn flow(agent: &FakeAgent, vpc: &str, instance: &str, nat_port: u32) {
    let flow = Flow { vpc: vpc.into(), instance: instance.into(), nat_port, ..Flow::default() };
    agent.behaviour.flows.lock().unwrap().push(flow);
}

async fn list(world: &World, request: ListFleetFlowsRequest) -> Result<Vec<HostFlows>, Status> {
    let request = ListFleetFlowsRequest { limit: 10, ..request };
    Ok(world.client().await.list_fleet_flows(request).await?.into_inner().hosts)
}

fn ports(hosts: &[HostFlows]) -> Vec<(&str, Vec<u32>)> {
    let of = |host: &HostFlows| host.flows.iter().map(|flow| flow.nat_port).collect();
    hosts.iter().map(|host| (host.host.as_str(), of(host))).collect()
}

#[tokio::test]
async fn flows_are_asked_of_the_hosts_that_may_have_them() {
    let world = World::new().await;
    let (_p1, h1) = (world.proxy("p1", 9).await, world.host("h1", 1).await);
    let mut h2 = world.host("h2", 2).await;
    world.create_vpc("blue").await;
    let vm = world.run("blue", "h1").await.unwrap();
    flow(&h1, "blue", &vm.id, 5000);
    flow(&h1, "green", "other", 5001);
    flow(&h2, "blue", "another", 5002);

    let all = list(&world, ListFleetFlowsRequest::default()).await.unwrap();
    assert_eq!(ports(&all), [("h1", vec![5000, 5001]), ("h2", vec![5002])], "proxies have none");
    let of_vpc = ListFleetFlowsRequest { vpc: "blue".into(), ..Default::default() };
    let found = list(&world, of_vpc).await.unwrap();
    assert_eq!(ports(&found), [("h1", vec![5000]), ("h2", vec![5002])]);
    let of_vm = ListFleetFlowsRequest { instance: vm.id.clone(), ..Default::default() };
    let found = list(&world, of_vm).await.unwrap();
    assert_eq!(ports(&found), [("h1", vec![5000])], "no other host is asked");

    for (host, vpc, instance) in [("p1", "", ""), ("", "red", ""), ("", "", "nobody")] {
        let (host, vpc, instance) = (host.into(), vpc.into(), instance.into());
        let request = ListFleetFlowsRequest { host, vpc, instance, limit: 0 };
        assert_eq!(list(&world, request).await.unwrap_err().code(), Code::NotFound);
    }
    h2.die(&world).await;
    let all = list(&world, ListFleetFlowsRequest::default()).await.unwrap();
    assert!(all[0].problem.is_empty() && all[1].problem.contains("not alive"), "{all:?}");
}

#[tokio::test]
async fn who_had_a_port_is_asked_of_every_host() {
    let world = World::new().await;
    let (h1, h2) = (world.host("h1", 1).await, world.host("h2", 2).await);
    let _p1 = world.proxy("p1", 9).await;
    world.create_vpc("blue").await;
    flow(&h1, "blue", "one", 5000);
    flow(&h2, "blue", "other", 5001);
    let find = async |vpc: &str, port| {
        let query = FindMappingsRequest { vpc: vpc.into(), port, ..Default::default() };
        let request = FindFleetMappingsRequest { host: String::new(), query: Some(query) };
        let found = world.client().await.find_fleet_mappings(request).await;
        found.map(|found| found.into_inner().hosts)
    };
    let hosts = find("blue", 5001).await.unwrap();
    let found = |host: &HostMappings| host.found.clone().unwrap().mappings;
    assert_eq!(found(&hosts[0]), []);
    assert_eq!(found(&hosts[1])[0].instance, "other");
    assert_eq!(find("red", 5001).await.unwrap_err().code(), Code::NotFound);
    let wrong = find("blue", 70_000).await.unwrap();
    assert!(wrong.iter().all(|host| host.problem.contains("port")), "{wrong:?}");
}
