//! Compiles a component's code ahead of time, for the guest.

use std::io::{self, Read, Write};

use wasmtime::{Engine, OptLevel};

use crate::check::{MAX_BYTES, check};
use crate::compiled::{CompileError, Compiled};
use crate::engine;

/// What processors of x86-64-v3 have, in cranelift's names: the baseline of hosts and of the guest.
const PROCESSOR: [&str; 11] = [
    "has_sse3",
    "has_ssse3",
    "has_sse41",
    "has_sse42",
    "has_popcnt",
    "has_avx",
    "has_avx2",
    "has_bmi1",
    "has_bmi2",
    "has_fma",
    "has_lzcnt",
];

/// Compiles a component. The same component gives the same code, whatever the machine: the code
/// carries the compiler's version.
///
/// It takes seconds and gigabytes for large components, and compilers have bugs: components of
/// somebody else's are for [`jailed`](crate::jailed).
///
/// # Errors
/// [`CompileError`].
pub fn compile(component: &[u8]) -> Result<Compiled, CompileError> {
    let checked = check(component)?;
    let failed = |error: wasmtime::Error| CompileError::Compiler(format!("{error:#}"));
    let mut config = engine::config();
    config.target(engine::TARGET).map_err(failed)?.cranelift_opt_level(OptLevel::Speed);
    for feature in PROCESSOR {
        // SAFETY: code that uses these is run on processors that have them: the guest's loader
        // refuses it elsewhere.
        unsafe { config.cranelift_flag_enable(feature) };
    }
    let engine = Engine::new(&config).map_err(failed)?;
    let code = engine.precompile_component(component).map_err(failed)?;
    Ok(Compiled { code, checked })
}

/// The compiler's side of [`jailed`](crate::jailed): reads a component, and answers.
///
/// # Errors
/// The streams'.
pub fn answer(input: impl Read, mut output: impl Write) -> io::Result<()> {
    let mut component = Vec::new();
    // One byte more than is allowed, by which to see that it is too much.
    input.take(MAX_BYTES as u64 + 1).read_to_end(&mut component)?;
    let answer = postcard::to_allocvec(&compile(&component)).map_err(io::Error::other)?;
    output.write_all(&answer)?;
    output.flush()
}
