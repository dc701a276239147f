//! Functions: published by the real compiler, kept, and told to gateways.

mod fake;

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use fake::functions::{compiler, component};
use fake::{FakeAgent, World, eventually};
use tonic::{Code, Status, Streaming};
use warren_proto::endpoint::connect;
use warren_proto::v1::data_flow_service_client::DataFlowServiceClient;
use warren_proto::v1::deploy_function_request::Part;
use warren_proto::v1::function_service_client::FunctionServiceClient;
use warren_proto::v1::trigger::Kind;
use warren_proto::v1::watch_data_flow_response::Change;
use warren_proto::v1::*;

type Client = FunctionServiceClient<tonic::transport::Channel>;

/// A control plane whose compiler counts its runs in a file.
async fn world() -> World {
    let compiler = compiler();
    let mut world = World::new().await;
    let (counting, runs) = (world.file("compile"), world.file("runs"));
    let script =
        format!("#!/bin/sh\necho run >> {}\nexec {} \"$@\"\n", runs.display(), compiler.display());
    std::fs::write(&counting, script).unwrap();
    std::fs::set_permissions(&counting, std::fs::Permissions::from_mode(0o755)).unwrap();
    world.functions.compiler = Some(counting);
    world.functions.zones = ["east", "west"]
        .map(|zone| (zone.to_owned(), world.file(zone).display().to_string()))
        .into();
    world.stop_control().await;
    world.start_control().await;
    world.create_vpc("blue").await;
    world
}

fn runs(world: &World) -> usize {
    std::fs::read_to_string(world.file("runs")).map_or(0, |text| text.lines().count())
}

async fn client(world: &World) -> Client {
    FunctionServiceClient::new(connect(&world.endpoint()).await.unwrap())
}

fn options(name: &str) -> FunctionOptions {
    FunctionOptions { name: name.into(), vpc: "blue".into(), ..Default::default() }
}

async fn deploy(
    world: &World,
    options: FunctionOptions,
    component: &[u8],
) -> Result<DeployFunctionResponse, Status> {
    let pieces = component.chunks(100).map(|piece| Part::Component(piece.to_vec()));
    let parts: Vec<_> = [Part::Options(options)].into_iter().chain(pieces).collect();
    upload(world, parts).await
}

async fn upload(world: &World, parts: Vec<Part>) -> Result<DeployFunctionResponse, Status> {
    let messages = parts.into_iter().map(|part| DeployFunctionRequest { part: Some(part) });
    let messages: Vec<_> = messages.collect();
    Ok(client(world).await.deploy_function(tokio_stream::iter(messages)).await?.into_inner())
}

async fn set_alias(
    client: &mut Client,
    alias: &str,
    versions: &[(u64, u32)],
) -> Result<FunctionAlias, Status> {
    let share = |&(number, weight)| WeightedVersion { number, weight };
    let versions = versions.iter().map(share).collect();
    let alias = FunctionAlias { name: alias.into(), versions, former: Vec::new() };
    let request = SetAliasRequest { function: "web".into(), alias: Some(alias) };
    Ok(client.set_alias(request).await?.into_inner().alias.unwrap())
}

fn http(name: &str, alias: &str, prefix: &str) -> CreateTriggerRequest {
    let kind = HttpTrigger { host: String::new(), prefix: prefix.into(), strip: false };
    let (name, function, alias) = (name.into(), "web".into(), alias.into());
    CreateTriggerRequest {
        trigger: Some(Trigger { name, function, alias, kind: Some(Kind::Http(kind)) }),
    }
}

async fn get(client: &mut Client, name: &str) -> Result<Function, Status> {
    let request = GetFunctionRequest { name: name.into() };
    Ok(client.get_function(request).await?.into_inner().function.unwrap())
}

