//! Clones of one template differ in everything that must differ.

mod common;

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use common::{Host, identity, kvm, tap};
use warren_abi::probe::{IdentityReport, Operation, Outcome, Reply, Request, decode, encode};
use warren_vmm::client::{ClientError, Invocation, MicroVm, invoke};
use warren_vmm::control::{EndReason, Refusal, ReleaseRequest, State, Tier};

async fn report(microvm: &MicroVm) -> IdentityReport {
    let request = encode(&Request { operation: Operation::Identity, timeout_ms: 1000 });
    let reply = invoke(microvm.path(), &request, Duration::from_secs(10)).await.unwrap();
    match decode::<Reply>(&reply).unwrap().outcome {
        Ok(Outcome::Identity(report)) => report,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn sixty_four_clones_have_sixty_four_identities_and_random_streams() {
    if !kvm() {
        return;
    }
    let host = Host::new("warren-guest").await;
    let mut clones = Vec::new();
    for slot in 0..64 {
        clones.push(host.parked(slot).await);
    }
    let mut random = HashSet::new();
    for (slot, clone) in (0..).zip(&mut clones) {
        let before = clone.status().await.unwrap();
        assert_eq!((before.state, before.identity), (State::Pooled(Tier::Parked), None));
        let expected = identity(slot);
        clone.release(&expected).await.unwrap();
        let status = clone.status().await.unwrap();
        assert_eq!(status.state, State::Running);
        assert_eq!(status.identity.as_ref(), Some(&expected.identity));
        assert_eq!(status.tag, expected.tag);
        assert_eq!(status.pid, clone.pid());

        let report = report(clone).await;
        assert_eq!(report.mac, expected.identity.mac);
        assert_eq!(report.ipv4, expected.identity.ipv4);
        assert_eq!(report.hostname, expected.identity.hostname);
        assert_eq!(report.instance_id, expected.identity.instance_id);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let clock = Duration::from_nanos(report.wall_clock_ns);
        assert!(now.abs_diff(clock) < Duration::from_secs(5), "{clock:?} is not {now:?}");
        assert!(random.insert(report.random), "slot {slot} repeats another's random stream");
        let halves: [[u8; 16]; 2] =
            [report.random[..16].try_into().unwrap(), report.random[16..].try_into().unwrap()];
        assert_ne!(halves[0], halves[1]);
    }
    for mut clone in clones {
        assert_eq!(clone.stop().await.unwrap(), EndReason::Stopped);
    }
}

/// Even if two clones are told to be the same: entropy is the VMM's to give.
#[tokio::test]
async fn the_same_identity_twice_draws_different_random_bytes() {
    if !kvm() {
        return;
    }
    let host = Host::new("warren-guest").await;
    let mut reports = Vec::new();
    for slot in [1, 2] {
        let mut clone = host.parked(slot).await;
        clone.release(&identity(7)).await.unwrap();
        reports.push(report(&clone).await);
        assert_eq!(clone.stop().await.unwrap(), EndReason::Stopped);
    }
    assert_eq!(reports[0].mac, reports[1].mac);
    assert_ne!(reports[0].random, reports[1].random);
}

/// What must differ, and what a clone says of its clock.
async fn note(clone: &MicroVm, slot: u32, seen: &mut HashSet<Vec<u8>>) {
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let before = now();
    let report = report(clone).await;
    let after = now();
    let clock = Duration::from_nanos(report.wall_clock_ns);
    let millisecond = Duration::from_millis(1);
    assert!(
        before <= clock + millisecond && clock <= after + millisecond,
        "slot {slot}: {clock:?} is not within 1 ms of {before:?} to {after:?}"
    );
    let unique: [&[u8]; 5] = [
        &report.random,
        &report.instance_id,
        report.hostname.as_bytes(),
        &report.mac,
        &report.ipv4,
    ];
    for what in unique {
        assert!(seen.insert(what.to_vec()), "slot {slot}: {what:?} is another's, too");
    }
}

/// The identity of the Nth clone.
fn nth(number: u32) -> ReleaseRequest {
    let mut request = identity(number);
    request.identity.instance_id = u128::from(number).to_be_bytes();
    request
}

#[tokio::test]
async fn of_four_thousand_clones_and_a_thousand_recycled_no_two_are_alike() {
    const AT_ONCE: u32 = 100;
    const CLONES: u32 = 4000;
    if !kvm() {
        return;
    }
    let host = Host::new("warren-guest").await;
    let taps: Vec<_> = (0..AT_ONCE).map(|_| tap("w0").unwrap()).collect();
    let mut seen = HashSet::new();
    let mut recycled = CLONES;
    for wave in 0..CLONES / AT_ONCE {
        let mut clones = Vec::new();
        for (slot, tap) in (0..).zip(&taps) {
            // From each tier.
            let tier = [Tier::Shell, Tier::Loaded, Tier::Parked][slot as usize % 3];
            clones.push(host.forked(slot, tap.try_clone().unwrap(), tier).await);
        }
        for (slot, clone) in (0..).zip(&mut clones) {
            clone.release(&nth(wave * AT_ONCE + slot)).await.unwrap();
        }
        for (slot, mut clone) in (0..).zip(clones) {
            note(&clone, slot, &mut seen).await;
            if slot % 4 == 0 {
                let status = clone.recycle().await.unwrap();
                assert_eq!((status.state, status.identity), (State::Pooled(Tier::Parked), None));
                clone.release(&nth(recycled)).await.unwrap();
                note(&clone, slot, &mut seen).await;
                recycled += 1;
            }
            assert_eq!(clone.stop().await.unwrap(), EndReason::Stopped);
        }
    }
    assert_eq!(recycled, 5000);
}

#[tokio::test]
async fn a_recycled_clone_knows_nothing_of_its_calls_and_can_be_called() {
    if !kvm() {
        return;
    }
    let host = Host::new("warren-guest").await;
    let mut clone = host.parked(1).await;
    let refused = clone.recycle().await;
    assert!(matches!(refused, Err(ClientError::Refused(Refusal::NotReleased))), "{refused:?}");
    clone.release(&identity(1)).await.unwrap();
    let request = encode(&Request { operation: Operation::Identity, timeout_ms: 1000 });
    let mut call = Invocation::connect(clone.path()).await.unwrap();
    call.call(&request).await.unwrap();
    clone.recycle().await.unwrap();
    // A call of the former life's ends with it.
    assert!(matches!(call.call(&request).await, Err(ClientError::ChannelClosed)));
    clone.release(&identity(2)).await.unwrap();
    assert_eq!(report(&clone).await.hostname, identity(2).identity.hostname);
    assert_eq!(clone.stop().await.unwrap(), EndReason::Stopped);
}
