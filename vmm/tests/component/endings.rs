//! Calls that end badly: what their callers, the log and the host are told.

use std::time::Duration;

use super::caller::{Caller, request};
use super::common::{Host, kvm};
use super::{Function, stop};
use warren_vmm::client::MicroVm;
use warren_vmm::control::EndReason;

/// A microVM of its own for each ending, and who reads its log.
async fn begun(host: &Host, slot: u32) -> (MicroVm, Caller, Caller) {
    let microvm = host.running(slot).await;
    let caller = Caller::new(microvm.path()).await;
    let log = Caller::to(microvm.path(), 514).await;
    (microvm, caller, log)
}

/// The guest ended with this reason, and its log holds all of these.
async fn ended(mut microvm: MicroVm, mut log: Caller, reason: &str, names: &[&str]) {
    let mut lines = String::new();
    while let Ok(line) = log.line().await {
        lines.push_str(&line);
        lines.push('\n');
    }
    let first = format!(" {reason}: ");
    assert!(lines.starts_with("runtime ") && lines.contains(&first), "{lines}");
    for name in names {
        assert!(lines.contains(name), "no {name} in {lines}");
    }
    match microvm.ended().await {
        EndReason::Panic { message } => assert!(message.contains(reason), "{message}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn traps_are_errors_with_a_stack_and_end_the_microvm() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let stack = ["unreachable", "inner_of_the_trap", "outer_of_the_trap"];
    for (slot, how) in [(1, "trap"), (2, "trap-before-anything-was-sent")] {
        let (microvm, mut caller, log) = begun(&host, slot).await;
        let answer = caller.get(&format!("/endings?{how}")).await;
        answer.is_error(500, "trap");
        assert!(answer.text().contains("unreachable"), "{answer:?}");
        ended(microvm, log, "trap", &stack).await;
    }
    let (microvm, mut caller, log) = begun(&host, 3).await;
    caller.send(request("GET", "/endings?trap-in-answer", "")).await;
    assert_eq!(caller.head().await.unwrap().status, 200);
    assert_eq!(caller.chunk().await.unwrap(), b"a part");
    caller.chunk().await.unwrap_err();
    ended(microvm, log, "trap", &stack).await;

    let (microvm, mut caller, log) = begun(&host, 4).await;
    assert_eq!(caller.get("/endings?trap-after-answer").await.text(), "whole");
    ended(microvm, log, "trap", &stack).await;

    let (microvm, mut caller, log) = begun(&host, 5).await;
    caller.get("/endings?exit").await.is_error(500, "exit");
    ended(microvm, log, "exit", &["with status 1"]).await;

    let (microvm, mut caller, log) = begun(&host, 6).await;
    caller.get("/resources?20000").await.is_error(500, "trap");
    ended(microvm, log, "trap", &["resource table", "Fields"]).await;
}

/// As deep as there is a stack, in which the host's functions find room, and no deeper.
#[tokio::test]
async fn the_stack_ends_with_an_error() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let (microvm, mut caller, log) = begun(&host, 1).await;
    assert_eq!(caller.get("/endings?deep").await.text(), "3001");
    caller.get("/endings?stack-overflow").await.is_error(500, "stack-overflow");
    ended(microvm, log, "stack-overflow", &["descend"]).await;
}

#[tokio::test]
async fn memory_ends_where_it_was_said() {
    if !kvm() {
        return;
    }
    let function = Function::with(|manifest| manifest.memory_bytes = 16 << 20);
    let host = function.host().await;
    let (microvm, mut caller, _log) = begun(&host, 1).await;
    let pages: u32 = caller.get("/endings?memory").await.text().parse().unwrap();
    assert!((200..256).contains(&pages), "{pages}");
    // It is given out for good, and calls go on.
    assert_eq!(caller.get("/endings?memory").await.text(), "0");
    stop(microvm).await;
    let (microvm, mut caller, log) = begun(&host, 2).await;
    caller.get("/endings?memory-bomb").await.is_error(500, "trap");
    ended(microvm, log, "trap", &["unreachable"]).await;
}

#[tokio::test]
async fn calls_that_wait_too_long_are_ended() {
    if !kvm() {
        return;
    }
    let function = Function::with(|manifest| manifest.timeout_ms = 300);
    let host = function.host().await;
    let (microvm, mut caller, log) = begun(&host, 1).await;
    // Each call has the time.
    for _ in 0..5 {
        caller.get("/clocks?100").await;
    }
    caller.get("/endings?wait").await.is_error(504, "timeout");
    ended(microvm, log, "timeout", &["time is over"]).await;

    let (microvm, mut caller, log) = begun(&host, 2).await;
    caller.send(request("GET", "/endings?wait-in-answer", "")).await;
    caller.head().await.unwrap();
    assert_eq!(caller.chunk().await.unwrap(), b"a part");
    caller.chunk().await.unwrap_err();
    ended(microvm, log, "timeout", &[]).await;

    // A caller who sends no body, and one who takes no answer.
    let (microvm, mut caller, log) = begun(&host, 3).await;
    caller.send(request("POST", "/echo-body-first", "content-length: 5\r\n")).await;
    caller.answer().await.unwrap().is_error(504, "timeout");
    ended(microvm, log, "timeout", &[]).await;
    let (microvm, mut caller, log) = begun(&host, 4).await;
    caller.send(request("GET", "/zeroes?8000000", "")).await;
    ended(microvm, log, "timeout", &[]).await;
    caller.head().await.unwrap();
    while caller.chunk().await.is_ok_and(|chunk| !chunk.is_empty()) {}
}

#[tokio::test]
async fn a_loop_is_ended_by_the_watchdog() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = Host::with(|config| {
        config.sources = function.sources.clone();
        config.watchdog = Duration::from_millis(300);
    })
    .await;
    let neighbour = host.running(2).await;
    let (mut microvm, mut caller, _log) = begun(&host, 1).await;
    caller.send(request("GET", "/endings?loop", "")).await;
    let reason = microvm.ended().await;
    assert!(matches!(reason, EndReason::Watchdog { budget_ms: 300, .. }), "{reason:?}");
    caller.answer().await.unwrap_err();
    assert_eq!(Caller::new(neighbour.path()).await.get("/calls").await.text(), "1 1");
    stop(neighbour).await;
}
