//! Streams of bytes as a function has them, whatever is behind them.

use alloc::string::String;
use alloc::vec::Vec;

use crate::machine::Machine;

/// Why a stream has nothing more, or takes nothing more.
#[derive(Clone, Debug)]
pub enum End {
    /// It ended.
    Closed,
    /// It broke.
    Failed(Broken),
}

/// What broke a stream.
#[derive(Clone, Debug)]
pub enum Broken {
    /// The other side reset the connection, or is gone.
    Reset,
    /// It took too long.
    Timeout,
    /// HTTP's rules were not kept, by whom and how.
    Http(&'static str),
    /// Anything else, in words.
    Other(String),
}

/// Bytes that come.
pub trait Source {
    /// Takes up to `limit` bytes, as many as there are; none: there are none now.
    fn read(&mut self, machine: &mut Machine, limit: usize) -> Result<Vec<u8>, End>;

    /// Whether [`Source::read`] has something to say, if only the end.
    fn is_ready(&mut self, machine: &mut Machine) -> bool;

    /// When it may be ready though nothing came, in nanoseconds since release.
    fn look_again_ns(&self) -> u64 {
        u64::MAX
    }
}

/// Bytes that go.
pub trait Sink {
    /// How many bytes [`Sink::write`] takes now.
    fn room(&mut self, machine: &mut Machine) -> Result<usize, End>;

    /// Takes all of these bytes, which are no more than there is room for.
    fn write(&mut self, machine: &mut Machine, bytes: &[u8]) -> Result<(), End>;

    /// Sends what was taken, soon.
    fn flush(&mut self, _: &mut Machine) -> Result<(), End> {
        Ok(())
    }
}
