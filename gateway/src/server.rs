//! Where calls come in: HTTP/1.1 and HTTP/2 on TCP.

use std::convert::Infallible;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::http::uri::PathAndQuery;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri, Version as HttpVersion};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::body::{AnswerBody, AnswerError, CallBody};
use crate::call::call;
use crate::dispatch::Dispatcher;
use crate::events::Events;
use crate::headers;
use crate::metrics::Counts;
use crate::path::without_first;
use crate::refusal::{ERROR_HEADER, Refusal};
use crate::shared::SharedRoutes;

/// A head that is not there after this time, and a connection without a request, is closed.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest head, in bytes.
const HEAD_MAX: u32 = 64 << 10;
const HEADERS_MAX: usize = 128;
/// Requests at one time on an HTTP/2 connection.
const STREAMS_MAX: u32 = 256;
/// A silent HTTP/2 connection is asked for a sign of life after this time, and closed after it again.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// The body of an event is to be there within this time.
const EVENT_TIMEOUT: Duration = Duration::from_secs(30);
/// After an error of the listener, such as too many files, it is tried again after this time.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);
/// Events are sent to paths that begin so.
const EVENTS: &str = "/async/";

/// What is the same for all calls.
pub struct Service {
    /// Where to.
    pub routes: SharedRoutes,
    /// By which instances.
    pub dispatcher: Arc<Dispatcher>,
    /// Calls that nobody waits for.
    pub events: Arc<Events>,
    /// What is counted.
    pub counts: Counts,
    /// Callers say truly for whom they call.
    pub trust_forwarded: bool,
    /// The longest body of an event, in bytes.
    pub event_bytes: usize,
}

/// Serves until `stop` completes, and then until the calls that run have ended, at most for `drain`.
/// At most `connections` at one time are served; more wait.
pub async fn serve(
    listener: TcpListener,
    service: Arc<Service>,
    connections: Arc<Semaphore>,
    stop: impl Future<Output = ()>,
    drain: Duration,
) {
    let graceful = GracefulShutdown::new();
    let builder = Arc::new(builder());
    let mut stop = pin!(stop);
    loop {
        let accepted = async {
            // Nobody closes it.
            let permit = connections.clone().acquire_owned().await.ok();
            (permit, listener.accept().await)
        };
        let (permit, (stream, peer)) = tokio::select! {
            (permit, Ok(accepted)) = accepted => (permit, accepted),
            () = &mut stop => break,
            else => {
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let (service, builder) = (service.clone(), builder.clone());
        let watcher = graceful.watcher();
        tokio::spawn(async move {
            let called = Arc::new(AtomicBool::new(false));
            let mark = called.clone();
            let answer = service_fn(move |request| {
                mark.store(true, Ordering::Relaxed);
                let service = service.clone();
                async move { Ok::<_, Infallible>(service.answer(request, peer).await) }
            });
            let connection = builder.serve_connection(TokioIo::new(stream), answer).into_owned();
            let mut connection = pin!(watcher.watch(connection));
            let timeout = tokio::time::sleep(HEAD_TIMEOUT);
            let ended = tokio::select! {
                ended = &mut connection => ended,
                // Which version of HTTP it is has no deadline of its own.
                () = timeout => {
                    if called.load(Ordering::Relaxed) { connection.await } else { Ok(()) }
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%peer, "a connection broke: {error}");
            }
            drop(permit);
        });
    }
    drop(listener);
    if tokio::time::timeout(drain, graceful.shutdown()).await.is_err() {
        tracing::warn!("calls still run after {} ms, and are cut", drain.as_millis());
    }
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_MAX as usize)
        .max_headers(HEADERS_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_MAX)
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE);
    builder
}

impl Service {
    async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Reply> {
        let answer = match self.event_trigger(&request) {
            Some(trigger) => self.accept(trigger, request).await,
            None => self.call(request, peer.ip()).await,
        };
        answer.unwrap_or_else(|refusal| {
            self.counts.call(refusal.token());
            refused(&refusal)
        })
    }

