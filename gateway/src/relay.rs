//! The relay: `CONNECT <instance id>:80` on TCP leads to the instance's Unix socket.
//!
//! It knows nothing but the directory where warrend links each instance's socket by its id, so it
//! need not be restarted with warrend. When it is itself, it serves its connections to their end,
//! while its successor listens at the same address.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use uuid::Uuid;

use crate::metrics::RelayCounts;

/// Where instances' sockets are linked by their ids, in warrend's run directory.
pub const BY_ID: &str = "by-id";
/// The longest head of a request, in bytes.
const HEAD_MAX: usize = 1024;
const HEADERS_MAX: usize = 16;
/// A head is there within this time, and a guest takes a connection within it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// What is copied at a time, in bytes.
const BUFFER: usize = 16 << 10;
/// Connections that nobody has accepted yet.
const BACKLOG: u32 = 1024;
/// A gateway whose machine is gone is found out in half a minute: its instances must not wait.
const KEEP_ALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(15))
    .with_interval(Duration::from_secs(5))
    .with_retries(3);
/// After an error of the listener, such as too many files, it is tried again after this time.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);

/// Why a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It did not begin with the request that is taken here, in time.
    #[error("this is a relay: begin with CONNECT <instance id>:80 HTTP/1.1")]
    BadRequest,
    /// There is no such instance on this host.
    #[error("no instance of this id is on this host")]
    NotFound,
    /// The instance is there and takes no connection.
    #[error("the instance takes no connection: it ended, or serves no HTTP")]
    BadGateway,
}

impl Refusal {
    fn status(self) -> &'static str {
        match self {
            Self::BadRequest => "400",
            Self::NotFound => "404",
            Self::BadGateway => "502",
        }
    }
}

/// Listens where a relay that is about to end may still listen.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address.ip() {
        IpAddr::V4(_) => TcpSocket::new_v4()?,
        IpAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Relays to the instances of this run directory of warrend's until `stop` completes and all
/// connections have ended.
pub async fn serve(
    listener: TcpListener,
    run_dir: &Path,
    counts: RelayCounts,
    stop: impl Future<Output = ()>,
) {
    let by_id: Arc<Path> = run_dir.join(BY_ID).into();
    let mut connections = JoinSet::new();
    let mut stop = pin!(stop);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(relay(stream, by_id.clone(), counts.clone()));
                }
                Err(error) => {
                    tracing::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            },
            Some(_) = connections.join_next() => {}
            () = &mut stop => break,
        }
    }
    // Those that the kernel accepted for this listener would be reset with it.
    while let Ok(Ok((stream, _))) = timeout(Duration::ZERO, listener.accept()).await {
        connections.spawn(relay(stream, by_id.clone(), counts.clone()));
    }
    drop(listener);
    tracing::info!("no longer listening; {} connections go on", connections.len());
    while connections.join_next().await.is_some() {}
}

async fn relay(mut stream: TcpStream, by_id: Arc<Path>, counts: RelayCounts) {
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(&stream).set_tcp_keepalive(&KEEP_ALIVE);
    let entered = match timeout(HEAD_TIMEOUT, read_request(&mut stream)).await {
        Ok(Ok((id, rest))) => enter(&by_id, id, &rest).await,
        Ok(Err(refusal)) => Err(refusal),
        Err(_) => Err(Refusal::BadRequest),
    };
    let (answer, guest) = match entered {
        Ok((guest, first)) => {
            counts.connection("relayed");
            ([b"HTTP/1.1 200 OK\r\n\r\n", &first[..]].concat(), Some(guest))
        }
        Err(refusal) => {
            counts.connection(refusal.status());
            let (status, text) = (refusal.status(), format!("{refusal}\n"));
            let head = "content-type: text/plain\r\nconnection: close";
            let length = text.len();
            let answer = format!(
                "HTTP/1.1 {status} Refused\r\n{head}\r\ncontent-length: {length}\r\n\r\n{text}"
            );
            (answer.into_bytes(), None)
        }
    };
    // Whatever breaks, both sides are closed.
    if stream.write_all(&answer).await.is_ok()
        && let Some(mut guest) = guest
        && let Err(error) =
            copy_bidirectional_with_sizes(&mut stream, &mut guest, BUFFER, BUFFER).await
    {
        tracing::debug!("a connection broke: {error}");
    }
}

/// The id of the instance, and what came after the head.
async fn read_request(stream: &mut TcpStream) -> Result<(Uuid, Vec<u8>), Refusal> {
    let mut head = Vec::with_capacity(HEAD_MAX);
    loop {
        let mut limited = (&mut *stream).take((HEAD_MAX - head.len()) as u64);
        if limited.read_buf(&mut head).await.map_err(|_| Refusal::BadRequest)? == 0 {
            return Err(Refusal::BadRequest);
        }
        if let Some((id, length)) = parse(&head)? {
            return Ok((id, head.split_off(length)));
        }
    }
}

