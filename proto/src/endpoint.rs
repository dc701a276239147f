//! Where a gRPC server listens and a client connects.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tonic::transport::{self, Channel};

/// A connection that does not stand after this time is given up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A silent connection is asked for a sign of life after this time, and again this often.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A connection that gives no sign of life for this time is closed.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);

/// Where a gRPC server listens: `unix:/run/warren/agent.sock` or `http://192.0.2.1:7700`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// HTTP/2 without TLS.
    Tcp(SocketAddr),
}

/// A text that is no [`Endpoint`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is not an endpoint: write unix:/PATH or http://ADDRESS:PORT (a numeric address), \
     such as unix:/run/warren/control.sock or http://127.0.0.1:7700"
)]
pub struct InvalidEndpoint(String);

impl FromStr for Endpoint {
    type Err = InvalidEndpoint;

    fn from_str(text: &str) -> Result<Self, InvalidEndpoint> {
        let invalid = || InvalidEndpoint(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            // gRPC also writes unix:///PATH.
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') || path.contains('\0') {
                return Err(invalid());
            }
            // Two slashes in front would read as gRPC's when it is written again.
            return Ok(Self::Unix(format!("/{}", path.trim_start_matches('/')).into()));
        }
        let address = text.strip_prefix("http://").ok_or_else(invalid)?;
        address.trim_end_matches('/').parse().map(Self::Tcp).map_err(|_| invalid())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "http://{address}"),
        }
    }
}

impl TryFrom<String> for Endpoint {
    type Error = InvalidEndpoint;

    fn try_from(text: String) -> Result<Self, InvalidEndpoint> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.to_string()
    }
}

/// Why [`connect`] failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No socket there, or no process behind it.
    #[error("nothing listens at {0}: is its server running, and is this its endpoint?")]
    NothingListens(Endpoint),
    /// The socket belongs to another user.
    #[error("no permission to connect to {0}: run as the user of its server, or as root")]
    NotPermitted(Endpoint),
    /// Neither an answer nor a refusal within the connect timeout.
    #[error(
        "{0} did not answer within {seconds} s: is its machine up, and does a firewall let this \
         connection through?",
        seconds = CONNECT_TIMEOUT.as_secs()
    )]
    NoAnswer(Endpoint),
    /// Anything else.
    #[error("cannot connect to {endpoint}: {reason}")]
    Other {
        /// Where to.
        endpoint: Endpoint,
        /// What the transport says.
        reason: String,
    },
}

/// Connects to a server. The channel reconnects by itself when the connection is lost later on.
///
/// Waits at most 2 s. A connection on which nothing is heard any more is found dead within 13 s.
pub async fn connect(endpoint: &Endpoint) -> Result<Channel, ConnectError> {
    let attempt = async {
        transport::Endpoint::from_shared(endpoint.to_string())?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect()
            .await
    };
    // The transport's own limit ends with the TCP handshake: a process that accepts and then says
    // nothing must not hold the caller either.
    match tokio::time::timeout(CONNECT_TIMEOUT, attempt).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(explain(endpoint, &error)),
        Err(_) => Err(ConnectError::NoAnswer(endpoint.clone())),
    }
}

fn explain(endpoint: &Endpoint, error: &transport::Error) -> ConnectError {
    let mut cause: &(dyn StdError + 'static) = error;
    loop {
        if let Some(io) = cause.downcast_ref::<io::Error>() {
            match io.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    return ConnectError::NothingListens(endpoint.clone());
                }
                io::ErrorKind::PermissionDenied => {
                    return ConnectError::NotPermitted(endpoint.clone());
                }
                io::ErrorKind::TimedOut => return ConnectError::NoAnswer(endpoint.clone()),
                _ => {}
            }
        }
        let Some(next) = cause.source() else {
            let reason = cause.to_string();
            return ConnectError::Other { endpoint: endpoint.clone(), reason };
        };
        cause = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        for text in ["unix:/run/warren/agent.sock", "http://192.0.2.1:7700", "http://[::1]:7700"] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), text);
            let json = serde_json::to_string(&endpoint).unwrap();
            assert_eq!(serde_json::from_str::<Endpoint>(&json).unwrap(), endpoint);
        }
        let grpc_style: Endpoint = "unix:///run/x.sock".parse().unwrap();
        assert_eq!(grpc_style, Endpoint::Unix("/run/x.sock".into()));
    }

    #[test]
    fn what_is_no_endpoint_is_refused_with_an_example() {
        for text in
            ["", "unix:", "unix:relative", "http://host:1", "http://192.0.2.1", "192.0.2.1:1"]
        {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(&format!("\"{text}\"")), "{error}");
            assert!(error.contains("http://127.0.0.1:7700"), "{error}");
        }
    }

    #[tokio::test]
    async fn errors_name_the_endpoint() {
        let directory = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::Unix(directory.path().join("absent.sock"));
        let error = connect(&endpoint).await.unwrap_err();
        assert!(matches!(error, ConnectError::NothingListens(_)), "{error:?}");
        assert!(error.to_string().contains(&endpoint.to_string()), "{error}");

        // A port that nobody else can get meanwhile.
        let silent = tokio::net::TcpSocket::new_v4().unwrap();
        silent.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let endpoint = Endpoint::Tcp(silent.local_addr().unwrap());
        let error = connect(&endpoint).await.unwrap_err();
        assert!(matches!(error, ConnectError::NothingListens(_)), "{error:?}");
    }
}
