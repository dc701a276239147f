//! The metadata service.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use warren_dataplane::datapath::DropReason;
use warren_netns::capture::Capture;
use warren_netns::netns::Namespace;

use super::{METADATA, Served};
use crate::bed::{VNI_A, VNI_B};
use crate::guest::{KernelGuest, PATIENCE, SILENCE};

const TOKEN: &str = "X-Warren-Metadata-Token";
const LIFETIME: &str = "X-Warren-Metadata-Token-TTL-Seconds";

fn connect(guest: &Namespace) -> TcpStream {
    let stream = guest.run(|| TcpStream::connect_timeout(&(METADATA, 80).into(), PATIENCE));
    let stream = stream.expect("the service answers");
    stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    stream
}

/// Makes a request; its status, its head and its body.
fn request(guest: &Namespace, line: &str, headers: &[(&str, &str)]) -> (u16, String, String) {
    request_on(connect(guest), line, headers)
}

fn request_on(
    mut stream: TcpStream,
    line: &str,
    headers: &[(&str, &str)],
) -> (u16, String, String) {
    let mut text = format!("{line} HTTP/1.1\r\nHost: {METADATA}\r\nConnection: close\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{text}\r\n").as_bytes()).expect("the service reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("the service answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("it is an answer");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("it has a code");
    (status, head.to_lowercase(), body.to_owned())
}

fn open_session(guest: &Namespace) -> String {
    let (status, _, token) = request(guest, "PUT /latest/api/token", &[(LIFETIME, "60")]);
    assert_eq!(status, 200, "{token}");
    token
}

#[test]
fn an_instance_is_told_who_it_is_if_it_asks_as_it_must() {
    let served = Served::new();
    let guest = KernelGuest::plug(&served.bed, 1);
    served.attach(1, VNI_A);
    let guest = &guest.namespace;

    assert_eq!(request(guest, "GET /", &[]).0, 401);
    assert_eq!(request(guest, "GET /", &[(TOKEN, "AAAA")]).0, 401);
    for lifetime in ["0", "21601", "-1", "x", ""] {
        let answer = request(guest, "PUT /latest/api/token", &[(LIFETIME, lifetime)]);
        assert_eq!(answer.0, 400, "{answer:?}");
    }
    assert_eq!(request(guest, "PUT /latest/api/token", &[]).0, 400);
    let forwarded = [(LIFETIME, "60"), ("X-Forwarded-For", "10.0.0.1")];
    assert_eq!(request(guest, "PUT /latest/api/token", &forwarded).0, 403);

    let token = open_session(guest);
    let session = [(TOKEN, token.as_str())];
    let (status, head, body) = request(guest, "GET /", &session);
    assert_eq!(status, 200);
    assert!(head.contains("content-type: application/json"), "{head}");
    let document: serde_json::Value = serde_json::from_str(&body).expect("it is JSON");
    assert_eq!((&document["hostname"], &document["vni"]), (&"vm-1".into(), &VNI_A.into()));
    let (_, _, keys) = request(guest, "GET /latest/meta-data/", &session);
    assert!(keys.lines().any(|key| key == "instance-id"), "{keys}");
    for key in keys.lines() {
        let (status, _, value) = request(guest, &format!("GET /latest/meta-data/{key}"), &session);
        let expected = document[key].as_str().map_or(document[key].to_string(), str::to_owned);
        assert_eq!((status, value), (200, expected), "{key}");
    }
    assert_eq!(request(guest, "GET /latest/meta-data/iam", &session).0, 404);
    let forwarded = [session[0], ("x-forwarded-for", "10.0.0.1")];
    assert_eq!(request(guest, "GET /", &forwarded).0, 403);

    assert_eq!(request(guest, "GET /latest/identity/token", &session).0, 400);
    let line = "GET /latest/identity/token?audience=https://db.example";
    let (status, _, identity) = request(guest, line, &session);
    assert_eq!((status, identity.split('.').count()), (200, 3), "{identity}");
    let (_, _, keys) = request(guest, "GET /latest/identity/jwks.json", &session);
    let file = std::fs::read_to_string(served.bed.run.path().join("jwks.json"));
    assert_eq!(keys, file.expect("it is there"));

    // What knows IMDSv2 knows this, too.
    let lifetime = [("x-aws-ec2-metadata-token-ttl-seconds", "21600")];
    let (status, head, token) = request(guest, "PUT /latest/api/token", &lifetime);
    assert!(status == 200 && head.contains("x-aws-ec2-metadata-token-ttl-seconds: 21600"));
    let session = [("x-aws-ec2-metadata-token", token.as_str())];
    let id = request(guest, "GET /latest/meta-data/instance-id", &session);
    assert_eq!((id.0, &id.2), (200, &document["instance-id"].as_str().expect("a text").to_owned()));
    assert_eq!(served.bed.host().drops().expect("counters can be read"), []);
}