/// The instance that a request head is for, and the head's length; `None` if it is not whole.
pub fn parse(head: &[u8]) -> Result<Option<(Uuid, usize)>, Refusal> {
    let mut fields = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    let httparse::Status::Complete(length) =
        request.parse(head).map_err(|_| Refusal::BadRequest)?
    else {
        return Ok(None);
    };
    let (Some("CONNECT"), Some(target)) = (request.method, request.path) else {
        return Err(Refusal::BadRequest);
    };
    let id = target.strip_suffix(":80").ok_or(Refusal::BadRequest)?;
    let uuid = Uuid::try_parse(id).map_err(|_| Refusal::BadRequest)?;
    // An id has one spelling, which is also the name of its link.
    let mut buffer = Uuid::encode_buffer();
    let is_so_spelt = uuid.hyphenated().encode_lower(&mut buffer) == id;
    is_so_spelt.then_some(Some((uuid, length))).ok_or(Refusal::BadRequest)
}

/// A connection to the guest's HTTP server, and what it said already.
async fn enter(by_id: &Path, id: Uuid, first: &[u8]) -> Result<(UnixStream, Vec<u8>), Refusal> {
    let path: PathBuf = by_id.join(format!("{id}.sock"));
    let connected = async {
        let mut guest = UnixStream::connect(path).await?;
        guest.write_all(b"CONNECT 80\n").await?;
        let rest = read_ok(&mut guest).await?;
        guest.write_all(first).await?;
        Ok((guest, rest))
    };
    let connected = timeout(HEAD_TIMEOUT, connected).await.map_err(|_| Refusal::BadGateway)?;
    connected.map_err(|error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Refusal::NotFound,
        _ => Refusal::BadGateway,
    })
}

/// Reads `OK PORT`, where the port is the VMM's own end, and answers what came after that line.
async fn read_ok(guest: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    const LONGEST: usize = "OK 4294967295\n".len();
    let mut line = Vec::with_capacity(64);
    loop {
        if let Some(end) = line.iter().position(|byte| *byte == b'\n') {
            let port = line[..end].strip_prefix(b"OK ").and_then(|port| str::from_utf8(port).ok());
            return match port.map(str::parse::<u32>) {
                Some(Ok(_)) => Ok(line.split_off(end + 1)),
                _ => Err(io::ErrorKind::InvalidData.into()),
            };
        }
        if line.len() >= LONGEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if guest.read_buf(&mut line).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "67e55044-10b1-426f-9247-bb680e5fe0c8";

    #[test]
    fn only_a_connect_to_an_id_spelt_as_ids_are() {
        let head = format!("CONNECT {ID}:80 HTTP/1.1\r\nhost: x\r\n\r\nmore");
        let (id, length) = parse(head.as_bytes()).unwrap().unwrap();
        assert_eq!((id.to_string().as_str(), &head[length..]), (ID, "more"));
        assert_eq!(parse(&head.as_bytes()[..30]), Ok(None));
        let upper = ID.to_uppercase();
        let plain = ID.replace('-', "");
        for target in [
            "../../etc/passwd:80",
            &format!("../{ID}:80"),
            &format!("{ID}/..:80"),
            &format!("{upper}:80"),
            &format!("{plain}:80"),
            &format!("{{{ID}}}:80"),
            &format!("{ID}:81"),
            ID,
        ] {
            let head = format!("CONNECT {target} HTTP/1.1\r\n\r\n");
            assert_eq!(parse(head.as_bytes()), Err(Refusal::BadRequest), "{target}");
        }
        let head = format!("GET {ID}:80 HTTP/1.1\r\n\r\n");
        assert_eq!(parse(head.as_bytes()), Err(Refusal::BadRequest));
    }

    #[tokio::test]
    async fn the_guest_must_take_the_port() {
        for accepted in [&b"OK 1024\nHTTP"[..], b"OK 4294967295\nHTTP"] {
            assert_eq!(read_ok(&mut { accepted }).await.unwrap(), b"HTTP");
        }
        for answer in [&b"OK x\n"[..], b"OK \n", b"OK 8", b"", b"NO\n", b"OK 42949672951\nHTTP"] {
            assert!(read_ok(&mut { answer }).await.is_err(), "{answer:?}");
        }
    }

    proptest! {
        #[test]
        fn no_head_breaks_it(head in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(Some((_, length))) = parse(&head) {
                prop_assert!(length <= head.len());
            }
        }
    }
}
