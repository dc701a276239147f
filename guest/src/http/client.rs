//! The client: a function's calls to others, each on a connection of its own.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::net::Ipv4Addr;

use smoltcp::wire::IpEndpoint;

use super::Fields;
use super::body::{Body, Encoder, Framing, Wire};
use super::head::{self, Malformed, Response};
use crate::dns::{Lookup, NoAddress};
use crate::machine::Machine;
use crate::stream::{Broken, End, Sink};
use crate::tcp::Tcp;

/// How much of a request may wait to be sent, in bytes.
const WAITING: usize = 64 * 1024;

/// How long each part may take, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Until it is connected, and the name is known.
    pub connect_ns: u64,
    /// From then on, until the response's head is there.
    pub first_byte_ns: u64,
    /// Between any two pieces of its body.
    pub between_bytes_ns: u64,
}

impl Default for Patience {
    fn default() -> Self {
        const MINUTE_NS: u64 = 60_000_000_000;
        Self { connect_ns: MINUTE_NS, first_byte_ns: MINUTE_NS, between_bytes_ns: MINUTE_NS }
    }
}

/// Why there is no response.
#[derive(Clone, Debug)]
pub enum Failure {
    /// The name has no address.
    NoName,
    /// Nobody is there, or takes the connection.
    Refused,
    /// It was not connected in time.
    ConnectTimeout,
    /// There was no response in time.
    ResponseTimeout,
    /// The other side ended the connection before its response was there.
    Cut,
    /// The other side does not speak HTTP/1.1.
    Malformed,
}

/// A request on its way, and its response.
pub struct Exchange {
    stage: Stage,
    port: u16,
    patience: Patience,
    /// When the present stage must have ended, in nanoseconds since release.
    deadline_ns: u64,
    /// Head and body, as they are to be sent.
    out: Vec<u8>,
    encoder: Option<Encoder>,
    /// It is a HEAD request: its response has no body.
    head_only: bool,
    received: Vec<u8>,
}

enum Stage {
    Asking(Lookup),
    Connecting(Rc<RefCell<Tcp>>),
    Exchanging(Rc<RefCell<Tcp>>),
    Answered(Response, Body<Connection>),
    Failed(Failure),
    Taken,
}

/// What a response's body is received by.
pub struct Connection {
    tcp: Rc<RefCell<Tcp>>,
    /// The request, of which something may still have to be sent.
    exchange: Rc<RefCell<Exchange>>,
    patience_ns: u64,
    deadline_ns: u64,
}

/// Where a request goes and how it is begun.
pub struct Start {
    pub host: String,
    pub port: u16,
    /// The request's line and fields, with their end.
    pub head: Vec<u8>,
    pub framing: Framing,
    pub head_only: bool,
    pub patience: Patience,
}

impl Exchange {
    /// Begins it.
    pub fn start(machine: &mut Machine, start: Start) -> Self {
        let Start { host, port, head, framing, head_only, patience } = start;
        let deadline_ns = machine.now_ns().saturating_add(patience.connect_ns);
        let mut this = Self {
            stage: Stage::Taken,
            port,
            patience,
            deadline_ns,
            out: head,
            encoder: Some(Encoder::new(framing)),
            head_only,
            received: Vec::new(),
        };
        this.stage = match host.parse::<Ipv4Addr>() {
            Ok(address) => this.connect(machine, address),
            Err(_) => match Lookup::start(machine, &host) {
                Ok(lookup) => Stage::Asking(lookup),
                Err(NoAddress) => Stage::Failed(Failure::NoName),
            },
        };
        this
    }

    fn connect(&self, machine: &mut Machine, address: Ipv4Addr) -> Stage {
        match Tcp::connect(machine, IpEndpoint::new(address.into(), self.port), None) {
            Ok(tcp) => Stage::Connecting(Rc::new(RefCell::new(tcp))),
            Err(_) => Stage::Failed(Failure::Refused),
        }
    }

    /// When it must be looked at again, though nothing came.
    pub fn deadline_ns(&self) -> u64 {
        self.deadline_ns
    }

    /// Goes on as far as it can; returns whether there is a response, or will be none.
    pub fn advance(this: &Rc<RefCell<Self>>, machine: &mut Machine) -> bool {
        let exchange = &mut *this.borrow_mut();
        let is_late = machine.now_ns() >= exchange.deadline_ns;
        loop {
            match &mut exchange.stage {
                Stage::Asking(lookup) => match lookup.result(machine) {
                    None if is_late => exchange.stage = Stage::Failed(Failure::ConnectTimeout),
                    None => return false,
                    Some(Ok(addresses)) if !addresses.is_empty() => {
                        exchange.stage = exchange.connect(machine, addresses[0]);
                    }
                    Some(_) => exchange.stage = Stage::Failed(Failure::NoName),
                },
                Stage::Connecting(tcp) => {
                    let connected = tcp.borrow_mut().is_connected(machine);
                    match connected {
                        None if is_late => exchange.stage = Stage::Failed(Failure::ConnectTimeout),
                        None => return false,
                        Some(true) => {
                            let patience_ns = exchange.patience.first_byte_ns;
                            exchange.deadline_ns = machine.now_ns().saturating_add(patience_ns);
                            exchange.stage = Stage::Exchanging(tcp.clone());
                        }
                        Some(false) => exchange.stage = Stage::Failed(Failure::Refused),
                    }
                }
                Stage::Exchanging(tcp) => {
                    let tcp = tcp.clone();
                    // Who answers before he has read all of a request is right to.
                    let _ = exchange.send(machine, &tcp);
                    match exchange.read_head(machine, &tcp) {
                        Ok(Some((response, framing))) => {
                            let wire = Connection {
                                tcp,
                                exchange: this.clone(),
                                patience_ns: exchange.patience.between_bytes_ns,
                                deadline_ns: u64::MAX,
                            };
                            let rest = core::mem::take(&mut exchange.received);
                            let body = Body::new(wire, framing, rest);
                            exchange.stage = Stage::Answered(response, body);
                        }
                        Ok(None) if is_late => {
                            exchange.stage = Stage::Failed(Failure::ResponseTimeout);
                        }
                        Ok(None) => return false,
                        Err(failure) => exchange.stage = Stage::Failed(failure),
                    }
                }
                Stage::Answered(..) | Stage::Failed(_) | Stage::Taken => return true,
            }
        }
    }

