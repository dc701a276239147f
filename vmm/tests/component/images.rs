//! Images of functions, and their clones.

use std::collections::BTreeSet;

use super::caller::{Caller, request};
use super::common::{Host, identity, kvm, tap};
use super::{Function, stop};
use warren_vmm::control::Tier;
use warren_vmm::snapshot::Sources;

/// How many clones draw random numbers.
const CLONES: u32 = 200;

/// No two calls, of one clone or of two, are ever given the same random bytes, however far the clones
/// were before they were released.
#[tokio::test]
async fn no_two_clones_share_a_random_number() {
    if !kvm() {
        return;
    }
    let mut seen = BTreeSet::new();
    let lazy = Function::new();
    let initialised = Function::with(|manifest| manifest.initialise = true);
    for function in [&lazy, &initialised] {
        let host = function.host().await;
        for slot in 0..CLONES / 2 {
            let tier = [Tier::Shell, Tier::Loaded, Tier::Parked][slot as usize % 3];
            let mut microvm = host.forked(slot, tap("w0").unwrap(), tier).await;
            microvm.advance(tier).await.unwrap();
            // They differ in nothing else.
            microvm.release(&identity(1)).await.unwrap();
            let mut caller = Caller::new(microvm.path()).await;
            for _ in 0..2 {
                seen.insert(caller.get("/random?32").await.body);
            }
            stop(microvm).await;
        }
    }
    assert_eq!(seen.len(), 2 * CLONES as usize);
    assert!(seen.iter().all(|bytes| bytes.len() == 64));
}

#[tokio::test]
async fn clones_see_nothing_of_each_other() {
    if !kvm() {
        return;
    }
    for initialise in [false, true] {
        let function = Function::with(|manifest| manifest.initialise = initialise);
        let host = function.host().await;
        let mut callers = Vec::new();
        for slot in 1..=3 {
            let microvm = host.running(slot).await;
            callers.push((Caller::new(microvm.path()).await, microvm));
        }
        for calls in 1..=3 {
            for (caller, microvm) in &mut callers {
                // Initialised once, in the image or in the clone.
                assert_eq!(caller.get("/calls").await.text(), format!("{calls} 1"));
                let name = format!("tmp/{}", microvm.slot());
                caller.get(&format!("/files/write?{name}=x")).await;
                assert_eq!(caller.get("/files/list?tmp").await.text(), &name[4..]);
            }
        }
        for (_, microvm) in callers {
            stop(microvm).await;
        }
    }
}

/// A clone of one that was saved in the middle of a call answers calls of its own, by its own clock.
#[tokio::test]
async fn clones_of_one_that_was_in_a_call_answer_their_own() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let mut microvm = host.running(1).await;
    let mut caller = Caller::new(microvm.path()).await;
    assert_eq!(caller.get("/calls").await.text(), "1 1");
    caller.send(request("GET", "/slowly?8", "")).await;
    caller.head().await.unwrap();
    assert_eq!(caller.chunk().await.unwrap(), b"piece 0\n");
    let diff = host.run_dir.path().join("diff");
    microvm.snapshot(&diff, None).await.unwrap();
    let branch = Host::with(|config| {
        config.sources = Sources { diff: Some(diff.clone()), ..function.sources.clone() };
    })
    .await;
    for slot in 2..=3 {
        let clone = branch.running(slot).await;
        let mut caller = Caller::new(clone.path()).await;
        assert_eq!(caller.get("/calls").await.text(), "2 1");
        let answer = caller.get("/clocks?30").await;
        let slept_ns: u64 = answer.text().split_once(' ').unwrap().1.parse().unwrap();
        assert!((30_000_000..60_000_000_000).contains(&slept_ns), "{slept_ns}");
        stop(clone).await;
    }
    for number in 1..8 {
        assert_eq!(caller.chunk().await.unwrap(), format!("piece {number}\n").as_bytes());
    }
    stop(microvm).await;
}

/// A microVM that is recycled has forgotten its calls, and is given other random numbers.
#[tokio::test]
async fn recycled_microvms_are_as_new() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let mut microvm = host.running(1).await;
    let mut seen = BTreeSet::new();
    for _ in 0..5 {
        let mut caller = Caller::new(microvm.path()).await;
        assert_eq!(caller.get("/calls").await.text(), "1 1");
        assert_eq!(caller.get("/files/list?tmp").await.text(), "");
        caller.get("/files/write?tmp/secret=x").await;
        seen.insert(caller.get("/random?32").await.body);
        microvm.recycle().await.unwrap();
        microvm.release(&identity(1)).await.unwrap();
    }
    assert_eq!(seen.len(), 5);
    stop(microvm).await;
}

/// What every clone of an image would have the same is given to none of them.
#[tokio::test]
async fn who_asks_for_what_is_a_clones_own_is_not_initialised_in_the_image() {
    if !kvm() {
        return;
    }
    let with = |what: &str, initialise| {
        let variable = ("INITIALISE".to_owned(), what.to_owned());
        Function::make(|manifest| {
            manifest.environment = vec![variable];
            manifest.initialise = initialise;
        })
    };
    for (what, named) in [
        ("random", "it asked for randomness while it was initialised"),
        ("monotonic-clock", "it asked for the clock while it was initialised"),
        ("wall-clock", "it asked for the clock while it was initialised"),
        ("wait", "it asked for the clock while it was initialised"),
        ("lookup", "it asked for the network while it was initialised"),
        ("trap", "unreachable"),
    ] {
        let Err(error) = with(what, true) else { panic!("{what}: an image was made") };
        assert!(error.contains(named), "{what}: {error}");
    }
    // In a clone it is given all of that.
    let function = with("random", false).unwrap();
    let host = function.host().await;
    let microvm = host.running(1).await;
    assert_eq!(Caller::new(microvm.path()).await.get("/calls").await.text(), "1 1");
    stop(microvm).await;
    // What it says while it is initialised is in each clone's log.
    let function = with("log", true).unwrap();
    let host = function.host().await;
    let microvm = host.running(1).await;
    let mut log = Caller::to(microvm.path(), 514).await;
    assert_eq!(log.line().await.unwrap(), "stdout 0 it initialises itself");
    stop(microvm).await;
}
