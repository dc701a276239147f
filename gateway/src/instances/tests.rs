use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);
const LIMITS: Limits = Limits {
    tenant_calls: 4,
    queue: 2,
    wait: Duration::from_millis(100),
    keep_alive: Duration::from_secs(1),
    start_again: Duration::from_millis(10),
};

fn version(function: &str, vpc: &str, concurrency: u32) -> Arc<Version> {
    Arc::new(Version {
        function: function.into(),
        number: 1,
        vpc: vpc.into(),
        package: String::new(),
        template: String::new(),
        timeout: Duration::from_secs(1),
        concurrency,
    })
}

/// Drives the instances; an instance is a number.
struct Bench {
    instances: Instances<u32>,
    now: Instant,
    actions: Vec<Action<u32>>,
}

impl Bench {
    fn new(limits: Limits) -> Self {
        Self { instances: Instances::new(limits), now: Instant::now(), actions: Vec::new() }
    }

    fn call(&mut self, version: &Arc<Version>, ticket: Ticket) -> Begin<u32> {
        self.instances.call(self.now, version, ticket, &mut self.actions)
    }

    fn started(&mut self, version: &Arc<Version>, instance: u32) {
        self.instances.started(self.now, version, instance, &mut self.actions);
    }

    fn release(&mut self, version: &Arc<Version>, instance: u32) {
        self.instances.release(self.now, version, instance, &mut self.actions);
    }

    fn start_failed(&mut self, version: &Arc<Version>, failure: StartFailure) {
        self.instances.start_failed(self.now, version, failure, &mut self.actions);
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.instances.tick(self.now, &mut self.actions);
    }

    fn actions(&mut self) -> Vec<Action<u32>> {
        std::mem::take(&mut self.actions)
    }
}

#[test]
fn cold_then_warm_the_most_recently_used_first_then_ended() {
    let (f, mut bench) = (version("f", "blue", 0), Bench::new(LIMITS));
    for ticket in [1, 2] {
        assert_eq!(bench.call(&f, ticket), Begin::Wait);
    }
    assert_eq!(bench.actions(), [Action::Start(f.clone()), Action::Start(f.clone())]);
    bench.started(&f, 10);
    bench.started(&f, 11);
    assert_eq!(bench.actions(), [Action::Use(1, f.clone(), 10), Action::Use(2, f.clone(), 11)]);
    bench.release(&f, 11);
    bench.pass(10 * MS);
    bench.release(&f, 10);
    assert_eq!(bench.call(&f, 3), Begin::Use(10));
    bench.pass(990 * MS);
    assert_eq!(bench.actions(), [Action::End(f.clone(), 11)]);
    bench.release(&f, 10);
    bench.pass(1000 * MS);
    assert_eq!(bench.actions(), [Action::End(f, 10)]);
    assert!(bench.instances.pools.is_empty() && bench.instances.tenants.is_empty());
}

#[test]
fn the_queue_is_bounded_and_has_a_deadline() {
    let (f, mut bench) = (version("f", "blue", 1), Bench::new(LIMITS));
    let begun: Vec<_> = (1..=4).map(|ticket| bench.call(&f, ticket)).collect();
    let refused = Begin::Refuse(Refusal::Concurrency);
    assert_eq!(begun, [Begin::Wait, Begin::Wait, Begin::Wait, refused]);
    assert_eq!(bench.actions(), [Action::Start(f.clone())]);
    bench.started(&f, 10);
    assert_eq!(bench.actions(), [Action::Use(1, f.clone(), 10)]);
    bench.instances.cancel(&f, 2);
    bench.pass(100 * MS);
    assert_eq!(bench.actions(), [Action::Refuse(3, Refusal::Concurrency)]);
}

#[test]
fn an_instance_that_becomes_idle_serves_the_first_who_waits() {
    let (f, mut bench) = (version("f", "blue", 2), Bench::new(LIMITS));
    bench.call(&f, 1);
    bench.started(&f, 10);
    bench.call(&f, 2);
    bench.call(&f, 3);
    bench.actions();
    bench.release(&f, 10);
    assert_eq!(bench.actions(), [Action::Use(2, f.clone(), 10)]);
    bench.started(&f, 11);
    assert_eq!(bench.actions(), [Action::Use(3, f, 11)]);
}

#[test]
fn without_room_one_tries_for_all_and_the_oldest_idle_instance_makes_way() {
    let (f, g) = (version("f", "blue", 0), version("g", "red", 0));
    let mut bench = Bench::new(LIMITS);
    bench.call(&g, 1);
    bench.started(&g, 10);
    bench.release(&g, 10);
    bench.call(&f, 2);
    bench.call(&f, 3);
    bench.actions();
    bench.start_failed(&f, StartFailure::NoCapacity);
    bench.start_failed(&f, StartFailure::NoCapacity);
    assert_eq!(bench.actions(), [Action::End(g, 10)]);
    bench.pass(10 * MS);
    assert_eq!(bench.actions(), [Action::Start(f.clone())]);
    bench.start_failed(&f, StartFailure::NoCapacity);
    bench.pass(90 * MS);
    let no_capacity = |ticket| Action::Refuse(ticket, Refusal::NoCapacity);
    assert_eq!(bench.actions(), [no_capacity(2), no_capacity(3)]);
}

