//! Rates of a microVM's devices, with a guest on a TAP.

mod common;

use std::collections::HashSet;
use std::io::Write;
use std::net::{TcpListener, UdpSocket};
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::{Host, identity, kvm, tap_with};
use warren_abi::probe::{Endpoint, Operation, Outcome, Reply, Request, decode, encode};
use warren_vmm::client::{MicroVm, invoke};
use warren_vmm::control::{EndReason, Tier};
use warren_vmm::rates::Rates;

const GUEST: &str = "warren-guest";
const HOST: [u8; 4] = [169, 254, 1, 1];
const DATAGRAMS: u16 = 7;
const SOURCE: u16 = 19;
const BULK: usize = 400_000;

/// When which datagram came: its number is in it.
#[derive(Clone, Default)]
struct Arrivals(Arc<Mutex<Vec<(Instant, u64)>>>);

impl Arrivals {
    fn all(&self) -> Vec<(Instant, u64)> {
        self.0.lock().unwrap().clone()
    }

    fn numbers(&self) -> Vec<u64> {
        self.all().into_iter().map(|(_, number)| number).collect()
    }

    async fn wait_for(&self, count: usize) {
        for _ in 0..3000 {
            if self.all().len() >= count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("of {count} datagrams only {:?} came", self.numbers());
    }
}

/// A TAP, and on its other side one who echoes datagrams and one who sends without end.
fn network() -> (OwnedFd, Arrivals) {
    let arrivals = Arrivals::default();
    let noted = arrivals.clone();
    let serve = move || {
        // The same address everywhere: a frame that was queued for another TAP would be taken here.
        for command in [
            "link set lo up",
            "link set w0 address 02:00:00:00:ff:01",
            "addr add 169.254.1.1/16 dev w0",
            "link set w0 up",
        ] {
            assert!(Command::new("ip").args(command.split(' ')).status().unwrap().success());
        }
        let echo = UdpSocket::bind((std::net::Ipv4Addr::from(HOST), DATAGRAMS)).unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = echo.recv_from(&mut buffer) {
                let number = u64::from_be_bytes(buffer[..8].try_into().unwrap());
                noted.0.lock().unwrap().push((Instant::now(), number));
                let _ = echo.send_to(&buffer[..length], from);
            }
        });
        let source = TcpListener::bind((std::net::Ipv4Addr::from(HOST), SOURCE)).unwrap();
        thread::spawn(move || {
            for mut stream in source.incoming().flatten() {
                let pattern: Vec<u8> = (0..BULK).map(|n| (n % 251) as u8).collect();
                let _ = stream.write_all(&pattern);
            }
        });
    };
    (tap_with("w0", serve).unwrap(), arrivals)
}

async fn host(rates: Rates) -> Host {
    Host::with(|config| {
        *config = common::config(GUEST, &config.run_dir);
        config.rates = rates;
    })
    .await
}

async fn running(host: &Host, slot: u32) -> (MicroVm, Arrivals) {
    let (tap, arrivals) = network();
    let mut microvm = host.forked(slot, tap, Tier::Shell).await;
    microvm.release(&identity(slot)).await.unwrap();
    (microvm, arrivals)
}

async fn probe(microvm: &MicroVm, operation: Operation) -> Outcome {
    let request = encode(&Request { operation, timeout_ms: 30_000 });
    let reply = invoke(microvm.path(), &request, Duration::from_secs(60)).await.unwrap();
    decode::<Reply>(&reply).unwrap().outcome.unwrap()
}

fn to(port: u16) -> Endpoint {
    Endpoint { address: HOST, port }
}

/// So many datagrams at once.
fn datagrams(count: u32) -> Operation {
    Operation::UdpEcho { to: to(DATAGRAMS), count, length: 100, interval_us: 1 }
}

