//! Asking a VPC's resolver, as a host of that VPC would.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use warren_abi::services::DNS_PORT;

use super::super::stack::{Stack, UdpSocket};
use super::message::{Key, answer_to, query};

/// Queries on their way at a time; others wait.
const IN_FLIGHT: usize = 64;
/// How often a resolver is asked that does not answer.
const ATTEMPTS: u32 = 3;
/// How long an answer over UDP is waited for. Stub resolvers wait 5 s for all attempts.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How long an answer over TCP is waited for.
const STREAM_PATIENCE: Duration = Duration::from_secs(4);
/// A port is used for so long. Each takes one of the host's in the VPC until some minutes later,
/// so that a port of its own for each query would use them up.
const PORT_LIFETIME: Duration = Duration::from_mins(1);
/// Ports to choose among, at least: a forger must know which one it is (RFC 5452, section 9.2).
const PORTS: usize = 8;

/// A port that is not in use at the moment.
struct Port {
    socket: UdpSocket,
    since: Instant,
}

/// The way to resolvers in one VPC.
pub struct Upstream {
    stack: Arc<Stack>,
    address: Ipv4Addr,
    permits: Semaphore,
    ports: Mutex<Vec<Port>>,
}

impl Upstream {
    /// Over a stack that has this address.
    pub fn new(stack: Arc<Stack>, address: Ipv4Addr) -> Self {
        let (permits, ports) = (Semaphore::new(IN_FLIGHT), Mutex::default());
        Self { stack, address, permits, ports }
    }

    /// What the resolver answers; an error if it does not.
    pub async fn ask(&self, resolver: Ipv4Addr, key: &Key) -> io::Result<Message> {
        let _permit = self.permits.acquire().await.map_err(io::Error::other)?;
        let to = SocketAddrV4::new(resolver, DNS_PORT);
        let answer = self.ask_as(to, &query(key, true)).await?;
        // Old servers do not know EDNS (RFC 6891, section 7).
        match answer.metadata.response_code {
            ResponseCode::FormErr | ResponseCode::NotImp => {
                self.ask_as(to, &query(key, false)).await
            }
            _ => Ok(answer),
        }
    }

    async fn ask_as(&self, to: SocketAddrV4, query: &Message) -> io::Result<Message> {
        let bytes = query.to_vec().map_err(io::Error::other)?;
        for _ in 0..ATTEMPTS {
            let port = self.take_port()?;
            port.socket.send(&bytes, to).await?;
            let answer = timeout(PATIENCE, receive(&port.socket, to, query)).await;
            self.give_back(port);
            match answer {
                Ok(Ok(answer)) if answer.metadata.truncation => {
                    let answer = self.ask_by_stream(to, query, &bytes);
                    return timeout(STREAM_PATIENCE, answer).await?;
                }
                Ok(answer) => return answer,
                Err(_) => {}
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    async fn ask_by_stream(
        &self,
        to: SocketAddrV4,
        query: &Message,
        bytes: &[u8],
    ) -> io::Result<Message> {
        let mut stream = self.stack.connect(to).await?;
        write_message(&mut stream, bytes).await?;
        let reply = read_message(&mut stream).await?;
        stream.finish().await;
        answer_to(query, &reply).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn take_port(&self) -> io::Result<Port> {
        let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        ports.retain(|port| port.since.elapsed() < PORT_LIFETIME);
        if ports.len() >= PORTS {
            let index = rand::random_range(0..ports.len());
            return Ok(ports.swap_remove(index));
        }
        let socket = self.stack.bind(self.address, rand::random_range(1024..=u16::MAX))?;
        Ok(Port { socket, since: Instant::now() })
    }

    fn give_back(&self, port: Port) {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).push(port);
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stack.close();
    }
}

/// The answer to a query, among whatever else comes.
async fn receive(socket: &UdpSocket, from: SocketAddrV4, query: &Message) -> io::Result<Message> {
    loop {
        let (bytes, sender) = socket.receive().await?;
        if sender == from
            && let Some(answer) = answer_to(query, &bytes)
        {
            return Ok(answer);
        }
    }
}

/// Reads a message with its length in front (RFC 1035, section 4.2.2).
pub async fn read_message(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// Writes a message with its length in front.
pub async fn write_message(
    stream: &mut (impl AsyncWriteExt + Unpin),
    bytes: &[u8],
) -> io::Result<()> {
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(bytes);
    stream.write_all(&framed).await
}
