//! wasi:http: the call that a function answers, and the calls that it makes.

mod body;
mod fields;
mod incoming;
mod outgoing;

use alloc::rc::Rc;
use alloc::string::{String, ToString};
use core::cell::RefCell;

use wasmtime::Result;
use wasmtime::component::Resource;

use super::bindings::wasi::http::types::{self, ErrorCode, Method};
use super::io::IoError;
use super::{Failure, State};
use crate::single::Single;
use crate::stream::Broken;

pub use body::{FutureTrailers, IncomingBody, OutgoingBody};
pub use fields::HttpFields;
pub use incoming::{IncomingRequest, OutgoingResponse, ResponseOutparam};
pub use outgoing::{FutureIncomingResponse, IncomingResponse, OutgoingRequest, RequestOptions};

pub type HttpError = Failure<ErrorCode>;

/// A value that several resources share.
pub type Shared<T> = Single<Rc<RefCell<T>>>;

impl From<ErrorCode> for HttpError {
    fn from(error: ErrorCode) -> Self {
        Self::Error(error)
    }
}

impl types::Host for State {
    fn http_error_code(&mut self, error: Resource<IoError>) -> Result<Option<ErrorCode>> {
        Ok(match &self.table.get(&error)?.0 {
            Broken::Reset => Some(ErrorCode::ConnectionTerminated),
            Broken::Timeout => Some(ErrorCode::ConnectionReadTimeout),
            Broken::Http(_) => Some(ErrorCode::HttpProtocolError),
            Broken::Other(_) => None,
        })
    }

    fn convert_error_code(&mut self, error: HttpError) -> Result<ErrorCode> {
        error.convert()
    }
}

fn method(name: &str) -> Method {
    match name {
        "GET" => Method::Get,
        "HEAD" => Method::Head,
        "POST" => Method::Post,
        "PUT" => Method::Put,
        "DELETE" => Method::Delete,
        "CONNECT" => Method::Connect,
        "OPTIONS" => Method::Options,
        "TRACE" => Method::Trace,
        "PATCH" => Method::Patch,
        other => Method::Other(other.to_string()),
    }
}

fn method_name(method: &Method) -> String {
    match method {
        Method::Get => "GET",
        Method::Head => "HEAD",
        Method::Post => "POST",
        Method::Put => "PUT",
        Method::Delete => "DELETE",
        Method::Connect => "CONNECT",
        Method::Options => "OPTIONS",
        Method::Trace => "TRACE",
        Method::Patch => "PATCH",
        Method::Other(other) => other,
    }
    .to_string()
}

fn internal(text: &str) -> ErrorCode {
    ErrorCode::InternalError(Some(text.to_string()))
}