#[tokio::test]
async fn a_component_becomes_a_version_in_region_and_zones() {
    let world = world().await;
    let deployed = deploy(&world, options("web"), &component("")).await.unwrap();
    assert_eq!((deployed.version, deployed.compiled_before), (1, false));
    assert!(deployed.zones_left_out.is_empty(), "{deployed:?}");
    let function = deployed.function.unwrap();
    let [version] = &function.versions[..] else { panic!("{function:?}") };
    assert_eq!((&function.vpc[..], &version.template[..]), ("blue", "runtime"));
    assert_eq!((version.memory_bytes, version.timeout_ms), (64 << 20, 3000));
    let package = |store: &str, digest: &str| {
        std::fs::read(world.file(store).join(&digest[..2]).join(digest))
    };
    for store in ["functions", "east", "west"] {
        let bytes = package(store, &version.package).unwrap();
        let package = warren_function::package::Package::parse(&bytes).unwrap();
        assert_eq!(package.manifest.memory_bytes, 64 << 20);
        assert!(!package.code().is_empty());
    }

    // The same once more is no version; another environment is, and compiles nothing.
    let again = deploy(&world, options("web"), &component("")).await.unwrap();
    assert_eq!((again.version, again.compiled_before), (1, true));
    let variable = EnvironmentVariable { name: "A".into(), value: "b".into() };
    let changed = FunctionOptions { environment: vec![variable], ..options("web") };
    let changed = deploy(&world, changed, &component("")).await.unwrap();
    assert_eq!((changed.version, changed.compiled_before), (2, true));
    assert_eq!(runs(&world), 1);
    let versions = changed.function.unwrap().versions;
    assert_ne!(versions[0].package, versions[1].package);
    let [first, second] =
        [0, 1].map(|at: usize| package("functions", &versions[at].package).unwrap());
    let parse = |bytes| warren_function::package::Package::parse(bytes).unwrap();
    assert_eq!(parse(&first).code(), parse(&second).code());
    assert_eq!(parse(&second).manifest.environment, [("A".to_owned(), "b".to_owned())]);

    // Whoever loses the package compiles again.
    let lost = &versions[0].package;
    std::fs::remove_file(world.file("functions").join(&lost[..2]).join(lost)).unwrap();
    let other = deploy(&world, options("other"), &component("")).await.unwrap();
    assert!(!other.compiled_before && runs(&world) == 2);
    assert!(package("functions", lost).is_ok(), "it is the same package");

    // Another component is other code.
    let other = component("(import \"wasi:io/error@0.2.0\" (instance))");
    let deployed = deploy(&world, options("web"), &other).await.unwrap();
    assert_eq!((deployed.version, deployed.compiled_before), (3, false));
}

#[tokio::test]
async fn what_cannot_be_a_function_is_refused_with_its_reason() {
    let world = world().await;
    let good = component("");
    let bad = component("(import \"wasi:keyvalue/store@0.2.0\" (instance))");
    let text = str::to_owned;
    let variable = |name: &str| EnvironmentVariable { name: text(name), value: text("b") };
    let file = FunctionFile { path: text("../a"), contents: vec![] };
    let cases = [
        (options("web"), &bad[..], Code::InvalidArgument, "wasi:keyvalue/store@0.2.0"),
        (options("web"), b"text", Code::InvalidArgument, "no WebAssembly"),
        (options("web"), b"", Code::InvalidArgument, "no WebAssembly"),
        (options("We b"), &good, Code::InvalidArgument, "name: "),
        (FunctionOptions { vpc: text("red"), ..options("web") }, &good, Code::NotFound, "\"red\""),
        (
            FunctionOptions { environment: vec![variable("A=")], ..options("web") },
            &good,
            Code::InvalidArgument,
            "A=",
        ),
        (
            FunctionOptions { files: vec![file], ..options("web") },
            &good,
            Code::InvalidArgument,
            "../a",
        ),
        (
            FunctionOptions { memory_bytes: 4096, ..options("web") },
            &good,
            Code::InvalidArgument,
            "131072 bytes",
        ),
        (
            FunctionOptions { memory_bytes: 5 << 30, ..options("web") },
            &good,
            Code::InvalidArgument,
            "memory_bytes: ",
        ),
    ];
    for (options, component, code, reason) in cases {
        let error = deploy(&world, options, component).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(reason), "{error:?} should contain {reason:?}");
    }
    let piece = Part::Component(good.clone());
    let error = upload(&world, vec![piece.clone()]).await.unwrap_err();
    assert!(error.message().contains("first message has the options"), "{error}");
    let large = Part::Component(vec![0; 3 << 20]);
    let parts = [Part::Options(options("web"))].into_iter().chain(std::iter::repeat_n(large, 22));
    let error = upload(&world, parts.collect()).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    let mut client = client(&world).await;
    assert_eq!(get(&mut client, "web").await.unwrap_err().code(), Code::NotFound);

    deploy(&world, options("web"), &good).await.unwrap();
    world.create_vpc("red").await;
    let elsewhere = FunctionOptions { vpc: text("red"), ..options("web") };
    let error = deploy(&world, elsewhere, &good).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
}

