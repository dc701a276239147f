//! `cold-start`: calls of functions through the gateway, from the request's first byte to the answer's:
//! where a microVM must be cloned for the call, where one waits at its barrier, and where an instance is
//! idle; alone and with 50 in flight. Beside them `wasmtime serve`, which has no microVM, alternated.

mod peer;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressIterator;
use warren_bench::figures::Figures;
use warren_bench::interrupt;
use warren_netns::fleet::{Daemon, Fleet, FleetOptions, GUEST, VPCS};
use warren_netns::functions::{Answer, Caller, Functions, GATEWAY, example, take_functions};
use warren_netns::process::Process;
use warren_netns::servers;
use warren_proto::v1;

use peer::Peer;

/// Samples of each figure, unless something else is said.
pub const ROUNDS: u32 = 300;

/// Calls in flight.
const IN_FLIGHT: usize = 50;

/// Slots: more than are used, so that none is waited for.
const SLOTS: u32 = 3 * IN_FLIGHT as u32;

/// How long calls are made for a rate.
const RATE: Duration = Duration::from_secs(5);

/// Callers at once for a rate: two for each processor.
const CALLERS: usize = 4;

/// The gateway has seen that an instance is gone.
const SETTLED: Duration = Duration::from_millis(30);

/// The examples: name and what they answer.
const EXAMPLES: [(&str, &str); 3] = [
    ("rust", "hello from Rust\n"),
    ("javascript", "hello from JavaScript\n"),
    ("python", "hello from Python\n"),
];

/// A fleet with functions.
struct World {
    fleet: Fleet,
    _functions: Functions,
    _redis: Process,
}

impl World {
    /// Of each function that was called so many are parked.
    async fn new(parked: u32) -> Result<Self> {
        let options = FleetOptions { slots: SLOTS, parked: 0, guest: GUEST };
        let mut fleet = Fleet::start(options).await?;
        take_functions(&mut fleet, parked).await?;
        let functions = Functions::start(&fleet, "queue_ms = 60000\n")?;
        let redis = servers::redis(&fleet.topology.vpcs[0], fleet.run.path())?;
        Ok(Self { fleet, _functions: functions, _redis: redis })
    }

    async fn deploy(&self, name: &str, of: &str, environment: &[(&str, &str)]) -> Result<()> {
        // What is measured of Rust's is what answers many calls.
        let reuse = of == "rust";
        self.fleet.deploy(name, VPCS[0], &example(of)?, environment, reuse).await.map(drop)
    }

    /// Ends all instances of functions.
    async fn end_instances(&self) -> Result<()> {
        let mut agent = self.fleet.agent(Daemon::Host).await?;
        let listed = agent.local_instances(v1::LocalInstancesRequest {}).await?.into_inner();
        for instance in listed.instances {
            agent.end_instance(v1::EndInstanceRequest { id: instance.id }).await?;
        }
        tokio::time::sleep(SETTLED).await;
        Ok(())
    }

    /// The parked ones are there again.
    async fn wait_parked(&self, parked: u32) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while (self.fleet.microvms().len() as u32) < parked {
            ensure!(Instant::now() < deadline, "{parked} microVMs are not parked");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // In the pool, too.
        tokio::time::sleep(SETTLED).await;
        Ok(())
    }

    /// One call on a connection of its own.
    fn call(&self, path: &str) -> Result<Answer> {
        self.fleet.call_when_known("GET", path, "")
    }

    /// Runs a closure where the gateway is.
    fn there<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.fleet.namespace(Daemon::Control).run(work)
    }
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

fn expect(answer: &Answer, expected: &str) -> Result<f64> {
    let is_right = answer.status == 200 && answer.body == expected;
    ensure!(is_right, "{answer:?} in place of {expected:?}");
    Ok(micros(answer.first_byte))
}

/// Calls of these paths at once, each on a connection that is open before.
fn at_once(address: SocketAddr, paths: &[String]) -> Result<Vec<Answer>> {
    let barrier = Barrier::new(paths.len());
    std::thread::scope(|scope| {
        let call = |path: &'_ String| {
            let (path, barrier) = (path.clone(), &barrier);
            scope.spawn(move || {
                let caller = Caller::connect(address);
                barrier.wait();
                caller?.call("GET", &path, "")
            })
        };
        let callers: Vec<_> = paths.iter().map(call).collect();
        let joined = callers
            .into_iter()
            .map(|caller| caller.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        joined.collect()
    })
}