    /// Takes the response, once.
    pub fn take(&mut self) -> Option<Result<(Response, Body<Connection>), Failure>> {
        match core::mem::replace(&mut self.stage, Stage::Taken) {
            Stage::Answered(response, body) => Some(Ok((response, body))),
            Stage::Failed(failure) => Some(Err(failure)),
            Stage::Taken => None,
            other => {
                self.stage = other;
                None
            }
        }
    }

    /// Sends what there is, as far as the connection takes it.
    fn send(&mut self, machine: &mut Machine, tcp: &RefCell<Tcp>) -> Result<(), End> {
        if !self.out.is_empty() {
            let sent = tcp.borrow_mut().send(machine, &self.out)?;
            self.out.drain(..sent);
        }
        Ok(())
    }

    /// The final response's head, once it is there, and how its body ends.
    fn read_head(
        &mut self,
        machine: &mut Machine,
        tcp: &RefCell<Tcp>,
    ) -> Result<Option<(Response, Framing)>, Failure> {
        let malformed = |Malformed(_)| Failure::Malformed;
        loop {
            match head::response(&self.received).map_err(malformed)? {
                // Only what is said in between (RFC 9110, 15.2).
                Some((Response { status: 100..=199, .. }, length)) => {
                    self.received.drain(..length);
                    continue;
                }
                Some((response, length)) => {
                    self.received.drain(..length);
                    let is_bodiless = self.head_only || matches!(response.status, 204 | 304);
                    let framing = match head::framing(&response.fields).map_err(malformed)? {
                        _ if is_bodiless => Framing::Length(0),
                        Some(framing) => framing,
                        None => Framing::UntilClosed,
                    };
                    return Ok(Some((response, framing)));
                }
                None => {}
            }
            let mut piece = [0; 4096];
            match tcp.borrow_mut().receive(machine, &mut piece) {
                Ok(0) => return Ok(None),
                Ok(length) => self.received.extend_from_slice(&piece[..length]),
                Err(_) => return Err(Failure::Cut),
            }
        }
    }

    /// The request is broken off: the other side sees that it is not whole.
    pub fn break_off(&mut self) {
        self.stage = Stage::Failed(Failure::Cut);
    }

    /// Puts bytes into the request's body.
    pub fn encode(&mut self, bytes: &[u8]) -> Result<(), End> {
        let encoder = self.encoder.as_mut().ok_or(End::Closed)?;
        let done = encoder.encode(bytes, &mut self.out);
        done.map_err(|Malformed(what)| End::Failed(Broken::Http(what)))
    }

    /// Ends the request's body.
    pub fn finish(&mut self, trailers: &Fields) -> Result<(), Malformed> {
        match self.encoder.take() {
            Some(encoder) => encoder.finish(trailers, &mut self.out),
            None => Err(Malformed("the request has ended")),
        }
    }
}

/// A request's body.
pub struct RequestBody(pub Rc<RefCell<Exchange>>);

impl Sink for RequestBody {
    fn room(&mut self, machine: &mut Machine) -> Result<usize, End> {
        if let Stage::Failed(_) = self.0.borrow().stage {
            return Err(End::Failed(Broken::Reset));
        }
        Exchange::advance(&self.0, machine);
        Ok(WAITING.saturating_sub(self.0.borrow().out.len()))
    }

    fn write(&mut self, machine: &mut Machine, bytes: &[u8]) -> Result<(), End> {
        self.0.borrow_mut().encode(bytes)?;
        Exchange::advance(&self.0, machine);
        Ok(())
    }
}

impl Wire for Connection {
    fn receive(&mut self, machine: &mut Machine, buffer: &mut [u8]) -> Result<usize, End> {
        self.exchange.borrow_mut().send(machine, &self.tcp)?;
        let received = self.tcp.borrow_mut().receive(machine, buffer);
        let now = machine.now_ns();
        match received {
            Ok(0) if now >= self.deadline_ns => Err(End::Failed(Broken::Timeout)),
            Ok(0) => {
                self.deadline_ns = self.deadline_ns.min(now.saturating_add(self.patience_ns));
                Ok(0)
            }
            Ok(length) => {
                self.deadline_ns = u64::MAX;
                Ok(length)
            }
            Err(end) => Err(end),
        }
    }

    fn has_received(&mut self, machine: &mut Machine) -> bool {
        let _ = self.exchange.borrow_mut().send(machine, &self.tcp);
        self.tcp.borrow().has_received(machine) || machine.now_ns() >= self.deadline_ns
    }

    fn look_again_ns(&self) -> u64 {
        self.deadline_ns
    }
}

/// The line that a request begins with.
pub fn request_line(method: &str, target: &str) -> Vec<u8> {
    format!("{method} {target} HTTP/1.1\r\n").into_bytes()
}
