//! A component's code, compiled ahead of time for the guest.

use serde::{Deserialize, Serialize};
use wasmtime::{Engine, OptLevel};

use crate::check::{CheckError, Checked, check};
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

/// A component that was compiled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compiled {
    /// The code, as wasmtime's `Component::deserialize_raw` takes it.
    pub code: Vec<u8>,
    /// What is known of the component.
    pub checked: Checked,
}

/// Why there is no code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum CompileError {
    /// The component is at fault.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// The compiler is at fault, or has a limit that the component is beyond.
    #[error("the component cannot be compiled: {0}; try a smaller one, and tell us of this one")]
    Compiler(String),
}

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
