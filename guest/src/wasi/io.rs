//! wasi:io: streams, their errors, and waiting for several things at once.

use alloc::boxed::Box;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;

use wasmtime::Result;
use wasmtime::component::Resource;

use super::bindings::wasi::io::{error, poll, streams};
use super::{Failure, State};
use crate::machine::Machine;
use crate::single::Single;
use crate::stream::{Broken, End, Sink, Source};

pub type StreamError = Failure<streams::StreamError>;

/// The most that a read gives at once, in bytes, whatever was asked for.
const READ_MAX: u64 = 64 * 1024;

/// What broke a stream.
pub struct IoError(pub Broken);

impl core::fmt::Display for Broken {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Reset => "the other side closed the connection",
            Self::Timeout => "it took too long",
            Self::Http(text) => text,
            Self::Other(text) => text,
        })
    }
}

/// Something to wait for.
pub struct Pollable {
    ready: Single<Box<dyn FnMut(&mut Machine) -> bool>>,
    /// When it may be ready though nothing came, in nanoseconds since release.
    at_ns: u64,
}

impl Pollable {
    /// What is ready when this says so.
    pub fn when(ready: impl FnMut(&mut Machine) -> bool + 'static) -> Self {
        Self { ready: Single(Box::new(ready)), at_ns: u64::MAX }
    }

    /// The same, which may also be so from a time on, in nanoseconds since release.
    pub fn when_or_at(ready: impl FnMut(&mut Machine) -> bool + 'static, at_ns: u64) -> Self {
        Self { ready: Single(Box::new(ready)), at_ns }
    }

    /// What is ready at a time, in nanoseconds since release.
    pub fn at(at_ns: u64) -> Self {
        Self::when_or_at(move |machine| machine.now_ns() >= at_ns, at_ns)
    }
}

/// Bytes that come.
pub struct InputStream(Single<Rc<RefCell<dyn Source>>>);

impl InputStream {
    pub fn new(source: Rc<RefCell<dyn Source>>) -> Self {
        Self(Single(source))
    }
}

/// Bytes that go.
pub struct OutputStream(Single<Rc<RefCell<dyn Sink>>>);

impl OutputStream {
    pub fn new(sink: Rc<RefCell<dyn Sink>>) -> Self {
        Self(Single(sink))
    }
}

impl State {
    /// A stream's end, as the interface has it.
    fn ended(&mut self, end: End) -> StreamError {
        match end {
            End::Closed => Failure::Error(streams::StreamError::Closed),
            End::Failed(broken) => match self.table.push(IoError(broken)) {
                Ok(error) => Failure::Error(streams::StreamError::LastOperationFailed(error)),
                Err(full) => full.into(),
            },
        }
    }

    fn source(&self, stream: &Resource<InputStream>) -> Result<Rc<RefCell<dyn Source>>> {
        Ok(self.table.get(stream)?.0.0.clone())
    }

    fn sink(&self, stream: &Resource<OutputStream>) -> Result<Rc<RefCell<dyn Sink>>> {
        Ok(self.table.get(stream)?.0.0.clone())
    }

    fn read_some(
        &mut self,
        source: &RefCell<dyn Source>,
        length: u64,
    ) -> Result<Vec<u8>, StreamError> {
        let limit = length.min(READ_MAX) as usize;
        let read = source.borrow_mut().read(&mut self.machine, limit);
        read.map_err(|end| self.ended(end))
    }

    fn room(&mut self, sink: &RefCell<dyn Sink>) -> Result<usize, StreamError> {
        let room = sink.borrow_mut().room(&mut self.machine);
        room.map_err(|end| self.ended(end))
    }

    fn write_some(&mut self, sink: &RefCell<dyn Sink>, bytes: &[u8]) -> Result<(), StreamError> {
        let written = sink.borrow_mut().write(&mut self.machine, bytes);
        written.map_err(|end| self.ended(end))
    }

    fn write_all(&mut self, sink: &RefCell<dyn Sink>, mut bytes: &[u8]) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            let room = self.room(sink)?;
            if room == 0 {
                self.wait(u64::MAX)?;
                continue;
            }
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.write_some(sink, now)?;
            bytes = later;
        }
        let flushed = sink.borrow_mut().flush(&mut self.machine);
        flushed.map_err(|end| self.ended(end))
    }
}

impl error::Host for State {}

impl error::HostError for State {
    fn to_debug_string(&mut self, error: Resource<IoError>) -> Result<String> {
        Ok(self.table.get(&error)?.0.to_string())
    }

    fn drop(&mut self, error: Resource<IoError>) -> Result<()> {
        self.table.delete(error)?;
        Ok(())
    }
}

impl poll::Host for State {
    fn poll(&mut self, pollables: Vec<Resource<Pollable>>) -> Result<Vec<u32>> {
        if pollables.is_empty() {
            return Err(wasmtime::Error::msg("it polled nothing, which would never end"));
        }
        loop {
            let (mut ready, mut until_ns) = (Vec::new(), u64::MAX);
            for (index, pollable) in (0..).zip(&pollables) {
                let pollable = self.table.get_mut(pollable)?;
                if (pollable.ready.0)(&mut self.machine) {
                    ready.push(index);
                } else {
                    until_ns = until_ns.min(pollable.at_ns);
                }
            }
            if !ready.is_empty() {
                return Ok(ready);
            }
            self.wait(until_ns)?;
        }
    }
}

impl poll::HostPollable for State {
    fn ready(&mut self, pollable: Resource<Pollable>) -> Result<bool> {
        let pollable = self.table.get_mut(&pollable)?;
        Ok((pollable.ready.0)(&mut self.machine))
    }

