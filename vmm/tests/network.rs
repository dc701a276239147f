//! The probe's operations against ordinary servers, over a TAP in a network namespace.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use common::{Host, identity, kvm, tap_with};
use warren_abi::probe::{Endpoint, Operation, Outcome, Reply, Request, decode, encode};
use warren_vmm::client::{Invocation, MicroVm};
use warren_vmm::control::EndReason;

const HOST: &str = "169.254.1.1";

/// A microVM whose gateway is this namespace's end of the TAP, with servers.
struct Network {
    _host: Host,
    microvm: MicroVm,
    invocation: Invocation,
}

impl Network {
    async fn new() -> Self {
        let host = Host::new("warren-guest").await;
        let tap = tap_with("w0", serve).unwrap();
        let mut microvm = host.parked_on(1, tap).await;
        microvm.release(&identity(1)).await.unwrap();
        let invocation = Invocation::connect(microvm.path()).await.unwrap();
        Self { _host: host, microvm, invocation }
    }

    async fn probe(&mut self, operation: Operation) -> Reply {
        let request = encode(&Request { operation, timeout_ms: 10_000 });
        let reply = decode::<Reply>(&self.invocation.call(&request).await.unwrap()).unwrap();
        assert!(reply.timings.start_ns > 0 && reply.timings.start_ns <= reply.timings.end_ns);
        reply
    }

    async fn outcome(&mut self, operation: Operation) -> Outcome {
        self.probe(operation).await.outcome.unwrap()
    }

    async fn refused(&mut self, operation: Operation) -> String {
        self.probe(operation).await.outcome.unwrap_err()
    }

    async fn end(mut self) {
        assert_eq!(self.microvm.stop().await.unwrap(), EndReason::Stopped);
    }
}

fn to(port: u16) -> Endpoint {
    Endpoint { address: [169, 254, 1, 1], port }
}

/// Accepts connections on a port, each served on a thread of its own.
fn tcp(port: u16, serve: fn(std::net::TcpStream)) {
    let listener = TcpListener::bind((HOST, port)).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || serve(stream));
        }
    });
}

fn serve() {
    for command in ["link set lo up", "addr add 169.254.1.1/16 dev w0", "link set w0 up"] {
        assert!(Command::new("ip").args(command.split(' ')).status().unwrap().success());
    }
    tcp(6379, |mut stream| {
        let mut received = Vec::new();
        let mut buffer = [0; 4096];
        // Each command ends with its last argument; answered in two pieces.
        while let Ok(length @ 1..) = stream.read(&mut buffer) {
            received.extend_from_slice(&buffer[..length]);
            let reply: &[u8] = match received.as_slice() {
                b"*1\r\n$4\r\nPING\r\n" => b"+PONG\r\n",
                b"*2\r\n$3\r\nGET\r\n$4\r\nlist\r\n" => b"*3\r\n$-1\r\n:7\r\n*1\r\n$2\r\n\r\n\r\n",
                b"*1\r\n$3\r\nBAD\r\n" => b"-ERR unknown\r\n",
                b"*1\r\n$4\r\nODD?\r\n" => b"HTTP/1.1 400 Bad Request\r\n",
                b"*1\r\n$3\r\nBYE\r\n" => return,
                _ => continue,
            };
            received.clear();
            let (first, second) = reply.split_at(reply.len() / 2);
            stream.write_all(first).unwrap();
            thread::sleep(Duration::from_millis(2));
            stream.write_all(second).unwrap();
        }
    });
    tcp(80, |mut stream| {
        let mut buffer = [0; 4096];
        let length = stream.read(&mut buffer).unwrap_or(0);
        let request = String::from_utf8_lossy(&buffer[..length]).into_owned();
        assert!(request.ends_with("\r\nHost: db\r\nConnection: close\r\n\r\n"), "{request}");
        let reply: Vec<u8> = match request.split(' ').nth(1).unwrap() {
            "/length" => b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloXXX".to_vec(),
            "/close" => b"HTTP/1.0 404 Not Found\r\n\r\nto the end".to_vec(),
            "/chunks" => b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
                5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n"
                .to_vec(),
            "/large" => [b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), vec![b'x'; 200_000]].concat(),
            "/short" => b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello".to_vec(),
            _ => b"garbage".to_vec(),
        };
        let _ = stream.write_all(&reply);
    });
    tcp(9, |mut stream| {
        let (mut received, mut buffer) = (0u64, vec![0; 1 << 16]);
        while let Ok(length @ 1..) = stream.read(&mut buffer) {
            for (n, byte) in (received..).zip(&buffer[..length]) {
                assert_eq!(u64::from(*byte), n % 251);
            }
            received += length as u64;
        }
    });
    tcp(19, |mut stream| {
        let pattern: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let _ = stream.write_all(&pattern);
    });
    tcp(20, |mut stream| {
        let mut pattern: Vec<u8> = (0..100_000u32).map(|n| (n % 251) as u8).collect();
        pattern[70_000] ^= 1;
        let _ = stream.write_all(&pattern);
    });
    let echo = UdpSocket::bind((HOST, 7)).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = echo.recv_from(&mut buffer) {
            let number = u64::from_be_bytes(buffer[..8].try_into().unwrap());
            // Every tenth is lost, of the others every seventh comes twice.
            if number % 10 == 9 {
                continue;
            }
            for _ in 0..if number % 7 == 0 { 2 } else { 1 } {
                let _ = echo.send_to(&buffer[..length], from);
            }
        }
    });
    let dns = UdpSocket::bind((HOST, 53)).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = dns.recv_from(&mut buffer) {
            let mut reply = buffer[..length].to_vec();
            if reply[12..].starts_with(b"\x02db\x05local\0") {
                // A response with two addresses, the name given by a pointer.
                (reply[2], reply[3], reply[7]) = (0x81, 0x80, 2);
                for last in [7, 8] {
                    reply.extend(b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\x0a\0\0");
                    reply.push(last);
                }
            } else {
                (reply[2], reply[3]) = (0x81, 0x83);
            }
            // Somebody else's answer first.
            let mut forged = reply.clone();
            forged[0] ^= 0xff;
            let _ = dns.send_to(&forged, from);
            let _ = dns.send_to(&reply, from);
        }
    });
}