#[test]
fn a_start_that_cannot_succeed_refuses_one_call_with_its_reason() {
    let (f, mut bench) = (version("f", "blue", 1), Bench::new(LIMITS));
    bench.call(&f, 1);
    bench.call(&f, 2);
    bench.actions();
    bench.start_failed(&f, StartFailure::Broken("no package".to_owned()));
    let refused = Action::Refuse(1, Refusal::StartFailed("no package".to_owned()));
    assert_eq!(bench.actions(), [refused, Action::Start(f)]);
}

#[test]
fn functions_of_a_tenant_take_turns_at_its_limit() {
    let (f, g) = (version("f", "blue", 0), version("g", "blue", 0));
    let mut bench = Bench::new(Limits { tenant_calls: 1, queue: 9, ..LIMITS });
    for ticket in 1..=3 {
        bench.call(&f, ticket);
    }
    bench.call(&g, 4);
    bench.started(&f, 10);
    bench.actions();
    bench.release(&f, 10);
    let order: Vec<_> = bench.actions();
    // One of f runs already; f was put behind itself when it got its start, before g came.
    assert_eq!(order, [Action::Use(2, f.clone(), 10)]);
    bench.release(&f, 10);
    assert_eq!(bench.actions(), [Action::Start(g.clone())]);
    bench.started(&g, 11);
    assert_eq!(bench.actions(), [Action::Use(4, g.clone(), 11)]);
    bench.release(&g, 11);
    assert_eq!(bench.actions(), [Action::Use(3, f, 10)]);
}

#[test]
fn an_idle_instance_that_is_lost_is_not_used() {
    let (f, mut bench) = (version("f", "blue", 0), Bench::new(LIMITS));
    bench.call(&f, 1);
    bench.started(&f, 10);
    assert_eq!(bench.instances.lost(&f, |instance| *instance == 10), None);
    bench.release(&f, 10);
    assert_eq!(bench.instances.lost(&f, |instance| *instance == 10), Some(10));
    assert_eq!(bench.call(&f, 2), Begin::Wait);
}

#[test]
fn levels_tell_the_peak_since_the_last_look() {
    let (f, mut bench) = (version("f", "blue", 2), Bench::new(LIMITS));
    for ticket in 1..=4 {
        bench.call(&f, ticket);
    }
    bench.started(&f, 10);
    let level = |running, waiting, starting, idle, peak| Level {
        version: f.clone(),
        running,
        waiting,
        starting,
        idle,
        peak,
    };
    assert_eq!(bench.instances.levels(), [level(1, 3, 1, 0, 4)]);
    bench.pass(100 * MS);
    bench.release(&f, 10);
    assert_eq!(bench.instances.levels(), [level(0, 0, 1, 1, 4)]);
    assert_eq!(bench.instances.levels(), [level(0, 0, 1, 1, 0)]);
}

#[derive(Clone, Debug)]
enum Step {
    Call(usize),
    Cancel(usize),
    Release(usize),
    Gone(usize),
    Started(usize),
    StartFailed(usize, bool),
    Lost(usize),
    Pass(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let index = 0..1000_usize;
    let step = prop_oneof![
        8 => (0..4_usize).prop_map(Step::Call),
        1 => index.clone().prop_map(Step::Cancel),
        4 => index.clone().prop_map(Step::Release),
        1 => index.clone().prop_map(Step::Gone),
        5 => index.clone().prop_map(Step::Started),
        1 => (index.clone(), any::<bool>()).prop_map(|(index, room)| Step::StartFailed(index, room)),
        1 => index.prop_map(Step::Lost),
        2 => (0..200_u64).prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 0..200)
}

/// What must be so, kept in the plainest way.
#[derive(Default)]
struct Model {
    waiting: Vec<(Ticket, Arc<Version>)>,
    running: Vec<(u32, Arc<Version>)>,
    starting: Vec<Arc<Version>>,
    idle: BTreeMap<u32, Arc<Version>>,
    ended: BTreeSet<u32>,
}

impl Model {
    fn apply(&mut self, actions: Vec<Action<u32>>) {
        for action in actions {
            match action {
                Action::Use(ticket, version, instance) => {
                    let first = self.waiting.iter().find(|(_, of)| *of == version).unwrap();
                    assert_eq!(first.0, ticket, "not in the order in which they came");
                    self.waiting.retain(|(waiting, _)| *waiting != ticket);
                    self.idle.remove(&instance);
                    self.run(instance, version);
                }
                Action::Start(version) => self.starting.push(version),
                Action::End(version, instance) => {
                    assert_eq!(self.idle.remove(&instance), Some(version));
                    assert!(self.ended.insert(instance));
                }
                Action::Refuse(ticket, _) => {
                    let before = self.waiting.len();
                    self.waiting.retain(|(waiting, _)| *waiting != ticket);
                    assert_eq!(self.waiting.len(), before - 1);
                }
            }
        }
    }

