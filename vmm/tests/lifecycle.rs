//! The client, the zygote and the life of a microVM.

mod common;

use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::Duration;

use common::{Host, config, identity, kvm, tap};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use warren_vmm::client::{ClientError, Invocation, MicroVm, Zygote, discover, invoke};
use warren_vmm::control::{EndReason, Refusal, State, Tier, socket_path};

const GUEST: &str = "warren-guest-hostile";

#[tokio::test]
async fn release_happens_once() {
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    let mut microvm = host.parked(1).await;
    let ready = microvm.release(&identity(1)).await.unwrap();
    assert!(ready.received_ns <= ready.released_ns && ready.released_ns < ready.ready_ns);
    let again = microvm.release(&identity(2)).await;
    assert!(matches!(again, Err(ClientError::Refused(Refusal::AlreadyReleased))), "{again:?}");
    let (_other, status) = MicroVm::connect(host.run_dir.path(), 1).await.unwrap();
    assert_eq!(status.identity, Some(identity(1).identity));
    assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
}

#[tokio::test]
async fn impossible_identities_are_refused_and_change_nothing() {
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    let mut microvm = host.parked(1).await;
    let edits: [fn(&mut warren_vmm::control::ReleaseRequest); 6] = [
        |request| request.identity.hostname = "x".repeat(65),
        |request| request.identity.hostname = "a\0b".to_owned(),
        |request| request.identity.mac = [1, 0, 0x5e, 0, 0, 1],
        |request| request.identity.mtu = 100,
        |request| request.identity.ipv4 = [0; 4],
        |request| request.tag = vec![0; 5000],
    ];
    for edit in edits {
        let mut request = identity(1);
        edit(&mut request);
        let refused = microvm.release(&request).await;
        assert!(matches!(refused, Err(ClientError::Refused(Refusal::Identity(_)))), "{refused:?}");
        assert_eq!(microvm.status().await.unwrap().state, State::Pooled(Tier::Parked));
    }
    microvm.release(&identity(1)).await.unwrap();
    assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
}

#[tokio::test]
async fn slot_has_one_microvm_and_is_free_when_it_ended() {
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    let mut first = host.parked(5).await;
    let refused = host.zygote.fork(5, tap("w0").unwrap(), Tier::Shell).await;
    let Err(ClientError::Zygote(error)) = refused else { panic!("{refused:?}") };
    assert!(error.contains("slot 5") && error.contains("stop it first"), "{error}");
    // The TAP too is free as soon as the end is known: it can be attached to again.
    assert_eq!(first.stop().await.unwrap(), EndReason::Stopped);
    assert!(UnixStream::connect(socket_path(host.run_dir.path(), 5)).is_err());
    let mut second = host.parked(5).await;
    assert_ne!(second.pid(), first.pid());
    assert_eq!(second.stop().await.unwrap(), EndReason::Stopped);
}

/// The end of a microVM takes its time after its slot is free: the next one does not feel it.
#[tokio::test]
async fn a_slot_is_used_again_and_again_at_once() {
    if !kvm() {
        return;
    }
    let host = Host::new("warren-guest").await;
    let tap = tap("w0").unwrap();
    for turn in 0..200 {
        let tier = if turn % 2 == 0 { Tier::Shell } else { Tier::Parked };
        let mut microvm = host.forked(5, tap.try_clone().unwrap(), tier).await;
        microvm.release(&identity(5)).await.unwrap();
        assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
    }
}

#[tokio::test]
async fn socket_of_a_dead_process_is_replaced() {
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    drop(UnixListener::bind(socket_path(host.run_dir.path(), 3)).unwrap());
    assert!(socket_path(host.run_dir.path(), 3).exists());
    let reason = host.parked(3).await.stop().await.unwrap();
    assert_eq!(reason, EndReason::Stopped);
}

#[tokio::test]
async fn killed_microvm_is_noticed_and_its_socket_goes() {
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    let mut microvm = host.running(1).await;
    kill(Pid::from_raw(microvm.pid()), Signal::SIGKILL).unwrap();
    assert_eq!(microvm.ended().await, EndReason::Lost);
    // The next one in the slot needs no cleaning up by anybody.
    let reason = host.parked(1).await.stop().await.unwrap();
    assert_eq!(reason, EndReason::Stopped);
}