#[tokio::test]
async fn what_a_guest_sends_is_held_to_its_rate_and_none_of_it_is_lost() {
    if !kvm() {
        return;
    }
    const RATE: f64 = 50.0;
    const BURST: f64 = 5.0;
    let rates = Rates { net_transmit_frames: NonZeroU64::new(50), ..Rates::default() };
    let host = host(rates).await;
    let (tap, arrivals) = network();
    let mut microvm = host.forked(1, tap, Tier::Parked).await;
    microvm.advance(Tier::Parked).await.unwrap();
    let began = Instant::now();
    microvm.release(&identity(1)).await.unwrap();
    let Outcome::Udp { sent: 40, .. } = probe(&microvm, datagrams(40)).await else {
        panic!("it sends");
    };
    arrivals.wait_for(40).await;
    assert_eq!(arrivals.numbers(), (0..40).collect::<Vec<_>>(), "each once, in their order");
    for (count, (time, _)) in (1..).zip(arrivals.all()) {
        let allowed = BURST + RATE * (time - began).as_secs_f64() + 1.0;
        assert!(f64::from(count) <= allowed, "{count} datagrams and not {allowed}");
    }
    assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
}

#[tokio::test]
async fn what_a_guest_gets_is_held_to_its_rate_in_every_life() {
    if !kvm() {
        return;
    }
    const RATE: f64 = 1e6;
    const BURST: f64 = 1e5;
    let rates = Rates { net_receive_bytes: NonZeroU64::new(1_000_000), ..Rates::default() };
    let host = host(rates).await;
    let (mut microvm, _arrivals) = running(&host, 1).await;
    for life in 1..=2 {
        let began = Instant::now();
        let download = Operation::BulkReceive { to: to(SOURCE), bytes: u64::MAX };
        let whole = Outcome::Bulk { bytes: BULK as u64, corrupt_at: None };
        assert_eq!(probe(&microvm, download).await, whole);
        let allowed = BURST + RATE * began.elapsed().as_secs_f64() + 1514.0;
        assert!(BULK as f64 <= allowed, "{BULK} bytes and not {allowed} in life {life}");
        microvm.recycle().await.unwrap();
        microvm.release(&identity(1 + life)).await.unwrap();
    }
    assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
}

/// Frames that a limit holds when a microVM is saved are sent by it, and not by its clones.
#[tokio::test]
async fn frames_that_are_held_when_a_microvm_is_saved_are_sent_once() {
    if !kvm() {
        return;
    }
    const COUNT: u32 = 20;
    let rates = Rates { net_transmit_frames: NonZeroU64::new(5), ..Rates::default() };
    let origin = host(rates).await;
    let (mut microvm, arrivals) = running(&origin, 1).await;
    let path = microvm.path().to_owned();
    let request = encode(&Request { operation: datagrams(COUNT), timeout_ms: 30_000 });
    let call = tokio::spawn(async move { invoke(&path, &request, Duration::from_secs(60)).await });
    arrivals.wait_for(1).await;
    let directory = tempfile::tempdir().unwrap();
    let diff = directory.path().join("diff");
    microvm.snapshot(&diff, None).await.unwrap();
    let sent_before = arrivals.all().len();
    assert!(sent_before < COUNT as usize, "nothing was held any more");

    let branch = Host::with(|config| {
        config.sources = origin.config.sources.clone();
        config.sources.diff = Some(diff);
    })
    .await;
    let (clone, of_clone) = running(&branch, 2).await;
    let Outcome::Udp { sent: 3, received: 3, .. } = probe(&clone, datagrams(3)).await else {
        panic!("it sends");
    };
    assert_eq!(of_clone.numbers(), [0, 1, 2], "nothing of the former one's");
    arrivals.wait_for(COUNT as usize).await;
    call.await.unwrap().unwrap();
    let numbers = arrivals.numbers();
    assert_eq!(numbers.len(), numbers.iter().collect::<HashSet<_>>().len(), "{numbers:?}");
    for mut microvm in [microvm, clone] {
        assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
    }
}

#[tokio::test]
async fn microvms_of_other_rates_are_of_another_make() {
    if !kvm() {
        return;
    }
    let rate = NonZeroU64::new(1 << 40);
    let rates = Rates {
        net_receive_bytes: rate,
        net_receive_frames: rate,
        net_transmit_bytes: rate,
        net_transmit_frames: rate,
        disk_bytes: rate,
        disk_requests: rate,
    };
    let unlimited = host(Rates::default()).await;
    let limited = Host::with(|config| {
        config.sources = unlimited.config.sources.clone();
        config.rates = rates;
    })
    .await;
    assert_ne!(limited.zygote.make(), unlimited.zygote.make());
}
