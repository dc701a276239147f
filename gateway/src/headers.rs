//! Header fields on their way through: those of one hop are taken away, and a function is told who
//! called.

use std::net::IpAddr;

use hyper::header::{
    CONNECTION, EXPECT, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};

/// Meant for the next hop only (RFC 9110, section 7.6.1), `Expect` because the server here has
/// answered it already.
const HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
    EXPECT,
];
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Headers that only Warren sets begin so.
const OWN: &str = "warren-";

/// Takes away what is for one hop, those that `Connection` names among it.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<_> = tokens(headers, CONNECTION)
            .filter_map(|token| HeaderName::from_bytes(token.as_bytes()).ok())
            .collect();
        for name in named {
            headers.remove(name);
        }
    }
    for name in HOP {
        headers.remove(name);
    }
}

/// Whether the connection is to end after this message.
pub fn closes(headers: &HeaderMap) -> bool {
    tokens(headers, CONNECTION).any(|token| token.eq_ignore_ascii_case("close"))
}

/// Whether another protocol is wanted. HTTP/2 by `Upgrade: h2c` is not: without it, all goes on as well.
pub fn upgrades(headers: &HeaderMap) -> bool {
    let asked = tokens(headers, CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    asked && tokens(headers, UPGRADE).any(|token| !token.eq_ignore_ascii_case("h2c"))
}

/// Takes away the headers that only Warren sets.
pub fn remove_own(headers: &mut HeaderMap) {
    let own = headers.keys().filter(|name| name.as_str().starts_with(OWN));
    for name in own.cloned().collect::<Vec<_>>() {
        headers.remove(name);
    }
}

fn tokens(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

/// Tells the function who called, and as which host. Without `trusted`, whatever the caller says
/// of that is dropped; with it, this hop is added.
pub fn forwarded(headers: &mut HeaderMap, peer: IpAddr, host: &HeaderValue, trusted: bool) {
    remove_own(headers);
    if !trusted {
        for name in [FORWARDED, FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PROTO] {
            headers.remove(name);
        }
    }
    let peer = peer.to_canonical();
    append(headers, FORWARDED_FOR, peer.to_string());
    let node = if peer.is_ipv6() { format!("\"[{peer}]\"") } else { peer.to_string() };
    // What is no host name is not quoted either: it must not add parameters.
    let name = host.to_str().unwrap_or_default();
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte));
    let name = if plain { name } else { "" };
    append(headers, FORWARDED, format!("for={node};host=\"{name}\";proto=http"));
    headers.entry(FORWARDED_HOST).or_insert_with(|| host.clone());
    headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static("http"));
    headers.insert(HOST, host.clone());
}

/// Adds to the list that is there.
fn append(headers: &mut HeaderMap, name: HeaderName, value: String) {
    let before = headers.get(&name).and_then(|before| before.to_str().ok());
    let whole = match before {
        Some(before) => format!("{before}, {value}"),
        None => value,
    };
    if let Ok(whole) = HeaderValue::try_from(whole) {
        headers.insert(name, whole);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let fields = fields
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        let mut headers = HeaderMap::new();
        fields.for_each(|(name, value)| {
            headers.append(name, value);
        });
        headers
    }

    #[test]
    fn what_is_for_one_hop_is_taken_away() {
        let mut fields = headers(&[
            ("connection", "close, X-Private"),
            ("connection", "keep-alive"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("te", "trailers"),
            ("x-public", "2"),
        ]);
        assert!(closes(&fields));
        remove_hop_by_hop(&mut fields);
        assert_eq!(fields, headers(&[("x-public", "2")]));
        assert!(!closes(&fields));
    }

    #[test]
    fn a_websocket_is_an_upgrade_and_h2c_is_not() {
        let upgrade =
            |protocol| upgrades(&headers(&[("connection", "Upgrade"), ("upgrade", protocol)]));
        assert!(upgrade("websocket"));
        assert!(!upgrade("h2c"));
        assert!(!upgrades(&headers(&[("upgrade", "websocket")])));
    }

    #[test]
    fn callers_are_told_and_not_believed() {
        let sent =
            [("x-forwarded-for", "6.6.6.6"), ("forwarded", "for=6.6.6.6"), ("warren-error", "x")];
        let host = HeaderValue::from_static("shop.example:80");
        let told = |trusted, peer: &str| {
            let mut fields = headers(&sent);
            forwarded(&mut fields, peer.parse().unwrap(), &host, trusted);
            let text =
                |name: &str| fields.get(name).map(|value| value.to_str().unwrap().to_owned());
            assert_eq!(text("host").as_deref(), Some("shop.example:80"));
            assert_eq!(text("x-forwarded-host").as_deref(), Some("shop.example:80"));
            assert_eq!(text("x-forwarded-proto").as_deref(), Some("http"));
            assert_eq!(text("warren-error"), None);
            (text("x-forwarded-for").unwrap(), text("forwarded").unwrap())
        };
        let own = "for=1.2.3.4;host=\"shop.example:80\";proto=http";
        assert_eq!(told(false, "1.2.3.4"), ("1.2.3.4".into(), own.into()));
        let both = ("6.6.6.6, 1.2.3.4".into(), format!("for=6.6.6.6, {own}"));
        assert_eq!(told(true, "::ffff:1.2.3.4"), both);
        let (_, six) = told(false, "2001:db8::1");
        assert!(six.starts_with("for=\"[2001:db8::1]\";"), "{six}");
    }
}
