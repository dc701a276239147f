//! `cargo bench -p warren-gateway`: how long a warm call takes by way of gateway and relay, beside
//! the same call by the relay alone and straight to the guest; and what gateway, relay and gRPC add to
//! a cold start. Guest and agent are tasks here, which take next to no time.

#[path = "../tests/gateway/agent.rs"]
#[allow(dead_code, reason = "the tests use all of it")]
mod agent;
#[path = "../tests/gateway/control.rs"]
#[allow(dead_code, reason = "the tests use all of it")]
mod control;
#[path = "../tests/gateway/guest.rs"]
#[allow(dead_code, reason = "the tests use all of it")]
mod guest;
#[path = "../tests/gateway/world.rs"]
#[allow(dead_code, reason = "the tests use all of it")]
mod world;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::world::{World, request};

/// Calls one after the other, of which the first tenth is not counted.
const CALLS: usize = 20_000;
/// Functions that are called once each.
const COLD: usize = 300;
/// Callers at one time, and how long.
const CALLERS: usize = 50;
const TIME: Duration = Duration::from_secs(5);

type Sender = SendRequest<Full<Bytes>>;

#[tokio::main]
async fn main() {
    let world = World::new(&[COLD + CALLERS + 1], "tenant_calls = 10000").await;
    world.function("shop", 60_000, 0).await;
    world.get("shop", "/id").await;
    let id = world.machine(0).running.lock().unwrap().keys().next().unwrap().clone();

    let socket = world.machine(0).run_dir.join(format!("by-id/{id}.sock"));
    let mut straight = UnixStream::connect(socket).await.unwrap();
    straight.write_all(b"CONNECT 80\n").await.unwrap();
    straight.read_exact(&mut [0; 6]).await.unwrap();
    let (sender, connection) = handshake(TokioIo::new(straight)).await.unwrap();
    tokio::spawn(connection);
    one_by_one("guest", sender).await;

    let relay = world.hosts[0].relay.as_ref().unwrap().address.to_string();
    let stream = warren_gateway::tunnel::dial(&relay).await.unwrap();
    let stream = warren_gateway::tunnel::enter(stream, &relay, &id).await.unwrap();
    let (sender, connection) = handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    one_by_one("relay, guest", sender).await;

    one_by_one("gateway, relay, guest", connect(world.address()).await).await;

    let mut sender = connect(world.address()).await;
    let names: Vec<_> = (0..COLD).map(|number| format!("cold{number}")).collect();
    for name in &names {
        world.function(name, 60_000, 0).await;
    }
    let mut times = Vec::new();
    for name in &names {
        times.push(call(&mut sender, name).await);
    }
    tell("cold", times);

    let begun = Instant::now();
    let callers = (0..CALLERS).map(|_| {
        let address = world.address();
        tokio::spawn(async move {
            let mut sender = connect(address).await;
            let mut times = Vec::new();
            while begun.elapsed() < TIME {
                times.push(call(&mut sender, "shop").await);
            }
            times
        })
    });
    let mut times = Vec::new();
    for caller in callers.collect::<Vec<_>>() {
        times.extend(caller.await.unwrap());
    }
    let rate = times.len() as f64 / begun.elapsed().as_secs_f64();
    tell(&format!("{CALLERS} callers, {rate:.0} calls/s"), times);
}

async fn connect(address: SocketAddr) -> Sender {
    let stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (sender, connection) = handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

async fn call(sender: &mut Sender, function: &str) -> Duration {
    sender.ready().await.unwrap();
    let begun = Instant::now();
    let answer = sender.send_request(request(function, "/id").body(Full::default()).unwrap()).await;
    let answer = answer.unwrap();
    assert_eq!(answer.status(), 200);
    answer.into_body().collect().await.unwrap();
    begun.elapsed()
}

async fn one_by_one(what: &str, mut sender: Sender) {
    let mut times = Vec::with_capacity(CALLS);
    for _ in 0..CALLS {
        times.push(call(&mut sender, "shop").await);
    }
    tell(what, times.split_off(CALLS / 10));
}

fn tell(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_nanos() as f64 / 1e3;
    println!("{what}: p50 {:.0} us, p99 {:.0} us, n {}", at(0.5), at(0.99), times.len());
}
