//! Bodies, of requests and responses, that come and that go.

use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;

use wasmtime::Result;
use wasmtime::component::Resource;

use super::super::State;
use super::super::bindings::wasi::http::types::{self, ErrorCode};
use super::super::io::{InputStream, OutputStream, Pollable};
use super::{HttpError, HttpFields, internal};
use crate::http::Fields;
use crate::http::body::{Body, Wire};
use crate::http::client::RequestBody;
use crate::http::head::Malformed;
use crate::http::server::Answer;
use crate::machine::Machine;
use crate::single::Single;
use crate::stream::{Broken, End, Sink, Source};

/// How much of a body may wait for its message to be sent, in bytes.
const WAITING: usize = 64 * 1024;

/// How much is read at a time of what nobody wants, in bytes.
const PIECE: usize = 16 * 1024;

/// A body that comes, whatever it comes by.
pub trait AnyBody: Source {
    /// What came after it.
    fn trailers(&mut self) -> Fields;
}

impl<W: Wire> AnyBody for Body<W> {
    fn trailers(&mut self) -> Fields {
        core::mem::take(&mut self.trailers)
    }
}

pub type SharedBody = Rc<RefCell<dyn AnyBody>>;

/// A body that comes.
pub struct IncomingBody {
    body: Single<SharedBody>,
    /// Somebody has the stream.
    is_taken: bool,
}

impl IncomingBody {
    pub fn new(body: SharedBody) -> Self {
        Self { body: Single(body), is_taken: false }
    }
}

struct Reader(SharedBody);

impl Source for Reader {
    fn read(&mut self, machine: &mut Machine, limit: usize) -> Result<Vec<u8>, End> {
        self.0.borrow_mut().read(machine, limit)
    }

    fn is_ready(&mut self, machine: &mut Machine) -> bool {
        self.0.borrow_mut().is_ready(machine)
    }

    fn look_again_ns(&self) -> u64 {
        self.0.borrow().look_again_ns()
    }
}

/// What comes after a body.
pub struct FutureTrailers {
    body: Single<SharedBody>,
    is_taken: bool,
}

/// Reads what nobody wants any more; `None`: there is more to come.
fn read_to_end(body: &SharedBody, machine: &mut Machine) -> Option<Result<(), End>> {
    loop {
        match body.borrow_mut().read(machine, PIECE) {
            Ok(bytes) if bytes.is_empty() => return None,
            Ok(_) => {}
            Err(End::Closed) => return Some(Ok(())),
            Err(failed) => return Some(Err(failed)),
        }
    }
}

/// Where a body goes.
pub enum Target {
    /// Nowhere yet: its message is not sent. What was written, and, if it has ended, the trailers.
    Waiting(Vec<u8>, Option<Fields>),
    Answer(Rc<RefCell<Answer>>),
    Request(RequestBody),
    Broken,
}

impl Default for Target {
    fn default() -> Self {
        Self::Waiting(Vec::new(), None)
    }
}

impl Target {
    /// Ends the body.
    fn finish(&mut self, machine: &mut Machine, trailers: Fields) -> Result<(), Malformed> {
        match self {
            Self::Waiting(_, end @ None) => {
                *end = Some(trailers);
                Ok(())
            }
            Self::Waiting(..) | Self::Broken => Err(Malformed("the body has ended")),
            Self::Answer(answer) => {
                let mut answer = answer.borrow_mut();
                answer.finish(&trailers)?;
                // Whatever the function does from now on; who is gone shows elsewhere.
                let _ = answer.push(machine);
                Ok(())
            }
            Self::Request(body) => {
                body.0.borrow_mut().finish(&trailers)?;
                // On its way, whether or not somebody waits for the response.
                crate::http::client::Exchange::advance(&body.0, machine);
                Ok(())
            }
        }
    }

    /// The body's message is sent: the body goes where that goes.
    pub fn attach_to_answer(
        &mut self,
        machine: &mut Machine,
        answer: &Rc<RefCell<Answer>>,
    ) -> Result<(), End> {
        let waited = core::mem::replace(self, Self::Answer(answer.clone()));
        if let Self::Waiting(bytes, end) = waited {
            let mut answer = answer.borrow_mut();
            answer.write(machine, &bytes)?;
            if let Some(trailers) = end {
                let finished = answer.finish(&trailers);
                finished.map_err(|Malformed(what)| End::Failed(Broken::Http(what)))?;
                answer.push(machine)?;
            }
        }
        Ok(())
    }
}

/// A body that goes.
pub struct OutgoingBody {
    pub target: Single<Rc<RefCell<Target>>>,
    is_taken: bool,
}

impl OutgoingBody {
    pub fn new(target: Rc<RefCell<Target>>) -> Self {
        Self { target: Single(target), is_taken: false }
    }
}

struct Writer(Rc<RefCell<Target>>);