    fn run(&mut self, instance: u32, version: Arc<Version>) {
        assert!(self.running.iter().all(|(other, _)| *other != instance), "two calls on one");
        assert!(!self.ended.contains(&instance), "a call on an instance that ended");
        self.running.push((instance, version));
    }

    fn check(&self, versions: &[Arc<Version>], limits: &Limits) {
        let running = self.running.iter().map(|(_, version)| version);
        let active: Vec<_> = running.chain(&self.starting).collect();
        for version in versions {
            let of = |field: fn(&Version) -> &Arc<str>| {
                active.iter().filter(|active| field(active) == field(version)).count()
            };
            let of_function = of(|version| &version.function);
            assert!(version.concurrency == 0 || of_function <= version.concurrency as usize);
            assert!(of(|version| &version.vpc) <= limits.tenant_calls as usize);
            let count = |all: &[Arc<Version>]| all.iter().filter(|of| *of == version).count();
            let waiting: Vec<_> = self.waiting.iter().map(|(_, of)| of.clone()).collect();
            // As many as may wait, and those for which starts are, or were, under way.
            assert!(count(&waiting) <= limits.queue + limits.tenant_calls as usize);
        }
    }
}

proptest! {
    #[test]
    fn it_keeps_its_promises_whatever_happens(steps in steps()) {
        let versions = [
            version("f", "blue", 0),
            version("g", "blue", 2),
            version("h", "red", 1),
            version("i", "red", 0),
        ];
        let mut bench = Bench::new(LIMITS);
        let mut model = Model::default();
        let (mut tickets, mut made) = (0, 0);
        for step in steps {
            match step {
                Step::Call(index) => {
                    tickets += 1;
                    let version = &versions[index];
                    match bench.call(version, tickets) {
                        Begin::Use(instance) => {
                            prop_assert_eq!(model.idle.remove(&instance), Some(version.clone()));
                            model.run(instance, version.clone());
                        }
                        Begin::Wait => model.waiting.push((tickets, version.clone())),
                        Begin::Refuse(_) => {}
                    }
                }
                Step::Cancel(index) if !model.waiting.is_empty() => {
                    let (ticket, version) = model.waiting.remove(index % model.waiting.len());
                    bench.instances.cancel(&version, ticket);
                }
                Step::Release(index) if !model.running.is_empty() => {
                    let (instance, version) = model.running.remove(index % model.running.len());
                    model.idle.insert(instance, version.clone());
                    bench.release(&version, instance);
                }
                Step::Gone(index) if !model.running.is_empty() => {
                    let (_, version) = model.running.remove(index % model.running.len());
                    bench.instances.gone(bench.now, &version, &mut bench.actions);
                }
                Step::Started(index) if !model.starting.is_empty() => {
                    made += 1;
                    let version = model.starting.remove(index % model.starting.len());
                    model.idle.insert(made, version.clone());
                    bench.started(&version, made);
                }
                Step::StartFailed(index, full) if !model.starting.is_empty() => {
                    let version = model.starting.remove(index % model.starting.len());
                    bench.start_failed(&version, if full {
                        StartFailure::NoCapacity
                    } else {
                        StartFailure::Broken(String::new())
                    });
                }
                Step::Lost(index) if !model.idle.is_empty() => {
                    let instance = *model.idle.keys().nth(index % model.idle.len()).unwrap();
                    let version = model.idle.remove(&instance).unwrap();
                    let lost = bench.instances.lost(&version, |other| *other == instance);
                    prop_assert_eq!(lost, Some(instance));
                }
                Step::Pass(ms) => bench.pass(Duration::from_millis(ms)),
                _ => {}
            }
            model.apply(bench.actions());
            model.check(&versions, &LIMITS);
        }
        // In the end everyone is served or refused, and nothing is left over.
        while !(model.running.is_empty() && model.starting.is_empty()) {
            if let Some(version) = model.starting.pop() {
                made += 1;
                model.idle.insert(made, version.clone());
                bench.started(&version, made);
            } else if let Some((instance, version)) = model.running.pop() {
                model.idle.insert(instance, version.clone());
                bench.release(&version, instance);
            }
            model.apply(bench.actions());
        }
        bench.pass(LIMITS.wait);
        model.apply(bench.actions());
        for _ in 0..2 {
            bench.pass(LIMITS.wait + LIMITS.keep_alive);
            model.apply(bench.actions());
            while let Some(version) = model.starting.pop() {
                bench.start_failed(&version, StartFailure::NoCapacity);
                model.apply(bench.actions());
            }
        }
        prop_assert!(model.waiting.is_empty() && model.idle.is_empty());
        prop_assert!(bench.instances.pools.is_empty() && bench.instances.functions.is_empty());
    }
}
