//! Who is in the fleet, who is alive, and what follows from it.

mod fake;

use std::time::Duration;

use fake::{FakeAgent, World, eventually};
use tokio_stream::StreamExt;
use tonic::{Code, Status};
use warren_proto::endpoint::connect;
use warren_proto::v1::fleet_service_client::FleetServiceClient;
use warren_proto::v1::*;

/// The error that a first heartbeat is refused with.
async fn refusal(world: &World, heartbeat: HeartbeatRequest) -> Status {
    let mut fleet = FleetServiceClient::new(connect(&world.endpoint()).await.unwrap());
    let heartbeats = tokio_stream::once(heartbeat).chain(tokio_stream::pending());
    fleet.heartbeat(heartbeats).await.unwrap_err()
}

#[tokio::test]
async fn registered_members_are_listed() {
    let world = World::new().await;
    let _h1 = world.host("h1", 1).await;
    let _p1 = world.proxy("p1", 9).await;
    let hosts = world.client().await.list_hosts(ListHostsRequest {}).await.unwrap().into_inner();
    let [h1, p1] = &hosts.hosts[..] else { panic!("{hosts:?}") };
    assert_eq!((h1.name.as_str(), h1.role(), h1.alive), ("h1", Role::Host, true));
    assert_eq!((h1.slots, h1.parked, h1.parked_target), (4, 2, 3));
    assert_eq!(h1.version, "1.2.3");
    assert_eq!(h1.underlay_address, "192.0.2.1");
    assert!(h1.endpoint.starts_with("unix:/") && h1.endpoint.ends_with("h1.sock"));
    assert_eq!((p1.name.as_str(), p1.role()), ("p1", Role::Proxy));
}

#[tokio::test]
async fn a_wrong_registration_is_refused_with_its_reason() {
    let world = World::new().await;
    let agent = FakeAgent::new(&world, "h1", Role::Host, 1).await;
    let valid = agent.report();
    let nowhere = "unix:/nowhere/at/all.sock".to_owned();
    let cases = [
        (HeartbeatRequest { name: "H 1".into(), ..valid.clone() }, "name: "),
        (HeartbeatRequest { role: 0, ..valid.clone() }, "role: "),
        (HeartbeatRequest { endpoint: "here".into(), ..valid.clone() }, "endpoint: "),
        (HeartbeatRequest { underlay_address: "x".into(), ..valid.clone() }, "underlay_address: "),
        (
            HeartbeatRequest { endpoint: nowhere, ..valid.clone() },
            "nothing listens at unix:/nowhere",
        ),
    ];
    for (heartbeat, part) in cases {
        let status = refusal(&world, heartbeat).await;
        assert!(status.message().contains(part), "{status:?} should contain {part}");
    }
    assert!(!world.is_alive("h1").await);

    let _h1 = world.host("h1b", 1).await;
    let other_role = HeartbeatRequest { name: "h1b".into(), role: Role::Proxy.into(), ..valid };
    let status = refusal(&world, other_role).await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(world.is_alive("h1b").await, "the other one is not disturbed");
}

#[tokio::test]
async fn a_silent_agent_is_dead_after_the_deadline() {
    let world = World::with_deadline(Duration::from_millis(300)).await;
    let agent = FakeAgent::new(&world, "h1", Role::Host, 1).await;
    let mut fleet = FleetServiceClient::new(connect(&world.endpoint()).await.unwrap());
    let heartbeats = tokio_stream::once(agent.report()).chain(tokio_stream::pending());
    let mut answers = fleet.heartbeat(heartbeats).await.unwrap().into_inner();
    assert!(answers.message().await.unwrap().is_some(), "registered");
    // The stream stays open on the agent's side; nothing more is sent.
    let status = answers.message().await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(!world.is_alive("h1").await);
}

