//! Clones of one template differ in everything that must differ.

mod common;

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use common::{Host, identity, kvm};
use warren_abi::probe::{IdentityReport, Operation, Outcome, Reply, Request, decode, encode};
use warren_vmm::client::{MicroVm, invoke};
use warren_vmm::control::{EndReason, State, Tier};

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
