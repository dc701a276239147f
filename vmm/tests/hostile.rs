//! A guest that faults, loops or lies ends alone, with the reason, and leaves its neighbours be.

mod common;

use std::time::Duration;

use common::{Host, identity, kvm, tap_with};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::task::JoinHandle;
use warren_vmm::client::{ClientError, Invocation, MicroVm, invoke};
use warren_vmm::control::{EndReason, State};

const GUEST: &str = "warren-guest-hostile";

/// Asks the guest for a deed and returns how it ended; `None` if it survived.
async fn commit(host: &Host, microvm: &mut MicroVm, deed: &str) -> Option<EndReason> {
    let limit = Duration::from_secs(20);
    match invoke(microvm.path(), deed.as_bytes(), limit).await {
        Ok(reply) => {
            assert_eq!(reply, b"survived", "{deed}");
            // A survivor is still in hand.
            let reason = microvm.stop().await.unwrap();
            assert_eq!(reason, EndReason::Stopped);
            None
        }
        Err(ClientError::ChannelClosed) => {
            let reason = microvm.ended().await;
            wait_for_socket_to_go(host, microvm).await;
            Some(reason)
        }
        Err(other) => panic!("{deed}: {other}"),
    }
}

/// A microVM that ended, however, leaves no socket behind.
async fn wait_for_socket_to_go(host: &Host, microvm: &MicroVm) {
    for _ in 0..500 {
        if !microvm.path().exists() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} is still in {}", microvm.path().display(), host.run_dir.path().display());
}

/// A neighbour that must not notice anything.
async fn neighbour_lives(neighbour: &mut MicroVm) {
    let echo = invoke(neighbour.path(), b"hello", Duration::from_secs(10)).await.unwrap();
    assert_eq!(echo, b"hello");
    neighbour.status().await.unwrap();
}

#[tokio::test]
async fn each_exception_is_reported_with_vector_and_address() {
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    let mut neighbour = host.running(0).await;
    // Vector, whether it has an error code, and the address for page faults.
    let cases: [(&str, &[u8], Option<u64>); 20] = [
        ("divide", &[0], None),
        ("debug", &[1], None),
        ("breakpoint", &[3], None),
        ("overflow", &[4], None),
        ("undefined", &[6], None),
        ("stack-segment", &[12, 13], None),
        // PVM says invalid opcode.
        ("software-interrupt", &[13, 6], None),
        ("halt", &[13], None),
        ("clear-interrupts", &[13], None),
        ("read-cr3", &[13], None),
        ("write-cr0", &[13], None),
        ("read-msr", &[13], None),
        ("non-canonical", &[13], None),
        ("null", &[14], Some(8)),
        ("wild", &[14], Some(0x1234_5678_9000)),
        ("supervisor", &[14], Some(0x1000)),
        ("write-boot-page", &[14], Some(0x1_0000)),
        ("x87", &[16], None),
        ("alignment", &[17], None),
        ("simd", &[19], None),
    ];
    for (slot, (kind, vectors, at)) in (1..).zip(cases) {
        // QEMU's processor does not raise these.
        if ["alignment", "simd"].contains(&kind) && warren_vmm::is_emulated() {
            continue;
        }
        let mut microvm = host.running(slot).await;
        let reason = commit(&host, &mut microvm, &format!("fault {kind}")).await;
        let Some(EndReason::Exception { vector, error_code, rip, address }) = reason else {
            panic!("{kind}: {reason:?}");
        };
        assert!(vectors.contains(&vector), "{kind}: vector {vector}");
        assert_eq!(error_code.is_some(), matches!(vector, 12 | 13 | 14 | 17), "{kind}");
        assert!((0x20_0000..0x30_0000).contains(&rip), "{kind}: rip {rip:#x}");
        assert_eq!(address, at, "{kind}");
        neighbour_lives(&mut neighbour).await;
    }
}

#[tokio::test]
async fn memory_rights_hold() {
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    for (slot, kind) in (1..).zip(["write-code", "execute-heap", "stack-overflow"]) {
        let mut microvm = host.running(slot).await;
        let reason = commit(&host, &mut microvm, &format!("fault {kind}")).await;
        let Some(EndReason::Exception { vector: 14, error_code: Some(code), address, .. }) = reason
        else {
            panic!("{kind}: {reason:?}");
        };
        // From ring 3; of the three only the stack's guard page is not there at all.
        assert_eq!(code & 4, 4, "{kind}: {code:#x}");
        assert_eq!(code & 1 == 0, kind == "stack-overflow", "{kind}: {code:#x}");
        assert_eq!(code & 16 == 16, kind == "execute-heap", "{kind}: {code:#x}");
        assert!(address.is_some());
    }
}