#[tokio::test]
async fn a_restarted_agent_replaces_its_older_stream() {
    let world = World::new().await;
    let agent = FakeAgent::new(&world, "h1", Role::Host, 1).await;
    let mut fleet = FleetServiceClient::new(connect(&world.endpoint()).await.unwrap());
    let (sender, older) = tokio::sync::mpsc::channel(1);
    sender.send(agent.report()).await.unwrap();
    let older = tokio_stream::wrappers::ReceiverStream::new(older);
    let mut older = fleet.heartbeat(older).await.unwrap().into_inner();
    let newer = tokio_stream::once(agent.report()).chain(tokio_stream::pending());
    let _newer = fleet.heartbeat(newer).await.unwrap();

    sender.send(agent.report()).await.unwrap();
    let status = loop {
        match older.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("ended without a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Aborted);
    assert!(world.is_alive("h1").await, "the end of the older stream does not end the newer");
}

#[tokio::test]
async fn instances_are_seen_at_once_and_stopped_ones_are_not() {
    let world = World::new().await;
    let h1 = world.host("h1", 1).await;
    let _p1 = world.proxy("p1", 9).await;
    world.create_vpc("blue").await;
    let started = world.run("blue", "").await.unwrap();
    assert_eq!(started.host, "h1");
    assert_eq!(world.instances().await, std::slice::from_ref(&started));

    let mut client = world.client().await;
    client.stop_instance(StopInstanceRequest { id: started.id.clone() }).await.unwrap();
    assert_eq!(world.instances().await, []);
    let again = client.stop_instance(StopInstanceRequest { id: started.id.clone() }).await;
    assert_eq!(again.unwrap_err().code(), Code::NotFound);

    // One that fails by itself is told by the heartbeats.
    let id = world.run("blue", "").await.unwrap().id;
    h1.behaviour.instances.lock().unwrap().get_mut(&id).unwrap().set_state(InstanceState::Failed);
    eventually("it is listed as failed", || async {
        world.instances().await.iter().any(|instance| instance.state() == InstanceState::Failed)
    })
    .await;
}

#[tokio::test]
async fn calls_go_to_the_instances_host() {
    let world = World::new().await;
    let (_h1, _h2) = (world.host("h1", 1).await, world.host("h2", 2).await);
    let _p1 = world.proxy("p1", 9).await;
    world.create_vpc("blue").await;
    let id = world.run("blue", "h2").await.unwrap().id;
    let call = CallInstanceRequest { id, invocation: b"ping".to_vec() };
    let reply = world.client().await.call_instance(call).await.unwrap().into_inner().reply;
    assert_eq!(reply, b"ping");
    let invoked = world.log.position(|name, told| {
        name == "h2" && matches!(told, fake::Told::Invoke(invoke) if invoke.invocation == b"ping")
    });
    assert!(invoked.is_some());
    let unknown = CallInstanceRequest { id: "x".into(), invocation: vec![] };
    let status = world.client().await.call_instance(unknown).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("warren vm ls"), "{status:?}");
}

#[tokio::test]
async fn a_dead_host_gets_nothing_and_its_instances_are_unknown() {
    let world = World::new().await;
    let mut h1 = world.host("h1", 1).await;
    let _p1 = world.proxy("p1", 9).await;
    world.create_vpc("blue").await;
    let id = world.run("blue", "h1").await.unwrap().id;
    h1.die(&world).await;

    let status = world.run("blue", "").await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unavailable, "no host is alive: start warrend in its host role on one",)
    );
    let status = world.run("blue", "h1").await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("host h1 is not alive"), "{status:?}");
    assert_eq!(world.run("blue", "h7").await.unwrap_err().code(), Code::NotFound);
    let instances = world.instances().await;
    assert_eq!(instances[0].state(), InstanceState::Unspecified);
    assert_eq!(instances[0].reason, "host h1 is not alive");
    let stop = StopInstanceRequest { id: id.clone() };
    let status = world.client().await.stop_instance(stop).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);

    let _h2 = world.host("h2", 2).await;
    assert_eq!(world.run("blue", "").await.unwrap().host, "h2");
    h1.register(&world).await;
    let instances = world.instances().await;
    let back = instances.iter().find(|instance| instance.id == id).unwrap();
    assert_eq!(back.state(), InstanceState::Running);
}

#[tokio::test]
async fn starts_under_way_take_slots() {
    let world = World::new().await;
    let h1 = world.host("h1", 1).await;
    let _p1 = world.proxy("p1", 9).await;
    world.create_vpc("blue").await;
    world.run("blue", "").await.unwrap();
    h1.behaviour.open.send_replace(false);
    let starts =
        async { tokio::join!(world.run("blue", ""), world.run("blue", ""), world.run("blue", "")) };
    let one_too_many = async {
        eventually("three starts are under way", || async {
            let starts = world.log.all();
            starts.iter().filter(|(_, told)| matches!(told, fake::Told::Start(_))).count() == 4
        })
        .await;
        let status = world.run("blue", "").await.unwrap_err();
        h1.behaviour.open.send_replace(true);
        status
    };
    let ((a, b, c), status) = tokio::join!(starts, one_too_many);
    assert!(a.is_ok() && b.is_ok() && c.is_ok());
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("all 4 slots of 1 alive host(s)"), "{status:?}");

    // What is stopped, or did not start, gives its slot back.
    let mut client = world.client().await;
    client.stop_instance(StopInstanceRequest { id: a.unwrap().id }).await.unwrap();
    *h1.behaviour.refuse_start.lock().unwrap() = Some(Status::data_loss("the template is damaged"));
    let status = world.run("blue", "").await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::DataLoss, "host h1: the template is damaged",)
    );
    *h1.behaviour.refuse_start.lock().unwrap() = None;
    world.run("blue", "").await.unwrap();
}

