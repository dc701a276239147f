//! Security groups: stored, checked, deployed, counted.

mod fake;

use std::time::Duration;

use fake::{Told, World, eventually};
use tonic::{Code, Status};
use warren_proto::policy::Rule;
use warren_proto::v1::apply_vpc_request::Role;
use warren_proto::v1::*;

fn rules(texts: &[&str]) -> Vec<SecurityRule> {
    texts.iter().map(|text| text.parse::<Rule>().unwrap().message(0)).collect()
}

async fn create(world: &World, name: &str, texts: &[&str]) -> Result<Vec<u32>, Status> {
    let request =
        CreateSecurityGroupRequest { vpc: "blue".into(), name: name.into(), rules: rules(texts) };
    let made = world.client().await.create_security_group(request).await?.into_inner();
    Ok(ids(&made.group.unwrap()))
}

async fn change(
    world: &World,
    group: &str,
    add: &[&str],
    remove: &[u32],
) -> Result<Vec<u32>, Status> {
    let request = ChangeSecurityRulesRequest {
        vpc: "blue".into(),
        group: group.into(),
        add: rules(add),
        remove: remove.to_vec(),
    };
    let changed = world.client().await.change_security_rules(request).await?.into_inner();
    Ok(ids(&changed.group.unwrap()))
}

async fn delete(world: &World, name: &str) -> Result<(), Status> {
    let request = DeleteSecurityGroupRequest { vpc: "blue".into(), name: name.into() };
    world.client().await.delete_security_group(request).await.map(drop)
}

async fn set_default_groups(world: &World, names: &[&str]) -> Result<(), Status> {
    let names = names.iter().map(|name| (*name).to_owned()).collect();
    let request = SetSecurityDefaultsRequest {
        vpc: "blue".into(),
        groups: Some(GroupNames { names }),
        ..Default::default()
    };
    world.client().await.set_security_defaults(request).await.map(drop)
}

async fn run_with(world: &World, groups: &[&str]) -> Result<Instance, Status> {
    let request = RunInstanceRequest {
        vpc: "blue".into(),
        security_groups: groups.iter().map(|name| (*name).to_owned()).collect(),
        ..Default::default()
    };
    let started = world.client().await.run_instance(request).await?.into_inner();
    Ok(started.instance.unwrap())
}

fn ids(group: &SecurityGroup) -> Vec<u32> {
    group.rules.iter().map(|rule| rule.id).collect()
}

/// What a host was told last.
fn told(world: &World, host: &str) -> Option<VpcSecurity> {
    match world.log.applied(host).pop()?.role? {
        Role::Host(host) => host.security,
        Role::Proxy(_) => None,
    }
}

#[tokio::test]
async fn groups_reach_hosts_and_outlive_the_control_plane_and_numbers_are_never_used_again() {
    let mut world = World::new().await;
    let _agents = (world.host("h1", 1).await, world.proxy("p1", 9).await);
    world.create_vpc("blue").await;
    assert_eq!(create(&world, "web", &["9 allow tcp 443", "5 deny any"]).await.unwrap(), [2, 1]);
    set_default_groups(&world, &["web"]).await.unwrap();
    world.run("blue", "h1").await.unwrap();
    let security = told(&world, "h1").unwrap();
    assert_eq!(ids(&security.groups[0]), [2, 1]);
    assert_eq!(security.defaults.unwrap().groups, ["web"]);

    assert_eq!(change(&world, "web", &["1 allow icmp"], &[2]).await.unwrap(), [3, 1]);
    eventually("the host has it", || async {
        told(&world, "h1").is_some_and(|security| ids(&security.groups[0]) == [3, 1])
    })
    .await;
    assert_eq!(change(&world, "web", &[], &[3]).await.unwrap(), [1]);
    world.stop_control().await;
    world.log.clear();
    world.start_control().await;
    assert_eq!(change(&world, "web", &["1 allow icmp"], &[]).await.unwrap(), [4, 1]);
    eventually("the host is told again", || async {
        told(&world, "h1").is_some_and(|security| ids(&security.groups[0]) == [4, 1])
    })
    .await;
}

#[tokio::test]
async fn a_start_waits_until_its_host_has_the_rules() {
    let world = World::new().await;
    let h1 = world.host("h1", 1).await;
    let _p1 = world.proxy("p1", 9).await;
    world.create_vpc("blue").await;
    world.run("blue", "h1").await.unwrap();
    h1.behaviour.open.send_replace(false);
    create(&world, "web", &["5 deny any"]).await.unwrap();
    let starts = world.log.all().len();
    let started = run_with(&world, &["web"]);
    tokio::pin!(started);
    let waiting = tokio::time::timeout(Duration::from_millis(200), &mut started).await;
    assert!(waiting.is_err(), "the host did not answer yet");
    let begun = |(_, told): &(String, Told)| matches!(told, Told::Start(_));
    assert!(!world.log.all()[starts..].iter().any(begun), "it does not know the group");
    h1.behaviour.open.send_replace(true);
    assert_eq!(started.await.unwrap().security_groups, ["web"]);
    let Some((_, Told::Start(start))) = world.log.all().into_iter().rfind(begun) else { panic!() };
    assert_eq!(start.security_groups, ["web"]);
}

