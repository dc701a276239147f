//! The runtime: a function's component, loaded at the template's barrier, answers calls.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::sync::Arc;
use core::cell::{RefCell, UnsafeCell};
use core::ptr::{NonNull, null_mut};

use warren_abi::microvm::{CODE_ADDRESS, FunctionPlace, HTTP_VSOCK_PORT, Identity, LOG_VSOCK_PORT};
use warren_function::engine;
use warren_function::package::{Manifest, Package};
use wasmtime::component::{Component, InstancePre};
use wasmtime::{CustomCodeMemory, Engine, Store, Trap};

use crate::barrier;
use crate::http::server::{Answer, Call, Callers};
use crate::http::values;
use crate::linear::Arena;
use crate::log::Stream;
use crate::machine::Machine;
use crate::net::Sockets;
use crate::single::Single;
use crate::wasi::{
    self, Exit, GuestIndices, Handler, IncomingRequest, ResponseOutparam, State, TimeOver,
};

/// How long a function that came to its end waits for somebody to read why, in nanoseconds.
const LAST_WORDS_NS: u64 = 250_000_000;

/// What wasmtime keeps for each thread, of which there is one.
struct ThreadLocal(UnsafeCell<[*mut u8; 2]>);

// SAFETY: a guest has one thread and no interrupts.
unsafe impl Sync for ThreadLocal {}

static THREAD_LOCAL: ThreadLocal = ThreadLocal(UnsafeCell::new([null_mut(); 2]));

/// Asked for by wasmtime.
#[unsafe(no_mangle)]
extern "C" fn wasmtime_tls_get(slot: usize) -> *mut u8 {
    // SAFETY: one thread, and no reference to it outlives a statement.
    unsafe { (*THREAD_LOCAL.0.get())[slot] }
}

/// Asked for by wasmtime.
#[unsafe(no_mangle)]
extern "C" fn wasmtime_tls_set(slot: usize, value: *mut u8) {
    // SAFETY: as above.
    unsafe { (*THREAD_LOCAL.0.get())[slot] = value };
}

/// The code is where it can be executed, and nobody can write to it.
struct InPlace;

impl CustomCodeMemory for InPlace {
    fn required_alignment(&self) -> usize {
        4096
    }

    fn publish_executable(&self, _: *const u8, _: usize) -> wasmtime::Result<()> {
        Ok(())
    }

    fn unpublish_executable(&self, _: *const u8, _: usize) -> wasmtime::Result<()> {
        Ok(())
    }
}

/// Serves the function that is put into the template; without one, calls are refused.
pub fn run() -> ! {
    let mut machine = Some(Machine::boot(&[HTTP_VSOCK_PORT, LOG_VSOCK_PORT], Sockets::none));
    let mut function = None;
    let identity = barrier::wait(&mut |place| {
        function = machine.take().map(|machine| {
            Function::load(&place, machine)
                .unwrap_or_else(|error| panic!("the function cannot be loaded: {}", text(&error)))
        });
    });
    match function {
        Some(function) => function.serve(identity),
        None => refuse(machine.expect("only a function takes it"), identity),
    }
}

fn refuse(mut machine: Machine, identity: Identity) -> ! {
    machine.release(identity);
    let mut callers = Callers::default();
    loop {
        while let Some(Call { mut body, connection, .. }) = callers.next(&mut machine) {
            let mut answer = Answer::new(connection, machine.now_ns(), false);
            answer.refuse(&mut machine, 503, "no-function", "this microVM has no function");
            callers.done(&mut machine, &mut body, false);
        }
        machine.wait(u64::MAX);
    }
}

/// A function that was loaded.
struct Function {
    store: Store<State>,
    ready: Ready,
    timeout_ns: u64,
    /// It answers more than one call.
    reuse: bool,
}

/// How far it is.
enum Ready {
    Loaded(InstancePre<State>, GuestIndices),
    Instantiated(Handler),
}

/// Why a call came to nothing.
struct Ended {
    status: u16,
    reason: &'static str,
    text: String,
}

impl Function {
    /// Loads it, and instantiates it if that is wanted, or runs nothing of its own.
    fn load(place: &FunctionPlace, machine: Machine) -> wasmtime::Result<Self> {
        let length = (place.code_end - CODE_ADDRESS) as usize;
        // SAFETY: the VMM has mapped the package there, and nobody can write to it.
        let bytes: &'static [u8] =
            unsafe { core::slice::from_raw_parts(CODE_ADDRESS as *const u8, length) };
        let package = Package::parse(bytes)?;
        let Manifest { starts_nothing, initialise, timeout_ms, reuse, .. } = package.manifest;
        // SAFETY: the VMM set it aside for this, in a region that was zeroes, and told nobody else.
        let arena = Arc::new(unsafe { Arena::new(place.heap_end, place.memory_end) });
        let mut config = engine::config();
        config.with_custom_code_memory(Some(Arc::new(InPlace)));
        config.with_host_memory(arena.clone());
        // SAFETY: whoever compiled the code and whoever built this did so for x86-64-v3, and the VMM
        // has made sure that the processor is one.
        unsafe {
            config.detect_host_feature(|_| Some(true));
            config.x86_float_abi_ok(true);
        }
        let engine = Engine::new(&config)?;
        // SAFETY: the package's code was compiled by a host's compiler, which its digest says; it is
        // mapped for ever and never changed.
        let component =
            unsafe { Component::deserialize_raw(&engine, NonNull::from(package.code())) }?;
        arena.divide(
            component.resources_required().map_or(1, |needed| needed.num_memories as usize),
        );
        let instance = wasi::linker(&engine)?.instantiate_pre(&component)?;
        let indices = GuestIndices::new(&instance)?;
        let mut store = Store::new(&engine, State::new(package, machine));
        store.limiter(|state| &mut state.limits);
        let ready = Ready::Loaded(instance, indices);
        let timeout_ns = u64::from(timeout_ms) * 1_000_000;
        let mut this = Self { store, ready, timeout_ns, reuse };
        if starts_nothing || initialise {
            this.handler()?;
        }
        Ok(this)
    }

