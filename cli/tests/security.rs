//! `warren security-group` and `warren vpc guard` against a control plane with agents that only
//! remember what they are told.

#[path = "../../control/tests/fake/mod.rs"]
mod fake;

use std::process::Output;

use fake::{Told, World};
use serde_json::{Value, json};
use warren_proto::v1::{Limits, RuleHits};

async fn warren(world: &World, words: &[&str]) -> Output {
    tokio::process::Command::new(env!("CARGO_BIN_EXE_warren"))
        .args(words)
        .env("WARREN_ENDPOINT", world.endpoint().to_string())
        .output()
        .await
        .unwrap()
}

/// Standard output of a command that must succeed.
async fn done(world: &World, words: &[&str]) -> String {
    let output = warren(world, words).await;
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

async fn read(world: &World, words: &[&str]) -> Value {
    serde_json::from_str(&done(world, &[words, &["--output", "json"]].concat()).await).unwrap()
}

/// Exit code and standard error of a command that must fail.
async fn failed(world: &World, words: &[&str]) -> (i32, String) {
    let output = warren(world, words).await;
    assert!(!output.status.success(), "{words:?}: {output:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[tokio::test]
async fn groups_are_made_shown_with_counters_changed_and_deleted() {
    let world = World::new().await;
    let mut h1 = world.host("h1", 1).await;
    world.create_vpc("blue").await;
    let create = ["security-group", "create", "blue", "web"];
    let with_rules = ["--rule", "100 allow tcp 443 to 10.0.0.0/8", "--rule", "20 deny udp 50-60"];
    assert_eq!(
        done(&world, &[&create[..], &with_rules].concat()).await,
        "ID  PRIORITY  ACTION  PROTOCOL  PORTS  PEERS       HITS\n\
         2   20        deny    udp       50-60  -           -\n\
         1   100       allow   tcp       443    10.0.0.0/8  -\n"
    );
    done(&world, &["security-group", "add-rule", "blue", "web", "7 allow icmp"]).await;
    *h1.behaviour.hits.lock().unwrap() = vec![RuleHits { id: 1, hits: 12 }];
    let show = ["security-group", "show", "blue", "web"];
    let shown = read(&world, &show).await;
    assert_eq!(
        shown[2],
        json!({
            "id": 1, "priority": 100, "action": "allow", "protocol": "tcp", "ports": "443",
            "peers": "10.0.0.0/8", "hits": 12,
        })
    );
    assert_eq!((&shown[0]["id"], &shown[0]["hits"]), (&3.into(), &0.into()));
    let left = read(&world, &["security-group", "remove-rule", "blue", "web", "1", "2"]).await;
    assert_eq!(left.as_array().unwrap().len(), 1);

    done(&world, &["vpc", "guard", "blue", "--security-group", "web"]).await;
    assert_eq!(
        read(&world, &["security-group", "ls", "blue"]).await,
        json!([{ "name": "web", "rules": 1, "default": true }])
    );
    let delete = ["security-group", "delete", "blue", "web"];
    let (code, error) = failed(&world, &delete).await;
    assert_eq!((code, error.contains("is a default of VPC \"blue\"")), (1, true), "{error}");
    done(&world, &["vpc", "guard", "blue", "--no-security-groups"]).await;
    assert_eq!(done(&world, &delete).await, "DELETED\nweb\n");

    done(&world, &create).await;
    h1.die(&world).await;
    let (code, error) = failed(&world, &show).await;
    assert!(code == 3 && error.contains("the counters of h1 are not known"), "{error}");
    for (words, code, part) in [
        (&["security-group", "show", "blue", "red"][..], 4, "no security group \"red\""),
        (&["security-group", "ls", "red"], 4, "there is no VPC \"red\""),
        (&["security-group", "add-rule", "blue", "web", "0 deny any"], 2, "priority 0 is not"),
        (&["security-group", "add-rule", "blue", "web", "deny"], 2, "write PRIORITY"),
        (&["security-group", "create", "blue", "web"], 1, "add rules to it"),
        (&["vpc", "guard", "blue", "--limit", "bits=1"], 2, "give at least 1000"),
        (&["vpc", "guard", "blue", "--security-group", "red"], 4, "\"red\""),
        (&["vm", "run", "--vpc", "blue", "--security-group", "red"], 4, "\"red\""),
    ] {
        let (got, error) = failed(&world, words).await;
        assert_eq!(got, code, "{words:?}: {error}");
        assert!(error.contains(part), "{words:?}: {error}");
    }
}

#[tokio::test]
async fn a_guard_changes_where_it_is_told_to_and_microvms_may_have_their_own() {
    let world = World::new().await;
    let (h1, _p1) = (world.host("h1", 1).await, world.proxy("p1", 9).await);
    world.create_vpc("blue").await;
    let guard = ["vpc", "guard", "blue"];
    assert_eq!(
        done(&world, &guard).await,
        "SECURITY GROUPS  LIMITS  DEFAULT EGRESS  HITS\n-                none    allow           0\n"
    );
    done(&world, &["security-group", "create", "blue", "web"]).await;
    let flags = ["--default-egress", "deny", "--limit", "packets=20k,flows=9"];
    done(&world, &[&guard[..], &flags].concat()).await;
    done(&world, &[&guard[..], &["--security-group", "web"]].concat()).await;
    *h1.behaviour.hits.lock().unwrap() = vec![RuleHits { id: 0, hits: 5 }];
    assert_eq!(
        read(&world, &guard).await,
        json!({
            "security_groups": ["web"], "default_egress": "deny", "hits": 5,
            "limits": {
                "packets": 20000, "bits": null, "new_flows": null, "flows": 9, "ports": null,
            },
        })
    );
    let run = ["vm", "run", "--vpc", "blue", "--security-group", "web", "--limit", "ports=4"];
    let started = read(&world, &run).await;
    assert_eq!(started[0]["security_groups"], json!(["web"]));
    let start = world.log.all().into_iter().find_map(|(_, told)| match told {
        Told::Start(start) => Some(start),
        _ => None,
    });
    assert_eq!(start.unwrap().limits, Some(Limits { ports: 4, ..Limits::default() }));
    done(&world, &[&guard[..], &["--limit", "none"]].concat()).await;
    assert!(done(&world, &guard).await.contains("web              none    deny            5"));
}
