//! What a function has besides calls: environment, files, clocks, randomness, a log.

use std::time::{SystemTime, UNIX_EPOCH};

use super::caller::Caller;
use super::common::kvm;
use super::{Function, stop};

#[tokio::test]
async fn environment_and_files_are_the_packages() {
    if !kvm() {
        return;
    }
    let function = Function::with(|manifest| {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        manifest.environment = vec![pair("A", "b c"), pair("ÄÖ", ""), pair("A2", "=")];
    });
    let host = function.host().await;
    let microvm = host.running(1).await;
    let mut caller = Caller::new(microvm.path()).await;
    assert_eq!(caller.get("/environment").await.text(), "A=b c\nÄÖ=\nA2==\n");
    let manifest = std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/component/Cargo.toml"
    ));
    assert_eq!(caller.get("/files/read?data/manifest").await.text(), manifest.unwrap());
    for (target, said) in [
        ("list?.", "data/ tmp/"),
        ("list?data", "deep/ manifest"),
        ("list?data/deep/../../tmp", ""),
        ("stat?data", "true 0"),
        ("read?data/nothing", "no-entry"),
        ("read?data/manifest/x", "not-directory"),
        ("read?data", "is-directory"),
        ("list?data/manifest", "not-directory"),
        // There is nothing outside.
        ("read?../etc/passwd", "not-permitted"),
        ("read?data/../../data/manifest", "not-permitted"),
        ("read?/data/manifest", "not-permitted"),
        ("write?../x=1", "not-permitted"),
        ("write?tmp/../../x=1", "not-permitted"),
        ("rename?data/manifest=../x", "not-permitted"),
        ("unlink?tmp/../../data/manifest", "not-permitted"),
        // What is the package's stays as it is.
        ("write?data/manifest=1", "read-only"),
        ("write?new=1", "read-only"),
        ("unlink?data/manifest", "read-only"),
        ("rename?data/manifest=tmp/x", "read-only"),
        ("mkdir?data/x", "read-only"),
        // What is in /tmp is the function's.
        ("write?tmp/a=hello", "6 bytes"),
        ("read?tmp/a", "hello!"),
        ("write?tmp/a=x", "2 bytes"),
        ("rename?tmp/a=tmp/b", "renamed"),
        ("read?tmp/a", "no-entry"),
        ("mkdir?tmp/d", "made"),
        ("mkdir?tmp/d", "exist"),
        ("rename?tmp/b=tmp/d/c", "renamed"),
        ("read?tmp/d/c", "x!"),
        ("list?tmp", "d/"),
        ("rename?tmp/d=tmp/d/e", "invalid"),
        ("rmdir?tmp/d", "not-empty"),
        ("unlink?tmp/d", "is-directory"),
        ("rmdir?tmp/d/c", "not-directory"),
        ("unlink?tmp/d/c", "unlinked"),
        ("rmdir?tmp/d", "removed"),
        ("list?tmp", ""),
    ] {
        assert_eq!(caller.get(&format!("/files/{target}")).await.text(), said, "{target}");
    }
    stop(microvm).await;
}

/// Files have room, and no more; what is removed leaves its room to others.
#[tokio::test]
async fn files_have_no_more_room_than_there_is() {
    if !kvm() {
        return;
    }
    let function = Function::with(|manifest| manifest.memory_bytes = 32 << 20);
    let host = function.host().await;
    let microvm = host.running(1).await;
    let mut caller = Caller::new(microvm.path()).await;
    for _ in 0..3 {
        let said = caller.get("/files/fill?tmp/all").await;
        let (kib, error) = said.text().split_once(' ').unwrap();
        assert_eq!(error, "insufficient-space");
        assert!((1024..=8192).contains(&kib.parse::<u32>().unwrap()), "{kib} KiB");
        assert_eq!(caller.get("/files/write?tmp/more=").await.text(), "the stream broke");
        assert_eq!(caller.get("/files/unlink?tmp/all").await.text(), "unlinked");
        assert_eq!(caller.get("/files/write?tmp/more=").await.text(), "1 bytes");
        assert_eq!(caller.get("/files/unlink?tmp/more").await.text(), "unlinked");
    }
    stop(microvm).await;
}

#[tokio::test]
async fn clocks_go_and_random_bytes_differ() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let microvm = host.running(1).await;
    let mut caller = Caller::new(microvm.path()).await;
    let seconds = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let before = seconds();
    let answer = caller.get("/clocks?30").await;
    let (wall, slept_ns) = answer.text().split_once(' ').unwrap();
    assert!((before..=seconds()).contains(&wall.parse().unwrap()), "{wall}");
    assert!(slept_ns.parse::<u64>().unwrap() >= 30_000_000, "{slept_ns}");
    let one = caller.get("/random?1000").await;
    let other = caller.get("/random?1000").await;
    assert_eq!(one.body.len(), 2000);
    assert_ne!(one.body, other.body);
    // Each of them a value that the generator seldom gives.
    let distinct: std::collections::BTreeSet<_> = one.body.chunks(2).collect();
    assert!(distinct.len() > 200, "{}", distinct.len());
    assert_eq!(caller.get("/resources?10000").await.text(), "held 10000");
    assert_eq!(caller.get("/resources?10000").await.text(), "held 10000");
    stop(microvm).await;
}

/// Lines of both streams, those from before somebody listened, and a line without an end with the next.
#[tokio::test]
async fn what_is_written_to_the_standard_streams_is_in_the_log() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let microvm = host.running(1).await;
    let mut caller = Caller::new(microvm.path()).await;
    caller.get("/log?early").await;
    let mut log = Caller::to(microvm.path(), 514).await;
    let mut lines = Vec::new();
    caller.get("/log?late").await;
    for _ in 0..4 {
        let line = log.line().await.unwrap();
        let [stream, time, text] = line.splitn(3, ' ').collect::<Vec<_>>().try_into().unwrap();
        // After 2020.
        assert!(time.parse::<u64>().unwrap() > 1_577_836_800_000_000_000, "{time}");
        lines.push(format!("{stream} {text}"));
    }
    let all = [
        "stdout out early",
        "stderr err early",
        "stdout out late",
        "stderr no end of lineerr late",
    ];
    assert_eq!(lines, all);
    stop(microvm).await;
}
