//! Functions: deployed, called through the gateway, each in its tenant's VPC.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, VPCS, kvm_or_skip};
use warren_netns::functions::{Functions, GATEWAY, example, take_functions};
use warren_netns::process::Process;
use warren_netns::servers;

const OPTIONS: FleetOptions = FleetOptions { slots: 16, parked: 1, guest: GUEST };

/// A call is answered within this time, or the test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A fleet with functions, and a Redis in each VPC.
struct World {
    fleet: Fleet,
    functions: Functions,
    _redis: Vec<Process>,
}

impl World {
    async fn new(gateway: &str) -> Self {
        let mut fleet = Fleet::start(OPTIONS).await.unwrap();
        take_functions(&mut fleet, 0).await.unwrap();
        let functions = Functions::start(&fleet, gateway).unwrap();
        let topology = &fleet.topology;
        let redis = topology.vpcs.iter().map(|vpc| {
            let dir = fleet.run.path().join(format!("redis-{}", vpc.name()));
            std::fs::create_dir_all(&dir).unwrap();
            servers::redis(vpc, &dir).unwrap()
        });
        let redis = redis.collect();
        Self { fleet, functions, _redis: redis }
    }

    fn deploy(&self, name: &str, vpc: &str, component: &str, more: &str) {
        let component = example(component).unwrap();
        let line = format!("function deploy {name} {} --vpc {vpc} {more}", component.display());
        self.fleet.warren(&line).unwrap();
        self.fleet.warren(&format!("trigger add http {name} --function {name} --prefix /{name} --strip")).unwrap();
    }

    /// The answer to a call: status and body.
    fn call(&self, request: &str) -> (u16, String) {
        let request = format!("{request} HTTP/1.1\r\nhost: functions\r\nconnection: close\r\n\r\n");
        self.fleet
            .namespace(Daemon::Control)
            .run(move || {
                let mut stream = TcpStream::connect(GATEWAY)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.write_all(request.as_bytes())?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
                let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
                Ok((status.unwrap_or(0), body.to_owned()))
            })
            .unwrap()
    }

    fn logs(&self) -> String {
        ["host", "control", "gateway", "relay"]
            .map(|name| {
                let path = self.fleet.run.path().join(format!("{name}.log"));
                std::fs::read_to_string(path).unwrap_or_default()
            })
            .join("\n----\n")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn examples_answer_each_in_its_tenants_vpc() {
    if !kvm_or_skip("examples") {
        return;
    }
    let world = World::new("").await;
    for (index, vpc) in VPCS.into_iter().enumerate() {
        world.deploy(&format!("rust{index}"), vpc, "rust", "--env REDIS=10.0.0.10:6379");
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    for count in 1..=3 {
        let answer = world.call("GET /rust0/visits");
        assert_eq!(answer, (200, format!("visits {count}\n")), "{}", world.logs());
    }
    assert_eq!(world.call("GET /rust1/visits"), (200, "visits 1\n".to_owned()));
    let instances = world.fleet.warren("instance ls --output json").unwrap();
    let instances: Value = serde_json::from_str(&instances).unwrap();
    assert_eq!(instances.as_array().map(Vec::len), Some(2), "{instances}");
    drop(world.functions);
}
