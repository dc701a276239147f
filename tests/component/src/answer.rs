//! Answers of all kinds.

use std::io::{Read, Write};

use wasip2::clocks::monotonic_clock;
use wasip2::http::types::{
    ErrorCode, Fields, IncomingBody, IncomingRequest, OutgoingBody, OutgoingResponse,
    ResponseOutparam,
};
use wasip2::io::streams::{OutputStream, StreamError};

use crate::say;

/// An answer that was begun.
pub struct Answer {
    // Dropped before the body that it is of.
    pub stream: OutputStream,
    body: OutgoingBody,
}

impl Answer {
    pub fn begin(out: ResponseOutparam, status: u16, fields: &[(&str, &str)]) -> Self {
        let pairs: Vec<_> = fields
            .iter()
            .map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()))
            .collect();
        let response = OutgoingResponse::new(Fields::from_list(&pairs).unwrap());
        response.set_status_code(status).unwrap();
        let body = response.body().unwrap();
        ResponseOutparam::set(out, Ok(response));
        Self { stream: body.write().unwrap(), body }
    }

    /// Sends bytes now; returns whether somebody is there for them.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok() && self.stream.flush().is_ok()
    }

    pub fn finish(self, trailers: Option<Fields>) {
        let Self { stream, body } = self;
        drop(stream);
        // Whoever hung up wants no answer.
        let _ = OutgoingBody::finish(body, trailers);
    }
}

pub fn text(out: ResponseOutparam, status: u16, said: &str) {
    let mut answer = Answer::begin(out, status, &[("content-type", "text/plain")]);
    let _ = answer.stream.write_all(said.as_bytes());
    answer.finish(None);
}

/// Each piece goes back as it came.
pub fn echo(request: &IncomingRequest, out: ResponseOutparam) {
    let mut answer = Answer::begin(out, 200, &[]);
    let body = request.consume().unwrap();
    let stream = body.stream().unwrap();
    loop {
        match stream.blocking_read(16 * 1024) {
            Ok(piece) => {
                if !answer.send(&piece) {
                    return say("the caller is gone");
                }
            }
            Err(StreamError::Closed) => break,
            // Not finished: the caller sees that it is cut.
            Err(StreamError::LastOperationFailed(error)) => {
                return say(&format!("the body broke: {}", error.to_debug_string()));
            }
        }
    }
    answer.finish(None);
}

/// The answer begins when all of the body is there.
pub fn echo_whole(request: &IncomingRequest, out: ResponseOutparam) {
    let body = request.consume().unwrap();
    let mut whole = Vec::new();
    match body.stream().unwrap().read_to_end(&mut whole) {
        Ok(_) => {
            let mut answer = Answer::begin(out, 200, &[]);
            let _ = answer.stream.write_all(&whole);
            answer.finish(None);
        }
        Err(error) => text(out, 400, &error.to_string()),
    }
}

pub fn zeroes(out: ResponseOutparam, bytes: usize) {
    let mut answer = Answer::begin(out, 200, &[]);
    let _ = answer.stream.write_all(&vec![0; bytes]);
    answer.finish(None);
}

/// A piece, a pause, the next one.
pub fn slowly(out: ResponseOutparam, pieces: u32) {
    let mut answer = Answer::begin(out, 200, &[]);
    for number in 0..pieces {
        let piece = format!("piece {number}\n");
        if !answer.send(piece.as_bytes()) {
            return say("the caller is gone");
        }
        monotonic_clock::subscribe_duration(50_000_000).block();
    }
    answer.finish(None);
}

/// What is said of the caller, and fields of its own.
pub fn fields(request: &IncomingRequest, out: ResponseOutparam) {
    let came = request.headers().entries();
    let came =
        came.iter().map(|(name, value)| format!("{name}={}\n", String::from_utf8_lossy(value)));
    let refused = Fields::from_list(&[("transfer-encoding".into(), b"chunked".to_vec())]);
    assert!(refused.is_err(), "the length of a body is the host's to say");
    let fields = [("x-own", "1"), ("X-Own", "2")];
    let mut answer = Answer::begin(out, 200, &fields);
    let _ = answer.stream.write_all(came.collect::<String>().as_bytes());
    answer.finish(None);
}

/// With lengths of its own saying; the body has five bytes.
pub fn with_length(out: ResponseOutparam, lengths: &str) {
    let fields: Vec<_> = lengths.split(',').map(|length| ("content-length", length)).collect();
    let mut answer = Answer::begin(out, 200, &fields);
    let _ = answer.stream.write_all(b"hello");
    answer.finish(None);
}

/// The request's trailers come back as the answer's.
pub fn trailers(request: &IncomingRequest, out: ResponseOutparam) {
    let future = IncomingBody::finish(request.consume().unwrap());
    future.subscribe().block();
    let came = future.get().unwrap().unwrap().unwrap();
    let mut answer = Answer::begin(out, 200, &[]);
    let _ = answer.stream.write_all(b"before trailers");
    let trailers = Fields::new();
    for (name, value) in came.map(|fields| fields.entries()).unwrap_or_default() {
        trailers.append(&name, &value).unwrap();
    }
    answer.finish(Some(trailers));
}

/// A body of which only a part is there.
pub fn unfinished(out: ResponseOutparam) {
    let mut answer = Answer::begin(out, 200, &[]);
    let _ = answer.stream.write_all(b"a part");
}

pub fn answer_and_go_on(out: ResponseOutparam, line: &str) {
    text(out, 200, "answered");
    monotonic_clock::subscribe_duration(20_000_000).block();
    say(&format!("went on {line}"));
}

pub fn error(out: ResponseOutparam) {
    ResponseOutparam::set(out, Err(ErrorCode::InternalError(Some("as it was told".into()))));
}

/// Makes many resources, holds them, and lets them go.
pub fn hold_many(count: usize) -> String {
    let held: Vec<_> = (0..count).map(|_| Fields::new()).collect();
    format!("held {}", held.len())
}
