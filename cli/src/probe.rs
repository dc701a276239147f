//! `warren vm probe`: operations of the built-in network probe.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::str::FromStr;

use clap::Subcommand;
use tonic::codegen::http::Uri;
use warren_abi::probe::{self as abi, Request};

use crate::error::Error;

/// What the microVM is to try.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Operation {
    /// Report the identity it runs with.
    Identity,
    /// Open a TCP connection and close it.
    TcpConnect {
        #[arg(value_name = "ADDRESS:PORT")]
        to: SocketAddrV4,
    },
    /// Get a URL (HTTP/1.1, numeric address).
    HttpGet {
        /// Such as `http://10.1.0.20:8080/index.html`.
        url: HttpUrl,
        /// `Host` header; the address otherwise.
        #[arg(long, value_name = "NAME")]
        host: Option<String>,
    },
    /// Send Redis commands on one connection.
    Redis {
        #[arg(value_name = "ADDRESS:PORT")]
        to: SocketAddrV4,
        /// A command and its arguments; a word "," begins the next command.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Send numbered datagrams that the server sends back.
    UdpEcho {
        #[arg(value_name = "ADDRESS:PORT")]
        to: SocketAddrV4,
        /// How many.
        #[arg(long, default_value_t = 1)]
        count: u32,
        /// Time from one to the next; 0 waits for each answer before the next.
        #[arg(long, value_name = "MICROSECONDS", default_value_t = 0)]
        interval: u32,
        /// Payload of each.
        #[arg(long, value_name = "BYTES", default_value_t = 64,
            value_parser = clap::value_parser!(u16).range(8..=1400))]
        length: u16,
    },
    /// Ask a DNS server for the IPv4 addresses of a name.
    Dns {
        #[arg(value_name = "ADDRESS[:PORT]")]
        server: DnsServer,
        name: String,
    },
    /// Send bytes on a TCP connection and wait until the server closes it.
    BulkSend {
        #[arg(value_name = "ADDRESS:PORT")]
        to: SocketAddrV4,
        #[arg(long)]
        bytes: u64,
    },
    /// Receive bytes on a TCP connection.
    BulkReceive {
        #[arg(value_name = "ADDRESS:PORT")]
        to: SocketAddrV4,
        /// At most so many.
        #[arg(long)]
        bytes: u64,
    },
    /// Put an Ethernet frame on the wire as it is.
    SendFrame {
        /// From the destination MAC on, in hexadecimal digits.
        #[arg(value_name = "HEX")]
        frame: Frame,
    },
    /// Keep a text in memory, in place of what it kept before.
    Remember { text: String },
    /// Report what it keeps.
    Recall,
}

impl Operation {
    /// The request to the probe.
    pub fn into_request(self, timeout_ms: u32) -> Result<Request, Error> {
        let operation = match self {
            Self::Identity => abi::Operation::Identity,
            Self::TcpConnect { to } => abi::Operation::TcpConnect { to: endpoint(to) },
            Self::HttpGet { url, host } => abi::Operation::HttpGet {
                to: endpoint(url.to),
                host: host.unwrap_or(url.host),
                path: url.path,
            },
            Self::Redis { to, command } => {
                let commands: Vec<_> =
                    command.split(|word| word == ",").map(<[String]>::to_vec).collect();
                if commands.iter().any(Vec::is_empty) {
                    return Err(Error::Usage("a \",\" stands between two Redis commands".into()));
                }
                abi::Operation::Redis { to: endpoint(to), commands }
            }
            Self::UdpEcho { to, count, interval, length } => {
                abi::Operation::UdpEcho { to: endpoint(to), count, length, interval_us: interval }
            }
            Self::Dns { server, name } => abi::Operation::DnsQuery { to: endpoint(server.0), name },
            Self::BulkSend { to, bytes } => abi::Operation::BulkSend { to: endpoint(to), bytes },
            Self::BulkReceive { to, bytes } => {
                abi::Operation::BulkReceive { to: endpoint(to), bytes }
            }
            Self::SendFrame { frame } => abi::Operation::SendFrame { frame: frame.0 },
            Self::Remember { text } => abi::Operation::Remember { bytes: text.into_bytes() },
            Self::Recall => abi::Operation::Recall,
        };
        Ok(Request { operation, timeout_ms })
    }
}

fn endpoint(to: SocketAddrV4) -> abi::Endpoint {
    abi::Endpoint { address: to.ip().octets(), port: to.port() }
}

