//! HTTP/1.1 (RFC 9112): heads and bodies, as a server towards the host and as a client in the network.

pub mod body;
pub mod client;
pub mod head;
pub mod server;

use alloc::string::String;
use alloc::vec::Vec;

/// Header fields or trailers, in order.
pub type Fields = Vec<(String, Vec<u8>)>;

/// All values of a field, of any case.
pub fn values<'a>(fields: &'a Fields, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    let same = fields.iter().filter(move |(known, _)| known.eq_ignore_ascii_case(name));
    same.map(|(_, value)| value.as_slice())
}

/// Fields that concern one connection (RFC 9110, 7.6.1), or say how long the body is, which is not the
/// function's to say twice.
pub fn is_of_the_connection(name: &str) -> bool {
    const NAMES: [&str; 7] = [
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    NAMES.iter().any(|known| known.eq_ignore_ascii_case(name))
}
