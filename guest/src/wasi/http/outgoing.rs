//! The calls that a function makes.

use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::RefCell;

use wasmtime::Result;
use wasmtime::component::Resource;

use super::super::State;
use super::super::bindings::wasi::http::types::{self, ErrorCode, Method, Scheme};
use super::super::bindings::wasi::http::{outgoing_handler, types::DnsErrorPayload};
use super::super::io::Pollable;
use super::body::Target;
use super::{HttpError, HttpFields, IncomingBody, OutgoingBody, method_name};
use crate::http::body::{Body, Framing};
use crate::http::client::{
    Connection, Exchange, Failure, Patience, RequestBody, Start, request_line,
};
use crate::http::head::{self, Malformed, Response};
use crate::http::{Fields, values};
use crate::single::Single;

/// A request that is put together.
pub struct OutgoingRequest {
    method: Method,
    target: Option<String>,
    scheme: Option<Scheme>,
    authority: Option<String>,
    fields: Fields,
    body: Single<Rc<RefCell<Target>>>,
    /// Somebody has the body.
    is_taken: bool,
}

/// How long it may take.
#[derive(Default)]
pub struct RequestOptions {
    connect: Option<u64>,
    first_byte: Option<u64>,
    between_bytes: Option<u64>,
}

/// A response that comes.
pub struct FutureIncomingResponse(Single<Rc<RefCell<Exchange>>>);

/// A response that came.
pub struct IncomingResponse {
    head: Response,
    body: Option<Single<Body<Connection>>>,
}

/// Host and port of an authority (RFC 3986, 3.2), without user information.
fn host_and_port(authority: &str, default: u16) -> Option<(String, u16)> {
    match authority.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && !host.contains(':') => {
            Some((host.to_string(), port.parse().ok().filter(|&port| port != 0)?))
        }
        None if !authority.is_empty() => Some((authority.to_string(), default)),
        _ => None,
    }
}

impl OutgoingRequest {
    /// Head and framing of what is to be sent, and where to.
    fn start(self, patience: Patience) -> Result<(Start, Rc<RefCell<Target>>), ErrorCode> {
        let Self { method, target, scheme, authority, mut fields, body, is_taken } = self;
        match scheme {
            None | Some(Scheme::Http) => {}
            Some(Scheme::Https | Scheme::Other(_)) => {
                return Err(ErrorCode::HttpRequestUriInvalid);
            }
        }
        let authority = authority.ok_or(ErrorCode::HttpRequestUriInvalid)?;
        let (host, port) = host_and_port(&authority, 80).ok_or(ErrorCode::HttpRequestUriInvalid)?;
        let is_whole = matches!(&*body.0.borrow(), Target::Waiting(_, Some(_)));
        let waiting = match &*body.0.borrow() {
            Target::Waiting(bytes, _) => bytes.len() as u64,
            _ => 0,
        };
        let own = head::framing(&fields);
        let framing = match own.map_err(|Malformed(_)| ErrorCode::HttpRequestHeaderSize(None))? {
            Some(framing) => framing,
            None if is_taken && !is_whole => {
                fields.push(("transfer-encoding".to_string(), b"chunked".to_vec()));
                Framing::Chunked
            }
            None => {
                if waiting > 0 || matches!(method, Method::Post | Method::Put | Method::Patch) {
                    let length = waiting.to_string().into_bytes();
                    fields.push(("content-length".to_string(), length));
                }
                Framing::Length(waiting)
            }
        };
        if values(&fields, "host").next().is_none() {
            fields.insert(0, ("host".to_string(), authority.into_bytes()));
        }
        fields.push(("connection".to_string(), b"close".to_vec()));
        let name = method_name(&method);
        let mut head = request_line(&name, target.as_deref().unwrap_or("/"));
        head::write_fields(&fields, &mut head);
        if !is_taken {
            *body.0.borrow_mut() = Target::Waiting(Vec::new(), Some(Fields::new()));
        }
        let head_only = matches!(method, Method::Head);
        Ok((Start { host, port, head, framing, head_only, patience }, body.0))
    }
}

