//! What hosts and proxies are told of VPCs, and when.

mod fake;

use fake::{Told, World, eventually, vpc};
use tonic::{Code, Status};
use warren_proto::v1::*;

/// Whether the proxy was told in this push that the host holds ports.
fn names_holder(told: &Told, address: &str) -> bool {
    let Told::Apply(ApplyVpcRequest { role: Some(apply_vpc_request::Role::Proxy(proxy)), .. }) =
        told
    else {
        return false;
    };
    proxy.holders.iter().any(|holder| holder.host_address == address)
}

#[tokio::test]
async fn proxies_acknowledge_before_the_host_hears_of_it_and_the_host_before_the_start() {
    let world = World::new().await;
    let _h1 = world.host("h1", 1).await;
    let (_p1, p2) = (world.proxy("p1", 8).await, world.proxy("p2", 9).await);
    let vpc = world.create_vpc("blue").await;
    eventually("both proxies know the VPC", || async {
        !world.log.applied("p1").is_empty() && !world.log.applied("p2").is_empty()
    })
    .await;

    p2.behaviour.open.send_replace(false);
    let held_back = async {
        eventually("the second proxy is told of the holder", || async {
            world
                .log
                .position(|name, told| name == "p2" && names_holder(told, "192.0.2.1"))
                .is_some()
        })
        .await;
        eventually("the first one, too", || async {
            world
                .log
                .position(|name, told| name == "p1" && names_holder(told, "192.0.2.1"))
                .is_some()
        })
        .await;
        assert_eq!(world.log.applied("h1"), [], "the second proxy did not acknowledge yet");
        p2.behaviour.open.send_replace(true);
    };
    let (started, ()) = tokio::join!(world.run("blue", ""), held_back);
    assert_eq!(started.unwrap().vpc, "blue");

    let told_host = |name: &str, told: &Told| name == "h1" && matches!(told, Told::Apply(_));
    let start = |name: &str, told: &Told| name == "h1" && matches!(told, Told::Start(_));
    assert!(world.log.position(told_host).unwrap() < world.log.position(start).unwrap());
    let applied = world.log.applied("h1").pop().unwrap();
    assert_eq!((applied.vni, applied.shared_address), (vpc.vni, vpc.shared_address));
    let Some(apply_vpc_request::Role::Host(host)) = applied.role else { panic!() };
    assert_eq!(host.ports.unwrap().count, 64);
    assert_eq!(host.proxies, ["192.0.2.8", "192.0.2.9"], "either may own the shared address");
    let order = world.log.succession_at("p1");
    assert_eq!((order.len(), &order[0]), (2, &host.proxy_address), "the first one begins");
    assert_eq!(world.log.succession_at("p2"), order);
}

#[tokio::test]
async fn a_warm_start_tells_nobody_but_the_host() {
    let world = World::new().await;
    let (_h1, _p1) = (world.host("h1", 1).await, world.proxy("p1", 9).await);
    world.create_vpc("blue").await;
    world.run("blue", "").await.unwrap();
    world.log.clear();
    world.run("blue", "").await.unwrap();
    let [(name, Told::Start(_))] = &world.log.all()[..] else { panic!("{:?}", world.log.all()) };
    assert_eq!(name, "h1");
}

#[tokio::test]
async fn each_host_gets_ports_of_its_own() {
    let world = World::new().await;
    let (_h1, _h2) = (world.host("h1", 1).await, world.host("h2", 2).await);
    let _p1 = world.proxy("p1", 9).await;
    let mut client = world.client().await;
    let definition = Vpc { ports_per_host: 32768, ..vpc("green") };
    client.create_vpc(CreateVpcRequest { vpc: Some(definition) }).await.unwrap();
    world.create_vpc("blue").await;
    let (a, b) = tokio::join!(world.run("blue", "h1"), world.run("blue", "h2"));
    assert!(a.is_ok() && b.is_ok());
    let [first, second] = ["h1", "h2"].map(|host| world.log.ports_of(host).unwrap());
    assert_eq!((first.count, second.count), (64, 64));
    assert_ne!(first.base, second.base);
    assert_eq!(world.log.holders_at("p1").len(), 2);

    world.run("green", "h1").await.unwrap();
    let status = world.run("green", "h2").await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("warren vpc add-address"), "{status:?}");
    let address = SharedAddress { address: "10.1.0.77".into(), ..SharedAddress::default() };
    let request = AddSharedAddressRequest { vpc: "green".into(), address: Some(address) };
    let green = client.add_shared_address(request.clone()).await.unwrap().into_inner().vpc.unwrap();
    let again = client.add_shared_address(request).await.unwrap().into_inner().vpc.unwrap();
    assert_eq!((green.more_addresses.len(), &again), (1, &green));
    world.run("green", "h2").await.unwrap();
    assert_eq!(world.log.ports_of("h2").unwrap().count, 32768);
}

#[tokio::test]
async fn without_a_proxy_the_error_says_what_to_do() {
    let world = World::new().await;
    let _h1 = world.host("h1", 1).await;
    world.create_vpc("blue").await;
    let status = world.run("blue", "").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("start warrend in its proxy role"), "{status:?}");
    let status = world.run("red", "").await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("warren vpc create"), "{status:?}");

    let _p1 = world.proxy("p1", 9).await;
    world.run("blue", "").await.unwrap();
}

