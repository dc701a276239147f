//! The metadata service: tells an instance who it is, over HTTP.
//!
//! As with EC2's `IMDSv2`, reading takes a session token that only a `PUT` yields, requests that a
//! proxy passed on are refused, and answers die at the next hop: a server that is tricked into
//! fetching a URL tells nothing. AWS's header names are taken as well as Warren's, so that what
//! knows `IMDSv2` works here.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::timeout;
use warren_abi::services::{METADATA, METADATA_PORT};

use super::identity::SESSION_MAX;
use super::stack::{Stack, TcpStream};
use super::{Instance, Session};

/// Headers that hold a session token.
const TOKEN: [&str; 2] = ["x-warren-metadata-token", "x-aws-ec2-metadata-token"];
/// Headers that say how long a session token is to be valid, in seconds, 1 to 21,600.
const LIFETIME: [&str; 2] =
    ["x-warren-metadata-token-ttl-seconds", "x-aws-ec2-metadata-token-ttl-seconds"];
/// A header that proxies add.
const FORWARDED: &str = "x-forwarded-for";
/// Answers go no further than to the instance itself.
const HOP_LIMIT: u8 = 1;
/// A request's header must be there after this time.
const HEADER: Duration = Duration::from_secs(5);
/// How long a connection may last.
const CONNECTION: Duration = Duration::from_secs(30);
/// Longest header of a request, in bytes: the least that hyper takes.
const HEADER_SIZE: usize = 8192;
/// An instance may run before its host has it on its list: how often and after which time it is
/// looked for again.
const LOOKS: (u32, Duration) = (100, Duration::from_millis(10));
/// Longest audience of an identity token, in bytes.
const AUDIENCE: usize = 256;

/// A socket for a connection of a guest's.
pub fn listen(stack: &Arc<Stack>) -> io::Result<TcpStream> {
    stack.listen(METADATA, METADATA_PORT, HOP_LIMIT)
}

/// Serves a guest, one connection after another, until its stack is closed.
pub async fn serve(session: Arc<Session>, mut stream: TcpStream) {
    let router = router(session.clone());
    while stream.accepted().await.is_ok() {
        let service = TowerToHyperService::new(router.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER)
            .max_buf_size(HEADER_SIZE)
            .serve_connection(TokioIo::new(&mut stream), service);
        // Whatever is wrong with it, it is the guest's own.
        timeout(CONNECTION, connection).await.ok();
        stream.finish().await;
        match listen(&session.stack) {
            Ok(next) => stream = next,
            Err(_) => return,
        }
    }
}

fn router(session: Arc<Session>) -> Router {
    let guarded = Router::new()
        .route("/", get(document))
        .route("/latest/meta-data", get(list))
        .route("/latest/meta-data/", get(list))
        .route("/latest/meta-data/{*key}", get(value))
        .route("/latest/identity/token", get(identity_token))
        .route("/latest/identity/jwks.json", get(key_set))
        .layer(middleware::from_fn_with_state(session.clone(), needs_session));
    Router::new()
        .route("/latest/api/token", put(open_session))
        .merge(guarded)
        .layer(middleware::from_fn(not_forwarded))
        .with_state(session)
}

/// Why a request is not answered.
enum Refusal {
    Forwarded,
    Lifetime,
    NoSession,
    Audience,
    NoInstance,
    NoKey,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, text) = match self {
            Self::Forwarded => (
                StatusCode::FORBIDDEN,
                "requests that were forwarded (X-Forwarded-For) are not answered",
            ),
            Self::Lifetime => (
                StatusCode::BAD_REQUEST,
                "say for how long, 1 to 21600: X-Warren-Metadata-Token-TTL-Seconds",
            ),
            Self::NoSession => (
                StatusCode::UNAUTHORIZED,
                "PUT /latest/api/token yields a token: send it in X-Warren-Metadata-Token",
            ),
            Self::Audience => (
                StatusCode::BAD_REQUEST,
                "say for whom, in up to 256 bytes of ASCII: /latest/identity/token?audience=URL",
            ),
            Self::NoInstance => (StatusCode::SERVICE_UNAVAILABLE, "no instance runs here now"),
            Self::NoKey => (StatusCode::NOT_FOUND, "GET /latest/meta-data/ lists what there is"),
        };
        (status, format!("{text}\n")).into_response()
    }
}