#[tokio::test]
async fn tcp_connects_and_is_refused() {
    if !kvm() {
        return;
    }
    let mut network = Network::new().await;
    for _ in 0..3 {
        let reply = network.probe(Operation::TcpConnect { to: to(6379) }).await;
        assert_eq!(reply.outcome, Ok(Outcome::Done));
        assert!(reply.timings.start_ns < reply.timings.connected_ns);
        assert!(reply.timings.connected_ns < reply.timings.end_ns);
    }
    assert_eq!(network.refused(Operation::TcpConnect { to: to(1) }).await, "connection refused");
    assert!(network.refused(Operation::TcpConnect { to: to(0) }).await.contains("is 0"));
    network.end().await;
}

#[tokio::test]
async fn unreachable_server_is_given_up_in_time() {
    if !kvm() {
        return;
    }
    let mut network = Network::new().await;
    let nobody = Endpoint { address: [169, 254, 99, 99], port: 80 };
    let operation = Operation::TcpConnect { to: nobody };
    let request = encode(&Request { operation, timeout_ms: 150 });
    let reply: Reply = decode(&network.invocation.call(&request).await.unwrap()).unwrap();
    assert_eq!(reply.outcome, Err("no answer within 150 ms".to_owned()));
    // And the socket can be used again.
    let reply = network.outcome(Operation::TcpConnect { to: to(6379) }).await;
    assert_eq!(reply, Outcome::Done);
    network.end().await;
}

#[tokio::test]
async fn redis_replies_are_taken_whole() {
    if !kvm() {
        return;
    }
    let mut network = Network::new().await;
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let commands = vec![words("PING"), words("GET list"), words("BAD"), words("PING")];
    let outcome = network.outcome(Operation::Redis { to: to(6379), commands }).await;
    let expected: [&[u8]; 4] = [
        b"+PONG\r\n",
        b"*3\r\n$-1\r\n:7\r\n*1\r\n$2\r\n\r\n\r\n",
        b"-ERR unknown\r\n",
        b"+PONG\r\n",
    ];
    assert_eq!(outcome, Outcome::Redis(expected.map(<[u8]>::to_vec).to_vec()));
    for (command, complaint) in [("ODD?", "does not speak RESP2"), ("BYE", "closed before")] {
        let commands = vec![words(command)];
        let error = network.refused(Operation::Redis { to: to(6379), commands }).await;
        assert!(error.contains(complaint), "{error}");
    }
    network.end().await;
}

