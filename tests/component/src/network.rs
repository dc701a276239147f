//! Sockets, names, and calls to others.

use std::fmt::Debug;
use std::io::{Read, Write};
use std::net::SocketAddr;

use wasip2::http::outgoing_handler::handle;
use wasip2::http::types::{Fields, Method, OutgoingBody, OutgoingRequest, Scheme};
use wasip2::io::streams::{InputStream, OutputStream};
use wasip2::sockets::instance_network::instance_network;
use wasip2::sockets::ip_name_lookup::resolve_addresses;
use wasip2::sockets::network::{
    ErrorCode, IpAddress, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress,
};
use wasip2::sockets::tcp::{ShutdownType, TcpSocket};
use wasip2::sockets::tcp_create_socket::create_tcp_socket;
use wasip2::sockets::udp::OutgoingDatagram;
use wasip2::sockets::udp_create_socket::create_udp_socket;

pub fn perform(what: &str, with: &str) -> Result<String, String> {
    let (address, rest) = with.split_once('=').unwrap_or((with, ""));
    match what {
        "/tcp" => tcp(address, rest),
        "/udp" => udp(address, rest.parse().unwrap()),
        "/lookup" => lookup(address).map(|addresses| addresses.join(" ")).map_err(named),
        "/get" => http(&Method::Get, address, 0),
        "/post" => http(&Method::Post, address, rest.parse().unwrap()),
        "/https" => https(address),
        _ => Err(format!("{what} is nothing to do with the network")),
    }
}

fn said(error: impl Debug) -> String {
    format!("{error:?}")
}

fn named(error: ErrorCode) -> String {
    error.name().into()
}

fn of_wasi(address: &str) -> IpSocketAddress {
    let SocketAddr::V4(address) = address.parse().unwrap() else { panic!("no IPv4 address") };
    let (port, address) = (address.port(), address.ip().octets().into());
    IpSocketAddress::Ipv4(Ipv4SocketAddress { port, address })
}

fn connect(address: &str) -> Result<(TcpSocket, InputStream, OutputStream), ErrorCode> {
    let socket = create_tcp_socket(IpAddressFamily::Ipv4)?;
    socket.start_connect(&instance_network(), of_wasi(address))?;
    loop {
        match socket.finish_connect() {
            Ok((input, output)) => return Ok((socket, input, output)),
            Err(ErrorCode::WouldBlock) => socket.subscribe().block(),
            Err(error) => return Err(error),
        }
    }
}

/// Sends so many bytes, says that there are no more, and counts what comes until the end.
fn tcp(address: &str, bytes: &str) -> Result<String, String> {
    let (socket, mut input, mut output) = connect(address).map_err(named)?;
    let bytes: usize = bytes.parse().unwrap();
    output.write_all(&vec![7; bytes]).map_err(said)?;
    output.flush().map_err(said)?;
    socket.shutdown(ShutdownType::Send).map_err(named)?;
    let mut came = Vec::new();
    input.read_to_end(&mut came).map_err(said)?;
    Ok(format!("{} of {}", came.iter().filter(|&&byte| byte == 7).count(), came.len()))
}

/// Sends datagrams one after the other, and counts those that come back as they were.
fn udp(address: &str, count: u8) -> Result<String, String> {
    let socket = create_udp_socket(IpAddressFamily::Ipv4).map_err(named)?;
    let any = of_wasi("0.0.0.0:0");
    socket.start_bind(&instance_network(), any).map_err(named)?;
    socket.finish_bind().map_err(named)?;
    let (incoming, outgoing) = socket.stream(Some(of_wasi(address))).map_err(named)?;
    let mut same = 0;
    for number in 0..count {
        outgoing.subscribe().block();
        assert!(outgoing.check_send().map_err(named)? > 0);
        let datagram = OutgoingDatagram { data: vec![number; 1000], remote_address: None };
        assert_eq!(outgoing.send(&[datagram]).map_err(named)?, 1);
        incoming.subscribe().block();
        let came = incoming.receive(1).map_err(named)?;
        same += came.iter().filter(|datagram| datagram.data == [number; 1000]).count();
    }
    Ok(format!("{same} of {count}"))
}

pub fn lookup(name: &str) -> Result<Vec<String>, ErrorCode> {
    let addresses = resolve_addresses(&instance_network(), name)?;
    let mut known = Vec::new();
    loop {
        match addresses.resolve_next_address() {
            Ok(None) => return Ok(known),
            Ok(Some(IpAddress::Ipv4((a, b, c, d)))) => known.push(format!("{a}.{b}.{c}.{d}")),
            Ok(Some(IpAddress::Ipv6(address))) => known.push(said(address)),
            Err(ErrorCode::WouldBlock) => addresses.subscribe().block(),
            Err(error) => return Err(error),
        }
    }
}

fn request(method: &Method, scheme: &Scheme, to: &str) -> OutgoingRequest {
    let (authority, path) = to.split_once('/').unwrap_or((to, ""));
    let request = OutgoingRequest::new(Fields::new());
    request.set_method(method).unwrap();
    request.set_scheme(Some(scheme)).unwrap();
    request.set_authority(Some(authority)).unwrap();
    request.set_path_with_query(Some(&format!("/{path}"))).unwrap();
    request
}

/// Sends a body of so many bytes as it is made, and says of the answer what it is.
fn http(method: &Method, to: &str, bytes: usize) -> Result<String, String> {
    let request = request(method, &Scheme::Http, to);
    let body = (bytes > 0).then(|| request.body().unwrap());
    let future = handle(request, None).map_err(said)?;
    if let Some(body) = body {
        let mut stream = body.write().unwrap();
        let piece = [7; 10_000];
        let mut left = bytes;
        while left > 0 {
            let length = left.min(piece.len());
            stream.write_all(&piece[..length]).map_err(said)?;
            left -= length;
        }
        stream.flush().map_err(said)?;
        drop(stream);
        OutgoingBody::finish(body, None).map_err(said)?;
    }
    future.subscribe().block();
    let response = future.get().unwrap().unwrap().map_err(said)?;
    let mut came = Vec::new();
    let body = response.consume().unwrap();
    body.stream().unwrap().read_to_end(&mut came).map_err(said)?;
    let begin = String::from_utf8_lossy(&came[..came.len().min(100)]);
    Ok(format!("{} {} {begin}", response.status(), came.len()))
}

fn https(to: &str) -> Result<String, String> {
    handle(request(&Method::Get, &Scheme::Https, to), None).map(|_| "begun".into()).map_err(said)
}
