//! As much of a client of Redis as a counter needs.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;

use wasip2::io::streams::{InputStream, OutputStream};
use wasip2::sockets::instance_network::instance_network;
use wasip2::sockets::network::{
    ErrorCode, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress, Ipv6SocketAddress,
};
use wasip2::sockets::tcp::TcpSocket;
use wasip2::sockets::tcp_create_socket::create_tcp_socket;

/// Adds one to the counter of that name, and returns what it is then.
pub fn increment(address: SocketAddr, name: &str) -> Result<u64, Box<dyn Error>> {
    // The streams are the socket's children: it is declared first, hence dropped last.
    let (_socket, input, mut output) = connect(address)?;
    // A name of bytes with its length first: it may hold anything.
    write!(output, "*2\r\n$4\r\nINCR\r\n${}\r\n{name}\r\n", name.len())?;
    output.flush()?;
    let mut line = String::new();
    BufReader::new(input).read_line(&mut line)?;
    match line.trim_end().split_at_checked(1) {
        Some((":", count)) => Ok(count.parse()?),
        Some(("-", error)) => Err(error.into()),
        _ => Err(format!("no answer of a Redis: {line:?}").into()),
    }
}

fn connect(address: SocketAddr) -> Result<(TcpSocket, InputStream, OutputStream), ErrorCode> {
    let family = match address {
        SocketAddr::V4(_) => IpAddressFamily::Ipv4,
        SocketAddr::V6(_) => IpAddressFamily::Ipv6,
    };
    let socket = create_tcp_socket(family)?;
    socket.start_connect(&instance_network(), of_wasi(address))?;
    loop {
        match socket.finish_connect() {
            Ok((input, output)) => return Ok((socket, input, output)),
            Err(ErrorCode::WouldBlock) => socket.subscribe().block(),
            Err(error) => return Err(error),
        }
    }
}

fn of_wasi(address: SocketAddr) -> IpSocketAddress {
    match address {
        SocketAddr::V4(v4) => IpSocketAddress::Ipv4(Ipv4SocketAddress {
            port: v4.port(),
            address: v4.ip().octets().into(),
        }),
        SocketAddr::V6(v6) => IpSocketAddress::Ipv6(Ipv6SocketAddress {
            port: v6.port(),
            flow_info: v6.flowinfo(),
            address: v6.ip().segments().into(),
            scope_id: v6.scope_id(),
        }),
    }
}
