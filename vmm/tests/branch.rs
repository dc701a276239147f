//! A microVM that runs is saved, goes on, and is cloned.

mod common;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Host, identity, kvm, tap};
use tempfile::TempDir;
use warren_abi::probe::{
    Endpoint, IdentityReport, Operation, Outcome, Reply, Request, decode, encode,
};
use warren_vmm::client::{ClientError, Invocation, MicroVm, Zygote, invoke};
use warren_vmm::control::{EndReason, Refusal, State, Tier};

const GUEST: &str = "warren-guest";

async fn probe(microvm: &MicroVm, operation: Operation) -> Outcome {
    let request = encode(&Request { operation, timeout_ms: 1000 });
    let reply = invoke(microvm.path(), &request, Duration::from_secs(10)).await.unwrap();
    decode::<Reply>(&reply).unwrap().outcome.unwrap()
}

async fn remember(microvm: &MicroVm, what: &[u8]) {
    let operation = Operation::Remember { bytes: what.to_vec() };
    assert_eq!(probe(microvm, operation).await, Outcome::Done);
}

async fn recall(microvm: &MicroVm) -> Vec<u8> {
    match probe(microvm, Operation::Recall).await {
        Outcome::Recalled(bytes) => bytes,
        other => panic!("{other:?}"),
    }
}

async fn report(microvm: &MicroVm) -> IdentityReport {
    match probe(microvm, Operation::Identity).await {
        Outcome::Identity(report) => report,
        other => panic!("{other:?}"),
    }
}

/// A host with a diff of its microVM in slot 1, which remembers something.
struct Origin {
    host: Host,
    microvm: MicroVm,
    directory: TempDir,
}

impl Origin {
    async fn new(what: &[u8]) -> Self {
        let host = Host::new(GUEST).await;
        let microvm = host.running(1).await;
        remember(&microvm, what).await;
        let directory = tempfile::tempdir().unwrap();
        let mut origin = Self { host, microvm, directory };
        origin.save().await;
        origin
    }

    async fn save(&mut self) {
        let diff = self.diff();
        let bytes = self.microvm.snapshot(&diff, None).await.unwrap();
        assert_eq!(std::fs::metadata(&diff).unwrap().len(), bytes);
    }

    fn diff(&self) -> PathBuf {
        self.directory.path().join("diff")
    }

    /// A zygote of the diff.
    async fn branch(&self) -> Host {
        self.branch_of(&self.diff()).await
    }

    async fn branch_of(&self, diff: &Path) -> Host {
        Host::with(|config| {
            config.sources = self.host.config.sources.clone();
            config.sources.diff = Some(diff.to_owned());
        })
        .await
    }

    async fn end(mut self) {
        assert_eq!(self.microvm.stop().await.unwrap(), EndReason::Stopped);
    }
}

#[tokio::test]
async fn eight_clones_recall_what_the_running_one_remembered_and_are_somebody_else() {
    if !kvm() {
        return;
    }
    let state: Vec<u8> = (0..200_000u32).map(|n| (n % 253) as u8).collect();
    let mut origin = Origin::new(&state).await;
    let own = report(&origin.microvm).await;
    assert_eq!(recall(&origin.microvm).await, state);
    // No more than what it wrote.
    assert!(std::fs::metadata(origin.diff()).unwrap().len() < 2 << 20);

    let branch = origin.branch().await;
    remember(&origin.microvm, b"later").await;
    let mut seen = HashSet::from([own.random.to_vec(), own.mac.to_vec(), own.ipv4.to_vec()]);
    let mut clones = Vec::new();
    for slot in 11..19 {
        // From each tier.
        let tier = [Tier::Shell, Tier::Loaded, Tier::Parked][slot as usize % 3];
        let mut clone = branch.forked(slot, tap("w0").unwrap(), tier).await;
        if slot % 2 == 0 {
            clone.advance(tier).await.unwrap();
        }
        clone.release(&identity(slot)).await.unwrap();
        clones.push(clone);
    }
    for clone in &clones {
        let (report, expected) = (report(clone).await, identity(clone.slot()).identity);
        assert_eq!((report.mac, report.ipv4), (expected.mac, expected.ipv4));
        assert_eq!(report.hostname, expected.hostname);
        assert_eq!(report.instance_id, expected.instance_id);
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        let clock = Duration::from_nanos(report.wall_clock_ns);
        assert!(now.abs_diff(clock) < Duration::from_secs(5), "{clock:?} is not {now:?}");
        for what in [report.random.to_vec(), report.mac.to_vec(), report.ipv4.to_vec()] {
            assert!(seen.insert(what), "slot {}", clone.slot());
        }
        assert!(recall(clone).await == state, "slot {}", clone.slot());
        // What one of them does no other sees.
        remember(clone, expected.hostname.as_bytes()).await;
    }
    for mut clone in clones {
        assert_eq!(recall(&clone).await, identity(clone.slot()).identity.hostname.as_bytes());
        assert_eq!(clone.stop().await.unwrap(), EndReason::Stopped);
    }
    assert_eq!(recall(&origin.microvm).await, b"later");
    assert_eq!(report(&origin.microvm).await.random, own.random);
    let status = origin.microvm.status().await.unwrap();
    assert_eq!((status.state, status.identity), (State::Running, Some(identity(1).identity)));
    origin.end().await;
}

