//! wasi:cli: environment, standard streams and exit.

use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt;

use wasmtime::Result;
use wasmtime::component::Resource;

use super::State;
use super::bindings::wasi::cli::{
    environment, exit, stderr, stdin, stdout, terminal_input, terminal_output, terminal_stderr,
    terminal_stdin, terminal_stdout,
};
use super::io::{InputStream, OutputStream};
use crate::log;
use crate::machine::Machine;
use crate::stream::{End, Sink, Source};

/// How much of the log is taken at once, in bytes.
const LOG_ROOM: usize = 64 * 1024;

/// The function ended itself.
#[derive(Clone, Copy, Debug)]
pub struct Exit(u8);

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it ended itself, with status {}", self.0)
    }
}

impl core::error::Error for Exit {}

/// Standard input: nothing.
struct Nothing;

impl Source for Nothing {
    fn read(&mut self, _: &mut Machine, _: usize) -> Result<Vec<u8>, End> {
        Err(End::Closed)
    }

    fn is_ready(&mut self, _: &mut Machine) -> bool {
        true
    }
}

/// Standard output and error: the log.
struct ToLog(log::Stream);

impl Sink for ToLog {
    fn room(&mut self, _: &mut Machine) -> Result<usize, End> {
        Ok(LOG_ROOM)
    }

    fn write(&mut self, machine: &mut Machine, bytes: &[u8]) -> Result<(), End> {
        machine.log(self.0, bytes);
        Ok(())
    }
}

impl State {
    fn to_log(&mut self, stream: log::Stream) -> Result<Resource<OutputStream>> {
        Ok(self.table.push(OutputStream::new(Rc::new(RefCell::new(ToLog(stream)))))?)
    }
}

impl environment::Host for State {
    fn get_environment(&mut self) -> Result<Vec<(String, String)>> {
        Ok(self.package.manifest.environment.clone())
    }

    fn get_arguments(&mut self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn initial_cwd(&mut self) -> Result<Option<String>> {
        Ok(None)
    }
}

impl exit::Host for State {
    fn exit(&mut self, status: Result<(), ()>) -> Result<()> {
        Err(Exit(u8::from(status.is_err())).into())
    }

    fn exit_with_code(&mut self, status: u8) -> Result<()> {
        Err(Exit(status).into())
    }
}

impl stdin::Host for State {
    fn get_stdin(&mut self) -> Result<Resource<InputStream>> {
        Ok(self.table.push(InputStream::new(Rc::new(RefCell::new(Nothing))))?)
    }
}

impl stdout::Host for State {
    fn get_stdout(&mut self) -> Result<Resource<OutputStream>> {
        self.to_log(log::Stream::Stdout)
    }
}

impl stderr::Host for State {
    fn get_stderr(&mut self) -> Result<Resource<OutputStream>> {
        self.to_log(log::Stream::Stderr)
    }
}

// Nobody sits at a terminal.

impl terminal_input::Host for State {}

impl terminal_input::HostTerminalInput for State {
    fn drop(&mut self, terminal: Resource<terminal_input::TerminalInput>) -> Result<()> {
        self.table.delete(terminal)?;
        Ok(())
    }
}

impl terminal_output::Host for State {}

impl terminal_output::HostTerminalOutput for State {
    fn drop(&mut self, terminal: Resource<terminal_output::TerminalOutput>) -> Result<()> {
        self.table.delete(terminal)?;
        Ok(())
    }
}

impl terminal_stdin::Host for State {
    fn get_terminal_stdin(&mut self) -> Result<Option<Resource<terminal_input::TerminalInput>>> {
        Ok(None)
    }
}

impl terminal_stdout::Host for State {
    fn get_terminal_stdout(&mut self) -> Result<Option<Resource<terminal_output::TerminalOutput>>> {
        Ok(None)
    }
}

impl terminal_stderr::Host for State {
    fn get_terminal_stderr(&mut self) -> Result<Option<Resource<terminal_output::TerminalOutput>>> {
        Ok(None)
    }
}
