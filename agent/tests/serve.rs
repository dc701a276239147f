//! A connection carries bytes both ways, until each side has said all.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use warren_agent::serve::connect;

/// Larger than any buffer on the way, in bytes.
const MUCH: usize = 4 << 20;

/// A peer that is connected with a port: the peer's side, and what does it.
fn peer(port: u16) -> (UnixStream, JoinHandle<()>) {
    let (near, far) = UnixStream::pair().unwrap();
    (near, thread::spawn(move || connect(far.into(), port)))
}

fn server() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn pattern(seed: usize) -> Vec<u8> {
    (0..MUCH).map(|index| (index / 7 + seed) as u8).collect()
}

fn read_all(mut stream: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn much_goes_both_ways_at_once() {
    let (listener, port) = server();
    let (near, connection) = peer(port);
    let (server, _) = listener.accept().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            (&server).write_all(&pattern(1)).unwrap();
            server.shutdown(Shutdown::Write).unwrap();
        });
        scope.spawn(|| {
            (&near).write_all(&pattern(2)).unwrap();
            near.shutdown(Shutdown::Write).unwrap();
        });
        let received = scope.spawn(|| read_all(&server));
        assert!(read_all(&near) == pattern(1));
        assert!(received.join().unwrap() == pattern(2));
    });
    connection.join().unwrap();
}

#[test]
fn an_answer_comes_after_the_request_ended() {
    let (listener, port) = server();
    let (near, connection) = peer(port);
    let (server, _) = listener.accept().unwrap();
    (&near).write_all(b"question").unwrap();
    near.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&server), b"question");
    (&server).write_all(b"answer").unwrap();
    drop(server);
    assert_eq!(read_all(&near), b"answer");
    connection.join().unwrap();
}

#[test]
fn a_server_that_ends_ends_the_connection() {
    let (listener, port) = server();
    let (near, connection) = peer(port);
    drop(listener.accept().unwrap());
    assert_eq!(read_all(&near), b"");
    drop(near);
    connection.join().unwrap();
}

#[test]
fn a_server_may_start_late() {
    let (listener, port) = server();
    drop(listener);
    let (near, connection) = peer(port);
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    let (server, _) = listener.accept().unwrap();
    drop(near);
    assert_eq!(read_all(&server), b"");
    drop(server);
    connection.join().unwrap();
}
