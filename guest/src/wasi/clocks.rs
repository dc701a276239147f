//! wasi:clocks.

use wasmtime::Result;
use wasmtime::component::Resource;

use super::State;
use super::bindings::wasi::clocks::{monotonic_clock, wall_clock};
use super::io::Pollable;

const SECOND_NS: u64 = 1_000_000_000;

impl monotonic_clock::Host for State {
    fn now(&mut self) -> Result<u64> {
        Ok(self.released("the clock")?.now_ns())
    }

    fn resolution(&mut self) -> Result<u64> {
        Ok(1)
    }

    fn subscribe_instant(&mut self, when: u64) -> Result<Resource<Pollable>> {
        self.released("the clock")?;
        Ok(self.table.push(Pollable::at(when))?)
    }

    fn subscribe_duration(&mut self, duration: u64) -> Result<Resource<Pollable>> {
        let when = self.released("the clock")?.now_ns().saturating_add(duration);
        Ok(self.table.push(Pollable::at(when))?)
    }
}

impl wall_clock::Host for State {
    fn now(&mut self) -> Result<wall_clock::Datetime> {
        let now = self.released("the clock")?.clock.wall_clock_ns();
        let nanoseconds = (now % SECOND_NS) as u32;
        Ok(wall_clock::Datetime { seconds: now / SECOND_NS, nanoseconds })
    }

    fn resolution(&mut self) -> Result<wall_clock::Datetime> {
        Ok(wall_clock::Datetime { seconds: 0, nanoseconds: 1 })
    }
}