/// A URL that the probe can get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpUrl {
    to: SocketAddrV4,
    host: String,
    path: String,
}

impl FromStr for HttpUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write it like http://10.1.0.20:8080/path, with a numeric address";
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        let (Some("http"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(wrong().into());
        };
        let address: Ipv4Addr = authority.host().parse().map_err(|_| wrong())?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        Ok(Self {
            to: SocketAddrV4::new(address, authority.port_u16().unwrap_or(80)),
            host: authority.to_string(),
            path: path.to_owned(),
        })
    }
}

/// A DNS server: port 53 if none is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DnsServer(SocketAddrV4);

impl FromStr for DnsServer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse()
            .or_else(|_| text.parse().map(|address| SocketAddrV4::new(address, 53)))
            .map(Self)
            .map_err(|_| "write it like 10.1.0.2 or 10.1.0.2:53".into())
    }
}

/// The bytes of an Ethernet frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame(Vec<u8>);

impl FromStr for Frame {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits: Option<Vec<_>> = text.chars().map(|digit| digit.to_digit(16)).collect();
        match digits {
            Some(digits) if digits.len() % 2 == 0 && digits.len() >= 28 => Ok(Self(
                digits.chunks_exact(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect(),
            )),
            _ => Err("write at least 14 bytes, two hexadecimal digits each".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Arguments, Command, VmCommand};

    fn request(line: &str) -> Result<abi::Operation, String> {
        let line = format!("warren vm probe 3a {line}");
        let arguments = Arguments::try_parse_from(line.split_whitespace())
            .map_err(|error| error.to_string())?;
        let Command::Vm(VmCommand::Probe { id, timeout_ms, operation }) = arguments.command else {
            return Err("not a probe".into());
        };
        assert_eq!((id.as_str(), timeout_ms), ("3a", 5000));
        let request = operation.into_request(timeout_ms).map_err(|error| error.to_string())?;
        Ok(request.operation)
    }

    const TO: abi::Endpoint = abi::Endpoint { address: [10, 1, 0, 2], port: 80 };

    #[test]
    fn each_operation() {
        let words = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
        let cases = [
            ("identity", abi::Operation::Identity),
            ("tcp-connect 10.1.0.2:80", abi::Operation::TcpConnect { to: TO }),
            (
                "http-get http://10.1.0.2",
                abi::Operation::HttpGet { to: TO, host: "10.1.0.2".into(), path: "/".into() },
            ),
            (
                "http-get http://10.1.0.2:80/a?b=c --host example.com",
                abi::Operation::HttpGet {
                    to: TO,
                    host: "example.com".into(),
                    path: "/a?b=c".into(),
                },
            ),
            (
                "redis 10.1.0.2:80 SET k -1 , GET k",
                abi::Operation::Redis {
                    to: TO,
                    commands: vec![words(&["SET", "k", "-1"]), words(&["GET", "k"])],
                },
            ),
            (
                "udp-echo 10.1.0.2:80 --count 7 --interval 100",
                abi::Operation::UdpEcho { to: TO, count: 7, length: 64, interval_us: 100 },
            ),
            (
                "dns 10.1.0.2 db.internal",
                abi::Operation::DnsQuery {
                    to: abi::Endpoint { port: 53, ..TO },
                    name: "db.internal".into(),
                },
            ),
            ("bulk-send 10.1.0.2:80 --bytes 9", abi::Operation::BulkSend { to: TO, bytes: 9 }),
            (
                "bulk-receive 10.1.0.2:80 --bytes 9",
                abi::Operation::BulkReceive { to: TO, bytes: 9 },
            ),
            (
                "send-frame ffffffffffff0200000000010806",
                abi::Operation::SendFrame {
                    frame: vec![255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 8, 6],
                },
            ),
        ];
        for (line, expected) in cases {
            assert_eq!(request(line), Ok(expected), "{line}");
        }
    }

    #[test]
    fn wrong_arguments_are_explained() {
        let cases = [
            ("tcp-connect 10.1.0.2", "10.1.0.2"),
            ("http-get https://10.1.0.2/", "http://10.1.0.20:8080/path"),
            ("http-get http://example.com/", "numeric address"),
            ("redis 10.1.0.2:80 SET a 1 ,", "between two Redis commands"),
            ("udp-echo 10.1.0.2:80 --length 7", "8..=1400"),
            ("dns 10.1.0.2:x name", "10.1.0.2:53"),
            ("send-frame abc", "14 bytes"),
        ];
        for (line, part) in cases {
            let error = request(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
