//! The process, killed: what it acknowledged is there afterwards.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tonic::transport::Channel;
use warren_proto::endpoint::{Endpoint, connect};
use warren_proto::v1::control_service_client::ControlServiceClient;
use warren_proto::v1::{CreateVpcRequest, ListVpcsRequest, Vpc};

/// A running warren-control; killed at the end if it still runs.
struct Process(Child);

impl Process {
    fn start(directory: &Path) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_warren-control"))
            .arg("--listen")
            .arg(endpoint(directory).to_string())
            .arg("--state")
            .arg(directory.join("control.db"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// SIGKILL: it cannot tidy up.
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn endpoint(directory: &Path) -> Endpoint {
    Endpoint::Unix(directory.join("control.sock"))
}

async fn client(directory: &Path) -> ControlServiceClient<Channel> {
    for _ in 0..1500 {
        if let Ok(channel) = connect(&endpoint(directory)).await {
            return ControlServiceClient::new(channel);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("warren-control never listened");
}

fn vpc(number: u32) -> Vpc {
    Vpc {
        name: format!("vpc-{number}"),
        cidr: "10.0.0.0/8".into(),
        shared_address: Ipv4Addr::from_bits(0x0a00_0000 + number).to_string(),
        interface: "eth1".into(),
        ..Vpc::default()
    }
}

#[tokio::test]
async fn acknowledged_vpcs_survive_kill_9_at_any_moment() {
    let directory = tempfile::tempdir().unwrap();
    let mut acknowledged: Vec<Vpc> = Vec::new();
    let mut number = 0;
    for round in 1..=4 {
        let mut process = Process::start(directory.path());
        let mut client = client(directory.path()).await;
        let known = client.list_vpcs(ListVpcsRequest {}).await.unwrap().into_inner().vpcs;
        for vpc in &acknowledged {
            assert!(known.contains(vpc), "round {round}: {} is lost", vpc.name);
        }
        // The kill comes at a different moment of the writing in each round.
        let killer = tokio::task::spawn_blocking(move || {
            std::thread::sleep(Duration::from_millis(20 * round));
            process.kill();
        });
        loop {
            number += 1;
            let request = CreateVpcRequest { vpc: Some(vpc(number)) };
            match client.create_vpc(request).await {
                Ok(created) => acknowledged.push(created.into_inner().vpc.unwrap()),
                Err(_) => break,
            }
        }
        killer.await.unwrap();
    }
    let _process = Process::start(directory.path());
    let mut client = client(directory.path()).await;
    let known = client.list_vpcs(ListVpcsRequest {}).await.unwrap().into_inner().vpcs;
    assert!(acknowledged.iter().all(|vpc| known.contains(vpc)));
    assert!(!acknowledged.is_empty());
    let mut vnis: Vec<_> = known.iter().map(|vpc| vpc.vni).collect();
    vnis.sort_unstable();
    vnis.dedup();
    assert_eq!(vnis.len(), known.len(), "no VNI was given twice");
}

#[tokio::test]
async fn sigterm_ends_it_and_leaves_no_socket() {
    let directory = tempfile::tempdir().unwrap();
    let mut process = Process::start(directory.path());
    client(directory.path()).await;
    let pid = nix::unistd::Pid::from_raw(process.0.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(process.0.wait().unwrap().success());
    assert!(!directory.path().join("control.sock").exists());
}

#[test]
fn a_wrong_configuration_is_explained() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("control.toml");
    std::fs::write(&config, "lisen = []\n").unwrap();
    let run = |arguments: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_warren-control")).args(arguments).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let error = run(&["--config", config.to_str().unwrap()]);
    assert!(error.contains("control.toml") && error.contains("lisen"), "{error}");
    let error = run(&["--heartbeat-deadline-ms", "5"]);
    assert!(error.contains("heartbeat_deadline_ms: 5 is not from 100 to 600000"), "{error}");
    let error = run(&["--listen", "localhost:7700"]);
    assert!(error.contains("unix:/PATH"), "{error}");
}
