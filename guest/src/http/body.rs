//! Bodies: their framing (RFC 9112, 6 and 7).

use alloc::format;
use alloc::vec::Vec;

use super::Fields;
use super::head::{self, Malformed};
use crate::machine::Machine;
use crate::stream::{Broken, End, Source};

/// How much is read at a time, in bytes.
const PIECE: usize = 8 * 1024;

/// The longest line of a chunk's size, and all trailers, in bytes.
const LINE_MAX: usize = 8 * 1024;

/// How a body's end is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// After so many bytes.
    Length(u64),
    /// The chunked transfer coding.
    Chunked,
    /// When the connection ends.
    UntilClosed,
}

/// What a body is received by.
pub trait Wire {
    /// Takes what came, up to the buffer's length; 0: nothing did, yet.
    fn receive(&mut self, machine: &mut Machine, buffer: &mut [u8]) -> Result<usize, End>;

    /// Whether [`Wire::receive`] has something to say.
    fn has_received(&mut self, machine: &mut Machine) -> bool;

    /// When it may have though nothing came, in nanoseconds since release.
    fn look_again_ns(&self) -> u64 {
        u64::MAX
    }
}

/// A body that is received.
pub struct Body<W> {
    wire: W,
    /// What came and is not decoded.
    input: Vec<u8>,
    state: State,
    /// What came after a chunked body.
    pub trailers: Fields,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// So many bytes, and what follows them.
    Data(u64, After),
    /// A chunk's size comes.
    Size,
    /// Trailers come.
    Trailers,
    UntilClosed,
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    Nothing,
    /// The end of a chunk.
    Chunk,
}

impl<W: Wire> Body<W> {
    /// A body of which `input` was received with its head.
    pub fn new(wire: W, framing: Framing, input: Vec<u8>) -> Self {
        let state = match framing {
            Framing::Length(0) => State::Ended,
            Framing::Length(length) => State::Data(length, After::Nothing),
            Framing::Chunked => State::Size,
            Framing::UntilClosed => State::UntilClosed,
        };
        Self { wire, input, state, trailers: Fields::new() }
    }

    /// What it is received by.
    pub fn wire(&self) -> &W {
        &self.wire
    }

    /// Whether all of it was read.
    pub fn has_ended(&self) -> bool {
        self.state == State::Ended
    }

    fn is_in_data(&self) -> bool {
        matches!(self.state, State::Data(1.., _) | State::UntilClosed)
    }

    /// What came after it.
    pub fn take_rest(&mut self) -> Vec<u8> {
        core::mem::take(&mut self.input)
    }

    /// Decodes what is there: bytes of the body, or none if more must come first.
    fn decode(&mut self, limit: usize) -> Result<Vec<u8>, End> {
        let malformed = |Malformed(what)| End::Failed(Broken::Http(what));
        loop {
            match self.state {
                State::Ended => return Err(End::Closed),
                State::UntilClosed => {
                    let length = self.input.len().min(limit);
                    return Ok(self.input.drain(..length).collect());
                }
                State::Data(0, After::Nothing) => self.state = State::Ended,
                State::Data(0, After::Chunk) => match self.input.get(..2) {
                    Some(b"\r\n") => {
                        self.input.drain(..2);
                        self.state = State::Size;
                    }
                    Some(_) => return Err(malformed(Malformed("a chunk's end is missing"))),
                    None => return Ok(Vec::new()),
                },
                State::Data(left, after) => {
                    let length = self.input.len().min(limit);
                    let length = length.min(usize::try_from(left).unwrap_or(usize::MAX));
                    self.state = State::Data(left - length as u64, after);
                    if after == After::Nothing && left == length as u64 {
                        self.state = State::Ended;
                    }
                    return Ok(self.input.drain(..length).collect());
                }
                State::Size => match httparse::parse_chunk_size(&self.input) {
                    Ok(httparse::Status::Complete((length, size))) => {
                        self.input.drain(..length);
                        self.state = match size {
                            0 => State::Trailers,
                            size => State::Data(size, After::Chunk),
                        };
                    }
                    Ok(httparse::Status::Partial) if self.input.len() < LINE_MAX => {
                        return Ok(Vec::new());
                    }
                    _ => return Err(malformed(Malformed("a chunk's size is none"))),
                },
                State::Trailers => {
                    let Some((trailers, length)) =
                        head::trailers(&self.input).map_err(malformed)?
                    else {
                        if self.input.len() >= LINE_MAX {
                            return Err(malformed(Malformed("trailers of more than 8 KiB")));
                        }
                        return Ok(Vec::new());
                    };
                    self.trailers = trailers;
                    self.input.drain(..length);
                    self.state = State::Ended;
                }
            }
        }
    }
}

impl<W: Wire> Source for Body<W> {
    fn read(&mut self, machine: &mut Machine, limit: usize) -> Result<Vec<u8>, End> {
        if limit == 0 {
            return Ok(Vec::new());
        }
        loop {
            let bytes = self.decode(limit)?;
            if !bytes.is_empty() {
                return Ok(bytes);
            }
            let mut piece = [0; PIECE];
            match self.wire.receive(machine, &mut piece) {
                Ok(0) => return Ok(Vec::new()),
                Ok(length) => self.input.extend_from_slice(&piece[..length]),
                Err(End::Closed) if self.state == State::UntilClosed => self.state = State::Ended,
                Err(End::Closed) => return Err(End::Failed(Broken::Http("the body was cut"))),
                Err(failed) => return Err(failed),
            }
        }
    }

    fn is_ready(&mut self, machine: &mut Machine) -> bool {
        // A part of a chunk's size is nothing to be read, and more of it comes only to who waits.
        let is_decoded = match self.decode(0) {
            Ok(_) => !self.input.is_empty() && self.is_in_data(),
            Err(_) => true,
        };
        is_decoded || self.wire.has_received(machine)
    }

    fn look_again_ns(&self) -> u64 {
        self.wire.look_again_ns()
    }
}

/// A body that is sent: puts its bytes into frames.
#[derive(Clone, Copy, Debug)]
pub struct Encoder(Framing);

impl Encoder {
    /// Of chunks, or of a length that must be kept.
    pub fn new(framing: Framing) -> Self {
        Self(framing)
    }

    /// Puts bytes into a frame.
    pub fn encode(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
        match &mut self.0 {
            _ if bytes.is_empty() => {}
            Framing::Length(left) => {
                let rest = left.checked_sub(bytes.len() as u64);
                *left = rest.ok_or(Malformed("the body is longer than its head says"))?;
                out.extend_from_slice(bytes);
            }
            Framing::Chunked => {
                out.extend_from_slice(format!("{:x}\r\n", bytes.len()).as_bytes());
                out.extend_from_slice(bytes);
                out.extend_from_slice(b"\r\n");
            }
            Framing::UntilClosed => out.extend_from_slice(bytes),
        }
        Ok(())
    }

    /// Ends the body.
    pub fn finish(self, trailers: &Fields, out: &mut Vec<u8>) -> Result<(), Malformed> {
        match self.0 {
            Framing::Length(0) | Framing::UntilClosed => {}
            Framing::Length(_) => return Err(Malformed("the body is shorter than its head says")),
            Framing::Chunked => {
                out.extend_from_slice(b"0\r\n");
                head::write_fields(trailers, out);
            }
        }
        Ok(())
    }
}
