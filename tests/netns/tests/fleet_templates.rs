//! Two templates of different size side by side on one host, each with a pool of its own.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tonic::Code;
use warren_netns::fleet::{
    Daemon, Fleet, FleetOptions, GUEST, TEMPLATE, VPCS, function_image, kvm_or_skip, template_with,
};
use warren_proto::v1;
use warren_vmm::client;
use warren_vmm::control::State;

const OPTIONS: FleetOptions = FleetOptions { slots: 12, parked: 2, guest: GUEST };
/// The other template.
const LARGE: &str = "large";
const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
const REAPED: &str = "warren_orphans_reaped_total";

/// A host with both: 2 of one, 1 to 3 of the other.
async fn fleet() -> Fleet {
    let mut fleet = Fleet::start(OPTIONS).await.unwrap();
    let large = template_with(&fleet.run, GUEST, 32).unwrap();
    let config = format!(
        "[[host.templates]]\nname = '{LARGE}'\npath = '{}'\nparked = 1\nparked_most = 3\n",
        large.display()
    );
    fleet.append_config(Daemon::Host, &config).unwrap();
    fleet.kill_and_restart(Daemon::Host).await.unwrap();
    fleet
}

async fn start(fleet: &Fleet, template: &str) -> (v1::Instance, v1::StartTimings) {
    let (vpc, template) = (VPCS[0].to_owned(), template.to_owned());
    let request = v1::RunInstanceRequest { vpc, template, ..Default::default() };
    let started = fleet.control().await.unwrap().run_instance(request).await;
    let log = || std::fs::read_to_string(fleet.run.path().join("host.log")).unwrap_or_default();
    let started = started.unwrap_or_else(|error| panic!("{error}; host's log:\n{}", log()));
    let started = started.into_inner();
    (started.instance.unwrap(), started.timings.unwrap())
}

fn warren(fleet: &Fleet, line: &str) -> Value {
    let printed = fleet.warren(&format!("{line} --output json")).unwrap();
    serde_json::from_str(&printed).unwrap()
}

