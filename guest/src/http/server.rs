//! The server: calls that come from the host, over vsock.

use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;

use warren_abi::microvm::{ERROR_FIELD, HTTP_VSOCK_PORT};

use super::body::{Body, Encoder, Framing, Wire};
use super::head::{self, Malformed, Request};
use super::{Fields, values};
use crate::channel::{Connection, NoCredit};
use crate::machine::Machine;
use crate::stream::{Broken, End, Sink};

/// How much of a response may wait, in bytes.
const WAITING: usize = 64 * 1024;

/// A response is sent in one piece, and with its length, if it is whole within so much time. What is
/// flushed later than that is sent at once. In nanoseconds.
const ONE_PIECE_NS: u64 = 2_000_000;

/// How much of a body that the function did not read is thrown away, in bytes, to keep the connection.
const THROWN_AWAY: usize = 64 * 1024;

/// Who calls.
#[derive(Default)]
pub struct Callers {
    known: Vec<Caller>,
}

struct Caller {
    connection: Connection,
    received: Vec<u8>,
}

/// A call.
pub struct Call {
    pub request: Request,
    pub body: Body<Connection>,
    pub connection: Connection,
}

impl Callers {
    /// The next call whose head is there, of callers in turn. Who sends something else is told so and
    /// disconnected.
    pub fn next(&mut self, machine: &mut Machine) -> Option<Call> {
        self.known.retain(|caller| machine.channel.is_open(caller.connection));
        for connection in machine.channel.connections(HTTP_VSOCK_PORT) {
            if !self.known.iter().any(|caller| caller.connection == connection) {
                self.known.push(Caller { connection, received: Vec::new() });
            }
        }
        for index in 0..self.known.len() {
            let Caller { connection, received } = &mut self.known[index];
            let connection = *connection;
            while received.len() < head::HEAD_MAX {
                let mut piece = [0; 4096];
                match machine.channel.receive(connection, &mut piece) {
                    0 => break,
                    length => received.extend_from_slice(&piece[..length]),
                }
            }
            match parse(received) {
                Ok(None) => {}
                Ok(Some((request, length, framing))) => {
                    received.drain(..length);
                    if received.is_empty() && expects_continue(&request, framing) {
                        machine.send(connection, b"HTTP/1.1 100 Continue\r\n\r\n");
                    }
                    let body = Body::new(connection, framing, core::mem::take(received));
                    // Whoever called is the last to be asked for the next one.
                    self.known.rotate_left(index + 1);
                    return Some(Call { request, body, connection });
                }
                Err(Malformed(what)) => {
                    let mut answer = Answer::new(connection, machine.now_ns(), false);
                    answer.refuse(machine, 400, "malformed", what);
                    machine.channel.close(connection);
                }
            }
        }
        None
    }

    /// A call was answered: its caller may call again, unless something of the body is left.
    pub fn done(&mut self, machine: &mut Machine, body: &mut Body<Connection>, keep: bool) {
        use crate::stream::Source;
        let connection = body.connection();
        let mut thrown_away = 0;
        while keep && !body.has_ended() && thrown_away < THROWN_AWAY {
            match body.read(machine, THROWN_AWAY) {
                Ok(bytes) if !bytes.is_empty() => thrown_away += bytes.len(),
                _ => break,
            }
        }
        if !keep || !body.has_ended() {
            machine.channel.close(connection);
        } else if let Some(caller) = self.known.iter_mut().find(|c| c.connection == connection) {
            caller.received = body.take_rest();
        }
    }
}

fn parse(received: &[u8]) -> Result<Option<(Request, usize, Framing)>, Malformed> {
    let Some((request, length)) = head::request(received)? else { return Ok(None) };
    if values(&request.fields, "upgrade").next().is_some() {
        return Err(Malformed("this function takes no other protocol"));
    }
    let framing = head::framing(&request.fields)?.unwrap_or(Framing::Length(0));
    Ok(Some((request, length, framing)))
}

/// Whether the caller waits with the body until it is told to send it (RFC 9110, 10.1.1).
fn expects_continue(request: &Request, framing: Framing) -> bool {
    let mut expected = values(&request.fields, "expect");
    framing != Framing::Length(0)
        && expected.any(|value| value.eq_ignore_ascii_case(b"100-continue"))
}

impl Body<Connection> {
    fn connection(&self) -> Connection {
        *self.wire()
    }
}

impl Wire for Connection {
    fn receive(&mut self, machine: &mut Machine, buffer: &mut [u8]) -> Result<usize, End> {
        match machine.channel.receive(*self, buffer) {
            0 if !machine.channel.is_open(*self) => Err(End::Closed),
            length => Ok(length),
        }
    }

    fn has_received(&mut self, machine: &mut Machine) -> bool {
        machine.channel.has_received(*self) || !machine.channel.is_open(*self)
    }
}

/// What a call is answered.
pub struct Answer {
    connection: Connection,
    began_ns: u64,
    /// It is to a HEAD request: nothing of a body is sent.
    head_only: bool,
    /// The status and the fields, until they are encoded.
    head: Option<(u16, Fields)>,
    /// What of the body is in no frame yet: there is no more of it than may wait.
    whole: Vec<u8>,
    encoder: Option<Encoder>,
    /// What is to be sent.
    out: Vec<u8>,
    state: State,
    /// The caller is told that this is the last answer.
    pub is_last: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No head.
    Awaited,
    /// A body follows.
    Begun,
    Finished,
    Broken,
}

impl Answer {
    pub fn new(connection: Connection, began_ns: u64, head_only: bool) -> Self {
        Self {
            connection,
            began_ns,
            head_only,
            head: None,
            whole: Vec::new(),
            encoder: None,
            out: Vec::new(),
            state: State::Awaited,
            is_last: false,
        }
    }

