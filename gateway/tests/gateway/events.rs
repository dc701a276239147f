//! Events: accepted, delivered, made again, dead letters, and never lost.

use http_body_util::Full;
use hyper::body::Bytes;
use std::sync::atomic::Ordering;
use warren_proto::v1::trigger::Kind;
use warren_proto::v1::watch_data_flow_response::Change;
use warren_proto::v1::{EventTrigger, TimerTrigger};

use crate::guest::until;
use crate::world::{Got, World, request, send};

const MINUTE: u32 = 60_000;

fn event(retries: u32, dead_letter: &str) -> Kind {
    Kind::Event(EventTrigger { retries, backoff_ms: 10, dead_letter: dead_letter.to_owned() })
}

async fn post(world: &World, trigger: &str, body: &str) -> Got {
    let request = request("any", &format!("/async/{trigger}"))
        .method("POST")
        .header("content-type", "text/x-order")
        .header("warren-event-id", "forged")
        .body(Full::<Bytes>::from(body.to_owned()));
    Got::whole(send(world.address(), request.unwrap()).await).await
}

fn seen(world: &World) -> Vec<String> {
    world.shared.events.lock().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_delivered_with_its_id_until_it_succeeds() {
    let world = World::new(&[4], "event_bytes = 100").await;
    world.function("mail", MINUTE, 0).await;
    world.trigger("orders", "mail", event(3, ""));
    world.settled().await;
    world.shared.failures.store(2, Ordering::SeqCst);
    let got = post(&world, "orders", "one pie").await;
    assert_eq!(got.status, 202, "{got:?}");
    let id = got.body.split('"').nth(3).unwrap().to_owned();
    until("the third delivery", || seen(&world).len() == 3).await;
    for (failed, event) in seen(&world).iter().enumerate() {
        assert!(event.starts_with("mail@1\nPOST /\n") && event.ends_with("\none pie"), "{event}");
        for line in [
            format!("warren-event-id: {id}"),
            format!("warren-event-failed: {failed}"),
            "content-type: text/x-order".to_owned(),
            "content-length: 7".to_owned(),
        ] {
            assert_eq!(
                event.lines().filter(|other| **other == line).count(),
                1,
                "{line} in {event}"
            );
        }
        assert!(!event.contains("forged"), "{event}");
    }
    let got = post(&world, "orders", &"x".repeat(101)).await;
    assert_eq!((got.status, got.error.as_str()), (413, "too-large"));
    assert_eq!(post(&world, "nobody", "").await.error, "no-route");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_in_the_end_is_a_dead_letter_once() {
    let world = World::new(&[4], "").await;
    world.function("mail", MINUTE, 0).await;
    world.function("lost", MINUTE, 0).await;
    world.trigger("orders", "mail", event(1, "letters"));
    // Its dead letters would come back for ever.
    world.trigger("letters", "lost", event(0, "orders"));
    world.settled().await;
    world.shared.failures.store(3, Ordering::SeqCst);
    assert_eq!(post(&world, "orders", "one pie").await.status, 202);
    let dropped = "warren_events_total{outcome=\"dropped\"}";
    while world.metric(dropped).await != 1 {}
    let events = seen(&world);
    let functions: Vec<_> = events.iter().map(|event| event.lines().next().unwrap()).collect();
    assert_eq!(functions, ["mail@1", "mail@1", "lost@1"]);
    let letter = &events[2];
    assert!(letter.contains("\nwarren-dead-letter-of: orders\n"), "{letter}");
    assert!(
        letter.contains("\nwarren-dead-letter-reason: its function answered 500\n"),
        "{letter}"
    );
    assert!(letter.ends_with("\none pie"), "{letter}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_accepted_survives_a_kill() {
    let mut world = World::new(&[4], "queue_ms = 100").await;
    world.function("mail", MINUTE, 0).await;
    world.trigger("orders", "mail", event(1000, ""));
    world.settled().await;
    // Nothing can be delivered while the agent is away.
    let endpoint = world.hosts[0].stop_agent().await;
    for number in 0..5 {
        assert_eq!(post(&world, "orders", &format!("pie {number}")).await.status, 202);
    }
    // Dropping kills it.
    drop(world.gateway.take());
    assert!(seen(&world).is_empty());
    let machine = world.hosts[0].machine.clone();
    let agent = crate::agent::Server::start(&endpoint, crate::agent::services(machine)).await;
    world.hosts[0].agent = Some(agent);
    world.start_gateway();
    let pies = || {
        let mut pies: Vec<_> =
            seen(&world).iter().map(|event| event.lines().last().unwrap().to_owned()).collect();
        pies.sort();
        // At least once.
        pies.dedup();
        pies
    };
    until("all are delivered", || pies().len() == 5).await;
    assert_eq!(pies(), ["pie 0", "pie 1", "pie 2", "pie 3", "pie 4"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timer_that_was_due_while_the_gateway_was_away_fires_once_if_it_is_its_own() {
    let mut world = World::new(&[4], "").await;
    world.function("clock", MINUTE, 0).await;
    world.trigger("each-minute", "clock", Kind::Timer(TimerTrigger { cron: "* * * * *".into() }));
    world.control.tell(Change::FiresTimers(true));
    world.settled().await;
    let database = world.directory.path().join("state/events.db");
    let fired = |set: Option<i64>| {
        // The gateway has the file alone, so this is for when it is away.
        let connection = rusqlite::Connection::open(&database).unwrap();
        if let Some(ms) = set {
            connection.execute("UPDATE timer SET fired_ms = ?", [ms]).unwrap();
        }
        let read = "SELECT fired_ms FROM timer";
        connection.query_row(read, [], |row| row.get::<_, i64>(0))
    };
    // It notes a timer when it first sees it.
    let known = loop {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        drop(world.gateway.take());
        match fired(None) {
            Ok(known) => break known,
            Err(_) => world.start_gateway(),
        }
    };
    world.shared.events.lock().unwrap().clear();
    fired(Some(known - 61_000)).unwrap();
    world.start_gateway();
    until("it fires", || !seen(&world).is_empty()).await;
    let event = seen(&world)[0].clone();
    assert!(event.contains("\nwarren-timer: each-minute\n"), "{event}");
    assert!(event.contains(":00Z\n"), "{event}");
    // It goes on from there.
    drop(world.gateway.take());
    assert!(fired(None).unwrap() > known - 61_000);
}
