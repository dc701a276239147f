//! HTTP/1.1, one request on a connection of its own.

use alloc::format;
use alloc::vec::Vec;

use httparse::{EMPTY_HEADER, Response, Status};
use warren_abi::probe::{Endpoint, Outcome, Timings};

use super::Failure;
use super::tcp::Connection;
use crate::machine::Machine;

/// The longest head that is read, in bytes.
const HEAD_MAX: usize = 16 * 1024;

/// The longest body that is reported, in bytes.
const BODY_MAX: usize = 64 * 1024;

/// Where a body ends (RFC 9112, 6.3).
#[derive(Clone, Copy)]
enum Framing {
    Length(usize),
    Chunked,
    UntilClose,
}

pub fn get(
    machine: &mut Machine,
    to: Endpoint,
    host: &str,
    path: &str,
    deadline: u64,
    timings: &mut Timings,
) -> Result<Outcome, Failure> {
    let bad = |text: &str| text.bytes().any(|byte| byte <= b' ' || byte == 0x7f);
    if bad(host) || bad(path) || path.is_empty() {
        return Err(
            "host or path contain spaces or control characters, or the path is empty".into()
        );
    }
    let mut connection = Connection::open(machine, to, deadline, timings)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    connection.send(request.as_bytes())?;
    let mut received = Vec::new();
    let mut open = true;
    let (status, framing, head) = loop {
        if let Some(head) = parse_head(&received)? {
            break head;
        }
        if !open {
            return Err("the server closed before the end of its head".into());
        }
        if received.len() > HEAD_MAX {
            return Err("the server's head is longer than 16 KiB".into());
        }
        open = connection.receive_into(&mut received)?;
        if timings.first_byte_ns == 0 {
            timings.first_byte_ns = connection.machine.now_ns();
        }
    };
    received.drain(..head);
    let body = loop {
        if let Some(body) = whole_body(&received, framing, !open)? {
            break body;
        }
        if !open {
            return Err("the server closed before the end of the body".into());
        }
        open = connection.receive_into(&mut received)?;
    };
    connection.finish();
    Ok(Outcome::Http { status, body })
}

/// Status, framing of the body and length of the head, once it is whole.
fn parse_head(bytes: &[u8]) -> Result<Option<(u16, Framing, usize)>, Failure> {
    let mut headers = [EMPTY_HEADER; 64];
    let mut response = Response::new(&mut headers);
    let Status::Complete(head) =
        response.parse(bytes).map_err(|_| Failure::from("the server does not speak HTTP/1.1"))?
    else {
        return Ok(None);
    };
    let status = response.code.unwrap_or(0);
    let mut framing = Framing::UntilClose;
    if status == 204 || status == 304 {
        framing = Framing::Length(0);
    }
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            framing = Framing::Chunked;
            break;
        }
        if header.name.eq_ignore_ascii_case("content-length") {
            let length =
                core::str::from_utf8(header.value).ok().and_then(|v| v.trim().parse().ok());
            framing = Framing::Length(length.ok_or("the server's Content-Length is no number")?);
        }
    }
    Ok(Some((status, framing, head)))
}

/// The body, cut at [`BODY_MAX`], once enough of it has come.
fn whole_body(bytes: &[u8], framing: Framing, closed: bool) -> Result<Option<Vec<u8>>, Failure> {
    let whole = match framing {
        Framing::Length(length) => {
            let length = length.min(BODY_MAX);
            (bytes.len() >= length).then(|| bytes[..length].to_vec())
        }
        Framing::UntilClose => {
            (closed || bytes.len() >= BODY_MAX).then(|| bytes[..bytes.len().min(BODY_MAX)].to_vec())
        }
        Framing::Chunked => chunked(bytes)?,
    };
    Ok(whole)
}

/// Decodes chunks (RFC 9112, 7.1).
fn chunked(mut bytes: &[u8]) -> Result<Option<Vec<u8>>, Failure> {
    let mut body = Vec::new();
    loop {
        let size = httparse::parse_chunk_size(bytes)
            .map_err(|_| Failure::from("the server's chunks are malformed"))?;
        let Status::Complete((head, size)) = size else { return Ok(None) };
        if size == 0 {
            return Ok(Some(body));
        }
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let available = &bytes[head..];
        let room = BODY_MAX - body.len();
        body.extend_from_slice(&available[..available.len().min(size).min(room)]);
        if body.len() == BODY_MAX {
            return Ok(Some(body));
        }
        // The chunk ends with CR LF.
        let Some(rest) = size.checked_add(2).and_then(|end| available.get(end..)) else {
            return Ok(None);
        };
        bytes = rest;
    }
}
