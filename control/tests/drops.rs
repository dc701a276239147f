//! What the fleet dropped, as the control plane tells it.

mod fake;

use fake::World;
use tonic::{Code, Status};
use warren_proto::v1::*;

async fn drops(world: &World, host: &str) -> Result<Vec<HostDrops>, Status> {
    let request = ListFleetDropsRequest { host: host.into() };
    Ok(world.client().await.list_fleet_drops(request).await?.into_inner().hosts)
}

#[tokio::test]
async fn each_drop_is_told_with_who_stands_behind_its_scope() {
    let world = World::new().await;
    let (p1, h1) = (world.proxy("p1", 9).await, world.host("h1", 1).await);
    let _h2 = world.host("h2", 2).await;
    let vpc = world.create_vpc("blue").await;
    let vm = world.run("blue", "h1").await.unwrap();
    h1.behaviour.drop_packets(vm.slot, "spoofed-address", 7);
    h1.behaviour.drop_packets(vm.slot + 1, "detached", 2);
    p1.behaviour.drop_packets(vpc.vni, "no-route", 1);

    let all = drops(&world, "").await.unwrap();
    let [first, second, proxy] = &all[..] else { panic!("{all:?}") };
    assert_eq!((first.host.as_str(), first.role()), ("h1", Role::Host));
    let spoofed = ScopedDrops {
        scope: vm.slot,
        reason: "spoofed-address".into(),
        packets: 7,
        instance: vm.id,
        vpc: "blue".into(),
    };
    let detached = ScopedDrops {
        scope: vm.slot + 1,
        reason: "detached".into(),
        packets: 2,
        ..ScopedDrops::default()
    };
    assert_eq!(first.drops, [spoofed, detached]);
    assert_eq!((second.host.as_str(), &second.drops[..]), ("h2", &[][..]));
    assert_eq!((proxy.host.as_str(), proxy.role()), ("p1", Role::Proxy));
    assert_eq!((proxy.drops[0].vpc.as_str(), proxy.drops[0].packets), ("blue", 1));
    assert!(all.iter().all(|host| host.problem.is_empty()), "{all:?}");

    assert_eq!(drops(&world, "p1").await.unwrap(), std::slice::from_ref(proxy));
    let unknown = drops(&world, "h9").await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    assert!(unknown.message().contains("\"h9\""), "{unknown:?}");
}

#[tokio::test]
async fn agents_that_do_not_answer_hide_nothing_of_the_others() {
    let world = World::new().await;
    let (h1, mut h2) = (world.host("h1", 1).await, world.host("h2", 2).await);
    let h3 = world.host("h3", 3).await;
    h1.behaviour.open.send_replace(false);
    h2.die(&world).await;
    h3.behaviour.drop_packets(0, "not-from-proxy", 5);

    let all = drops(&world, "").await.unwrap();
    let [silent, dead, answers] = &all[..] else { panic!("{all:?}") };
    assert!(silent.problem.contains("did not answer within"), "{silent:?}");
    assert!(dead.problem.contains("not alive"), "{dead:?}");
    assert_eq!((answers.problem.as_str(), answers.drops[0].packets), ("", 5));
}
