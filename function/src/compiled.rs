//! What comes of compiling a component: its code, or why there is none.

use serde::{Deserialize, Serialize};

use crate::check::{CheckError, Checked};

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