/// How a pool stands.
fn pool(template: &str) -> TemplatePool {
    TemplatePool { template: template.into(), parked: 1, parked_target: 2 }
}

#[tokio::test]
async fn an_instance_starts_where_its_template_is_and_more_of_that_are_wanted_there() {
    let world = World::new().await;
    let _p1 = world.proxy("p1", 9).await;
    let h1 = world.host("h1", 1).await;
    let mut h2 = FakeAgent::new(&world, "h2", Role::Host, 2).await;
    h2.report.slots = 3;
    h2.report.templates = vec![pool("small"), pool("large")];
    h2.register(&world).await;
    world.create_vpc("blue").await;
    let run = async |template: &str, host: &str| {
        let (vpc, host, template) = ("blue".into(), host.into(), template.into());
        let request = RunInstanceRequest { vpc, host, template, ..Default::default() };
        let answer = world.client().await.run_instance(request).await?;
        Ok::<_, Status>(answer.into_inner().instance.unwrap())
    };
    let large = run("large", "").await.unwrap();
    assert_eq!((large.host.as_str(), large.template.as_str()), ("h2", "large"));
    let refused = run("huge", "").await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert!(refused.message().contains("there are large, small"), "{refused}");
    let refused = run("large", "h1").await.unwrap_err();
    assert_eq!(refused.message(), "host h1 has no template \"large\": it has small");

    let told = |agent: &FakeAgent| agent.behaviour.wanted.lock().unwrap().clone();
    eventually("more are wanted", || async { told(&h2) == [("large".into(), 2)].into() }).await;
    // The default one, which is the first; together they get the slots that are left.
    run("", "h2").await.unwrap();
    let shared = [("large".into(), 0), ("small".into(), 1)].into();
    eventually("slots are shared", || async { told(&h2) == shared }).await;
    assert_eq!(told(&h1), [].into());

    let hosts = world.client().await.list_hosts(ListHostsRequest {}).await.unwrap().into_inner();
    let host = hosts.hosts.iter().find(|host| host.name == "h2").unwrap();
    assert_eq!((host.parked, host.parked_target), (2, 4));
    assert_eq!(host.templates, [pool("small"), pool("large")]);
}

#[tokio::test]
async fn the_operator_s_command_is_asked_for_proxies_when_there_is_too_much_to_do() {
    let world = World::new().await;
    let load = ProxyLoad { bits_per_second: 1500, packets_per_second: 3, cpu_permille: 40 };
    let mut p1 = FakeAgent::new(&world, "p1", Role::Proxy, 8).await;
    p1.report.load = Some(load);
    p1.register(&world).await;
    let hosts = world.client().await.list_hosts(ListHostsRequest {}).await.unwrap().into_inner();
    assert_eq!(hosts.hosts[0].load, Some(load));
    let told = world.file("told");
    let config = format!(
        "command = ['/bin/sh', '-c', 'cat > {told}.new; mv {told}.new {told}']\n\
         least = 1\nmost = 9\nbits_per_second = 1000",
        told = told.display()
    );
    world.scale(toml::from_str(&config).unwrap());
    eventually("the command was told", || async { told.exists() }).await;
    let message = std::fs::read_to_string(&told).unwrap();
    let message: serde_json::Value = serde_json::from_str(&message).unwrap();
    assert_eq!((&message["version"], &message["action"]), (&1.into(), &"add".into()));
    assert_eq!((&message["count"], &message["proxies"][0]), (&2.into(), &"p1".into()));
    let reason = message["reason"].as_str().unwrap();
    assert_eq!(reason, "there is enough to do for 1.5 proxies, and 1 is at work");
    let hosts = world.client().await.list_hosts(ListHostsRequest {}).await.unwrap().into_inner();
    assert!(!hosts.hosts[0].drained);
}
