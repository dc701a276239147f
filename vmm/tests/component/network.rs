//! The network as a function has it: ordinary servers, over a TAP in a network namespace.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;

use super::caller::Caller;
use super::common::{identity, kvm, tap_with};
use super::{Function, stop};

const HOST: &str = "169.254.1.1";

/// The resolver's address.
const DNS: &str = "169.254.169.253";

/// Accepts connections on a port, each served on a thread of its own.
fn tcp(port: u16, serve: fn(TcpStream)) {
    let listener = TcpListener::bind((HOST, port)).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || serve(stream));
        }
    });
}

fn serve() {
    let address = format!("addr add {DNS}/32 dev w0");
    for command in ["link set lo up", "addr add 169.254.1.1/16 dev w0", &address, "link set w0 up"]
    {
        assert!(Command::new("ip").args(command.split(' ')).status().unwrap().success());
    }
    tcp(7, |mut stream| {
        let mut reader = stream.try_clone().unwrap();
        let _ = std::io::copy(&mut reader, &mut stream);
    });
    // Takes everything, then resets.
    tcp(9, |mut stream| {
        let _ = stream.read(&mut [0; 10]);
        drop(stream);
    });
    tcp(80, |mut stream| {
        let _ = http(&mut stream);
    });
    let echo = UdpSocket::bind((HOST, 7)).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = echo.recv_from(&mut buffer) {
            let _ = echo.send_to(&buffer[..length], from);
        }
    });
    let dns = UdpSocket::bind((DNS, 53)).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = dns.recv_from(&mut buffer) {
            let mut reply = buffer[..length].to_vec();
            if reply[12..].starts_with(b"\x02db\x05local\0") {
                // A response with two addresses, the name given by a pointer.
                (reply[2], reply[3], reply[7]) = (0x81, 0x80, 2);
                for address in [[169, 254, 1, 1], [169, 254, 1, 9]] {
                    reply.extend(b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04");
                    reply.extend(address);
                }
            } else {
                (reply[2], reply[3]) = (0x81, 0x83);
            }
            let _ = dns.send_to(&reply, from);
        }
    });
}

/// Answers one request, with what its path says.
fn http(stream: &mut TcpStream) -> std::io::Result<()> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    let path = head.split(' ').nth(1).unwrap_or_default();
    match path {
        "/length" => stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloXXX"),
        "/close" => stream.write_all(b"HTTP/1.1 404 Not Found\r\n\r\nto the end"),
        "/chunks" => stream.write_all(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n\
              5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n",
        ),
        "/short" => stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello"),
        "/garbage" => stream.write_all(b"SSH-2.0-OpenSSH\r\n\r\n"),
        "/head" => {
            let lines = head.lines().skip(1).filter(|line| !line.is_empty());
            let text = lines.collect::<Vec<_>>().join("|");
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len())
        }
        "/count" => {
            assert!(head.contains("transfer-encoding: chunked"), "{head}");
            let mut body = Vec::new();
            while !body.ends_with(b"\r\n0\r\n\r\n") {
                let mut piece = [0; 10_000];
                match stream.read(&mut piece)? {
                    0 => return Ok(()),
                    length => body.extend_from_slice(&piece[..length]),
                }
            }
            let sevens = body.split(|&byte| byte == 7).count() - 1;
            write!(stream, "HTTP/1.1 200 OK\r\n\r\n{sevens}")
        }
        // The connection ends without an answer.
        _ => Ok(()),
    }
}

#[tokio::test]
async fn functions_talk_to_others() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let mut microvm = host.parked_on(1, tap_with("w0", serve).unwrap()).await;
    microvm.release(&identity(1)).await.unwrap();
    let mut caller = Caller::new(microvm.path()).await;
    let get = |path: &str| format!("get?169.254.1.1:80{path}");
    for (target, said) in [
        ("tcp?169.254.1.1:7=0".to_owned(), "0 of 0"),
        ("tcp?169.254.1.1:7=100".to_owned(), "100 of 100"),
        ("tcp?169.254.1.1:7=1000000".to_owned(), "1000000 of 1000000"),
        ("tcp?169.254.1.1:1=0".to_owned(), "connection-refused"),
        ("udp?169.254.1.1:7=50".to_owned(), "50 of 50"),
        ("lookup?db.local".to_owned(), "169.254.1.1 169.254.1.9"),
        ("lookup?169.254.7.7".to_owned(), "169.254.7.7"),
        ("lookup?nobody.local".to_owned(), "name-unresolvable"),
        (get("/length"), "200 5 hello"),
        (get("/close"), "404 10 to the end"),
        (get("/chunks"), "201 11 hello world"),
        (get("/head"), "200 38 host: 169.254.1.1:80|connection: close"),
        (get("/garbage"), "ErrorCode::HttpProtocolError"),
        (get("/nothing"), "ErrorCode::ConnectionTerminated"),
        ("get?169.254.1.1:1/".to_owned(), "ErrorCode::ConnectionRefused"),
        ("get?db.local/length".to_owned(), "200 5 hello"),
        ("get?nobody.local/length".to_owned(), "ErrorCode::DnsError"),
        ("post?169.254.1.1:80/count=1".to_owned(), "200 1 1"),
        ("post?169.254.1.1:80/count=3000000".to_owned(), "200 7 3000000"),
        ("https?169.254.1.1".to_owned(), "ErrorCode::HttpRequestUriInvalid"),
    ] {
        let answer = caller.get(&format!("/network/{target}")).await;
        assert!(answer.text().starts_with(said), "{target}: {}", answer.text());
    }
    for (target, said) in [
        ("get?169.254.1.1:80/short", "the body was cut"),
        ("tcp?169.254.1.1:9=1000000", "closed the connection"),
    ] {
        let answer = caller.get(&format!("/network/{target}")).await;
        assert!(answer.status == 500 && answer.text().contains(said), "{target}: {answer:?}");
    }
    stop(microvm).await;
}

/// More calls to others than there is memory for, if what one took were not given back.
#[tokio::test]
async fn what_a_call_took_is_given_back() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let mut microvm = host.parked_on(1, tap_with("w0", serve).unwrap()).await;
    microvm.release(&identity(1)).await.unwrap();
    let mut caller = Caller::new(microvm.path()).await;
    for _ in 0..300 {
        let answer = caller.get("/network/get?169.254.1.1:80/length").await;
        assert_eq!(answer.text(), "200 5 hello");
        assert_eq!(caller.get("/network/udp?169.254.1.1:7=1").await.text(), "1 of 1");
    }
    stop(microvm).await;
}
