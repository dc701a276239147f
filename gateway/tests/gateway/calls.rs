//! Calls: routed, warm and cold, streamed, queued, limited, refused.

use std::sync::atomic::Ordering;

use http_body_util::{BodyExt, Full, StreamBody};
use hyper::Request;
use hyper::body::{Bytes, Frame};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Code;
use warren_proto::v1::HttpTrigger;
use warren_proto::v1::trigger::Kind;
use warren_proto::v1::watch_data_flow_response::Change;

use crate::guest::until;
use crate::world::{Got, World, function, http2, request, send};

const MINUTE: u32 = 60_000;

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_call_starts_an_instance_and_warm_ones_use_it() {
    let world = World::new(&[4], "").await;
    world.function("shop", MINUTE, 0).await;
    let first = world.get("shop", "/x").await;
    assert_eq!(first.status, 200, "{first:?}");
    assert!(first.body.starts_with("shop@1 "), "{first:?}");
    for _ in 0..20 {
        assert_eq!(world.get("shop", "/x").await.body, first.body);
    }
    assert_eq!(world.machine(0).starts(), 1);
    let started = world.machine(0).started.lock().unwrap()[0].clone();
    let package = started.function.unwrap();
    assert_eq!((started.vpc.as_str(), started.template.as_str()), ("blue", "small"));
    assert_eq!((package.timeout_ms, package.package), (MINUTE, "00".repeat(32)));

    world.control.tell(function("shop", &[1, 2], MINUTE, 0));
    world.settled().await;
    let second = world.get("shop", "/x").await;
    assert!(second.body.starts_with("shop@2 "), "{second:?}");
    assert_eq!(world.metric("warren_calls_total{outcome=\"answered\"}").await, 22);
    assert_eq!(world.metric("warren_cold_starts_total{outcome=\"started\"}").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_function_sees_and_what_it_does_not() {
    let world = World::new(&[1], "").await;
    world.function("shop", MINUTE, 0).await;
    let prefix = HttpTrigger { host: String::new(), prefix: "/api/v1".into(), strip: true };
    world.trigger("api", "shop", Kind::Http(prefix));
    world.settled().await;
    let request = request("other", "/api/v1/head?a=%20b")
        .header("connection", "x-hop")
        .header("x-hop", "1")
        .header("x-forwarded-for", "6.6.6.6")
        .header("warren-event-id", "forged")
        .header("cookie", "kept")
        .body(Full::<Bytes>::default());
    let got = Got::whole(send(world.address(), request.unwrap()).await).await;
    assert!(got.body.starts_with("GET /head?a=%20b\n"), "{got:?}");
    for line in [
        "host: other.test",
        "cookie: kept",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-host: other.test",
        "x-forwarded-proto: http",
        "forwarded: for=127.0.0.1;host=\"other.test\";proto=http",
    ] {
        assert!(got.body.lines().any(|other| other == line), "{line} in {got:?}");
    }
    assert!(!got.body.contains("x-hop") && !got.body.contains("forged"), "{got:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_say_why() {
    let world = World::new(&[1], "").await;
    world.function("shop", MINUTE, 0).await;
    let refused = async |name: &str, path: &str| {
        let got = world.get(name, path).await;
        assert!(got.body.ends_with('\n') && got.body.len() > 20, "{got:?}");
        (got.status, got.error)
    };
    assert_eq!(refused("nobody", "/").await, (404, "no-route".into()));
    assert_eq!(refused("shop", "/a/%2e%2e/b").await, (400, "bad-path".into()));
    let upgrade = request("shop", "/")
        .header("connection", "upgrade")
        .header("upgrade", "websocket")
        .body(Full::<Bytes>::default());
    let got = Got::whole(send(world.address(), upgrade.unwrap()).await).await;
    assert_eq!((got.status, got.error.as_str()), (501, "upgrade"));
    assert!(got.body.contains("WebSocket"), "{got:?}");
    let no_host = Request::builder().uri("/").body(Full::<Bytes>::default()).unwrap();
    let got = Got::whole(send(world.address(), no_host).await).await;
    assert_eq!((got.status, got.error.as_str()), (400, "bad-host"));
    assert_eq!(world.machine(0).starts(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_stream_both_ways_before_the_request_ends() {
    let world = World::new(&[1], "").await;
    world.function("shop", MINUTE, 0).await;
    let (sender, receiver) = mpsc::unbounded_channel::<Result<Frame<Bytes>, std::io::Error>>();
    let body = StreamBody::new(UnboundedReceiverStream::new(receiver));
    let request = request("shop", "/echo").method("POST").body(body).unwrap();
    let mut answer = send(world.address(), request).await.into_body();
    for part in ["one", "two", "three"] {
        sender.send(Ok(Frame::data(part.into()))).unwrap();
        let mut heard = Vec::new();
        while heard.len() < part.len() {
            heard.extend(answer.frame().await.unwrap().unwrap().into_data().unwrap());
        }
        assert_eq!(heard, part.as_bytes());
    }
    drop(sender);
    assert!(answer.frame().await.is_none());
    // The instance is free, and as good as before.
    assert_eq!(world.get("shop", "/").await.status, 200);
    assert_eq!(world.machine(0).starts(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_come_whole() {
    let world = World::new(&[1], "").await;
    world.function("shop", MINUTE, 0).await;
    let large = (0..200_000).map(|number| format!("{number:07}")).collect::<Vec<_>>().concat();
    let request = request("shop", "/echo").method("POST").body(Full::<Bytes>::from(large.clone()));
    let got = Got::whole(send(world.address(), request.unwrap()).await).await;
    assert!(got.body == large, "{} bytes of {}", got.body.len(), large.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_beyond_the_limit_wait_and_those_beyond_the_queue_are_refused() {
    let world = World::new(&[9], "queue = 2").await;
    world.function("shop", MINUTE, 1).await;
    let held = world.spawn_get("shop", "/hold");
    world.held(1).await;
    let waiting: Vec<_> = (0..2).map(|_| world.spawn_get("shop", "/id")).collect();
    let gauge = "warren_function_waiting_calls{function=\"shop\",version=\"1\"}";
    while world.metric(gauge).await < 2 {}
    let got = world.get("shop", "/id").await;
    assert_eq!((got.status, got.error.as_str()), (429, "concurrency"));
    world.shared.gate.add_permits(1);
    let first = held.await.unwrap();
    for waiting in waiting {
        assert_eq!(waiting.await.unwrap().body, first.body);
    }
    assert_eq!(world.machine(0).starts(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_does_not_wait_beyond_its_deadline() {
    let world = World::new(&[1], "queue_ms = 50\nkeep_alive_ms = 600000").await;
    world.function("shop", MINUTE, 0).await;
    let held = world.spawn_get("shop", "/hold");
    world.held(1).await;
    let got = world.get("shop", "/id").await;
    assert_eq!((got.status, got.error.as_str()), (503, "no-capacity"));
    world.shared.gate.add_permits(1);
    assert_eq!(held.await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_goes_away_leaves_the_queue() {
    let world = World::new(&[1], "").await;
    world.function("shop", MINUTE, 1).await;
    let held = world.spawn_get("shop", "/hold");
    world.held(1).await;
    let gauge = "warren_function_waiting_calls{function=\"shop\",version=\"1\"}";
    let waiting = world.spawn_get("shop", "/id");
    while world.metric(gauge).await != 1 {}
    waiting.abort();
    while world.metric(gauge).await != 0 {}
    world.shared.gate.add_permits(1);
    assert_eq!(held.await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_that_refuse_are_passed_over_and_idle_instances_make_way() {
    let world = World::new(&[1, 1], "").await;
    world.function("shop", MINUTE, 0).await;
    world.function("bank", MINUTE, 0).await;
    let held = world.spawn_get("shop", "/hold");
    world.held(1).await;
    // The first host has more slots by its report, and refuses.
    assert_eq!(world.get("shop", "/id").await.status, 200);
    assert_eq!((world.machine(0).starts(), world.machine(1).starts()), (2, 1));
    // No room is left but that of an idle instance.
    let got = world.get("bank", "/id").await;
    assert!(got.body.starts_with("bank@1 "), "{got:?}");
    world.shared.gate.add_permits(1);
    assert_eq!(held.await.unwrap().status, 200);
    assert_eq!(world.machine(0).instances() + world.machine(1).instances(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_cannot_succeed_is_told_at_once() {
    let world = World::new(&[1], "queue_ms = 600000").await;
    world.function("shop", MINUTE, 0).await;
    *world.machine(0).refusal.lock().unwrap() = Some(Code::FailedPrecondition);
    let got = world.get("shop", "/id").await;
    assert_eq!((got.status, got.error.as_str()), (502, "start-failed"));
    assert!(got.body.contains("refused by the test"), "{got:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_instances_end_after_their_time() {
    let world = World::new(&[2], "keep_alive_ms = 100").await;
    world.function("shop", MINUTE, 0).await;
    assert_eq!(world.get("shop", "/id").await.status, 200);
    until("the instance ends", || world.machine(0).instances() == 0).await;
    assert_eq!(world.get("shop", "/id").await.status, 200);
    assert_eq!(world.machine(0).starts(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_crashes_or_closes_is_not_used_again() {
    let world = World::new(&[4], "").await;
    world.function("shop", MINUTE, 0).await;
    let got = world.get("shop", "/crash").await;
    assert_eq!((got.status, got.error.as_str()), (502, "crashed"));
    let got = world.get("shop", "/trap").await;
    assert_eq!((got.status, got.error.as_str()), (500, "trap"));
    assert_eq!(world.get("shop", "/close").await.status, 200);
    assert_eq!(world.get("shop", "/id").await.status, 200);
    assert_eq!(world.machine(0).starts(), 4);
    until("those that broke end", || world.machine(0).instances() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_instance_that_ended_costs_no_call() {
    let world = World::new(&[2], "").await;
    world.function("shop", MINUTE, 0).await;
    assert_eq!(world.get("shop", "/id").await.status, 200);
    let idle = "warren_function_idle_instances{function=\"shop\",version=\"1\"}";
    while world.metric(idle).await != 1 {}
    world.machine(0).running.lock().unwrap().clear();
    while world.metric(idle).await != 0 {}
    assert_eq!(world.get("shop", "/id").await.status, 200);
    assert_eq!(world.machine(0).starts(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_has_the_time_of_its_version() {
    let world = World::new(&[4], "").await;
    world.function("shop", 100, 0).await;
    let got = world.get("shop", "/hang").await;
    assert_eq!((got.status, got.error.as_str()), (504, "timeout"));
    let got = world.get("shop", "/stall").await;
    assert_eq!((got.status, got.body.as_str()), (200, "CUT"));
    until("both end", || world.machine(0).instances() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_carries_many_calls_on_a_connection() {
    let world = World::new(&[9], "").await;
    world.function("shop", MINUTE, 0).await;
    let sender = http2(world.address()).await;
    let calls: Vec<_> = (0..4)
        .map(|_| {
            let mut sender = sender.clone();
            let request = Request::builder().uri("http://shop.test/hold");
            let request = request.body(Full::<Bytes>::default()).unwrap();
            tokio::spawn(
                async move { Got::whole(sender.send_request(request).await.unwrap()).await },
            )
        })
        .collect();
    world.held(4).await;
    world.shared.gate.add_permits(4);
    let mut bodies = std::collections::BTreeSet::new();
    for call in calls {
        let got = call.await.unwrap();
        assert_eq!(got.status, 200);
        bodies.insert(got.body);
    }
    assert_eq!(bodies.len(), 4, "each had an instance of its own");
    assert_eq!(world.shared.held.load(Ordering::SeqCst), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_followed() {
    let world = World::new(&[9], "").await;
    world.function("shop", MINUTE, 0).await;
    assert_eq!(world.get("shop", "/id").await.status, 200);
    world.control.tell(Change::TriggerRemoved("shop".into()));
    world.settled().await;
    assert_eq!(world.get("shop", "/id").await.error, "no-route");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_does_not_read_holds_no_instance_beyond_the_time_of_a_call() {
    let world = World::new(&[1], "").await;
    world.function("shop", 300, 0).await;
    let request = request("shop", "/flood").body(Full::<Bytes>::default()).unwrap();
    let unread = send(world.address(), request).await;
    assert_eq!((unread.status().as_u16(), world.machine(0).instances()), (200, 1));
    until("the instance ends", || world.machine(0).instances() == 0).await;
    assert_eq!(world.get("shop", "/id").await.status, 200);
    assert_eq!(Got::whole(unread).await.body, "CUT");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_given_up_frees_its_place() {
    let world = World::new(&[2], "").await;
    world.function("shop", MINUTE, 1).await;
    let held = world.spawn_get("shop", "/hold");
    world.held(1).await;
    held.abort();
    assert_eq!(world.get("shop", "/id").await.status, 200);
    assert_eq!(world.machine(0).starts(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrency_is_told_each_second() {
    let world = World::new(&[4], "").await;
    world.function("shop", MINUTE, 0).await;
    // Another gateway, in this process.
    let mut config =
        warren_gateway::config::Config::read(&world.directory.path().join("gateway.toml")).unwrap();
    config.state = world.directory.path().join("state2");
    let gateway = warren_gateway::Gateway::start(&config).await.unwrap();
    let address = gateway.addresses().unwrap()[0];
    let mut concurrency = gateway.concurrency();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(gateway.serve(async {
        let _ = stopped.await;
    }));
    while crate::world::get(address, "shop", "/id").await.status != 200 {}
    let held = tokio::spawn(crate::world::get(address, "shop", "/hold"));
    world.held(1).await;
    let running = loop {
        let levels = concurrency.next().await.unwrap();
        if let Some(level) = levels.iter().find(|level| level.running == 1) {
            break level.clone();
        }
    };
    assert_eq!((&*running.version.function, running.peak, running.waiting), ("shop", 1, 0));
    world.shared.gate.add_permits(1);
    assert_eq!(held.await.unwrap().status, 200);
    stop.send(()).unwrap();
    serving.await.unwrap();
    assert!(
        concurrency
            .latest()
            .iter()
            .all(|level| level.version.function == std::sync::Arc::from("shop"))
    );
    assert_eq!(world.machine(0).instances(), 0);
}