    /// Whether the function has said what the answer is.
    pub fn has_begun(&self) -> bool {
        self.state != State::Awaited
    }

    /// Whether the caller was sent something of it.
    pub fn is_under_way(&self) -> bool {
        self.has_begun() && self.head.is_none()
    }

    /// Whether all of the answer is known.
    pub fn has_finished(&self) -> bool {
        self.state == State::Finished
    }

    /// Begins the answer.
    pub fn begin(&mut self, status: u16, fields: Fields) {
        self.head = Some((status, fields));
        self.state = State::Begun;
    }

    /// Ends the body.
    pub fn finish(&mut self, trailers: &Fields) -> Result<(), Malformed> {
        if self.state != State::Begun {
            return Err(Malformed("the answer has ended"));
        }
        // Until all of it is encoded: the caller must not wait for the rest.
        self.state = State::Broken;
        if self.head.is_some() {
            let length = trailers.is_empty().then_some(self.whole.len() as u64);
            self.encode_head(length)?;
        }
        if let Some(encoder) = self.encoder.take() {
            encoder.finish(trailers, &mut self.out)?;
        }
        self.state = State::Finished;
        Ok(())
    }

    /// The answer is an error of the runtime's: a reason for programs and one for people.
    pub fn refuse(&mut self, machine: &mut Machine, status: u16, reason: &str, text: &str) {
        let fields =
            [(ERROR_FIELD, reason.as_bytes().to_vec()), ("content-type", b"text/plain".to_vec())];
        let fields = fields.map(|(name, value)| (name.to_string(), value)).to_vec();
        self.is_last = true;
        self.begin(status, fields);
        self.whole = format!("{reason}: {text}\n").into_bytes();
        // A body of its own length.
        let _ = self.finish(&Fields::new());
        self.send_all(machine);
    }

    /// No more of the answer comes: the caller is sent as much of it as it takes now, and sees that it is
    /// not whole.
    pub fn break_off(&mut self, machine: &mut Machine) {
        let _ = self.push(machine);
        self.state = State::Broken;
        self.is_last = true;
    }

    /// Puts the head into `out`, and what there is of the body.
    fn encode_head(&mut self, length: Option<u64>) -> Result<(), Malformed> {
        let Some((status, mut fields)) = self.head.take() else { return Ok(()) };
        let bodiless = self.head_only || status == 204 || status == 304;
        let framing = match (head::framing(&fields)?, length) {
            (Some(framing), _) => framing,
            _ if bodiless => Framing::Length(0),
            (None, Some(length)) => {
                fields.push(("content-length".to_string(), length.to_string().into_bytes()));
                Framing::Length(length)
            }
            (None, None) => {
                fields.push(("transfer-encoding".to_string(), b"chunked".to_vec()));
                Framing::Chunked
            }
        };
        if self.is_last {
            fields.push(("connection".to_string(), b"close".to_vec()));
        }
        self.out.extend_from_slice(format!("HTTP/1.1 {status} \r\n").as_bytes());
        head::write_fields(&fields, &mut self.out);
        let whole = core::mem::take(&mut self.whole);
        if !bodiless {
            let mut encoder = Encoder::new(framing);
            encoder.encode(&whole, &mut self.out)?;
            self.encoder = Some(encoder);
        }
        Ok(())
    }

    /// Sends what there is, as far as the caller takes it.
    pub fn push(&mut self, machine: &mut Machine) -> Result<(), End> {
        if self.state == State::Begun && self.head.is_some() {
            let encoded = self.encode_head(None);
            encoded.map_err(|Malformed(what)| End::Failed(Broken::Http(what)))?;
        }
        while !self.out.is_empty() {
            match machine.channel.send(self.connection, &self.out) {
                Ok(length) => drop(self.out.drain(..length)),
                Err(NoCredit) => break,
            }
        }
        if machine.channel.is_open(self.connection) {
            Ok(())
        } else {
            Err(End::Failed(Broken::Reset))
        }
    }

    /// Sends all of it, waiting as long as it takes.
    pub fn send_all(&mut self, machine: &mut Machine) {
        let out = core::mem::take(&mut self.out);
        machine.send(self.connection, &out);
    }
}

impl Sink for Answer {
    fn room(&mut self, machine: &mut Machine) -> Result<usize, End> {
        match self.state {
            // Before the head is known, bytes of the body wait for it.
            State::Awaited | State::Begun => {
                if self.state == State::Begun && self.out.len() + self.whole.len() >= WAITING {
                    self.push(machine)?;
                }
                Ok(WAITING.saturating_sub(self.out.len() + self.whole.len()))
            }
            State::Finished => Err(End::Closed),
            State::Broken => Err(End::Failed(Broken::Reset)),
        }
    }

    fn write(&mut self, machine: &mut Machine, bytes: &[u8]) -> Result<(), End> {
        if self.room(machine)? == 0 && !bytes.is_empty() {
            return Err(End::Failed(Broken::Http("more was written than there was room for")));
        }
        match &mut self.encoder {
            Some(encoder) => encoder
                .encode(bytes, &mut self.out)
                .map_err(|Malformed(what)| End::Failed(Broken::Http(what))),
            // Nobody reads it, or its head is not encoded.
            None if self.head.is_none() && self.state == State::Begun => Ok(()),
            None => {
                self.whole.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    fn flush(&mut self, machine: &mut Machine) -> Result<(), End> {
        let is_late = machine.now_ns().saturating_sub(self.began_ns) > ONE_PIECE_NS;
        if is_late && self.state == State::Begun { self.push(machine) } else { Ok(()) }
    }
}
