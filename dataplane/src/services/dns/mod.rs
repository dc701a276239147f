//! The DNS service: asks the VPC's own resolver for its guests.
//!
//! [`message`] is what is asked and answered, [`upstream`] how; here answers are kept, for each
//! VPC on its own, and guests are served.

mod message;
mod upstream;

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::ProtoError;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::Name;
use moka::Expiry;
use moka::future::Cache;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use warren_abi::services::{DNS, DNS_PORT};

use self::message::{Answer, Key, Question, STREAM, candidates};
use self::upstream::{Upstream, read_message, write_message};
use super::Session;
use super::stack::{Stack, TcpStream, UdpSocket};

/// What a VPC's kept answers take together, in bytes of [`Answer::weight`].
const CACHE: u64 = 1 << 20;
/// Queries of one guest that are worked on at a time; more are lost, and asked again by the guest.
const PER_GUEST: usize = 32;
/// Answers may be for a network inside the guest.
const HOP_LIMIT: u8 = 64;
/// How long a guest may use one TCP connection.
const CONNECTION: Duration = Duration::from_secs(30);

/// How names are resolved in a VPC.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Naming {
    /// The resolver; without one, every question is refused.
    pub resolver: Option<Ipv4Addr>,
    /// Where names of one label are looked for first.
    pub search_domain: Option<Name>,
}

impl Naming {
    /// A search domain, from text that may end with a dot; empty: none.
    pub fn parse_domain(text: &str) -> Result<Option<Name>, ProtoError> {
        if text.is_empty() {
            return Ok(None);
        }
        let mut domain = Name::from_ascii(text)?;
        domain.set_fqdn(true);
        Ok(Some(domain))
    }
}

/// What is known of the names in one VPC.
pub struct Forwarder {
    upstream: Upstream,
    /// By the resolver as well: another one may know other names.
    cache: Cache<(Ipv4Addr, Key), Arc<Answer>>,
}

/// Answers go when their time is over.
struct Lifetime;

impl<K> Expiry<K, Arc<Answer>> for Lifetime {
    fn expire_after_create(&self, _: &K, answer: &Arc<Answer>, _: Instant) -> Option<Duration> {
        Some(answer.lifetime())
    }
}

impl Forwarder {
    /// Over a stack that has this address.
    pub fn new(stack: Arc<Stack>, address: Ipv4Addr) -> Self {
        let cache = Cache::builder()
            .max_capacity(CACHE)
            .weigher(|_, answer: &Arc<Answer>| answer.weight())
            .expire_after(Lifetime)
            .build();
        Self { upstream: Upstream::new(stack, address), cache }
    }

    async fn resolve(&self, naming: &Naming, key: &Key) -> Answer {
        let Some(resolver) = naming.resolver else {
            return Answer::error(ResponseCode::Refused);
        };
        for name in candidates(&key.name, naming.search_domain.as_ref()) {
            let wanted = Key { name: name.clone(), ..key.clone() };
            let found = self.look_up(resolver, wanted).await;
            let answer = Answer::clone(&found);
            match answer.code() {
                _ if name == key.name => return answer,
                ResponseCode::NXDomain => {}
                ResponseCode::NoError => return answer.alias(&key.name, &name),
                _ => return answer,
            }
        }
        Answer::error(ResponseCode::ServFail)
    }

    /// From the cache, or from the resolver: asked once for all who want the same at the time.
    async fn look_up(&self, resolver: Ipv4Addr, key: Key) -> Arc<Answer> {
        let ask = async {
            Arc::new(match self.upstream.ask(resolver, &key).await {
                Ok(message) => Answer::new(&key, message),
                Err(error) => {
                    tracing::debug!(%resolver, name = %key.name, "no answer: {error}");
                    Answer::error(ResponseCode::ServFail)
                }
            })
        };
        self.cache.get_with((resolver, key.clone()), ask).await
    }
}

/// A socket for a guest's datagrams.
pub fn bind(stack: &Arc<Stack>) -> io::Result<UdpSocket> {
    stack.bind(DNS, DNS_PORT)
}

/// A socket for a connection of a guest's.
pub fn listen(stack: &Arc<Stack>) -> io::Result<TcpStream> {
    stack.listen(DNS, DNS_PORT, HOP_LIMIT)
}

/// Serves a guest over UDP until its stack is closed.
pub async fn serve_datagrams(session: Arc<Session>, socket: UdpSocket) {
    let (socket, permits) = (Arc::new(socket), Arc::new(Semaphore::new(PER_GUEST)));
    while let Ok((bytes, from)) = socket.receive().await {
        let Ok(permit) = permits.clone().try_acquire_owned() else { continue };
        let (session, socket) = (session.clone(), socket.clone());
        tokio::spawn(async move {
            let answer = answer(&session, &bytes, Question::datagram).await;
            if let Some(bytes) = answer {
                // It fails if the guest is gone.
                socket.send(&bytes, from).await.ok();
            }
            drop(permit);
        });
    }
}

/// Serves a guest over TCP, one connection after another, until its stack is closed.
pub async fn serve_streams(session: Arc<Session>, mut stream: TcpStream) {
    while stream.accepted().await.is_ok() {
        timeout(CONNECTION, serve_stream(&session, &mut stream)).await.ok();
        stream.finish().await;
        match listen(&session.stack) {
            Ok(next) => stream = next,
            Err(_) => return,
        }
    }
}

async fn serve_stream(session: &Session, stream: &mut TcpStream) {
    while let Ok(bytes) = read_message(stream).await {
        let Some(answer) = answer(session, &bytes, |_| STREAM).await else { return };
        if write_message(stream, &answer).await.is_err() {
            return;
        }
    }
}

async fn answer(
    session: &Session,
    bytes: &[u8],
    limit: impl Fn(&Question) -> usize,
) -> Option<Vec<u8>> {
    let question = match Question::read(bytes) {
        Ok(question) => question,
        Err(refusal) => return refusal,
    };
    let vpc = session.directory.vpc(session.attachment.vni);
    let naming = vpc.map(|vpc| vpc.naming).unwrap_or_default();
    let answer = session.forwarder.resolve(&naming, &question.key).await;
    question.reply(&answer, limit(&question))
}