#[tokio::test]
async fn panic_is_reported_on_one_line() {
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    let mut microvm = host.running(1).await;
    let reason = commit(&host, &mut microvm, "panic").await;
    let Some(EndReason::Panic { message }) = reason else { panic!("{reason:?}") };
    assert!(message.contains("on\\npurpose") && message.contains("hostile.rs"), "{message}");
    assert!(!message.contains('\n'));
    // Out of memory is a panic too.
    let mut microvm = host.running(2).await;
    let reason = commit(&host, &mut microvm, "exhaust").await;
    assert!(matches!(reason, Some(EndReason::Panic { .. })), "{reason:?}");
}

#[tokio::test]
async fn guest_that_loops_for_ever_is_ended_by_the_watchdog() {
    if !kvm() {
        return;
    }
    let host = Host::with_watchdog(GUEST, Duration::from_millis(300)).await;
    let mut neighbour = host.running(0).await;
    let mut microvm = host.running(1).await;
    let reason = commit(&host, &mut microvm, "loop").await;
    let Some(EndReason::Watchdog { rip, budget_ms: 300 }) = reason else { panic!("{reason:?}") };
    assert!((0x20_0000..0x30_0000).contains(&rip), "rip {rip:#x}");
    neighbour_lives(&mut neighbour).await;
}