#[tokio::test]
async fn a_clone_is_saved_as_its_origin_was_and_recycled_to_what_it_began_with() {
    if !kvm() {
        return;
    }
    let origin = Origin::new(b"first").await;
    let branch = origin.branch().await;
    let mut clone = branch.running(2).await;
    let second = origin.directory.path().join("second");
    // Also if it has changed nothing since; then another one, over it.
    clone.snapshot(&second, None).await.unwrap();
    remember(&clone, b"second").await;
    clone.snapshot(&second, None).await.unwrap();
    clone.recycle().await.unwrap();
    clone.release(&identity(3)).await.unwrap();
    assert_eq!(recall(&clone).await, b"first");
    assert_eq!(report(&clone).await.hostname, identity(3).identity.hostname);

    let branch_of_branch = origin.branch_of(&second).await;
    let mut grandchild = branch_of_branch.running(4).await;
    assert_eq!(recall(&grandchild).await, b"second");
    let reports = [report(&clone).await, report(&grandchild).await];
    assert_ne!(reports[0].random, reports[1].random);
    assert_eq!(reports[1].hostname, identity(4).identity.hostname);
    for microvm in [&mut clone, &mut grandchild] {
        assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
    }
    origin.end().await;
}

/// In the middle of a call, and with connections open: they are the former one's.
#[tokio::test]
async fn a_clone_has_no_calls_and_connections_of_the_former_one() {
    if !kvm() {
        return;
    }
    let mut origin = Origin::new(b"state").await;
    let recalling = encode(&Request { operation: Operation::Recall, timeout_ms: 1000 });
    let is_recalled = |reply: &[u8]| {
        let reply = decode::<Reply>(reply).unwrap();
        assert_eq!(reply.outcome, Ok(Outcome::Recalled(b"state".to_vec())));
    };
    let mut open = Invocation::connect(origin.microvm.path()).await.unwrap();
    is_recalled(&open.call(&recalling).await.unwrap());
    origin.save().await;
    is_recalled(&open.call(&recalling).await.unwrap());

    // Nobody answers: the call lasts until its deadline.
    let connecting = Operation::TcpConnect { to: Endpoint { address: [10, 0, 0, 9], port: 80 } };
    let connecting = encode(&Request { operation: connecting, timeout_ms: 120_000 });
    let call = tokio::spawn(async move { open.call(&connecting).await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    origin.save().await;

    let branch = origin.branch().await;
    let mut clone = branch.running(2).await;
    // Long before that deadline, and not with the answer to the other's call.
    let mut first = Invocation::connect(clone.path()).await.unwrap();
    for _ in 0..3 {
        let reply = tokio::time::timeout(Duration::from_mins(1), first.call(&recalling));
        is_recalled(&reply.await.unwrap().unwrap());
    }
    assert_eq!(clone.stop().await.unwrap(), EndReason::Stopped);
    assert!(!call.is_finished());
    origin.end().await;
}

#[tokio::test]
async fn what_does_not_run_is_not_saved_and_a_client_that_is_gone_harms_nobody() {
    use tokio::io::AsyncWriteExt;
    use warren_vmm::control::{CONTROL_LINE, Request, encode_frame};
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    let mut microvm = host.parked(1).await;
    let diff = host.run_dir.path().join("diff");
    let refused = microvm.snapshot(&diff, None).await;
    assert!(matches!(refused, Err(ClientError::Refused(Refusal::NotReleased))), "{refused:?}");
    microvm.release(&identity(1)).await.unwrap();
    let much = vec![7; 500_000];
    remember(&microvm, &much).await;
    // One goes away, one does not read.
    let mut silent = Vec::new();
    for stays in [false, true] {
        let mut stream = tokio::net::UnixStream::connect(microvm.path()).await.unwrap();
        let message = [CONTROL_LINE, &encode_frame(&Request::Snapshot)].concat();
        stream.write_all(&message).await.unwrap();
        if stays {
            silent.push(stream);
        }
    }
    assert!(recall(&microvm).await == much);
    let nowhere = host.run_dir.path().join("no/diff");
    let refused = microvm.snapshot(&nowhere, None).await;
    assert!(matches!(refused, Err(ClientError::Snapshot(_))), "{refused:?}");
    microvm.snapshot(&diff, None).await.unwrap();
    assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
}

/// The zygote refuses, and says what is wrong with which file.
#[tokio::test]
async fn diffs_that_do_not_fit_are_refused() {
    if !kvm() {
        return;
    }
    let mut origin = Origin::new(b"state").await;
    let (good, path) = (std::fs::read(origin.diff()).unwrap(), origin.directory.path());
    let key = path.join("key");
    std::fs::write(&key, [9; 32]).unwrap();
    let encrypted = path.join("encrypted");
    origin.microvm.snapshot(&encrypted, Some(&key)).await.unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = path.join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let refuse = async |template: &Path, diff: &Path, complaint: &str| {
        let mut config = origin.host.config.clone();
        config.sources.template = template.to_owned();
        config.sources.diff = Some(diff.to_owned());
        let Err(ClientError::Zygote(error)) = Zygote::spawn(&config).await else {
            panic!("{} was taken", diff.display());
        };
        assert!(error.contains(complaint), "{error}");
        assert!(error.contains(diff.to_str().unwrap()), "{error}");
    };
    let template = origin.host.config.sources.template.clone();
    for length in [1, 11, 60, 4000, good.len() / 2, good.len() - 1] {
        let what = if length < 8 { "not a diff" } else { "truncated or damaged" };
        refuse(&template, &file("truncated", &good[..length]), what).await;
    }
    for at in [57, 100, 3000, good.len() / 2, good.len() - 1] {
        let mut flipped = good.clone();
        flipped[at] ^= 4;
        refuse(&template, &file("flipped", &flipped), "wrong checksum").await;
    }
    refuse(&template, &template, "not a diff").await;
    refuse(&template, &encrypted, "--key").await;
    let other = common::config("warren-guest-hostile", origin.host.run_dir.path());
    let other = other.sources.template;
    refuse(&other, &origin.diff(), other.to_str().unwrap()).await;
    refuse(&other, &origin.diff(), "a diff against another template").await;
    origin.end().await;
}

#[tokio::test]
async fn with_a_key_template_and_diff_are_encrypted() {
    if !kvm() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    let key = files.path().join("key");
    std::fs::write(&key, [5; 32]).unwrap();
    let diff = files.path().join("diff");
    let host = Host::with(|config| {
        config.sources.template = files.path().join("template");
        config.sources.key = Some(key.clone());
        common::make_template(GUEST, &config.sources);
    })
    .await;
    let mut microvm = host.running(1).await;
    remember(&microvm, b"nobody shall read this").await;
    microvm.snapshot(&diff, Some(&key)).await.unwrap();
    let secret = b"nobody shall read this";
    assert!(!std::fs::read(&diff).unwrap().windows(secret.len()).any(|bytes| bytes == secret));
    let branch = Host::with(|config| {
        config.sources = host.config.sources.clone();
        config.sources.diff = Some(diff.clone());
    })
    .await;
    let mut clone = branch.running(2).await;
    assert_eq!(recall(&clone).await, secret);
    for microvm in [&mut microvm, &mut clone] {
        assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
    }
}