impl Sink for Writer {
    fn room(&mut self, machine: &mut Machine) -> Result<usize, End> {
        match &mut *self.0.borrow_mut() {
            Target::Waiting(bytes, None) => Ok(WAITING - bytes.len()),
            Target::Waiting(..) => Err(End::Closed),
            Target::Answer(answer) => answer.borrow_mut().room(machine),
            Target::Request(body) => body.room(machine),
            Target::Broken => Err(End::Failed(Broken::Reset)),
        }
    }

    fn write(&mut self, machine: &mut Machine, bytes: &[u8]) -> Result<(), End> {
        match &mut *self.0.borrow_mut() {
            Target::Waiting(waiting, None) => {
                waiting.extend_from_slice(bytes);
                Ok(())
            }
            Target::Waiting(..) => Err(End::Closed),
            Target::Answer(answer) => answer.borrow_mut().write(machine, bytes),
            Target::Request(body) => body.write(machine, bytes),
            Target::Broken => Err(End::Failed(Broken::Reset)),
        }
    }

    fn flush(&mut self, machine: &mut Machine) -> Result<(), End> {
        match &mut *self.0.borrow_mut() {
            Target::Answer(answer) => answer.borrow_mut().flush(machine),
            Target::Request(body) => body.flush(machine),
            Target::Waiting(..) | Target::Broken => Ok(()),
        }
    }
}

impl types::HostIncomingBody for State {
    fn stream(
        &mut self,
        body: Resource<IncomingBody>,
    ) -> Result<Result<Resource<InputStream>, ()>> {
        let body = self.table.get_mut(&body)?;
        if core::mem::replace(&mut body.is_taken, true) {
            return Ok(Err(()));
        }
        let stream = InputStream::new(Rc::new(RefCell::new(Reader(body.body.0.clone()))));
        Ok(Ok(self.table.push(stream)?))
    }

    fn finish(&mut self, body: Resource<IncomingBody>) -> Result<Resource<FutureTrailers>> {
        let body = self.table.delete(body)?.body;
        Ok(self.table.push(FutureTrailers { body, is_taken: false })?)
    }

    fn drop(&mut self, body: Resource<IncomingBody>) -> Result<()> {
        self.table.delete(body)?;
        Ok(())
    }
}

impl types::HostFutureTrailers for State {
    fn subscribe(&mut self, trailers: Resource<FutureTrailers>) -> Result<Resource<Pollable>> {
        let body = self.table.get(&trailers)?.body.0.clone();
        let ready = move |machine: &mut Machine| read_to_end(&body, machine).is_some();
        Ok(self.table.push(Pollable::when(ready))?)
    }

    fn get(
        &mut self,
        trailers: Resource<FutureTrailers>,
    ) -> Result<Option<Result<Result<Option<Resource<HttpFields>>, ErrorCode>, ()>>> {
        let future = self.table.get_mut(&trailers)?;
        let body = future.body.0.clone();
        let Some(end) = read_to_end(&body, &mut self.machine) else { return Ok(None) };
        if core::mem::replace(&mut future.is_taken, true) {
            return Ok(Some(Err(())));
        }
        if end.is_err() {
            return Ok(Some(Ok(Err(ErrorCode::ConnectionTerminated))));
        }
        let fields = body.borrow_mut().trailers();
        if fields.is_empty() {
            return Ok(Some(Ok(Ok(None))));
        }
        Ok(Some(Ok(Ok(Some(self.table.push(HttpFields::fixed(fields))?)))))
    }

    fn drop(&mut self, trailers: Resource<FutureTrailers>) -> Result<()> {
        self.table.delete(trailers)?;
        Ok(())
    }
}

impl types::HostOutgoingBody for State {
    fn write(
        &mut self,
        body: Resource<OutgoingBody>,
    ) -> Result<Result<Resource<OutputStream>, ()>> {
        let body = self.table.get_mut(&body)?;
        if core::mem::replace(&mut body.is_taken, true) {
            return Ok(Err(()));
        }
        let stream = OutputStream::new(Rc::new(RefCell::new(Writer(body.target.0.clone()))));
        Ok(Ok(self.table.push(stream)?))
    }

    fn finish(
        &mut self,
        body: Resource<OutgoingBody>,
        trailers: Option<Resource<HttpFields>>,
    ) -> Result<(), HttpError> {
        let trailers = match trailers {
            Some(trailers) => self.table.delete(trailers)?.fields,
            None => Fields::new(),
        };
        let target = self.table.delete(body)?.target.0;
        let finished = target.borrow_mut().finish(&mut self.machine, trailers);
        finished.map_err(|Malformed(what)| internal(what).into())
    }

    /// It was not finished: whoever gets it is to see that it is not whole.
    fn drop(&mut self, body: Resource<OutgoingBody>) -> Result<()> {
        let target = self.table.delete(body)?.target.0;
        let target = core::mem::replace(&mut *target.borrow_mut(), Target::Broken);
        match target {
            Target::Answer(answer) => answer.borrow_mut().break_off(&mut self.machine),
            Target::Request(body) => body.0.borrow_mut().break_off(),
            Target::Waiting(..) | Target::Broken => {}
        }
        Ok(())
    }
}
