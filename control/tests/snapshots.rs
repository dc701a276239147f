//! Snapshots: each is one host's, and its clones are where their origin was.

mod fake;

use fake::{Told, World};
use tonic::Code;
use warren_proto::v1::*;

async fn take(world: &World, id: &str, name: &str) -> Result<Snapshot, tonic::Status> {
    let request = TakeSnapshotRequest { id: id.into(), name: name.into() };
    let answer = world.client().await.take_snapshot(request).await?;
    Ok(answer.into_inner().snapshot.unwrap())
}

async fn clone(
    world: &World,
    from: &str,
    vpc: &str,
    host: &str,
    template: &str,
) -> Result<Instance, tonic::Status> {
    let request = RunInstanceRequest {
        snapshot: from.into(),
        vpc: vpc.into(),
        host: host.into(),
        template: template.into(),
        ..Default::default()
    };
    let answer = world.client().await.run_instance(request).await?;
    Ok(answer.into_inner().instance.unwrap())
}

async fn list(world: &World) -> Vec<HostSnapshots> {
    let request = ListFleetSnapshotsRequest::default();
    world.client().await.list_fleet_snapshots(request).await.unwrap().into_inner().hosts
}

#[tokio::test]
async fn clones_are_where_their_origin_was_and_nowhere_else() {
    let world = World::new().await;
    let _proxy = world.proxy("p1", 9).await;
    let (_h1, h2) = (world.host("h1", 1).await, world.host("h2", 2).await);
    world.create_vpc("blue").await;
    world.create_vpc("red").await;
    let origin = world.run("blue", "h2").await.unwrap();
    let taken = take(&world, &origin.id, "golden").await.unwrap();
    assert_eq!((taken.vpc.as_str(), taken.host.as_str()), ("blue", "h2"));
    let told: Vec<_> = list(&world).await.into_iter().map(|it| it.snapshots.len()).collect();
    assert_eq!(told, [0, 1]);

    let one = clone(&world, "golden", "", "", "").await.unwrap();
    assert_eq!((one.vpc.as_str(), one.host.as_str()), ("blue", "h2"));
    let is_clone = |told: &Told| matches!(told, Told::Start(start) if start.snapshot == "golden");
    assert!(world.log.all().iter().any(|(name, told)| name == "h2" && is_clone(told)));
    clone(&world, "golden", "blue", "h2", "").await.unwrap();
    for (vpc, host, template) in [("red", "", ""), ("", "h1", ""), ("", "", "large")] {
        let error = clone(&world, "golden", vpc, host, template).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    }
    assert_eq!(clone(&world, "silver", "", "", "").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(h2.behaviour.instances.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn a_name_is_one_snapshots_in_the_fleet() {
    let world = World::new().await;
    let _proxy = world.proxy("p1", 9).await;
    let (mut h1, _h2) = (world.host("h1", 1).await, world.host("h2", 2).await);
    world.create_vpc("blue").await;
    let one = world.run("blue", "h1").await.unwrap();
    let two = world.run("blue", "h2").await.unwrap();
    take(&world, &one.id, "golden").await.unwrap();
    for id in [&one.id, &two.id] {
        let error = take(&world, id, "golden").await.unwrap_err();
        assert_eq!(error.code(), Code::AlreadyExists, "{error}");
        assert!(error.message().contains("host h1"), "{error}");
    }
    assert_eq!(take(&world, "nobody", "x").await.unwrap_err().code(), Code::NotFound);

    let remove = async |name: &str| {
        let request = DeleteSnapshotRequest { name: name.into() };
        world.client().await.delete_snapshot(request).await
    };
    remove("golden").await.unwrap();
    assert_eq!(remove("golden").await.unwrap_err().code(), Code::NotFound);
    take(&world, &two.id, "golden").await.unwrap();

    // A host that does not answer may have one of any name.
    h1.die(&world).await;
    let error = take(&world, &two.id, "other").await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    let hosts = list(&world).await;
    assert!(hosts[0].problem.contains("not alive"), "{hosts:?}");
    assert_eq!(hosts[1].snapshots[0].name, "golden");
    clone(&world, "golden", "", "", "").await.unwrap();
}