    fn block(&mut self, pollable: Resource<Pollable>) -> Result<()> {
        poll::Host::poll(self, vec![pollable]).map(drop)
    }

    fn drop(&mut self, pollable: Resource<Pollable>) -> Result<()> {
        self.table.delete(pollable)?;
        Ok(())
    }
}

impl streams::Host for State {
    fn convert_stream_error(&mut self, error: StreamError) -> Result<streams::StreamError> {
        error.convert()
    }
}

impl streams::HostInputStream for State {
    fn read(&mut self, stream: Resource<InputStream>, length: u64) -> Result<Vec<u8>, StreamError> {
        let source = self.source(&stream)?;
        self.read_some(&source, length)
    }

    fn blocking_read(
        &mut self,
        stream: Resource<InputStream>,
        length: u64,
    ) -> Result<Vec<u8>, StreamError> {
        let source = self.source(&stream)?;
        loop {
            let bytes = self.read_some(&source, length)?;
            if !bytes.is_empty() || length == 0 {
                return Ok(bytes);
            }
            let until_ns = source.borrow().look_again_ns();
            self.wait(until_ns)?;
        }
    }

    fn skip(&mut self, stream: Resource<InputStream>, length: u64) -> Result<u64, StreamError> {
        Ok(streams::HostInputStream::read(self, stream, length)?.len() as u64)
    }

    fn blocking_skip(
        &mut self,
        stream: Resource<InputStream>,
        length: u64,
    ) -> Result<u64, StreamError> {
        Ok(self.blocking_read(stream, length)?.len() as u64)
    }

    fn subscribe(&mut self, stream: Resource<InputStream>) -> Result<Resource<Pollable>> {
        let source = self.source(&stream)?;
        let at_ns = source.borrow().look_again_ns();
        let ready = move |machine: &mut Machine| source.borrow_mut().is_ready(machine);
        Ok(self.table.push(Pollable::when_or_at(ready, at_ns))?)
    }

    fn drop(&mut self, stream: Resource<InputStream>) -> Result<()> {
        self.table.delete(stream)?;
        Ok(())
    }
}

impl streams::HostOutputStream for State {
    fn check_write(&mut self, stream: Resource<OutputStream>) -> Result<u64, StreamError> {
        let sink = self.sink(&stream)?;
        Ok(self.room(&sink)? as u64)
    }

    fn write(&mut self, stream: Resource<OutputStream>, bytes: Vec<u8>) -> Result<(), StreamError> {
        let sink = self.sink(&stream)?;
        let room = self.room(&sink)?;
        if bytes.len() > room {
            let text = format!("it wrote {} bytes where there was room for {room}", bytes.len());
            return Err(Failure::Trap(wasmtime::Error::msg(text)));
        }
        self.write_some(&sink, &bytes)
    }

    fn blocking_write_and_flush(
        &mut self,
        stream: Resource<OutputStream>,
        bytes: Vec<u8>,
    ) -> Result<(), StreamError> {
        let sink = self.sink(&stream)?;
        self.write_all(&sink, &bytes)
    }

    fn flush(&mut self, stream: Resource<OutputStream>) -> Result<(), StreamError> {
        let sink = self.sink(&stream)?;
        let flushed = sink.borrow_mut().flush(&mut self.machine);
        flushed.map_err(|end| self.ended(end))
    }

    fn blocking_flush(&mut self, stream: Resource<OutputStream>) -> Result<(), StreamError> {
        streams::HostOutputStream::flush(self, stream)
    }

    fn subscribe(&mut self, stream: Resource<OutputStream>) -> Result<Resource<Pollable>> {
        let sink = self.sink(&stream)?;
        let ready = move |machine: &mut Machine| !matches!(sink.borrow_mut().room(machine), Ok(0));
        Ok(self.table.push(Pollable::when(ready))?)
    }

    fn write_zeroes(
        &mut self,
        stream: Resource<OutputStream>,
        length: u64,
    ) -> Result<(), StreamError> {
        let room = self.check_write(Resource::new_borrow(stream.rep()))?;
        if length > room {
            let text = format!("it wrote {length} zeroes where there was room for {room}");
            return Err(Failure::Trap(wasmtime::Error::msg(text)));
        }
        streams::HostOutputStream::write(self, stream, vec![0; length as usize])
    }

    fn blocking_write_zeroes_and_flush(
        &mut self,
        stream: Resource<OutputStream>,
        length: u64,
    ) -> Result<(), StreamError> {
        self.blocking_write_and_flush(stream, vec![0; length.min(4096) as usize])
    }

    fn splice(
        &mut self,
        stream: Resource<OutputStream>,
        from: Resource<InputStream>,
        length: u64,
    ) -> Result<u64, StreamError> {
        let (sink, source) = (self.sink(&stream)?, self.source(&from)?);
        let room = self.room(&sink)? as u64;
        let bytes = self.read_some(&source, length.min(room))?;
        self.write_some(&sink, &bytes)?;
        Ok(bytes.len() as u64)
    }

    fn blocking_splice(
        &mut self,
        stream: Resource<OutputStream>,
        from: Resource<InputStream>,
        length: u64,
    ) -> Result<u64, StreamError> {
        let sink = self.sink(&stream)?;
        let bytes = streams::HostInputStream::blocking_read(self, from, length)?;
        self.write_all(&sink, &bytes)?;
        Ok(bytes.len() as u64)
    }

    fn drop(&mut self, stream: Resource<OutputStream>) -> Result<()> {
        self.table.delete(stream)?;
        Ok(())
    }
}