/// Calls one after the other by each caller for a while, and returns how many a second.
fn rate(address: SocketAddr, path: &str) -> Result<f64> {
    let end = Instant::now() + RATE;
    let counts: Result<Vec<u64>> = std::thread::scope(|scope| {
        let callers = (0..CALLERS).map(|_| {
            scope.spawn(|| {
                let (mut caller, mut count) = (Caller::connect(address)?, 0);
                while Instant::now() < end {
                    let answer = caller.call("GET", path, "")?;
                    ensure!(answer.status == 200, "{answer:?}");
                    count += 1;
                }
                Ok(count)
            })
        });
        let callers: Vec<_> = callers.collect();
        let joined = callers
            .into_iter()
            .map(|caller| caller.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        joined.collect()
    });
    Ok(counts?.iter().sum::<u64>() as f64 / RATE.as_secs_f64())
}

/// Measures.
pub async fn run(rounds: u32) -> Result<Figures> {
    let mut figures = Figures::new("cold-start");
    cold(rounds, &mut figures).await.context("cold")?;
    parked(rounds, &mut figures).await.context("parked")?;
    figures.note(
        "A cold call's image is on the host and its zygote runs; no microVM of the function is there. \
         first_ever_us: the host has neither package nor image.",
    );
    Ok(figures)
}

/// Where nothing is parked: cold and warm calls, alone and many at once.
async fn cold(rounds: u32, figures: &mut Figures) -> Result<()> {
    let world = World::new(0).await?;
    let _peer = Peer::start(&world.fleet, &example("rust")?)?;
    for (name, hello) in EXAMPLES {
        let bytes = std::fs::metadata(example(name)?)?.len();
        figures.count(&format!("{name}_wasm_bytes"), bytes);
        world.deploy(name, name, &[]).await?;
        let (mut colds, mut warms, mut peers) = (Vec::new(), Vec::new(), Vec::new());
        let path = format!("/{name}/");
        expect(&world.call(&path)?, hello)?;
        let of_name = if name == "rust" { rounds } else { rounds.div_ceil(3) };
        for _ in (0..of_name).progress() {
            interrupt::check()?;
            world.end_instances().await?;
            colds.push(expect(&world.call(&path)?, hello)?);
            if name == "rust" {
                let two = world.there(|| {
                    let mut caller = Caller::connect(GATEWAY)?;
                    caller.call("GET", &path, "")?;
                    caller.call("GET", &path, "")
                })?;
                warms.push(expect(&two, hello)?);
                peers.push(expect(&world.there(peer::warm_call)?, hello)?);
            }
        }
        let prefix = if name == "rust" { String::new() } else { format!("{name}_") };
        figures.distribution(&format!("{prefix}cold_us"), colds);
        figures.distribution(&format!("{prefix}warm_us"), warms);
        figures.distribution("wasmtime_serve_us", peers);
    }
    world.deploy("vpc", "rust", &[("REDIS", "10.0.0.10:6379")]).await?;
    world.call("/vpc/visits")?;
    let mut in_vpc = Vec::new();
    for _ in (0..rounds).progress() {
        interrupt::check()?;
        world.end_instances().await?;
        let answer = world.call("/vpc/visits")?;
        ensure!(answer.status == 200, "{answer:?}");
        in_vpc.push(micros(answer.first_byte));
    }
    figures.distribution("cold_vpc_us", in_vpc);
    first_ever(&world, figures).await?;
    many(&world, rounds, figures).await?;
    world.end_instances().await?;
    world.call("/rust/")?;
    figures.number("warm_rps", world.there(|| rate(GATEWAY, "/rust/"))?);
    figures.number("wasmtime_serve_rps", world.there(|| rate(peer::address(), "/"))?);
    Ok(())
}

/// Functions whose package is in the zone only.
async fn first_ever(world: &World, figures: &mut Figures) -> Result<()> {
    let mut firsts = Vec::new();
    for number in (0..20).progress() {
        interrupt::check()?;
        let name = format!("first{number}");
        world.deploy(&name, "rust", &[("N", &number.to_string())]).await?;
        // The gateway knows of it before it is called.
        tokio::time::sleep(Duration::from_millis(500)).await;
        firsts.push(expect(&world.call(&format!("/{name}/"))?, EXAMPLES[0].1)?);
    }
    figures.distribution("first_ever_us", firsts);
    Ok(())
}

/// Fifty calls at once: of one function, and of as many functions.
async fn many(world: &World, rounds: u32, figures: &mut Figures) -> Result<()> {
    let one = vec!["/rust/".to_owned(); IN_FLIGHT];
    let distinct: Vec<String> = (0..IN_FLIGHT).map(|number| format!("/of{number}/")).collect();
    for number in (0..IN_FLIGHT).progress() {
        world.deploy(&format!("of{number}"), "rust", &[("OF", &number.to_string())]).await?;
        world.call(&format!("/of{number}/"))?;
    }
    let (mut colds, mut warms, mut distincts) = (Vec::new(), Vec::new(), Vec::new());
    for _ in (0..rounds.div_ceil(IN_FLIGHT as u32).max(4)).progress() {
        interrupt::check()?;
        for (paths, samples) in [(&one, &mut colds), (&distinct, &mut distincts)] {
            world.end_instances().await?;
            for answer in world.there(|| at_once(GATEWAY, paths))? {
                samples.push(expect(&answer, EXAMPLES[0].1)?);
            }
        }
        for answer in world.there(|| at_once(GATEWAY, &distinct))? {
            warms.push(expect(&answer, EXAMPLES[0].1)?);
        }
    }
    figures.distribution("cold_us_50", colds);
    figures.distribution("cold_distinct_us_50", distincts);
    figures.distribution("warm_us_50", warms);
    Ok(())
}

/// Where clones of the function wait at the barrier.
async fn parked(rounds: u32, figures: &mut Figures) -> Result<()> {
    for (parked, key, rounds) in
        [(1, "parked_us", rounds), (IN_FLIGHT as u32, "parked_us_50", rounds.div_ceil(50).max(4))]
    {
        let world = World::new(parked).await?;
        world.deploy("rust", "rust", &[]).await?;
        world.call("/rust/")?;
        let mut samples = Vec::new();
        let paths = vec!["/rust/".to_owned(); parked as usize];
        for _ in (0..rounds).progress() {
            interrupt::check()?;
            world.end_instances().await?;
            world.wait_parked(parked).await?;
            for answer in world.there(|| at_once(GATEWAY, &paths))? {
                samples.push(expect(&answer, EXAMPLES[0].1)?);
            }
        }
        figures.distribution(key, samples);
    }
    Ok(())
}

/// Where a file of this run is.
fn in_target(path: &Path) -> Result<std::path::PathBuf> {
    let example = example("rust")?;
    let target = example.parent().and_then(Path::parent).context("no target directory")?;
    Ok(target.join(path))
}