#[tokio::test]
async fn a_version_is_stored_only_when_it_is_published() {
    let mut world = world().await;
    // A region that cannot be written to: a file is in the way of each directory.
    world.functions.repository = Some(world.file("region").display().to_string());
    world.stop_control().await;
    world.start_control().await;
    std::fs::remove_dir(world.file("region")).unwrap();
    std::fs::write(world.file("region"), "").unwrap();
    let error = deploy(&world, options("web"), &component("")).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert!(error.message().contains("the region's repository"), "{error}");
    assert!(get(&mut client(&world).await, "web").await.is_err());

    // A zone that is cut off stops nobody, and is told of.
    std::fs::remove_file(world.file("region")).unwrap();
    std::fs::remove_dir_all(world.file("west")).unwrap();
    std::fs::write(world.file("west"), "").unwrap();
    let deployed = deploy(&world, options("web"), &component("")).await.unwrap();
    let [left_out] = &deployed.zones_left_out[..] else { panic!("{deployed:?}") };
    assert!(left_out.starts_with("west: "), "{left_out}");
}

#[tokio::test]
async fn aliases_roll_back_and_everything_outlives_a_restart() {
    let mut world = world().await;
    for timeout_ms in [1000, 2000] {
        let options = FunctionOptions { timeout_ms, ..options("web") };
        deploy(&world, options, &component("")).await.unwrap();
    }
    let mut client = client(&world).await;
    let code = |status: Status| status.code();
    set_alias(&mut client, "live", &[(1, 1)]).await.unwrap();
    let alias = set_alias(&mut client, "live", &[(1, 9), (2, 1)]).await.unwrap();
    assert_eq!((alias.versions.len(), alias.former.len()), (2, 1));
    assert_eq!(set_alias(&mut client, "live", &[(3, 1)]).await.map_err(code), Err(Code::NotFound));
    let latest = set_alias(&mut client, "$LATEST", &[(1, 1)]).await;
    assert_eq!(latest.map_err(code), Err(Code::InvalidArgument));

    client.create_trigger(http("site", "live", "/shop/")).await.unwrap();
    client.create_trigger(http("site", "live", "/shop")).await.expect("the same");
    let mut refused = async |request| client.create_trigger(request).await.unwrap_err();
    assert_eq!(refused(http("site", "1", "/shop")).await.code(), Code::AlreadyExists);
    let taken = refused(http("other", "", "/shop")).await;
    assert_eq!(taken.code(), Code::AlreadyExists);
    assert!(taken.message().contains("\"site\""), "{taken}");
    assert_eq!(refused(http("other", "dead", "")).await.code(), Code::NotFound);
    assert_eq!(refused(http("other", "7", "")).await.code(), Code::NotFound);

    world.stop_control().await;
    world.start_control().await;
    let mut client = self::client(&world).await;
    let function = get(&mut client, "web").await.unwrap();
    let timeouts: Vec<_> = function.versions.iter().map(|version| version.timeout_ms).collect();
    assert_eq!(timeouts, [1000, 2000]);
    let triggers = client.list_triggers(ListTriggersRequest::default()).await.unwrap();
    assert_eq!(triggers.into_inner().triggers.len(), 1);
    let rolled = RollBackAliasRequest { function: "web".into(), alias: "live".into() };
    let rolled = client.roll_back_alias(rolled).await.unwrap().into_inner().alias.unwrap();
    assert_eq!(rolled.versions, [WeightedVersion { number: 1, weight: 1 }]);
    let again = deploy(&world, options("other"), &component("")).await.unwrap();
    assert!(again.compiled_before, "the code is known after a restart, too");

    let alias = DeleteAliasRequest { function: "web".into(), alias: "live".into() };
    let error = client.delete_alias(alias.clone()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    let function = DeleteFunctionRequest { name: "web".into() };
    let error = client.delete_function(function.clone()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("warren trigger rm site"), "{error}");
    client.delete_trigger(DeleteTriggerRequest { name: "site".into() }).await.unwrap();
    client.delete_alias(alias).await.unwrap();
    client.delete_function(function.clone()).await.unwrap();
    assert_eq!(client.delete_function(function).await.unwrap_err().code(), Code::NotFound);
}

async fn watch(world: &World, gateway: &str) -> Streaming<WatchDataFlowResponse> {
    let mut client = DataFlowServiceClient::new(connect(&world.endpoint()).await.unwrap());
    let request = WatchDataFlowRequest { gateway: gateway.into() };
    client.watch_data_flow(request).await.unwrap().into_inner()
}

/// What is told until this is.
async fn until(
    watched: &mut Streaming<WatchDataFlowResponse>,
    what: &str,
    is_it: impl Fn(&Change) -> bool,
) -> Vec<Change> {
    let mut told = Vec::new();
    let read = async {
        loop {
            let change = watched.message().await.unwrap().unwrap().change.unwrap();
            told.push(change);
            if told.last().is_some_and(&is_it) {
                return;
            }
        }
    };
    let done = tokio::time::timeout(Duration::from_secs(20), read).await;
    done.unwrap_or_else(|_| panic!("never told: {what}; but {told:?}"));
    told
}

async fn runtime_host(world: &World, name: &str, number: u8) -> FakeAgent {
    let mut host = FakeAgent::new(world, name, Role::Host, number).await;
    host.report.relay = format!("192.0.2.{number}:7800");
    host.report.templates[0].template = "runtime".into();
    host.register(world).await;
    host
}

#[tokio::test]
async fn gateways_are_told_everything_and_then_changes() {
    let mut world = world().await;
    let _proxy = world.proxy("p1", 9).await;
    let _h1 = runtime_host(&world, "h1", 1).await;
    // Neither is a function's: another template, and no relay.
    let _h2 = world.host("h2", 2).await;
    deploy(&world, options("web"), &component("")).await.unwrap();

    let mut watched = watch(&world, "g1").await;
    let complete = |change: &Change| matches!(change, Change::Complete(true));
    let all = until(&mut watched, "complete", complete).await;
    assert!(
        all.iter().any(|it| matches!(it, Change::Function(function) if function.name == "web"))
    );
    assert!(all.contains(&Change::FiresTimers(true)));
    let h2 = all.iter().find_map(|change| match change {
        Change::Host(host) if host.name == "h2" => Some(host),
        _ => None,
    });
    assert_eq!(h2.map(|host| (&host.relay[..], host.vpcs.len())), Some(("", 0)));

    // The VPC comes to the host without any start.
    let has_blue = |change: &Change| matches!(change, Change::Host(host) if host.name == "h1" && host.vpcs == ["blue"]);
    if !all.iter().any(has_blue) {
        until(&mut watched, "h1 has the VPC", has_blue).await;
    }
    assert_eq!(world.log.applied("h1").last().unwrap().vpc, "blue");
    assert!(world.log.applied("h2").is_empty());

    // Another one that watches does not fire timers.
    let mut second = watch(&world, "g2").await;
    let all = until(&mut second, "complete", complete).await;
    assert!(!all.contains(&Change::FiresTimers(true)), "{all:?}");
    let told = all.iter().find(|change| has_blue(change));
    let Some(Change::Host(told)) = told else { panic!("{all:?}") };
    let relay = "192.0.2.1:7800".to_owned();
    assert_eq!((&told.relay, told.alive, told.slots), (&relay, true, 4));
    assert_eq!(told.templates, ["runtime"]);

    let mut client = client(&world).await;
    client.create_trigger(http("site", "", "")).await.unwrap();
    for stream in [&mut watched, &mut second] {
        let is_site = |it: &Change| matches!(it, Change::Trigger(trigger) if trigger.name == "site" && trigger.alias == "$LATEST");
        until(stream, "the trigger", is_site).await;
    }
    world.run("blue", "h1").await.unwrap();
    let taken =
        |it: &Change| matches!(it, Change::Host(host) if host.name == "h1" && host.taken == 1);
    until(&mut watched, "a slot is taken", taken).await;
    client.delete_trigger(DeleteTriggerRequest { name: "site".into() }).await.unwrap();
    client.delete_function(DeleteFunctionRequest { name: "web".into() }).await.unwrap();
    let told =
        until(&mut watched, "it is gone", |it| matches!(it, Change::FunctionRemoved(_))).await;
    assert!(told.contains(&Change::TriggerRemoved("site".into())), "{told:?}");

    // Another VPC's first function, and a host that comes later.
    world.create_vpc("red").await;
    let red = FunctionOptions { vpc: "red".into(), ..options("api") };
    deploy(&world, red, &component("")).await.unwrap();
    let has_red = |host: &str| {
        let host = host.to_owned();
        move |change: &Change| matches!(change, Change::Host(it) if it.name == host && it.vpcs.iter().any(|vpc| vpc == "red"))
    };
    until(&mut watched, "h1 has the other VPC", has_red("h1")).await;
    let mut h3 = runtime_host(&world, "h3", 3).await;
    until(&mut watched, "h3 has the VPC", has_red("h3")).await;
    h3.die(&world).await;
    let dead = |it: &Change| matches!(it, Change::Host(host) if host.name == "h3" && !host.alive && host.vpcs.is_empty());
    until(&mut watched, "h3 is dead", dead).await;
    let forget = ForgetHostRequest { name: "h3".into() };
    world.client().await.forget_host(forget).await.unwrap();
    until(&mut watched, "h3 is gone", |it| *it == Change::HostRemoved("h3".into())).await;

    // After a restart, nothing is told before the host has its VPCs again: what a gateway then
    // takes for the truth is no less than what it had.
    world.stop_control().await;
    world.start_control().await;
    let mut watched = watch(&world, "g1").await;
    let all = until(&mut watched, "complete", complete).await;
    assert!(all.iter().any(has_red("h1")), "{all:?}");
    assert!(all.contains(&Change::FiresTimers(true)), "it is still the one");
}

#[tokio::test]
async fn another_gateway_fires_timers_when_the_first_went_away() {
    let world = world().await;
    let mut first = watch(&world, "g1").await;
    let fires = |change: &Change| *change == Change::FiresTimers(true);
    until(&mut first, "it fires", fires).await;
    let mut second = watch(&world, "g2").await;
    drop(first);
    let began = std::time::Instant::now();
    until(&mut second, "the other one fires", fires).await;
    let patience = warren_control::functions::timers::PATIENCE;
    assert!(began.elapsed() + Duration::from_millis(500) >= patience, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_relay_that_is_none_is_refused_and_one_that_is_is_shown() {
    let world = World::new().await;
    let mut host = FakeAgent::new(&world, "h1", Role::Host, 1).await;
    host.report.relay = "here".into();
    let report = host.report();
    let channel = connect(&world.endpoint()).await.unwrap();
    let mut fleet = fleet_service_client::FleetServiceClient::new(channel);
    let error = fleet.heartbeat(tokio_stream::once(report)).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().starts_with("relay: \"here\""), "{error}");
    host.report.relay = "192.0.2.1:7800".into();
    host.register(&world).await;
    eventually("the relay is shown", || async {
        let hosts = world.client().await.list_hosts(ListHostsRequest {}).await.unwrap();
        hosts.into_inner().hosts[0].relay == "192.0.2.1:7800"
    })
    .await;
}