#[tokio::test]
async fn microvms_outlive_their_zygote_and_are_found_again() {
    if !kvm() {
        return;
    }
    let mut host = Host::new(GUEST).await;
    let run_dir = host.run_dir.path().to_owned();
    let parked = host.parked(1).await;
    let running = host.running(2).await;
    let mut doomed = host.running(3).await;
    let before = (parked.pid(), running.pid());
    let zygote = Pid::from_raw(host.zygote.pid().unwrap() as i32);
    host.replace_zygote(GUEST).await;
    drop((parked, running));
    // A zygote ends when its client is gone; whether it was reaped does not matter here.
    for _ in 0..500 {
        let state = std::fs::read_to_string(format!("/proc/{zygote}/stat")).unwrap_or_default();
        if state.is_empty() || state.contains(") Z") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    kill(Pid::from_raw(doomed.pid()), Signal::SIGKILL).unwrap();
    assert_eq!(doomed.ended().await, EndReason::Lost);
    std::fs::write(run_dir.join("vm-x.sock"), "not ours").unwrap();

    let mut found = discover(&run_dir).await.unwrap();
    let states: Vec<_> = found.iter().map(|(vm, status)| (vm.slot(), status.state)).collect();
    assert_eq!(states, [(1, State::Pooled(Tier::Parked)), (2, State::Running)]);
    assert_eq!((found[0].0.pid(), found[1].0.pid()), before);
    assert_eq!(found[1].1.tag, identity(2).tag);
    // The next zygote is of the same template.
    assert_eq!(found[0].0.make().await.unwrap(), host.zygote.make());
    assert!(!socket_path(&run_dir, 3).exists());
    assert!(run_dir.join("vm-x.sock").exists());
    for (microvm, _) in &mut found {
        if microvm.slot() == 1 {
            microvm.release(&identity(1)).await.unwrap();
        }
        let echo = invoke(microvm.path(), b"still here", Duration::from_secs(5)).await.unwrap();
        assert_eq!(echo, b"still here");
        assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
    }
    assert!(discover(&run_dir).await.unwrap().is_empty());
}

#[tokio::test]
async fn microvms_say_which_template_they_are_of() {
    if !kvm() {
        return;
    }
    let mut host = Host::new(GUEST).await;
    let mut microvms = [host.parked(1).await, host.running(2).await];
    host.replace_zygote("warren-guest").await;
    let mut other = host.parked(3).await;
    assert_eq!(other.make().await.unwrap(), host.zygote.make());
    for microvm in &mut microvms {
        assert_ne!(microvm.make().await.unwrap(), host.zygote.make());
        microvm.stop().await.unwrap();
    }
    other.stop().await.unwrap();
}

#[tokio::test]
async fn calls_of_any_length_arrive_whole_on_several_connections() {
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    let mut microvm = host.running(1).await;
    let mut tasks = Vec::new();
    for connection in 0..8u8 {
        let path = microvm.path().to_owned();
        tasks.push(tokio::spawn(async move {
            let mut invocation = Invocation::connect(&path).await.unwrap();
            for length in [0, 1, 100, 4052, 4053, 16 * 1024, 70_000, 1 << 20] {
                let request: Vec<u8> =
                    (0..length).map(|n| (n as u8).wrapping_mul(31) ^ connection).collect();
                assert!(invocation.call(&request).await.unwrap() == request, "{length} bytes");
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let too_long = vec![0; (1 << 20) + 1];
    let refused = invoke(microvm.path(), &too_long, Duration::from_secs(1)).await;
    assert!(matches!(refused, Err(ClientError::TooLong(_))));
    assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
}

/// Whoever connects and says nothing, or nonsense, does not keep others away.
#[tokio::test]
async fn bad_clients_harm_nobody() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    let mut microvm = host.running(1).await;
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(tokio::net::UnixStream::connect(microvm.path()).await.unwrap());
    }
    let nonsense: [&[u8]; 6] = [
        b"HELLO\n",
        b"CONNECT x\n",
        b"CONTROL\n\xff\xff\xff\xff",
        b"CONTROL\n\x02\x00\x00\x00\x77\x77",
        &[b'x'; 4096],
        b"CONNECT 9\n",
    ];
    for line in nonsense {
        let mut stream = tokio::net::UnixStream::connect(microvm.path()).await.unwrap();
        let _ = stream.write_all(line).await;
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest));
        assert!(closed.await.is_ok(), "{}", String::from_utf8_lossy(line));
    }
    let echo = invoke(microvm.path(), b"fine", Duration::from_secs(5)).await.unwrap();
    assert_eq!(echo, b"fine");
    assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
}

/// The file is refused by the process that would map it, and the client hears why.
#[tokio::test]
async fn damaged_template_is_refused_with_its_name_and_the_remedy() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let good = config(GUEST, directory.path());
    let bytes = std::fs::read(&good.sources.template).unwrap();
    let mut flipped = bytes.clone();
    flipped[bytes.len() / 2] ^= 0x10;
    let mut other_version = bytes.clone();
    other_version[8] += 1;
    let cases = [
        ("truncated", &bytes[..bytes.len() - 1], "truncated or damaged"),
        ("flipped", &flipped, "wrong checksum"),
        ("version", &other_version, "template of format 5, this warren-vmm takes 3 to 4"),
        ("empty", &[], "not a template"),
    ];
    for (name, content, complaint) in cases {
        let path = directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        let mut config = good.clone();
        config.sources.template.clone_from(&path);
        let Err(ClientError::Zygote(error)) = Zygote::spawn(&config).await else {
            panic!("{name} was taken");
        };
        assert!(error.contains(complaint), "{error}");
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn what_is_no_guest_makes_no_template() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let make = |guest: &std::path::Path, memory: &str| {
        let result = Command::new(common::vmm())
            .args(["template", "--memory", memory, "--guest"])
            .arg(guest)
            .arg("--output")
            .arg(&output)
            .output()
            .unwrap();
        assert!(!result.status.success());
        String::from_utf8(result.stderr).unwrap()
    };
    let text = directory.path().join("text");
    std::fs::write(&text, "no program").unwrap();
    assert!(make(&text, "8").contains("not a static x86-64 ELF executable"));
    assert!(make(&common::guest(GUEST), "4").contains("raise --memory"));
    assert!(make(&common::guest(GUEST), "7").contains("multiple of 2 MiB"));
    assert!(make(&common::vmm(), "64").contains("not a static x86-64 ELF executable"));
    assert!(!output.exists());
}

/// A template that `--key` encrypted is cloned with the key, and with nothing else.
#[tokio::test]
async fn encrypted_template_is_cloned_with_its_key_only() {
    if !kvm() {
        return;
    }
    let host = Host::with(|config| {
        for name in ["key", "other"] {
            std::fs::write(config.run_dir.join(name), blake3::hash(name.as_bytes()).as_bytes())
                .unwrap();
        }
        let sources = &mut config.sources;
        sources.template = config.run_dir.join("encrypted");
        sources.key = Some(config.run_dir.join("key"));
        common::make_template(GUEST, sources);
    })
    .await;
    let mut microvm = host.running(1).await;
    let echo = invoke(microvm.path(), b"opened", Duration::from_secs(5)).await.unwrap();
    assert_eq!(echo, b"opened");
    assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);

    let plain = config(GUEST, host.run_dir.path()).sources.template;
    let encrypted = &host.config.sources.template;
    let key = |name: &str| Some(host.run_dir.path().join(name));
    let cases = [
        (encrypted, None, "--key"),
        (encrypted, key("other"), "encrypted with another key"),
        (&plain, key("key"), "not encrypted"),
        (encrypted, Some(plain.clone()), "a key has 32 bytes"),
    ];
    for (template, key, complaint) in cases {
        let mut config = host.config.clone();
        (config.sources.template, config.sources.key) = (template.clone(), key);
        let Err(ClientError::Zygote(error)) = Zygote::spawn(&config).await else {
            panic!("no complaint of {complaint:?}");
        };
        assert!(error.contains(complaint), "{error}");
    }
}
