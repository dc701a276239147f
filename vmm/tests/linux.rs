//! Linux guests: boot, clones, calls, network. On a host whose KVM cannot run them, that it says so.

mod common;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, SystemTime};

use common::{guest, identity, kvm, tap, tap_with};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use warren_abi::microvm::HTTP_VSOCK_PORT;
use warren_vmm::can_run_linux;
use warren_vmm::client::{ClientError, MicroVm, Zygote, ZygoteConfig};
use warren_vmm::control::{EndReason, State, Tier, WATCHDOG};
use warren_vmm::jail::{self, JailConfig};
use warren_vmm::rates::Rates;
use warren_vmm::snapshot::Sources;

/// The kernels that `cargo xtask linux` has.
const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// Emulated processors are slow.
const PATIENCE: Duration = Duration::from_mins(2);

/// Whether Linux guests run here.
fn linux() -> bool {
    kvm() && common::linux::linux(file("linux-function.ext4").exists())
}

/// A result of `cargo xtask linux`.
fn file(name: &str) -> PathBuf {
    guest("warren-guest").with_file_name(name)
}

fn template(kernel: &str, output: &Path) -> Command {
    let mut command = Command::new(common::vmm());
    command.arg("template").arg("--kernel").arg(file(&format!("linux-{kernel}.vmlinuz")));
    command.arg("--initrd").arg(file(&format!("linux-{kernel}.initrd")));
    command.arg("--disk").arg(file("linux-function.ext4")).arg("--output").arg(output);
    command
}

/// A zygote of a Linux template.
struct Linux {
    zygote: Zygote,
    directory: TempDir,
    config: ZygoteConfig,
    pids: Vec<i32>,
}

impl Drop for Linux {
    fn drop(&mut self) {
        for &pid in &self.pids {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        jail::remove_groups(&self.config.jail.cgroup);
    }
}

impl Linux {
    async fn new(kernel: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("template");
        let output = template(kernel, &path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let name = directory.path().file_name().unwrap().to_str().unwrap();
        let config = ZygoteConfig {
            binary: common::vmm(),
            sources: Sources { disk: Some(file("linux-function.ext4")), ..Sources::from(path) },
            run_dir: directory.path().to_owned(),
            jail: JailConfig::named(&format!("test{name}")),
            rates: Rates::default(),
            watchdog: WATCHDOG,
        };
        let zygote = Zygote::spawn(&config).await.unwrap();
        Self { zygote, directory, config, pids: Vec::new() }
    }

    async fn parked(&mut self, slot: u32, tap: std::os::fd::OwnedFd) -> MicroVm {
        let mut microvm = self.zygote.fork(slot, tap, Tier::Parked).await.unwrap();
        self.pids.push(microvm.pid());
        microvm.advance(Tier::Parked).await.unwrap();
        microvm
    }
}

/// A request to the function, from the host: status line, headers and body of the answer.
async fn http(microvm: &MicroVm, method: &str, path: &str, body: &[u8]) -> (String, Vec<u8>) {
    let exchange = async {
        let mut stream = UnixStream::connect(microvm.path()).await.unwrap();
        let length = body.len();
        let head = format!(
            "CONNECT {HTTP_VSOCK_PORT}\n{method} {path} HTTP/1.0\r\nHost: function\r\n\
             Content-Length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        answer
    };
    let answer = timeout(PATIENCE, exchange).await.expect("the function answers");
    let line = answer.iter().position(|&byte| byte == b'\n').expect("a line that accepts");
    assert!(answer.starts_with(b"OK "), "{}", String::from_utf8_lossy(&answer));
    let answer = &answer[line + 1..];
    // busybox ends its lines with a carriage return, and those of its scripts as they do.
    let ends = |end: &[u8]| answer.windows(end.len()).position(|part| part == end);
    let lines = [&b"\r\n\r\n"[..], b"\n\n"].into_iter();
    let end = lines.filter_map(|end| Some((ends(end)?, end.len()))).min();
    let (end, length) = end.expect("a head");
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    assert!(head.contains(" 200 "), "{head}");
    (head, answer[end + length..].to_vec())
}

async fn json(microvm: &MicroVm, path: &str) -> Value {
    let (_, body) = http(microvm, "GET", path, b"").await;
    serde_json::from_slice(&body).unwrap_or_else(|error| {
        panic!("{error}: {}", String::from_utf8_lossy(&body));
    })
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap()
}

/// No two of them are alike in this.
fn all_differ(reports: &[Value], field: &str) {
    let values: HashSet<_> = reports.iter().map(|report| report[field].to_string()).collect();
    assert_eq!(values.len(), reports.len(), "{field}: {values:?}");
}

/// Eight clones of a template, one after the other and all at a time, have eight identities.
async fn eight_clones_differ(kernel: &str) {
    let mut linux = Linux::new(kernel).await;
    let mut clones = Vec::new();
    for slot in 1..=8 {
        clones.push(linux.parked(slot, tap("w0").unwrap()).await);
    }
    let mut reports = Vec::new();
    for (slot, clone) in (1..).zip(&mut clones) {
        let expected = identity(slot);
        let status = clone.status().await.unwrap();
        assert_eq!((status.state, status.identity), (State::Pooled(Tier::Parked), None));
        clone.release(&expected).await.unwrap();
        assert_eq!(clone.status().await.unwrap().identity.as_ref(), Some(&expected.identity));

        let began = now();
        let report = json(clone, "/cgi-bin/identity").await;
        let ended = now();
        let public = expected.identity;
        assert_eq!(report["hostname"], public.hostname.as_str());
        assert_eq!(report["mac"], public.mac.map(|byte| format!("{byte:02x}")).join(":").as_str());
        let address = std::net::Ipv4Addr::from(public.ipv4).to_string();
        assert!(report["ipv4"].as_str().is_some_and(|found| found.starts_with(&address)));
        let id = public.instance_id.map(|byte| format!("{byte:02x}")).concat();
        assert_eq!(report["machine_id"], id.as_str());
        // Its clock is the host's, wherever in the call it was read.
        let clock = Duration::from_nanos(report["wall_clock_ns"].as_u64().unwrap());
        let millisecond = Duration::from_millis(1);
        assert!(clock + millisecond >= began && clock <= ended + millisecond, "{clock:?}");
        // Time went on where the template's stood still.
        assert!(report["uptime"].as_f64().is_some_and(|uptime| uptime > 0.0 && uptime < 3600.0));
        // VIRTIO_NET_F_CTRL_VQ and VIRTIO_NET_F_MQ: its driver took several pairs of queues.
        let features = report["net_features"].as_str().unwrap().as_bytes();
        assert_eq!((features[17], features[22]), (b'1', b'1'));
        // Its kernel reseeds by itself where it knows of generations (CONFIG_VMGENID).
        assert_eq!(report["generations"], i32::from(kernel == "6.12"));
        reports.push(report);
    }
    for field in ["hostname", "machine_id", "boot_id", "mac", "ipv4", "random"] {
        all_differ(&reports, field);
    }
    // Each answers still, beside the others.
    let body: Vec<u8> = (0..20_000u32).map(|n| (n % 251) as u8).collect();
    for clone in &clones {
        assert_eq!(http(clone, "POST", "/cgi-bin/echo", &body).await.1, body);
    }
    for mut clone in clones {
        assert_eq!(clone.stop().await.unwrap(), EndReason::Stopped);
    }
}

#[tokio::test]
async fn eight_clones_of_linux_6_1_have_eight_identities() {
    if linux() {
        eight_clones_differ("6.1").await;
    }
}

#[tokio::test]
async fn eight_clones_of_linux_6_12_have_eight_identities() {
    if linux() {
        eight_clones_differ("6.12").await;
    }
}

/// The host's side of the network: the gateway, and an HTTP server on it.
fn serve() {
    for command in ["link set lo up", "addr add 169.254.1.1/16 dev w0", "link set w0 up"] {
        assert!(Command::new("ip").args(command.split(' ')).status().unwrap().success());
    }
    let listener = TcpListener::bind(("169.254.1.1", 8000)).unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 3000000\r\n\r\n");
            let _ = stream.write_all(&vec![b'w'; 3_000_000]);
        }
    });
}