    /// The function's handler, instantiated if it was not.
    fn handler(&mut self) -> wasmtime::Result<Handler> {
        if let Ready::Loaded(instance, indices) = &self.ready {
            let instance = instance.instantiate(&mut self.store)?;
            self.ready = Ready::Instantiated(indices.load(&mut self.store, &instance)?);
        }
        match &self.ready {
            Ready::Instantiated(handler) => Ok(handler.clone()),
            Ready::Loaded(..) => unreachable!("it was instantiated above"),
        }
    }

    /// Answers calls, for ever.
    fn serve(mut self, identity: Identity) -> ! {
        self.store.data_mut().machine.release(identity);
        let mut callers = Callers::default();
        loop {
            while let Some(call) = callers.next(&mut self.store.data_mut().machine) {
                self.answer(call, &mut callers);
            }
            self.store.data_mut().machine.wait(u64::MAX);
        }
    }

    fn answer(&mut self, Call { request, body, connection }: Call, callers: &mut Callers) {
        let state = self.store.data_mut();
        state.machine.begin_call();
        let now = state.machine.now_ns();
        let is_head = request.method == "HEAD";
        let mut answer = Answer::new(connection, now, is_head);
        let closes = values(&request.fields, "connection").any(|value| value == b"close");
        answer.is_last = closes || !self.reuse;
        let answer = Rc::new(RefCell::new(answer));
        let body = Rc::new(RefCell::new(body));
        state.deadline_ns = now.saturating_add(self.timeout_ns);
        state.answer = Some(Single(answer.clone()));
        let result = self.call(IncomingRequest::new(request, body.clone()), &answer);

        let State { machine, answer: current, deadline_ns, .. } = self.store.data_mut();
        (*current, *deadline_ns) = (None, u64::MAX);
        let mut answer = answer.borrow_mut();
        match &result {
            _ if answer.has_finished() => answer.send_all(machine),
            Ok(()) if !answer.has_begun() => {
                answer.refuse(machine, 500, "no-answer", "it returned without an answer");
            }
            Err(Ended { status, reason, text }) if !answer.is_under_way() => {
                let first = text.lines().next().unwrap_or_default();
                answer.refuse(machine, *status, reason, first);
            }
            // As much as the caller takes: it may be why the time was over.
            _ => answer.break_off(machine),
        }
        callers.done(machine, &mut body.borrow_mut(), !answer.is_last);
        if let Err(Ended { reason, text, .. }) = result {
            let now = machine.wall_clock_ns();
            machine.log.end_lines(now);
            machine.log(Stream::Runtime, format!("{reason}: {text}").as_bytes());
            // Who reads the log connects a moment after the start.
            let until_ns = machine.now_ns().saturating_add(LAST_WORDS_NS);
            while machine.log.is_waiting() && machine.now_ns() < until_ns {
                machine.wait(until_ns);
            }
            // Everything is on its way before the machine ends.
            machine.wait(0);
            panic!("{reason}: {text}");
        }
    }

    fn call(
        &mut self,
        request: IncomingRequest,
        answer: &Rc<RefCell<Answer>>,
    ) -> Result<(), Ended> {
        let call = || {
            let handler = self.handler()?;
            let table = &mut self.store.data_mut().table;
            let request = table.push(request)?;
            let answer = table.push(ResponseOutparam(Single(answer.clone())))?;
            handler.call_handle(&mut self.store, request, answer)
        };
        call().map_err(|error| ended(&error))
    }
}

/// What the caller and the log are told.
fn ended(error: &wasmtime::Error) -> Ended {
    let (status, reason) = if error.is::<TimeOver>() {
        (504, "timeout")
    } else if error.is::<Exit>() {
        (500, "exit")
    } else if error.downcast_ref::<Trap>() == Some(&Trap::StackOverflow) {
        (500, "stack-overflow")
    } else {
        (500, "trap")
    };
    Ended { status, reason, text: text(error) }
}

/// The cause first, then where.
fn text(error: &wasmtime::Error) -> String {
    format!("{}\n{error:?}", error.root_cause())
}