#[tokio::test]
async fn http_bodies_end_where_they_should() {
    if !kvm() {
        return;
    }
    let mut network = Network::new().await;
    let get = |path: &str| Operation::HttpGet {
        to: to(80),
        host: "db".to_owned(),
        path: path.to_owned(),
    };
    let cases = [
        ("/length", 200, b"hello".to_vec()),
        ("/close", 404, b"to the end".to_vec()),
        ("/chunks", 200, b"hello world".to_vec()),
        ("/large", 200, vec![b'x'; 65536]),
    ];
    for (path, status, body) in cases {
        let outcome = network.outcome(get(path)).await;
        assert!(outcome == Outcome::Http { status, body }, "{path}");
    }
    assert!(network.refused(get("/short")).await.contains("before the end of the body"));
    assert!(network.refused(get("/garbage")).await.contains("does not speak HTTP"));
    assert!(network.refused(get("/a b")).await.contains("contain spaces"));
    network.end().await;
}

#[tokio::test]
async fn udp_counts_each_datagram_once() {
    if !kvm() {
        return;
    }
    let mut network = Network::new().await;
    for interval_us in [500, 20_000] {
        let echo = Operation::UdpEcho { to: to(7), count: 50, length: 1400, interval_us };
        let outcome = network.outcome(echo).await;
        let Outcome::Udp { sent: 50, received: 45, longest_gap_ns: 1.. } = outcome else {
            panic!("{outcome:?}");
        };
    }
    // Each sent when the one before came back.
    let echo = Operation::UdpEcho { to: to(7), count: 9, length: 8, interval_us: 0 };
    let outcome = network.outcome(echo).await;
    assert!(matches!(outcome, Outcome::Udp { sent: 9, received: 9, .. }), "{outcome:?}");
    let echo = Operation::UdpEcho { to: to(7), count: 1, length: 7, interval_us: 0 };
    assert!(network.refused(echo).await.contains("8 to 1400"));
    network.end().await;
}

#[tokio::test]
async fn dns_believes_only_its_own_answer() {
    if !kvm() {
        return;
    }
    let mut network = Network::new().await;
    let query = |name: &str| Operation::DnsQuery { to: to(53), name: name.to_owned() };
    let outcome = network.outcome(query("db.local")).await;
    assert_eq!(outcome, Outcome::Dns(vec![[10, 0, 0, 7], [10, 0, 0, 8]]));
    assert!(network.refused(query("nobody.local")).await.contains("code 3"));
    assert!(network.refused(query("a..b")).await.contains("label"));
    network.end().await;
}

#[tokio::test]
async fn bulk_arrives_whole_and_in_order() {
    if !kvm() {
        return;
    }
    let mut network = Network::new().await;
    let bytes = 5_000_000;
    let outcome = network.outcome(Operation::BulkSend { to: to(9), bytes }).await;
    assert_eq!(outcome, Outcome::Bulk { bytes, corrupt_at: None });
    let all = network.outcome(Operation::BulkReceive { to: to(19), bytes: u64::MAX }).await;
    assert_eq!(all, Outcome::Bulk { bytes: 3_000_000, corrupt_at: None });
    let part = network.outcome(Operation::BulkReceive { to: to(19), bytes: 12_345 }).await;
    assert_eq!(part, Outcome::Bulk { bytes: 12_345, corrupt_at: None });
    let corrupt = network.outcome(Operation::BulkReceive { to: to(20), bytes: u64::MAX }).await;
    assert_eq!(corrupt, Outcome::Bulk { bytes: 100_000, corrupt_at: Some(70_000) });
    network.end().await;
}

/// A frame goes out as it is; a request that is none is answered, and the guest lives on.
#[tokio::test]
async fn frames_are_sent_as_they_are() {
    if !kvm() {
        return;
    }
    let mut network = Network::new().await;
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 99, 0x88, 0xb5]);
    frame.resize(60, 0);
    let outcome = network.outcome(Operation::SendFrame { frame }).await;
    assert_eq!(outcome, Outcome::Done);
    for frame in [vec![], vec![0; 1515]] {
        assert!(network.refused(Operation::SendFrame { frame }).await.contains("1 to 1514"));
    }
    let reply = network.invocation.call(b"\xff\xff\xff\xff").await.unwrap();
    let reply: Reply = decode(&reply).unwrap();
    assert_eq!(reply.outcome, Err("not a probe message of this version".to_owned()));
    network.end().await;
}