#[tokio::test]
async fn what_cannot_be_is_refused() {
    let world = World::new().await;
    let _agents = (world.host("h1", 1).await, world.proxy("p1", 9).await);
    let unknown = create(&world, "web", &[]).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    world.create_vpc("blue").await;
    let many: Vec<_> = (1..=128).map(|priority| format!("{priority} deny any")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    create(&world, "full", &many).await.unwrap();
    create(&world, "web", &["5 deny any"]).await.unwrap();
    create(&world, "own", &[]).await.unwrap();
    set_default_groups(&world, &["web"]).await.unwrap();
    let instance = run_with(&world, &["own", "full"]).await.unwrap();
    eventually("it is listed", || async { !world.instances().await.is_empty() }).await;

    let refusals = [
        (create(&world, "web", &[]).await.unwrap_err(), Code::AlreadyExists, "\"web\" already"),
        (create(&world, "We", &[]).await.unwrap_err(), Code::InvalidArgument, "\"We\""),
        (delete(&world, "red").await.unwrap_err(), Code::NotFound, "ls blue"),
        (delete(&world, "web").await.unwrap_err(), Code::FailedPrecondition, "is a default"),
        (delete(&world, "own").await.unwrap_err(), Code::FailedPrecondition, &instance.id),
        (change(&world, "own", &[], &[7]).await.unwrap_err(), Code::NotFound, "no rule 7"),
        (
            change(&world, "full", &["1 allow any"], &[]).await.unwrap_err(),
            Code::InvalidArgument,
            "129 rules in full",
        ),
        (
            change(&world, "own", &["1 allow any"], &[]).await.unwrap_err(),
            Code::InvalidArgument,
            "129 rules in full, own",
        ),
        (
            set_default_groups(&world, &["web", "full"]).await.unwrap_err(),
            Code::InvalidArgument,
            "129 rules",
        ),
        (set_default_groups(&world, &["red"]).await.unwrap_err(), Code::NotFound, "\"red\""),
        (run_with(&world, &["red"]).await.unwrap_err(), Code::NotFound, "security group \"red\""),
        (run_with(&world, &["web", "full"]).await.unwrap_err(), Code::InvalidArgument, "129 rules"),
    ];
    for (error, code, part) in refusals {
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(part), "{error} should contain {part}");
    }
    set_default_groups(&world, &[]).await.unwrap();
    delete(&world, "web").await.unwrap();
}

#[tokio::test]
async fn hits_are_summed_over_hosts_and_a_silent_one_is_named() {
    let world = World::new().await;
    let (h1, mut h2) = (world.host("h1", 1).await, world.host("h2", 2).await);
    world.create_vpc("blue").await;
    create(&world, "web", &["5 deny any"]).await.unwrap();
    let hits = |id, hits| RuleHits { id, hits };
    *h1.behaviour.hits.lock().unwrap() = vec![hits(0, 4), hits(1, 3)];
    *h2.behaviour.hits.lock().unwrap() = vec![hits(1, 5)];
    let counted = || async {
        let request = GetSecurityRequest { vpc: "blue".into(), with_hits: true };
        world.client().await.get_security(request).await.unwrap().into_inner()
    };
    let all = counted().await;
    assert_eq!((all.hits, all.silent), (vec![hits(0, 4), hits(1, 8)], vec![]));
    h2.die(&world).await;
    let some = counted().await;
    assert_eq!(some.hits, [hits(0, 4), hits(1, 3)]);
    assert_eq!(some.silent[0].host, "h2");
}

#[tokio::test]
async fn changes_at_the_same_time_are_all_there() {
    let world = World::new().await;
    world.create_vpc("blue").await;
    create(&world, "web", &[]).await.unwrap();
    let mut adds = tokio::task::JoinSet::new();
    for port in 1..=20 {
        let mut client = world.client().await;
        let request = ChangeSecurityRulesRequest {
            vpc: "blue".into(),
            group: "web".into(),
            add: rules(&[&format!("{port} allow tcp {port}")]),
            remove: vec![],
        };
        adds.spawn(async move { client.change_security_rules(request).await.unwrap() });
    }
    adds.join_all().await;
    let mut all = change(&world, "web", &[], &[]).await.unwrap();
    all.sort_unstable();
    assert_eq!(all, (1..=20).collect::<Vec<_>>());
}