impl outgoing_handler::Host for State {
    fn handle(
        &mut self,
        request: Resource<OutgoingRequest>,
        options: Option<Resource<RequestOptions>>,
    ) -> Result<Resource<FutureIncomingResponse>, HttpError> {
        self.released("the network")?;
        let mut patience = Patience::default();
        if let Some(options) = options {
            let options = self.table.delete(options)?;
            patience.connect_ns = options.connect.unwrap_or(patience.connect_ns);
            patience.first_byte_ns = options.first_byte.unwrap_or(patience.first_byte_ns);
            patience.between_bytes_ns = options.between_bytes.unwrap_or(patience.between_bytes_ns);
        }
        let (start, target) = self.table.delete(request)?.start(patience)?;
        let exchange = Rc::new(RefCell::new(Exchange::start(&mut self.machine, start)));
        let waited = core::mem::replace(
            &mut *target.borrow_mut(),
            Target::Request(RequestBody(exchange.clone())),
        );
        if let Target::Waiting(bytes, end) = waited {
            let mut exchange = exchange.borrow_mut();
            let invalid = ErrorCode::HttpRequestBodySize(None);
            exchange.encode(&bytes).map_err(|_| invalid.clone())?;
            if let Some(trailers) = end {
                exchange.finish(&trailers).map_err(|Malformed(_)| invalid)?;
            }
        }
        Exchange::advance(&exchange, &mut self.machine);
        Ok(self.table.push(FutureIncomingResponse(Single(exchange)))?)
    }
}

fn error_code(failure: Failure) -> ErrorCode {
    match failure {
        Failure::NoName => ErrorCode::DnsError(DnsErrorPayload { rcode: None, info_code: None }),
        Failure::Refused => ErrorCode::ConnectionRefused,
        Failure::ConnectTimeout => ErrorCode::ConnectionTimeout,
        Failure::ResponseTimeout => ErrorCode::HttpResponseTimeout,
        Failure::Cut => ErrorCode::ConnectionTerminated,
        Failure::Malformed => ErrorCode::HttpProtocolError,
    }
}

impl types::HostFutureIncomingResponse for State {
    fn subscribe(
        &mut self,
        response: Resource<FutureIncomingResponse>,
    ) -> Result<Resource<Pollable>> {
        let exchange = self.table.get(&response)?.0.0.clone();
        let at_ns = exchange.borrow().deadline_ns();
        let ready = move |machine: &mut _| Exchange::advance(&exchange, machine);
        Ok(self.table.push(Pollable::when_or_at(ready, at_ns))?)
    }

    fn get(
        &mut self,
        response: Resource<FutureIncomingResponse>,
    ) -> Result<Option<Result<Result<Resource<IncomingResponse>, ErrorCode>, ()>>> {
        let exchange = self.table.get(&response)?.0.0.clone();
        if !Exchange::advance(&exchange, &mut self.machine) {
            return Ok(None);
        }
        let taken = exchange.borrow_mut().take();
        Ok(Some(match taken {
            None => Err(()),
            Some(Err(failure)) => Ok(Err(error_code(failure))),
            Some(Ok((head, body))) => {
                let body = Some(Single(body));
                Ok(Ok(self.table.push(IncomingResponse { head, body })?))
            }
        }))
    }

    fn drop(&mut self, response: Resource<FutureIncomingResponse>) -> Result<()> {
        // A response that came holds its exchange, which holds the response.
        self.table.delete(response)?.0.0.borrow_mut().take();
        Ok(())
    }
}

impl types::HostIncomingResponse for State {
    fn status(&mut self, response: Resource<IncomingResponse>) -> Result<u16> {
        Ok(self.table.get(&response)?.head.status)
    }

    fn headers(&mut self, response: Resource<IncomingResponse>) -> Result<Resource<HttpFields>> {
        let fields = self.table.get(&response)?.head.fields.clone();
        Ok(self.table.push(HttpFields::fixed(fields))?)
    }

    fn consume(
        &mut self,
        response: Resource<IncomingResponse>,
    ) -> Result<Result<Resource<IncomingBody>, ()>> {
        let Some(Single(body)) = self.table.get_mut(&response)?.body.take() else {
            return Ok(Err(()));
        };
        let body = IncomingBody::new(Rc::new(RefCell::new(body)));
        Ok(Ok(self.table.push(body)?))
    }

    fn drop(&mut self, response: Resource<IncomingResponse>) -> Result<()> {
        self.table.delete(response)?;
        Ok(())
    }
}

impl types::HostOutgoingRequest for State {
    fn new(&mut self, fields: Resource<HttpFields>) -> Result<Resource<OutgoingRequest>> {
        let fields = self.table.delete(fields)?.fields;
        Ok(self.table.push(OutgoingRequest {
            method: Method::Get,
            target: None,
            scheme: None,
            authority: None,
            fields,
            body: Single(Rc::default()),
            is_taken: false,
        })?)
    }

    fn body(
        &mut self,
        request: Resource<OutgoingRequest>,
    ) -> Result<Result<Resource<OutgoingBody>, ()>> {
        let request = self.table.get_mut(&request)?;
        if core::mem::replace(&mut request.is_taken, true) {
            return Ok(Err(()));
        }
        let body = OutgoingBody::new(request.body.0.clone());
        Ok(Ok(self.table.push(body)?))
    }

