//! Route tables: stored, checked, deployed.

mod fake;

use fake::{World, eventually};
use tonic::Code;
use warren_proto::v1::apply_vpc_request::Role;
use warren_proto::v1::*;

fn via(n: u32) -> Route {
    let prefix = format!("100.{}.{}.0/24", 64 + n / 256, n % 256);
    Route { prefix, kind: RouteKind::Via.into(), via: "10.1.0.7".into() }
}

/// The routes that a proxy was told last.
fn told(world: &World, proxy: &str) -> Vec<Route> {
    match world.log.applied(proxy).pop().and_then(|apply| apply.role) {
        Some(Role::Proxy(proxy)) => proxy.routes,
        _ => vec![],
    }
}

async fn replace(world: &World, routes: Vec<Route>) -> Result<(), tonic::Status> {
    let request = ReplaceRoutesRequest { vpc: "blue".into(), routes };
    world.client().await.replace_routes(request).await.map(drop)
}

#[tokio::test]
async fn ten_thousand_routes_reach_every_proxy_and_outlive_the_control_plane() {
    let mut world = World::new().await;
    let _proxies = (world.proxy("p1", 8).await, world.proxy("p2", 9).await);
    let _h1 = world.host("h1", 1).await;
    world.create_vpc("blue").await;
    let routes: Vec<_> = (0..10_000).map(via).collect();
    replace(&world, routes.clone()).await.unwrap();
    for proxy in ["p1", "p2"] {
        eventually("it has them", || async { told(&world, proxy).len() == 10_000 }).await;
    }
    world.run("blue", "h1").await.unwrap();

    let error = replace(&world, (0..10_001).map(via).collect()).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("10001 routes are too many"), "{error}");

    world.stop_control().await;
    world.log.clear();
    world.start_control().await;
    eventually("it is told again", || async { told(&world, "p1").len() == 10_000 }).await;
    let request = ListRoutesRequest { vpc: "blue".into() };
    let listed = world.client().await.list_routes(request).await.unwrap().into_inner();
    assert_eq!(listed.routes, routes);
    assert_eq!(listed.defaults[0].prefix, "10.1.0.0/16");
}

#[tokio::test]
async fn a_start_waits_until_proxies_have_the_routes() {
    let world = World::new().await;
    let p1 = world.proxy("p1", 9).await;
    let _h1 = world.host("h1", 1).await;
    world.create_vpc("blue").await;
    world.run("blue", "h1").await.unwrap();
    p1.behaviour.open.send_replace(false);
    replace(&world, vec![via(1)]).await.unwrap();
    eventually("it is told", || async { told(&world, "p1") == [via(1)] }).await;
    let started = world.run("blue", "h1");
    tokio::pin!(started);
    let waiting = tokio::time::timeout(std::time::Duration::from_millis(200), &mut started).await;
    assert!(waiting.is_err(), "the proxy did not answer yet");
    p1.behaviour.open.send_replace(true);
    started.await.unwrap();
}

#[tokio::test]
async fn changes_at_the_same_time_are_all_there() {
    let world = World::new().await;
    world.create_vpc("blue").await;
    let mut adds = tokio::task::JoinSet::new();
    for n in 0..20 {
        let mut client = world.client().await;
        let request = AddRoutesRequest { vpc: "blue".into(), routes: vec![via(n)] };
        adds.spawn(async move { client.add_routes(request).await.unwrap() });
    }
    adds.join_all().await;
    let request = ListRoutesRequest { vpc: "blue".into() };
    let listed = world.client().await.list_routes(request).await.unwrap().into_inner();
    assert_eq!(listed.routes.len(), 20);
}