    async fn call(
        &self,
        request: Request<Incoming>,
        peer: IpAddr,
    ) -> Result<Response<Reply>, Refusal> {
        if headers::upgrades(request.headers()) || request.method() == Method::CONNECT {
            return Err(Refusal::Upgrade);
        }
        let host = host(&request)?;
        let (version, strip) = {
            let routes = self.routes.get();
            let name = host.to_str().map_err(|_| Refusal::BadHost)?;
            let route = routes.find(name, request.uri().path())?;
            (route.target.version(rand::random())?.clone(), route.strip)
        };
        let (mut head, body) = request.into_parts();
        head.uri = origin_form(&head.uri, strip)?;
        headers::forwarded(&mut head.headers, peer, &host, self.trust_forwarded);
        let request = Request::from_parts(head, CallBody::streamed(body));
        let answer = call(&self.dispatcher, &version, request).await?;
        self.counts.call("answered");
        Ok(answer.map(Reply::Answer))
    }

    fn event_trigger(&self, request: &Request<Incoming>) -> Option<String> {
        let name = request.uri().path().strip_prefix(EVENTS)?;
        let known = *request.method() == Method::POST && self.routes.get().event(name).is_some();
        known.then(|| name.to_owned())
    }

    async fn accept(
        &self,
        trigger: String,
        request: Request<Incoming>,
    ) -> Result<Response<Reply>, Refusal> {
        let (mut head, body) = request.into_parts();
        headers::remove_own(&mut head.headers);
        let body = Limited::new(body, self.event_bytes).collect();
        let body = tokio::time::timeout(EVENT_TIMEOUT, body).await;
        let body = body.map_err(|_| Refusal::BodyBroken)?.map_err(|error| {
            let too_large = error.is::<LengthLimitError>();
            if too_large { Refusal::TooLarge(self.event_bytes) } else { Refusal::BodyBroken }
        })?;
        let kept = self.events.accept(trigger, head.headers, body.to_bytes()).await;
        let id = kept.map_err(|error| {
            tracing::error!("an event is not accepted: {error}");
            Refusal::NotKept
        })?;
        self.counts.event("accepted");
        let mut answer = text(StatusCode::ACCEPTED, format!("{{\"id\":\"{id}\"}}\n"));
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(answer)
    }
}

/// The host that is called, with its port; empty for HTTP/1.0, which need not say.
fn host(request: &Request<Incoming>) -> Result<HeaderValue, Refusal> {
    let mut named = request.headers().get_all(HOST).into_iter();
    match (request.uri().authority(), named.next(), named.next()) {
        (_, _, Some(_)) => Err(Refusal::BadHost),
        (Some(authority), ..) => {
            HeaderValue::from_str(authority.as_str()).map_err(|_| Refusal::BadHost)
        }
        (None, Some(host), None) => Ok(host.clone()),
        (None, None, None) if request.version() == HttpVersion::HTTP_10 => {
            Ok(HeaderValue::from_static(""))
        }
        (None, None, None) => Err(Refusal::BadHost),
    }
}

/// The path and query that the function sees.
fn origin_form(uri: &Uri, strip: usize) -> Result<Uri, Refusal> {
    if strip == 0 && uri.authority().is_none() {
        return Ok(uri.clone());
    }
    let path = match uri.path() {
        "" => "/",
        path => without_first(path, strip),
    };
    let whole = match uri.query() {
        Some(query) => PathAndQuery::try_from(format!("{path}?{query}")),
        None => PathAndQuery::try_from(path),
    };
    whole.map(Uri::from).map_err(|_| Refusal::BadPath("it is no path without its prefix"))
}

fn refused(refusal: &Refusal) -> Response<Reply> {
    let mut answer = text(refusal.status(), format!("{refusal}\n"));
    let token = HeaderValue::from_static(refusal.token());
    answer.headers_mut().insert(ERROR_HEADER, token);
    answer
}

fn text(status: StatusCode, text: String) -> Response<Reply> {
    let mut answer = Response::new(Reply::Text(Some(text.into())));
    *answer.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(CONTENT_TYPE, plain);
    answer
}

/// The body of what is answered.
pub enum Reply {
    /// The gateway's own.
    Text(Option<Bytes>),
    /// A function's.
    Answer(AnswerBody),
}

impl Body for Reply {
    type Data = Bytes;
    type Error = AnswerError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, AnswerError>>> {
        match self.get_mut() {
            Self::Text(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Self::Answer(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Text(text) => text.is_none(),
            Self::Answer(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, Bytes::len) as u64),
            Self::Answer(body) => body.size_hint(),
        }
    }
}