#[tokio::test]
async fn a_proxy_that_died_is_left_out_until_it_is_back_and_knows_everything() {
    let world = World::new().await;
    let _h1 = world.host("h1", 1).await;
    let (mut p1, p2) = (world.proxy("p1", 8).await, world.proxy("p2", 9).await);
    world.create_vpc("blue").await;
    world.run("blue", "").await.unwrap();
    let order = world.log.succession_at("p2");
    p1.die(&world).await;
    eventually("it is left out", || async {
        world.log.succession_at("p2") == ["192.0.2.9"]
            && world.log.proxy_of("h1").unwrap() == "192.0.2.9"
    })
    .await;
    world.run("blue", "").await.unwrap();
    let applied = world.log.applied("h1").pop().unwrap();
    let Some(apply_vpc_request::Role::Host(host)) = applied.role else { panic!() };
    assert_eq!(host.proxies.len(), 2, "replies may be on their way from it");

    world.log.clear();
    p1.register(&world).await;
    eventually("both are told of each other, and of who holds ports", || async {
        ["p1", "p2"].iter().all(|proxy| world.log.succession_at(proxy) == order)
            && world.log.holders_at("p1").len() == 1
    })
    .await;
    drop(p2);
}

#[tokio::test]
async fn a_drained_proxy_is_to_own_nothing_also_after_a_restart() {
    let mut world = World::new().await;
    let _h1 = world.host("h1", 1).await;
    let (_p1, _p2) = (world.proxy("p1", 8).await, world.proxy("p2", 9).await);
    world.create_vpc("blue").await;
    world.run("blue", "").await.unwrap();
    let mut client = world.client().await;
    let mut drain = async |name: &str, drained| {
        client.drain_proxy(DrainProxyRequest { name: name.into(), drained }).await.map(drop)
    };
    drain("p1", true).await.unwrap();
    let left_out = async |world: &World| {
        eventually("it is left out, and told of everything", || async {
            ["p1", "p2"].iter().all(|proxy| world.log.succession_at(proxy) == ["192.0.2.9"])
                && world.log.holders_at("p1").len() == 1
        })
        .await;
    };
    left_out(&world).await;
    let status = drain("h1", true).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(drain("nobody", true).await.unwrap_err().code(), Code::NotFound);

    world.stop_control().await;
    world.log.clear();
    world.start_control().await;
    left_out(&world).await;
    let mut client = world.client().await;
    let hosts = client.list_hosts(ListHostsRequest {}).await.unwrap().into_inner().hosts;
    let drained: Vec<_> = hosts.iter().filter(|host| host.drained).map(|host| &host.name).collect();
    assert_eq!(drained, ["p1"]);
    client.drain_proxy(DrainProxyRequest { name: "p1".into(), drained: false }).await.unwrap();
    eventually("it may own them again", || async { world.log.succession_at("p2").len() == 2 })
        .await;
}

#[tokio::test]
async fn a_proxy_that_refuses_is_named_and_asked_again() {
    let world = World::new().await;
    let (_h1, p1) = (world.host("h1", 1).await, world.proxy("p1", 9).await);
    let no_device = Status::failed_precondition("there is no interface eth1");
    *p1.behaviour.refuse_apply.lock().unwrap() = Some(no_device);
    world.create_vpc("blue").await;
    let status = world.run("blue", "").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(status.message(), "p1 did not take VPC blue: there is no interface eth1");
    assert_eq!(world.log.applied("h1"), []);

    // Also without anybody asking for it.
    let pushes = world.log.applied("p1").len();
    eventually("it is asked again", || async { world.log.applied("p1").len() > pushes }).await;
    *p1.behaviour.refuse_apply.lock().unwrap() = None;
    world.run("blue", "").await.unwrap();
}

#[tokio::test]
async fn an_agent_that_registers_anew_is_told_anew() {
    let world = World::new().await;
    let (mut h1, _p1) = (world.host("h1", 1).await, world.proxy("p1", 9).await);
    world.create_vpc("blue").await;
    world.run("blue", "").await.unwrap();
    h1.die(&world).await;
    world.log.clear();
    h1.register(&world).await;
    world.run("blue", "").await.unwrap();
    let told = world.log.all();
    assert!(matches!(&told[..], [(_, Told::Apply(_)), (_, Told::Start(_))]), "{told:?}");
}

#[tokio::test]
async fn a_restarted_control_plane_knows_everything_again() {
    let mut world = World::new().await;
    let _h1 = world.host("h1", 1).await;
    let (_p1, _p2) = (world.proxy("p1", 8).await, world.proxy("p2", 9).await);
    let before = world.create_vpc("blue").await;
    let instance = world.run("blue", "").await.unwrap();
    let ports = world.log.applied("h1").pop().unwrap().role;
    world.stop_control().await;
    world.log.clear();
    world.start_control().await;

    let vpcs = world.client().await.list_vpcs(ListVpcsRequest {}).await.unwrap().into_inner().vpcs;
    assert_eq!(vpcs, [before]);
    eventually("all register again by themselves", || async {
        world.is_alive("h1").await && world.is_alive("p1").await && world.is_alive("p2").await
    })
    .await;
    assert_eq!(world.instances().await, [instance]);
    world.run("blue", "").await.unwrap();
    let applied = world.log.applied("h1");
    assert!(applied.iter().all(|apply| apply.role == ports), "same ports, same proxy: {applied:?}");
    let next = world.create_vpc("green").await;
    assert_eq!(next.vni, vpcs[0].vni + 1);
}
