//! A microVM with Linux in it, behind the programs.

#[path = "../../../../vmm/tests/common/linux.rs"]
mod needs;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;

use warren_abi::microvm::HTTP_VSOCK_PORT;
use warren_abi::wire::GATEWAY;
use warren_netns::fleet::built;
use warren_netns::netns::Namespace;
use warren_netns::topology::SERVER;
use warren_vmm::client::{Zygote, ZygoteConfig};
use warren_vmm::control::{EndReason, PublicIdentity, ReleaseRequest, Tier, WATCHDOG};
use warren_vmm::jail::JailConfig;
use warren_vmm::rates::Rates;
use warren_vmm::snapshot::Sources;

use crate::bed::{Bed, VNI_A};
use crate::guest::open_slot;

const PORT: u16 = 8000;
const BYTES: usize = 3_000_000;

fn result(name: &str) -> std::path::PathBuf {
    built(name).expect("`cargo xtask linux` made it")
}

/// A zygote of Linux with the test function.
async fn zygote(directory: &Path, cgroup: std::path::PathBuf) -> Zygote {
    let (template, disk) = (directory.join("linux.template"), result("linux-function.ext4"));
    let mut command = Command::new(result("warren-vmm"));
    command.arg("template").arg("--kernel").arg(result("linux-6.12.vmlinuz"));
    command.arg("--initrd").arg(result("linux-6.12.initrd"));
    command.arg("--disk").arg(&disk).arg("--output").arg(&template);
    assert!(command.status().expect("it runs").success());
    let run_dir = directory.join("linux");
    std::fs::create_dir(&run_dir).expect("the directory is new");
    let config = ZygoteConfig {
        binary: result("warren-vmm"),
        sources: Sources { disk: Some(disk), ..Sources::from(template) },
        run_dir,
        jail: JailConfig { cgroup, ..JailConfig::named("") },
        rates: Rates::default(),
        watchdog: WATCHDOG,
    };
    Zygote::spawn(&config).await.expect("the template is of this host")
}

/// Serves downloads over HTTP, for as long as the test program runs.
fn serve(namespace: &Namespace) {
    let listener = namespace.run(|| TcpListener::bind((SERVER, PORT))).expect("the port is free");
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {BYTES}\r\n\r\n");
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&vec![b'w'; BYTES]);
        }
    });
}

#[tokio::test]
async fn a_linux_guest_downloads_through_host_and_proxy() {
    if !needs::linux(built("linux-function.ext4").is_ok()) {
        return;
    }
    let bed = Bed::new();
    bed.host().attach(1, VNI_A).expect("the slot is free");
    serve(&bed.topology.vpcs[0]);
    let zygote = zygote(bed.run.path(), bed.run.cgroup()).await;
    let tap = open_slot(&bed.topology.host, bed.host(), 1);
    let mut microvm = zygote.fork(1, tap, Tier::Parked).await.expect("it is forked");
    let slot = &bed.host().slots()[0];
    let identity = PublicIdentity {
        instance_id: [1; 16],
        hostname: "linux".to_owned(),
        mac: slot.mac,
        ipv4: slot.address.octets(),
        gateway: GATEWAY.octets(),
        mtu: bed.host().mtu(),
    };
    let release = ReleaseRequest { identity, tag: Vec::new() };
    microvm.release(&release).await.expect("it has its identity");

    let mut stream = UnixStream::connect(microvm.path()).expect("it listens");
    let request =
        format!("CONNECT {HTTP_VSOCK_PORT}\nGET /cgi-bin/fetch?{SERVER}:{PORT}/x HTTP/1.0\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers, and closes");
    assert!(answer.contains("\"status\": \"ok\""), "{answer}");
    assert!(answer.contains(&format!("\"bytes\": {BYTES}")), "{answer}");
    assert_eq!(bed.host().drops().expect("counters can be read"), []);
    assert_eq!(microvm.stop().await.expect("it ends"), EndReason::Stopped);
}
