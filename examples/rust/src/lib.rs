//! Counts in a Redis how often each path was asked for.
//!
//! The Redis's address is in the environment, as `REDIS=10.0.0.5:6379`. Without one, this only says
//! hello.

mod redis;

use std::io::Write;
use std::net::SocketAddr;

use wasip2::cli::environment::get_environment;
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{
    Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam,
};

struct Counter;

wasip2::http::proxy::export!(Counter);

impl Guest for Counter {
    fn handle(request: IncomingRequest, response: ResponseOutparam) {
        match answer(&request) {
            Ok(text) => send(response, 200, &text),
            Err(reason) => send(response, 502, &format!("{reason}\n")),
        }
    }
}

fn answer(request: &IncomingRequest) -> Result<String, String> {
    let variables = get_environment();
    let Some((_, address)) = variables.iter().find(|(name, _)| name == "REDIS") else {
        return Ok("hello from Rust\n".into());
    };
    let address: SocketAddr =
        address.parse().map_err(|error| format!("REDIS is {address:?}: {error}"))?;
    let path = request.path_with_query().unwrap_or_default();
    let name = path.split('?').next().unwrap_or_default().trim_start_matches('/');
    let count = redis::increment(address, name).map_err(|error| format!("{address}: {error}"))?;
    Ok(format!("{name} {count}\n"))
}

fn send(response: ResponseOutparam, status: u16, text: &str) {
    let outgoing = OutgoingResponse::new(Fields::new());
    outgoing.set_status_code(status).expect("is a status");
    let body = outgoing.body().expect("is taken once");
    ResponseOutparam::set(response, Ok(outgoing));
    let mut stream = body.write().expect("is taken once");
    // Whoever hung up wants no answer.
    let written = stream.write_all(text.as_bytes());
    drop(stream);
    if written.is_ok() {
        OutgoingBody::finish(body, None).ok();
    }
}