/// What a guest is used for: its function downloads over the slot's TAP. And what becomes of it when
/// it is recycled, when its function ends, and when its template's disk is another one.
#[tokio::test]
async fn a_linux_guest_transfers_over_its_tap_and_is_recycled() {
    if !linux() {
        return;
    }
    for kernel in KERNELS {
        let mut linux = Linux::new(kernel).await;
        let mut microvm = linux.parked(1, tap_with("w0", serve).unwrap()).await;
        let mut random = HashSet::new();
        for life in 1..=2 {
            microvm.release(&identity(life)).await.unwrap();
            let fetched = json(&microvm, "/cgi-bin/fetch?169.254.1.1:8000/x").await;
            assert_eq!(fetched["status"], "ok");
            assert_eq!(fetched["bytes"], 3_000_000);
            let report = json(&microvm, "/cgi-bin/identity").await;
            assert_eq!(report["hostname"], identity(life).identity.hostname.as_str());
            assert!(random.insert(report["random"].to_string()));
            assert!(random.insert(report["boot_id"].to_string()));
            microvm.recycle().await.unwrap();
        }
        assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);

        let other = linux.directory.path().join("other.ext4");
        std::fs::write(&other, vec![0; 8 << 20]).unwrap();
        for (disk, complaint) in [(None, "made with a disk"), (Some(other), "another disk")] {
            let mut config = linux.config.clone();
            config.sources.disk = disk;
            let Err(ClientError::Zygote(error)) = Zygote::spawn(&config).await else {
                panic!("taken without its disk");
            };
            assert!(error.contains(complaint), "{error}");
        }
    }
}

#[test]
fn what_is_no_kernel_or_no_initrd_makes_no_template() {
    if !linux() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let garbage = directory.path().join("garbage");
    std::fs::write(&garbage, vec![7; 100_000]).unwrap();
    let make = |kernel: &Path, initrd: &Path, memory: &str| {
        let mut command = Command::new(common::vmm());
        command.args(["template", "--memory", memory]).arg("--kernel").arg(kernel);
        let result = command.arg("--initrd").arg(initrd).arg("--output").arg(&output).output();
        let result = result.unwrap();
        assert!(!result.status.success() && !output.exists());
        String::from_utf8(result.stderr).unwrap()
    };
    let (kernel, initrd) = (file("linux-6.12.vmlinuz"), file("linux-6.12.initrd"));
    assert!(make(&garbage, &initrd, "128").contains("not a Linux kernel"));
    assert!(make(&kernel, &initrd, "32").contains("64 MiB to 3 GiB"));
    // The kernel panics, which is told with its last words.
    let error = make(&kernel, &garbage, "128");
    assert!(error.contains("the guest rebooted") && error.contains("panic"), "{error}");
}

/// One sentence, before anything is tried.
#[test]
fn a_host_without_hardware_virtualisation_says_that_it_cannot_run_linux() {
    if !kvm() || can_run_linux() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let result = template("6.12", &output).output().unwrap();
    let error = String::from_utf8(result.stderr).unwrap();
    assert!(!result.status.success() && !output.exists());
    assert!(error.contains("cannot run Linux guests: use a host with VMX or SVM"), "{error}");
    assert_eq!(error.lines().filter(|line| line.contains("Linux")).count(), 1, "{error}");
}
