//! Heads of requests and responses.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::Fields;
use super::body::Framing;
use crate::http::values;

/// The longest head that is read, in bytes.
pub const HEAD_MAX: usize = 64 * 1024;

/// The most fields of one.
const FIELDS_MAX: usize = 128;

/// What was received is not HTTP/1.1, or not within limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

/// A request's head.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub target: String,
    pub fields: Fields,
}

/// A response's head.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub fields: Fields,
}

/// A head and its length, once it is there as a whole.
type Parsed<T> = Result<Option<(T, usize)>, Malformed>;

/// Reads a request's head.
pub fn request(bytes: &[u8]) -> Parsed<Request> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut head = httparse::Request::new(&mut fields);
    match head.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => {
            if head.version != Some(1) {
                return Err(Malformed("HTTP/1.1 only"));
            }
            let method = head.method.unwrap_or_default().to_string();
            let target = head.path.unwrap_or_default().to_string();
            Ok(Some((Request { method, target, fields: copied(head.headers) }, length)))
        }
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_MAX => Ok(None),
        Ok(httparse::Status::Partial) => Err(Malformed("the head is longer than 64 KiB")),
        Err(httparse::Error::TooManyHeaders) => Err(Malformed("more than 128 fields")),
        Err(_) => Err(Malformed("the head cannot be read")),
    }
}

/// Reads a response's head.
pub fn response(bytes: &[u8]) -> Parsed<Response> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut head = httparse::Response::new(&mut fields);
    match head.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => {
            let status = head.code.unwrap_or_default();
            Ok(Some((Response { status, fields: copied(head.headers) }, length)))
        }
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_MAX => Ok(None),
        Ok(httparse::Status::Partial) => Err(Malformed("the head is longer than 64 KiB")),
        Err(httparse::Error::TooManyHeaders) => Err(Malformed("more than 128 fields")),
        Err(_) => Err(Malformed("the head cannot be read")),
    }
}

fn copied(fields: &[httparse::Header]) -> Fields {
    fields.iter().map(|field| (field.name.to_string(), field.value.to_vec())).collect()
}

/// How long a message's body is, by its fields (RFC 9112, 6.3); `None`: they do not say.
pub fn framing(fields: &Fields) -> Result<Option<Framing>, Malformed> {
    let mut codings = values(fields, "transfer-encoding");
    if let Some(coding) = codings.next() {
        // With a length beside it, somebody on the way may have understood another one.
        if !coding.eq_ignore_ascii_case(b"chunked")
            || codings.next().is_some()
            || values(fields, "content-length").next().is_some()
        {
            return Err(Malformed("a transfer coding other than chunked, or a length beside it"));
        }
        return Ok(Some(Framing::Chunked));
    }
    let mut length = None;
    for value in values(fields, "content-length") {
        let digits = value.iter().all(u8::is_ascii_digit);
        let number = core::str::from_utf8(value).ok().filter(|_| digits);
        let number = number.and_then(|value| value.parse::<u64>().ok());
        match (number, length) {
            (Some(number), None) => length = Some(number),
            (Some(number), Some(known)) if number == known => {}
            _ => return Err(Malformed("the content length is none")),
        }
    }
    Ok(length.map(Framing::Length))
}

/// Writes fields and the end of the head.
pub fn write_fields(fields: &Fields, out: &mut Vec<u8>) {
    for (name, value) in fields {
        for part in [name.as_bytes(), b": ", value, b"\r\n"] {
            out.extend_from_slice(part);
        }
    }
    out.extend_from_slice(b"\r\n");
}

/// Whether it is a name that a field can have (RFC 9110, 5.1).
pub fn is_name(name: &str) -> bool {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !name.is_empty() && name.bytes().all(is_token)
}

/// Whether it is a value that a field can have (RFC 9110, 5.5).
pub fn is_value(value: &[u8]) -> bool {
    value.iter().all(|&byte| byte == b'\t' || (byte >= b' ' && byte != 0x7f))
}

/// Reads what follows the last chunk.
pub fn trailers(bytes: &[u8]) -> Parsed<Fields> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    match httparse::parse_headers(bytes, &mut fields) {
        Ok(httparse::Status::Complete((length, fields))) => Ok(Some((copied(fields), length))),
        Ok(httparse::Status::Partial) => Ok(None),
        Err(_) => Err(Malformed("trailers cannot be read")),
    }
}
