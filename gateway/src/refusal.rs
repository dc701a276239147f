//! Why a call gets no answer of its function: a status, a token for programs, a text for people.

use hyper::StatusCode;
use hyper::header::HeaderName;

/// Carries the token. A guest sets it, too, on errors of its own (`trap` and others).
pub const ERROR_HEADER: HeaderName = HeaderName::from_static("warren-error");

/// Why a call is refused, or broken off.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No trigger is for this host name and path.
    #[error("no function answers here: no HTTP trigger is for this host name and path")]
    NoRoute,
    /// The path is not one.
    #[error("the path is refused: {0}")]
    BadPath(&'static str),
    /// The host name is not one.
    #[error("the request names no host, or more than one: send one Host header")]
    BadHost,
    /// The trigger's alias leads to no version.
    #[error("function {function} has no version \"{alias}\": publish one, or change the trigger")]
    NoVersion {
        /// Name of the function.
        function: String,
        /// What the trigger names.
        alias: String,
    },
    /// As many calls as are allowed wait already.
    #[error("too many calls of this function wait: try again later")]
    QueueFull,
    /// The function or its tenant has all the calls that it may have at one time.
    #[error("the function or its tenant has as many calls at a time as it may: try again later")]
    Concurrency,
    /// No host had room until the deadline.
    #[error("no host has room for another instance: try again later, or add a host")]
    NoCapacity,
    /// No instance was ready until the deadline.
    #[error("no instance of the function was ready in time: try again later")]
    QueueTimeout,
    /// The host could not start an instance.
    #[error("an instance of the function could not be started: {0}")]
    StartFailed(String),
    /// The call took longer than its version allows.
    #[error("the function did not answer within {0} ms, its limit")]
    Timeout(u64),
    /// The connection to the instance broke before an answer.
    #[error("the instance ended in the call: look at the function's log")]
    Crashed,
    /// The client wants another protocol than HTTP.
    #[error(
        "functions are called by plain requests: WebSocket, CONNECT and other upgrades are not"
    )]
    Upgrade,
    /// The body is longer than an event may be.
    #[error("the body of an event is at most {0} bytes")]
    TooLarge(usize),
    /// The body of an event did not come whole.
    #[error("the body of the event did not come whole")]
    BodyBroken,
    /// The event could not be kept.
    #[error("the event could not be kept, and is not accepted: try again later")]
    NotKept,
}

impl Refusal {
    /// The value of [`ERROR_HEADER`].
    pub fn token(&self) -> &'static str {
        match self {
            Self::NoRoute => "no-route",
            Self::BadPath(_) => "bad-path",
            Self::BadHost => "bad-host",
            Self::NoVersion { .. } => "no-version",
            Self::QueueFull => "queue-full",
            Self::Concurrency => "concurrency",
            Self::NoCapacity => "no-capacity",
            Self::QueueTimeout => "queue-timeout",
            Self::StartFailed(_) => "start-failed",
            Self::Timeout(_) => "timeout",
            Self::Crashed => "crashed",
            Self::Upgrade => "upgrade",
            Self::TooLarge(_) => "too-large",
            Self::BodyBroken => "body-broken",
            Self::NotKept => "not-kept",
        }
    }

    /// The status of the answer.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::NoRoute => StatusCode::NOT_FOUND,
            Self::BadPath(_) | Self::BadHost | Self::BodyBroken => StatusCode::BAD_REQUEST,
            Self::Concurrency => StatusCode::TOO_MANY_REQUESTS,
            Self::NoVersion { .. }
            | Self::QueueFull
            | Self::NoCapacity
            | Self::QueueTimeout
            | Self::NotKept => StatusCode::SERVICE_UNAVAILABLE,
            Self::StartFailed(_) | Self::Crashed => StatusCode::BAD_GATEWAY,
            Self::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Upgrade => StatusCode::NOT_IMPLEMENTED,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
        }
    }
}