/// Waits until so many of each are parked and are to be, as `warren template ls` has it.
async fn wait_for_pools(fleet: &Fleet, default: u32, large: u32) {
    let row = |template, is_default, parked| {
        json!({
            "host": "host", "template": template, "default": is_default,
            "parked": parked, "wanted": parked,
        })
    };
    let expected = json!([row(TEMPLATE, true, default), row(LARGE, false, large)]);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = warren(fleet, "template ls");
        if now == expected {
            return;
        }
        assert!(Instant::now() < deadline, "{now} is not {expected}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The processes that wait in a template's pool.
async fn pooled(fleet: &Fleet, template: &str) -> BTreeSet<u32> {
    let found = client::discover(&fleet.sockets(template)).await.unwrap().into_iter();
    let pooled = found.filter(|(_, status)| status.state != State::Running);
    pooled.map(|(microvm, _)| microvm.pid() as u32).collect()
}

/// The address space of a process.
fn address_space(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    size.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[tokio::test(flavor = "multi_thread")]
async fn templates_have_pools_of_their_own() {
    if !kvm_or_skip("templates_have_pools_of_their_own") {
        return;
    }
    let mut fleet = fleet().await;
    wait_for_pools(&fleet, 2, 1).await;
    let (small, timings) = start(&fleet, "").await;
    assert_eq!((small.template.as_str(), timings.tier.as_str()), (TEMPLATE, "parked"));
    let (large, timings) = start(&fleet, LARGE).await;
    assert_eq!((large.template.as_str(), timings.tier.as_str()), (LARGE, "parked"));
    assert!(address_space(large.pid) > address_space(small.pid) + 15 * MIB);

    // One is wanted more, and the other as before.
    for _ in 0..2 {
        start(&fleet, LARGE).await;
    }
    wait_for_pools(&fleet, 2, 3).await;
    let host = warren(&fleet, "host ls");
    let host = host.as_array().unwrap().iter().find(|host| host["role"] == "host").unwrap();
    assert_eq!((&host["parked"], &host["parked_target"]), (&json!(5), &json!(5)));

    let refused = fleet.warren(&format!("vm run --vpc {} --template huge", VPCS[0]));
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("template \"huge\": there are default, large"), "{refused}");
    let (vpc, template) = (VPCS[0].to_owned(), "huge".to_owned());
    let request = v1::StartInstanceRequest { vpc, template, ..Default::default() };
    let refused = fleet.agent(Daemon::Host).await.unwrap().start_instance(request).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert!(refused.message().contains("name one of default, large"), "{refused}");

    // A snapshot is of its instance's template.
    let id = &large.id;
    warren(&fleet, &format!("vm probe {id} remember it"));
    assert_eq!(warren(&fleet, &format!("vm snapshot {id} golden"))["template"], LARGE);
    let clone = &warren(&fleet, "vm clone --from golden")[0];
    assert_eq!(clone["template"], LARGE);
    let clone = clone["id"].as_str().unwrap();
    let recalled = warren(&fleet, &format!("vm probe {clone} recall"));
    assert_eq!(recalled["outcome"]["recalled"], "it");

    // A daemon that restarts finds each in its own pool.
    wait_for_pools(&fleet, 2, 3).await;
    let waiting = (pooled(&fleet, TEMPLATE).await, pooled(&fleet, LARGE).await);
    assert_eq!((waiting.0.len(), waiting.1.len()), (2, 3));
    fleet.kill_and_restart(Daemon::Host).await.unwrap();
    wait_for_pools(&fleet, 2, 3).await;
    assert_eq!(fleet.metric(Daemon::Host, REAPED).unwrap(), 0);
    assert_eq!((pooled(&fleet, TEMPLATE).await, pooled(&fleet, LARGE).await), waiting);
    let listed = warren(&fleet, "vm ls");
    let of = |template: &str| {
        listed.as_array().unwrap().iter().filter(|row| row["template"] == template).count()
    };
    assert_eq!((of(TEMPLATE), of(LARGE)), (1, 4));
    let (adopted, _) = start(&fleet, LARGE).await;
    assert!(waiting.1.contains(&adopted.pid), "{waiting:?}, {}", adopted.pid);
    assert_eq!(warren(&fleet, "vm clone --from golden")[0]["template"], LARGE);
}

/// The inode of a process's mapping of this name.
fn inode(pid: u32, name: &str) -> Option<String> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let line = maps.lines().find(|line| line.contains(name))?;
    line.split_whitespace().nth(4).map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_s_image_answers_calls_on_its_template_s_memory() {
    if !kvm_or_skip("a_function_s_image_answers_calls_on_its_template_s_memory") {
        return;
    }
    let mut fleet = Fleet::start(OPTIONS).await.unwrap();
    // One template as it is, and with a function in it.
    let template = template_with(&fleet.run, GUEST, 32).unwrap();
    let image = function_image(&fleet.run, &template).unwrap();
    let config = |name: &str| {
        format!(
            "[[host.templates]]\nname = '{name}'\npath = '{}'\nparked = 1\n",
            template.display()
        )
    };
    let image = format!("image = '{}'\n", image.display());
    fleet.append_config(Daemon::Host, &(config("plain") + &config("counter") + &image)).unwrap();
    fleet.kill_and_restart(Daemon::Host).await.unwrap();
    fleet.wait_parked_of("plain", 1).await.unwrap();
    fleet.wait_parked_of("counter", 1).await.unwrap();

    let (plain, _) = start(&fleet, "plain").await;
    let (counter, timings) = start(&fleet, "counter").await;
    assert_eq!(timings.tier, "parked");
    assert_eq!(call(&fleet, &counter.id, "one").await, "hello 0 ");
    assert_eq!(call(&fleet, &counter.id, "two").await, "hello 1 one");
    for (name, shared) in [("warren-memory", true), ("warren-code", false)] {
        let (of_plain, of_counter) = (inode(plain.pid, name), inode(counter.pid, name));
        assert!(of_counter.is_some() && (of_plain == of_counter) == shared, "{name}");
    }
    // A branch of it goes on counting, and the next one begins.
    warren(&fleet, &format!("vm snapshot {} counted", counter.id));
    let clone = &warren(&fleet, "vm clone --from counted")[0];
    assert_eq!(call(&fleet, clone["id"].as_str().unwrap(), "").await, "hello 2 two");
    let (next, _) = start(&fleet, "counter").await;
    assert_eq!(call(&fleet, &next.id, "").await, "hello 0 ");
}

async fn call(fleet: &Fleet, id: &str, what: &str) -> String {
    let (id, invocation) = (id.to_owned(), what.as_bytes().to_vec());
    let request = v1::CallInstanceRequest { id, invocation };
    let reply = fleet.control().await.unwrap().call_instance(request).await.unwrap();
    String::from_utf8(reply.into_inner().reply).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_host_starts_one_template_at_the_expense_of_the_other_s_pool() {
    if !kvm_or_skip("a_full_host_starts_one_template_at_the_expense_of_the_other_s_pool") {
        return;
    }
    let fleet = fleet().await;
    wait_for_pools(&fleet, 2, 1).await;
    let mut started = Vec::new();
    for _ in 0..OPTIONS.slots {
        let (instance, _) = start(&fleet, TEMPLATE).await;
        assert_eq!(instance.template, TEMPLATE);
        started.push(instance);
    }
    let slots: BTreeSet<_> = started.iter().map(|instance| instance.slot).collect();
    assert_eq!(slots.len() as u32, OPTIONS.slots);
    assert_eq!(pooled(&fleet, LARGE).await, BTreeSet::new());
    let mut agent = fleet.agent(Daemon::Host).await.unwrap();
    for template in [TEMPLATE, LARGE] {
        let (vpc, template) = (VPCS[0].to_owned(), template.to_owned());
        let request = v1::StartInstanceRequest { vpc, template, ..Default::default() };
        let refused = agent.start_instance(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    }
    // Pools that find no slot come to rest, and are filled again when there are slots.
    for instance in &started[1..] {
        fleet.stop(&instance.id).await.unwrap();
    }
    fleet.wait_parked_of(LARGE, 1).await.unwrap();
    fleet.wait_parked_of(TEMPLATE, 2).await.unwrap();
    let (_, timings) = start(&fleet, LARGE).await;
    assert_eq!(timings.tier, "parked");
}
