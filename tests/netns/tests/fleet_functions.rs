//! Functions: deployed, called through the gateway, each in its tenant's VPC.

use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, VPCS, kvm_or_skip};
use warren_netns::functions::{Answer, Functions, example, take_functions};
use warren_netns::process::Process;
use warren_netns::servers;
use warren_proto::v1;

const OPTIONS: FleetOptions = FleetOptions { slots: 16, parked: 1, guest: GUEST };

/// A fleet with functions, and a Redis in each VPC.
struct World {
    fleet: Fleet,
    _functions: Functions,
    _redis: Vec<Process>,
}

impl World {
    async fn new(gateway: &str) -> Self {
        let mut fleet = Fleet::start(OPTIONS).await.unwrap();
        take_functions(&mut fleet, 0).await.unwrap();
        let functions = Functions::start(&fleet, gateway).unwrap();
        let redis = fleet.topology.vpcs.iter();
        let redis = redis.map(|vpc| servers::redis(vpc, fleet.run.path()).unwrap()).collect();
        Self { fleet, _functions: functions, _redis: redis }
    }

    async fn deploy(
        &self,
        name: &str,
        vpc: &str,
        component: &str,
        environment: &[(&str, &str)],
        reuse: bool,
    ) {
        let component = example(component).unwrap();
        let deployed = self.fleet.deploy(name, vpc, &component, environment, reuse).await;
        deployed.unwrap_or_else(|error| panic!("{name}: {error:#}\n{}", self.logs()));
    }

    fn call(&self, method: &str, path: &str, body: &str) -> Answer {
        let answer = self.fleet.call_when_known(method, path, body);
        answer.unwrap_or_else(|error| panic!("{method} {path}: {error:#}\n{}", self.logs()))
    }

    /// The call is answered by the function, with this.
    fn expect(&self, method: &str, path: &str, body: &str, expected: &str) {
        let answer = self.call(method, path, body);
        let of_answer = (answer.status, answer.body.as_str());
        if of_answer == (200, expected) {
            return;
        }
        let name = path.split('/').nth(1).unwrap_or_default();
        let said = self.fleet.warren(&format!("function logs {name}"));
        panic!("{method} {path}: {answer:?} in place of {expected:?}\n{said:?}\n{}", self.logs());
    }

    fn logs(&self) -> String {
        let log = |name: &str| {
            let text = std::fs::read_to_string(self.fleet.run.path().join(format!("{name}.log")));
            format!("---- {name}\n{}", text.unwrap_or_default())
        };
        ["host", "control", "gateway", "relay"].map(log).concat()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_answers_in_its_tenants_vpc_and_its_instance_again() {
    if !kvm_or_skip("functions in their VPCs") {
        return;
    }
    let world = World::new("").await;
    for (name, vpc) in ["one", "two"].into_iter().zip(VPCS) {
        world.deploy(name, vpc, "rust", &[("REDIS", "10.0.0.10:6379")], true).await;
    }
    for count in 1..=3 {
        world.expect("GET", "/one/visits", "", &format!("visits {count}\n"));
    }
    // The same address in another VPC is another Redis.
    world.expect("GET", "/two/visits", "", "visits 1\n");
    let mut host = world.fleet.agent(Daemon::Host).await.unwrap();
    let instances = host.local_instances(v1::LocalInstancesRequest {}).await.unwrap();
    let instances = instances.into_inner().instances;
    let mut of: Vec<_> = instances.iter().map(|it| (&*it.function, &*it.vpc)).collect();
    of.sort_unstable();
    assert_eq!(of, [("one", VPCS[0]), ("two", VPCS[1])]);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_example_is_deployed_and_called() {
    if !kvm_or_skip("examples") {
        return;
    }
    let world = World::new("").await;
    for (name, hello) in [("javascript", "JavaScript"), ("python", "Python"), ("c", "C")] {
        world.deploy(name, VPCS[0], name, &[], false).await;
        world.expect("POST", &format!("/{name}/echo"), "said so", "said so");
        world.expect("GET", &format!("/{name}/"), "", &format!("hello from {hello}\n"));
    }
    world.deploy("rust", VPCS[0], "rust", &[], false).await;
    world.expect("GET", "/rust/", "", "hello from Rust\n");
}