/// A microVM whose guest loops for ever, and the call that will have no answer.
async fn spinning(host: &Host) -> (MicroVm, JoinHandle<Result<Vec<u8>, ClientError>>) {
    let microvm = host.running(1).await;
    let mut invocation = Invocation::connect(microvm.path()).await.unwrap();
    let call = tokio::spawn(async move { invocation.call(b"loop").await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    (microvm, call)
}

#[tokio::test]
async fn guest_that_loops_for_ever_can_be_asked_and_stopped() {
    if !kvm() {
        return;
    }
    let host = Host::with_watchdog(GUEST, Duration::from_hours(1)).await;
    let (mut microvm, call) = spinning(&host).await;
    assert_eq!(microvm.status().await.unwrap().slot, 1);
    assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
    assert!(matches!(call.await.unwrap(), Err(ClientError::ChannelClosed)));
}

#[tokio::test]
async fn time_that_a_guest_did_not_get_is_not_its_own() {
    if !kvm() {
        return;
    }
    let host = Host::with_watchdog(GUEST, Duration::from_secs(1)).await;
    let (mut microvm, call) = spinning(&host).await;
    let pid = Pid::from_raw(microvm.pid());
    kill(pid, Signal::SIGSTOP).unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    kill(pid, Signal::SIGCONT).unwrap();
    assert_eq!(microvm.status().await.unwrap().state, State::Running);
    assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
    assert!(matches!(call.await.unwrap(), Err(ClientError::ChannelClosed)));
}

#[tokio::test]
async fn misused_ports_are_reported() {
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    for (slot, kind) in (1..).zip(["barrier", "ready", "panic-outside", "byte", "read", "string"]) {
        let mut microvm = host.running(slot).await;
        let reason = commit(&host, &mut microvm, &format!("port {kind}")).await;
        assert!(matches!(reason, Some(EndReason::Protocol { .. })), "{kind}: {reason:?}");
    }
    // Ports that are not the guest's, among them those that report exceptions.
    for (slot, kind) in (10..).zip(["exception", "unknown"]) {
        let mut microvm = host.running(slot).await;
        let reason = commit(&host, &mut microvm, &format!("port {kind}")).await;
        assert!(matches!(reason, Some(EndReason::Exception { vector: 13, .. })), "{reason:?}");
    }
}

/// SYSCALL has nowhere to go. PVM takes it for a hypercall, which may or may not return.
#[tokio::test]
async fn syscall_does_not_reach_ring_0() {
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    let mut neighbour = host.running(0).await;
    let mut microvm = host.running(1).await;
    let reason = commit(&host, &mut microvm, "fault syscall").await;
    assert!(
        matches!(
            reason,
            None | Some(
                EndReason::Exception { .. }
                    | EndReason::TripleFault { .. }
                    | EndReason::Protocol { .. }
            )
        ),
        "{reason:?}"
    );
    neighbour_lives(&mut neighbour).await;
}

#[tokio::test]
async fn nonsense_in_virtqueues_ends_the_microvm_and_nobody_else() {
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    let mut neighbour = host.running(0).await;
    let refused = [
        "address-outside",
        "address-supervisor",
        "address-wraps",
        "address-across-end",
        "length-huge",
        "wrong-direction",
        "chain-loop",
        "chain-outside",
        "head-outside",
        "index-jumps",
        "rings-outside",
        "rings-supervisor",
        "rings-wrap",
    ];
    let mut slot = 0;
    for queue in ["net-tx", "net-rx", "vsock-tx", "vsock-rx"] {
        for attack in refused {
            // Only the packet's own length counts there.
            if (queue, attack) == ("vsock-tx", "length-huge") {
                continue;
            }
            slot += 1;
            // Something arrives on the network all the time, for the guest to be served with.
            let tap = tap_with("w0", chatter).unwrap();
            let mut microvm = host.parked_on(slot, tap).await;
            microvm.release(&identity(slot)).await.unwrap();
            let deed = format!("queue {queue} {attack}");
            let mut invocation = Invocation::connect(microvm.path()).await.unwrap();
            let (path, call) = (microvm.path().to_owned(), deed.clone());
            // And a second call, for the vsock device to deliver.
            let calls = tokio::spawn(async move {
                let first = tokio::spawn(async move { invocation.call(call.as_bytes()).await });
                tokio::time::sleep(Duration::from_millis(20)).await;
                let _ = invoke(&path, b"knock", Duration::from_secs(5)).await;
                first.await
            });
            let reason = tokio::time::timeout(Duration::from_secs(10), microvm.ended()).await;
            let Ok(EndReason::Queue { queue: reported, .. }) = &reason else {
                panic!("{deed}: {reason:?}");
            };
            assert_eq!(*reported, queue.replace('-', " "), "{deed}");
            calls.abort();
        }
        neighbour_lives(&mut neighbour).await;
    }
}

/// Makes frames arrive at the TAP of this namespace: ARP requests for addresses nobody has.
fn chatter() {
    for command in ["addr add 10.1.0.1/16 dev w0", "link set w0 up"] {
        let words = command.split(' ');
        assert!(std::process::Command::new("ip").args(words).status().unwrap().success());
    }
    std::thread::spawn(|| {
        let socket = std::net::UdpSocket::bind("10.1.0.1:0").unwrap();
        for last in 2..=250 {
            // Fails once the TAP is gone.
            if socket.send_to(b"?", ("10.1.0.0".replace(".0.0", &format!(".7.{last}")), 9)).is_err()
            {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    });
}

/// Odd, but within what virtio allows, or undetectable: nobody is harmed, whatever comes of it.
#[tokio::test]
async fn odd_virtqueues_harm_nobody() {
    if !kvm() {
        return;
    }
    let host = Host::new(GUEST).await;
    let mut neighbour = host.running(0).await;
    let attacks = [
        "length-zero",
        "length-huge",
        "indirect",
        "same-head-often",
        "rings-overlap",
        "size-zero",
        "size-huge",
        "packet-lies",
        "packet-unknown",
    ];
    let mut slot = 0;
    for queue in ["net-tx", "vsock-tx"] {
        for attack in attacks {
            slot += 1;
            let mut microvm = host.running(slot).await;
            let deed = format!("queue {queue} {attack}");
            // An attacked vsock device answers no more, so the outcome is asked of the VMM.
            let limit = Duration::from_millis(300);
            let _ = invoke(microvm.path(), deed.as_bytes(), limit).await;
            let reason = match microvm.stop().await {
                Ok(reason) => reason,
                Err(error) => panic!("{deed}: {error}"),
            };
            assert!(
                matches!(
                    reason,
                    EndReason::Stopped | EndReason::Queue { .. } | EndReason::Panic { .. }
                ),
                "{deed}: {reason:?}"
            );
        }
    }
    neighbour_lives(&mut neighbour).await;
}
