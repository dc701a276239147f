//! Whatever is restarted or dead, calls go on.

use std::time::Duration;

use nix::sys::signal::Signal;

use crate::agent::{Server, services};
use crate::guest::until;
use crate::world::{Program, World};

const MINUTE: u32 = 60_000;

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_the_agent_cuts_no_call() {
    let mut world = World::new(&[4], "keep_alive_ms = 200").await;
    world.function("shop", MINUTE, 0).await;
    let held = world.spawn_get("shop", "/hold");
    world.held(1).await;
    let endpoint = world.hosts[0].stop_agent().await;
    world.shared.gate.add_permits(1);
    let first = held.await.unwrap();
    assert_eq!(first.status, 200);
    assert_eq!(world.get("shop", "/id").await.body, first.body);
    // A cold call waits for it to come back; the end of the idle instance does, too.
    let held = world.spawn_get("shop", "/hold");
    world.held(2).await;
    let cold = world.spawn_get("shop", "/id");
    let machine = world.hosts[0].machine.clone();
    world.hosts[0].agent = Some(Server::start(&endpoint, services(machine)).await);
    assert_ne!(cold.await.unwrap().body, first.body);
    world.shared.gate.add_permits(1);
    assert_eq!(held.await.unwrap().body, first.body);
    until("idle instances end", || world.machine(0).instances() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_control_plane_calls_go_on_warm_and_cold_and_after_a_restart() {
    let mut world = World::new(&[4], "").await;
    world.function("shop", MINUTE, 0).await;
    let warm = world.get("shop", "/id").await;
    let file = world.directory.path().join("state/metadata");
    let kept =
        || std::fs::read(&file).is_ok_and(|file| file.windows(9).any(|at| at == b"shop.test"));
    until("the metadata is kept", kept).await;
    world.control_server.take().unwrap().stop().await;
    assert_eq!(world.get("shop", "/id").await.body, warm.body);
    let held = world.spawn_get("shop", "/hold");
    world.held(1).await;
    assert_eq!(world.get("shop", "/id").await.status, 200);
    world.shared.gate.add_permits(1);
    assert_eq!(held.await.unwrap().status, 200);

    // Killed with its instances running: the next one ends them, and starts its own.
    assert_eq!(world.machine(0).instances(), 2);
    drop(world.gateway.take());
    world.start_gateway();
    until("those of the former end", || world.machine(0).instances() == 0).await;
    let again = world.get("shop", "/id").await;
    assert_eq!(again.status, 200, "{again:?}");
    assert_ne!(again.body, warm.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_is_replaced_ends_with_its_last_call() {
    let mut world = World::new(&[4], "keep_alive_ms = 100").await;
    world.function("shop", MINUTE, 0).await;
    let held = world.spawn_get("shop", "/hold");
    world.held(1).await;
    let mut former = world.hosts[0].relay.take().unwrap();
    let run_dir = world.machine(0).run_dir.clone();
    world.hosts[0].relay = Some(Program::relay(&run_dir, &former.address.to_string()));
    former.signal(Signal::SIGTERM);
    // Cold calls go to the new one while the call of the former runs.
    for _ in 0..10 {
        let second = world.spawn_get("shop", "/id");
        assert_eq!(second.await.unwrap().status, 200);
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!former.has_ended());
    world.shared.gate.add_permits(1);
    assert_eq!(held.await.unwrap().status, 200);
    until("the former relay ends", || former.has_ended()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_is_told_to_stop_ends_calls_and_instances_properly() {
    let mut world = World::new(&[4], "").await;
    world.function("shop", MINUTE, 0).await;
    let held = world.spawn_get("shop", "/hold");
    world.held(1).await;
    assert_eq!(world.get("shop", "/id").await.status, 200);
    let mut gateway = world.gateway.take().unwrap();
    gateway.signal(Signal::SIGTERM);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!gateway.has_ended());
    world.shared.gate.add_permits(1);
    assert_eq!(held.await.unwrap().status, 200);
    until("the gateway ends", || gateway.has_ended()).await;
    assert_eq!(world.machine(0).instances(), 0);
}
