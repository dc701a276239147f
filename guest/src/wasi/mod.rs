//! What a function may import: WASI 0.2 and wasi:http, on this machine's devices.
//!
//! Everything is synchronous: who waits, waits in [`State::wait`], and the whole microVM with it.

mod cli;
mod clocks;
mod filesystem;
mod http;
mod io;
mod random;
mod sockets;

use alloc::format;
use alloc::rc::Rc;
use core::cell::RefCell;

use warren_function::package::Package;
use wasmtime::component::{HasSelf, Linker, ResourceTable, ResourceTableError};
use wasmtime::{StoreLimits, StoreLimitsBuilder};

use crate::http::server::Answer;
use crate::machine::Machine;
use crate::single::Single;

mod bindings {
    #![allow(missing_docs, clippy::all, clippy::pedantic, unused, reason = "generated")]

    wasmtime::component::bindgen!({
        path: "wit/wasi.wit",
        world: "warren:guest/function",
        imports: { default: trappable },
        require_store_data_send: false,
        trappable_error_type: {
            "wasi:io/streams.stream-error" => crate::wasi::io::StreamError,
            "wasi:filesystem/types.error-code" => crate::wasi::filesystem::FileError,
            "wasi:sockets/network.error-code" => crate::wasi::sockets::SocketError,
            "wasi:http/types.error-code" => crate::wasi::http::HttpError,
        },
        with: {
            "wasi:io/error.error": crate::wasi::io::IoError,
            "wasi:io/poll.pollable": crate::wasi::io::Pollable,
            "wasi:io/streams.input-stream": crate::wasi::io::InputStream,
            "wasi:io/streams.output-stream": crate::wasi::io::OutputStream,
            "wasi:filesystem/types.descriptor": crate::wasi::filesystem::Descriptor,
            "wasi:filesystem/types.directory-entry-stream": crate::wasi::filesystem::Entries,
            "wasi:sockets/network.network": crate::wasi::sockets::Network,
            "wasi:sockets/tcp.tcp-socket": crate::wasi::sockets::TcpSocket,
            "wasi:sockets/udp.udp-socket": crate::wasi::sockets::UdpSocket,
            "wasi:sockets/udp.incoming-datagram-stream": crate::wasi::sockets::Datagrams,
            "wasi:sockets/udp.outgoing-datagram-stream": crate::wasi::sockets::Datagrams,
            "wasi:sockets/ip-name-lookup.resolve-address-stream": crate::wasi::sockets::Addresses,
            "wasi:http/types.fields": crate::wasi::http::HttpFields,
            "wasi:http/types.incoming-request": crate::wasi::http::IncomingRequest,
            "wasi:http/types.outgoing-request": crate::wasi::http::OutgoingRequest,
            "wasi:http/types.request-options": crate::wasi::http::RequestOptions,
            "wasi:http/types.response-outparam": crate::wasi::http::ResponseOutparam,
            "wasi:http/types.incoming-response": crate::wasi::http::IncomingResponse,
            "wasi:http/types.incoming-body": crate::wasi::http::IncomingBody,
            "wasi:http/types.future-trailers": crate::wasi::http::FutureTrailers,
            "wasi:http/types.outgoing-response": crate::wasi::http::OutgoingResponse,
            "wasi:http/types.outgoing-body": crate::wasi::http::OutgoingBody,
            "wasi:http/types.future-incoming-response": crate::wasi::http::FutureIncomingResponse,
        },
    });
}

pub use bindings::exports::wasi::http::incoming_handler::{Guest as Handler, GuestIndices};
pub use cli::Exit;
pub use http::{IncomingRequest, ResponseOutparam, Shared};

/// How many things a function may hold at a time: files, streams, sockets, requests.
const RESOURCES_MAX: usize = 16 * 1024;

/// What a function's host knows.
pub struct State {
    pub table: ResourceTable,
    pub machine: Machine,
    pub limits: StoreLimits,
    package: Package<'static>,
    files: filesystem::Files,
    /// The answer to the call in progress.
    pub answer: Option<Shared<Answer>>,
    /// When the call in progress must have ended, in nanoseconds since release.
    pub deadline_ns: u64,
}

/// A call has taken too long.
#[derive(Clone, Copy, Debug)]
pub struct TimeOver;

impl core::fmt::Display for TimeOver {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("the call's time is over")
    }
}

impl core::error::Error for TimeOver {}

impl State {
    /// For a function, before the microVM is released.
    pub fn new(package: Package<'static>, machine: Machine) -> Self {
        let memory = usize::try_from(package.manifest.memory_bytes).unwrap_or(usize::MAX);
        let mut table = ResourceTable::new();
        table.set_max_capacity(RESOURCES_MAX);
        Self {
            table,
            machine,
            limits: StoreLimitsBuilder::new().memory_size(memory).build(),
            files: filesystem::Files::of(&package),
            package,
            answer: None,
            deadline_ns: u64::MAX,
        }
    }

    /// The machine, for what is another one's in each clone: a function must not have it before it is
    /// released, or all clones had the same.
    fn released(&mut self, what: &str) -> wasmtime::Result<&mut Machine> {
        if self.machine.is_released() {
            Ok(&mut self.machine)
        } else {
            Err(wasmtime::Error::msg(format!(
                "it asked for {what} while it was initialised: every clone of the image would have had the \
                 same. Deploy it without --init-snapshot"
            )))
        }
    }

    /// Waits until something came, at most until a time, but never beyond the call's.
    fn wait(&mut self, until_ns: u64) -> wasmtime::Result<()> {
        let deadline_ns = self.deadline_ns;
        self.released("something to wait for")?;
        if self.machine.now_ns() >= deadline_ns {
            return Err(TimeOver.into());
        }
        if let Some(answer) = &self.answer {
            // A caller that is gone shows when something is written.
            let _ = answer.0.borrow_mut().push(&mut self.machine);
        }
        self.machine.wait(until_ns.min(deadline_ns));
        Ok(())
    }
}

/// Everything that a function may import.
pub fn linker(engine: &wasmtime::Engine) -> wasmtime::Result<Linker<State>> {
    let mut linker = Linker::new(engine);
    bindings::Function::add_to_linker::<_, HasSelf<State>>(&mut linker, |state| state)?;
    Ok(linker)
}

/// What a function of an interface gives in place of its result: one of the interface's errors, or a
/// trap, because the function did what it must not.
pub enum Failure<E> {
    Error(E),
    Trap(wasmtime::Error),
}

impl<E> Failure<E> {
    /// As the bindings want it.
    fn convert(self) -> wasmtime::Result<E> {
        match self {
            Self::Error(error) => Ok(error),
            Self::Trap(trap) => Err(trap),
        }
    }
}

impl<E> From<wasmtime::Error> for Failure<E> {
    fn from(trap: wasmtime::Error) -> Self {
        Self::Trap(trap)
    }
}

impl<E> From<ResourceTableError> for Failure<E> {
    fn from(error: ResourceTableError) -> Self {
        Self::Trap(error.into())
    }
}

/// Shares a value among resources.
fn shared<T>(value: T) -> Single<Rc<RefCell<T>>> {
    Single(Rc::new(RefCell::new(value)))
}