async fn not_forwarded(request: Request, next: Next) -> Result<Response, Refusal> {
    if request.headers().contains_key(FORWARDED) {
        return Err(Refusal::Forwarded);
    }
    Ok(next.run(request).await)
}

async fn needs_session(
    State(session): State<Arc<Session>>,
    request: Request,
    next: Next,
) -> Result<Response, Refusal> {
    let (_, token) = header(request.headers(), TOKEN).ok_or(Refusal::NoSession)?;
    if !session.identity.is_session(token, session.slot, session.attachment) {
        return Err(Refusal::NoSession);
    }
    Ok(next.run(request).await)
}

/// The first of these headers that is there, and its value.
fn header<'a>(headers: &'a HeaderMap, names: [&'static str; 2]) -> Option<(HeaderName, &'a str)> {
    names.into_iter().find_map(|name| {
        let value = headers.get(name)?.to_str().ok()?;
        Some((HeaderName::from_static(name), value))
    })
}

async fn open_session(
    State(session): State<Arc<Session>>,
    headers: HeaderMap,
) -> Result<impl IntoResponse, Refusal> {
    let (name, seconds) = header(&headers, LIFETIME).ok_or(Refusal::Lifetime)?;
    let lifetime = seconds.parse().map(Duration::from_secs).map_err(|_| Refusal::Lifetime)?;
    if lifetime.is_zero() || lifetime > SESSION_MAX {
        return Err(Refusal::Lifetime);
    }
    let token = session.identity.open_session(session.slot, session.attachment, lifetime);
    Ok(([(name, lifetime.as_secs().to_string())], token))
}

async fn instance(session: &Session) -> Result<Instance, Refusal> {
    let (looks, pause) = LOOKS;
    for _ in 0..looks {
        let is_here = session.directory.attachment(session.slot) == Some(session.attachment);
        match session.directory.instance(session.slot) {
            Some(instance) if is_here => return Ok(instance),
            _ if !is_here => return Err(Refusal::NoInstance),
            _ => tokio::time::sleep(pause).await,
        }
    }
    Err(Refusal::NoInstance)
}

async fn document(State(session): State<Arc<Session>>) -> Result<Json<Instance>, Refusal> {
    Ok(Json(instance(&session).await?))
}

async fn list(State(session): State<Arc<Session>>) -> Result<String, Refusal> {
    let values = values(&instance(&session).await?);
    Ok(values.keys().flat_map(|key| [key.as_str(), "\n"]).collect())
}

async fn value(
    State(session): State<Arc<Session>>,
    Path(key): Path<String>,
) -> Result<String, Refusal> {
    match values(&instance(&session).await?).remove(&key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Ok(other.to_string()),
        None => Err(Refusal::NoKey),
    }
}

/// What there is to be read one by one, by name.
fn values(instance: &Instance) -> serde_json::Map<String, Value> {
    match serde_json::to_value(instance) {
        Ok(Value::Object(values)) => values,
        _ => serde_json::Map::new(),
    }
}

/// Query of a request for an identity token.
#[derive(Deserialize)]
struct For {
    audience: String,
}

async fn identity_token(
    State(session): State<Arc<Session>>,
    audience: Result<Query<For>, QueryRejection>,
) -> Result<impl IntoResponse, Refusal> {
    let Query(For { audience }) = audience.map_err(|_| Refusal::Audience)?;
    let is_text = |byte: u8| byte.is_ascii_graphic();
    if audience.is_empty() || audience.len() > AUDIENCE || !audience.bytes().all(is_text) {
        return Err(Refusal::Audience);
    }
    let token = session.identity.sign(&instance(&session).await?, &audience);
    Ok(([(CONTENT_TYPE, "application/jwt")], token))
}

async fn key_set(State(session): State<Arc<Session>>) -> Json<Value> {
    Json(session.identity.key_set())
}