    fn method(&mut self, request: Resource<OutgoingRequest>) -> Result<Method> {
        Ok(self.table.get(&request)?.method.clone())
    }

    fn set_method(
        &mut self,
        request: Resource<OutgoingRequest>,
        method: Method,
    ) -> Result<Result<(), ()>> {
        if !head::is_name(&method_name(&method)) {
            return Ok(Err(()));
        }
        self.table.get_mut(&request)?.method = method;
        Ok(Ok(()))
    }

    fn path_with_query(&mut self, request: Resource<OutgoingRequest>) -> Result<Option<String>> {
        Ok(self.table.get(&request)?.target.clone())
    }

    fn set_path_with_query(
        &mut self,
        request: Resource<OutgoingRequest>,
        path: Option<String>,
    ) -> Result<Result<(), ()>> {
        // What would end the line, or be another part of it.
        let is_path = |path: &String| path.bytes().all(|byte| byte > b' ' && byte != 0x7f);
        if path.as_ref().is_some_and(|path| !is_path(path)) {
            return Ok(Err(()));
        }
        let path = path.map(|path| match path.as_str() {
            "" => "/".to_string(),
            other if other.starts_with('?') => ["/", other].concat(),
            _ => path,
        });
        self.table.get_mut(&request)?.target = path;
        Ok(Ok(()))
    }

    fn scheme(&mut self, request: Resource<OutgoingRequest>) -> Result<Option<Scheme>> {
        Ok(self.table.get(&request)?.scheme.clone())
    }

    fn set_scheme(
        &mut self,
        request: Resource<OutgoingRequest>,
        scheme: Option<Scheme>,
    ) -> Result<Result<(), ()>> {
        self.table.get_mut(&request)?.scheme = scheme;
        Ok(Ok(()))
    }

    fn authority(&mut self, request: Resource<OutgoingRequest>) -> Result<Option<String>> {
        Ok(self.table.get(&request)?.authority.clone())
    }

    fn set_authority(
        &mut self,
        request: Resource<OutgoingRequest>,
        authority: Option<String>,
    ) -> Result<Result<(), ()>> {
        if let Some(authority) = &authority
            && (host_and_port(authority, 1).is_none() || !head::is_value(authority.as_bytes()))
        {
            return Ok(Err(()));
        }
        self.table.get_mut(&request)?.authority = authority;
        Ok(Ok(()))
    }

    fn headers(&mut self, request: Resource<OutgoingRequest>) -> Result<Resource<HttpFields>> {
        let fields = self.table.get(&request)?.fields.clone();
        Ok(self.table.push(HttpFields::fixed(fields))?)
    }

    fn drop(&mut self, request: Resource<OutgoingRequest>) -> Result<()> {
        self.table.delete(request)?;
        Ok(())
    }
}

impl types::HostRequestOptions for State {
    fn new(&mut self) -> Result<Resource<RequestOptions>> {
        Ok(self.table.push(RequestOptions::default())?)
    }

    fn connect_timeout(&mut self, options: Resource<RequestOptions>) -> Result<Option<u64>> {
        Ok(self.table.get(&options)?.connect)
    }

    fn set_connect_timeout(
        &mut self,
        options: Resource<RequestOptions>,
        duration: Option<u64>,
    ) -> Result<Result<(), ()>> {
        self.table.get_mut(&options)?.connect = duration;
        Ok(Ok(()))
    }

    fn first_byte_timeout(&mut self, options: Resource<RequestOptions>) -> Result<Option<u64>> {
        Ok(self.table.get(&options)?.first_byte)
    }

    fn set_first_byte_timeout(
        &mut self,
        options: Resource<RequestOptions>,
        duration: Option<u64>,
    ) -> Result<Result<(), ()>> {
        self.table.get_mut(&options)?.first_byte = duration;
        Ok(Ok(()))
    }

    fn between_bytes_timeout(&mut self, options: Resource<RequestOptions>) -> Result<Option<u64>> {
        Ok(self.table.get(&options)?.between_bytes)
    }

    fn set_between_bytes_timeout(
        &mut self,
        options: Resource<RequestOptions>,
        duration: Option<u64>,
    ) -> Result<Result<(), ()>> {
        self.table.get_mut(&options)?.between_bytes = duration;
        Ok(Ok(()))
    }

    fn drop(&mut self, options: Resource<RequestOptions>) -> Result<()> {
        self.table.delete(options)?;
        Ok(())
    }
}
