//! Who gets which ports, and when they are another's.

mod fake;

use fake::{FakeAgent, Told, World, eventually, vpc};
use tonic::{Code, Status};
use warren_proto::v1::*;

/// A host reports so many ports in use, of those that it was told of.
fn uses(world: &World, host: &FakeAgent, name: &str, vni: u32, in_use: u32) {
    let ports = world.log.ports_of(name);
    let used = PortUse { vni, ports, in_use, former_blocks: vec![] };
    *host.behaviour.port_use.lock().unwrap() = vec![used];
}

async fn forget(world: &World, name: &str) -> Result<(), Status> {
    let request = ForgetHostRequest { name: name.into() };
    world.client().await.forget_host(request).await.map(drop)
}

#[tokio::test]
async fn a_host_that_uses_half_of_its_ports_gets_twice_as_many_after_all_proxies_know() {
    let world = World::new().await;
    let h1 = world.host("h1", 1).await;
    let (_p1, p2) = (world.proxy("p1", 8).await, world.proxy("p2", 9).await);
    let vni = world.create_vpc("blue").await.vni;
    world.run("blue", "").await.unwrap();
    let before = world.log.ports_of("h1").unwrap();
    assert_eq!(before.count, 64);

    p2.behaviour.open.send_replace(false);
    uses(&world, &h1, "h1", vni, 33);
    eventually("both proxies are told", || async {
        let is_told = |proxy| world.log.ports_at(proxy).iter().any(|(ports, _)| ports.count == 128);
        is_told("p1") && is_told("p2")
    })
    .await;
    // Meanwhile, it starts instances on what it has.
    world.run("blue", "").await.unwrap();
    assert_eq!(world.log.ports_of("h1"), Some(before), "a proxy did not acknowledge yet");
    p2.behaviour.open.send_replace(true);
    eventually("the host has more", || async { world.log.ports_of("h1").unwrap().count == 128 })
        .await;
    let after = world.log.ports_of("h1").unwrap();
    assert!(after.base <= before.base && before.base + 64 <= after.base + 128, "{after:?}");
}

#[tokio::test]
async fn instances_bring_ports_before_they_use_any() {
    let world = World::new().await;
    let (h1, _p1) = (world.host("h1", 1).await, world.proxy("p1", 8).await);
    let Vpc { vni, shared_address, .. } = world.create_vpc("blue").await;
    for _ in 0..9 {
        let instance = Instance {
            id: uuid::Uuid::new_v4().to_string(),
            vpc: "blue".into(),
            shared_address: shared_address.clone(),
            state: InstanceState::Running.into(),
            ..Instance::default()
        };
        h1.behaviour.instances.lock().unwrap().insert(instance.id.clone(), instance);
    }
    uses(&world, &h1, "h1", vni, 0);
    eventually("it has twice of 16 for each", || async {
        world.log.ports_of("h1").is_some_and(|ports| ports.count == 512)
    })
    .await;
}

#[tokio::test]
async fn each_instance_starts_with_ports_for_all() {
    let world = World::new().await;
    let mut h1 = FakeAgent::new(&world, "h1", Role::Host, 1).await;
    h1.report.slots = 20;
    h1.register(&world).await;
    let _p1 = world.proxy("p1", 8).await;
    world.create_vpc("blue").await;
    for _ in 0..20 {
        world.run("blue", "").await.unwrap();
    }
    let (mut started, mut ports) = (0, 0);
    for (_, told) in world.log.all() {
        match told {
            Told::Apply(ApplyVpcRequest {
                role: Some(apply_vpc_request::Role::Host(host)),
                ..
            }) => ports = host.ports.unwrap().count,
            Told::Start(_) => {
                started += 1;
                assert!(ports >= 16 * started, "{started} instances, {ports} ports");
            }
            _ => {}
        }
    }
    assert_eq!(started, 20);
}

#[tokio::test]
async fn a_host_that_is_cut_off_keeps_its_ports_and_nobody_else_gets_them() {
    let world = World::new().await;
    let mut h1 = world.host("h1", 1).await;
    let _p1 = world.proxy("p1", 8).await;
    let definition = Vpc { ports_per_host: 8192, ..vpc("blue") };
    let request = CreateVpcRequest { vpc: Some(definition) };
    world.client().await.create_vpc(request).await.unwrap();
    world.run("blue", "h1").await.unwrap();
    let held = world.log.ports_of("h1").unwrap();
    h1.die(&world).await;

    let mut others = Vec::new();
    for number in 2..10 {
        let name = format!("h{number}");
        others.push(world.host(&name, number).await);
        match world.run("blue", &name).await {
            Ok(_) => {
                let ports = world.log.ports_of(&name).unwrap();
                let is_apart =
                    ports.base + ports.count <= held.base || held.base + held.count <= ports.base;
                assert!(is_apart, "{ports:?} is h1's: {held:?}");
            }
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}"),
        }
    }
    let at_proxy = world.log.ports_at("p1");
    assert_eq!(at_proxy.len(), 7, "eight ranges of 8192, but for the first ports: {at_proxy:?}");
    assert!(at_proxy.contains(&(held, "192.0.2.1".into())), "{at_proxy:?}");
}

#[tokio::test]
async fn a_host_that_is_forgotten_is_no_holder_and_its_ports_rest() {
    let world = World::new().await;
    let mut h1 = world.host("h1", 1).await;
    let _p1 = world.proxy("p1", 8).await;
    let definition = Vpc { ports_per_host: 32768, ..vpc("blue") };
    let request = CreateVpcRequest { vpc: Some(definition) };
    world.client().await.create_vpc(request).await.unwrap();
    world.run("blue", "h1").await.unwrap();

    let status = forget(&world, "h1").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    h1.die(&world).await;
    forget(&world, "h1").await.unwrap();
    assert_eq!(forget(&world, "h1").await.unwrap_err().code(), Code::NotFound);
    eventually("the proxy drops it", || async { world.log.ports_at("p1").is_empty() }).await;

    let _h2 = world.host("h2", 2).await;
    let status = world.run("blue", "h2").await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "they rest: {status:?}");
}