#[test]
fn answers_go_no_further_than_the_instance() {
    let served = Served::new();
    let guest = KernelGuest::plug(&served.bed, 1);
    served.attach(1, VNI_A);
    let capture = Capture::start(&guest.namespace, "eth0").expect("captures can be made");
    open_session(&guest.namespace);
    let frames = capture.drain().expect("the capture can be read");
    let from_service = |bytes: &[u8]| bytes.get(26..30) == Some(&METADATA.octets());
    let ttls: Vec<u8> =
        frames.iter().filter(|f| from_service(&f.bytes)).map(|f| f.bytes[22]).collect();
    assert!(ttls.len() >= 2 && ttls.iter().all(|ttl| *ttl == 1), "{ttls:?}");
}

#[test]
fn a_former_tenant_s_session_and_connection_end_with_it() {
    let served = Served::new();
    let guest = KernelGuest::plug(&served.bed, 1);
    served.attach(1, VNI_A);
    let guest = &guest.namespace;
    let token = open_session(guest);
    let mut stream = connect(guest);
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n").expect("the service reads");

    served.detach(1);
    served.attach(1, VNI_B);
    // The rest of the request comes from the next tenant, as far as the service can tell.
    let rest = format!("{TOKEN}: {token}\r\n\r\n");
    stream.write_all(rest.as_bytes()).expect("the kernel takes it");
    stream.set_read_timeout(Some(SILENCE)).expect("it is not zero");
    let got = stream.read(&mut [0; 64]);
    assert!(!matches!(got, Ok(1..)), "{got:?}");

    assert_eq!(request(guest, "GET /", &[(TOKEN, &token)]).0, 401);
    let token = open_session(guest);
    let (_, _, body) = request(guest, "GET /latest/meta-data/vni", &[(TOKEN, &token)]);
    assert_eq!(body, VNI_B.to_string());
}

#[test]
fn slow_clients_and_many_of_them_hold_up_nobody_else() {
    let served = Served::new();
    let (slow, other) = (KernelGuest::plug(&served.bed, 1), KernelGuest::plug(&served.bed, 2));
    served.attach(1, VNI_A);
    served.attach(2, VNI_A);
    // As many connections as a guest has, and one more, which is refused.
    let held: Vec<_> = (0..4).map(|_| connect(&slow.namespace)).collect();
    let refused = slow.namespace.run(|| TcpStream::connect((METADATA, 80)));
    let refused = refused.expect_err("all connections are in use").kind();
    assert_eq!(refused, std::io::ErrorKind::ConnectionRefused);
    open_session(&other.namespace);
    // They say nothing: after some seconds they are closed, and there is room again, once the
    // service has seen that the guest closed them, too.
    for mut stream in held {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).expect("it is closed in order");
    }
    let deadline = Instant::now() + PATIENCE;
    let stream = loop {
        match slow.namespace.run(|| TcpStream::connect((METADATA, 80))) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "there is no room again: {error}"),
        }
    };
    stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    let (status, _, token) = request_on(stream, "PUT /latest/api/token", &[(LIFETIME, "60")]);
    assert_eq!(status, 200, "{token}");
}

#[test]
fn services_come_back_with_the_daemon_and_keep_their_sessions() {
    let mut served = Served::new();
    let guest = KernelGuest::plug(&served.bed, 1);
    served.attach(1, VNI_A);
    let token = open_session(&guest.namespace);
    served.stop();
    let silent = guest
        .namespace
        .run(|| TcpStream::connect_timeout(&(METADATA, 80).into(), SILENCE))
        .expect_err("nobody is there");
    assert_eq!(silent.kind(), std::io::ErrorKind::TimedOut);
    served.bed.reopen_host();
    served.start();
    assert_eq!(request(&guest.namespace, "GET /", &[(TOKEN, &token)]).0, 200);
}

#[test]
fn a_guest_that_asks_too_often_is_not_listened_to() {
    let served = Served::new();
    let (loud, other) = (KernelGuest::plug(&served.bed, 1), KernelGuest::plug(&served.bed, 2));
    served.attach(1, VNI_A);
    served.attach(2, VNI_A);
    let dropped = || served.bed.host_drops(1, DropReason::ServiceRate);
    loud.namespace.run(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("there is a port");
        // Until it is too much: how many that are depends on how fast this machine is.
        while dropped() == 0 {
            for _ in 0..500 {
                socket.send_to(b"no question", (super::DNS, 53)).ok();
            }
        }
    });
    open_session(&other.namespace);
    assert_eq!(served.bed.host_drops(2, DropReason::ServiceRate), 0);
}
