//! Whether a component is one that the guest can run: said before anything is compiled, and so that
//! its author knows what to change.

use std::fmt;

use serde::{Deserialize, Serialize};
use wasmparser::names::{ComponentName, ComponentNameKind};
use wasmparser::{
    BinaryReaderError, ComponentExternName, ComponentExternalKind, Encoding,
    FuncValidatorAllocations, Parser, Payload, ValidPayload, Validator, WasmFeatures,
};

/// The most that a component may have, in bytes.
pub const MAX_BYTES: usize = 64 << 20;

/// The package, the interfaces of it that the guest provides: of version 0.2.0 to 0.2.[`PATCH`].
pub const PROVIDED: [(&str, &[&str]); 7] = [
    ("io", &["error", "poll", "streams"]),
    ("clocks", &["monotonic-clock", "wall-clock"]),
    ("random", &["random", "insecure", "insecure-seed"]),
    (
        "cli",
        &[
            "environment",
            "exit",
            "stdin",
            "stdout",
            "stderr",
            "terminal-input",
            "terminal-output",
            "terminal-stdin",
            "terminal-stdout",
            "terminal-stderr",
        ],
    ),
    ("filesystem", &["types", "preopens"]),
    (
        "sockets",
        &[
            "network",
            "instance-network",
            "tcp",
            "tcp-create-socket",
            "udp",
            "udp-create-socket",
            "ip-name-lookup",
        ],
    ),
    ("http", &["types", "outgoing-handler"]),
];

/// The newest patch of WASI 0.2 that components may be built for.
pub const PATCH: u64 = 12;

/// What is known of a component that the guest can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// No module of it has a start function.
    pub starts_nothing: bool,
    /// What the linear memories of its modules begin with, together, in bytes.
    pub memory_bytes: u64,
}

/// Why the guest cannot run it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum CheckError {
    /// It is longer than [`MAX_BYTES`].
    #[error(
        "the component has {0} bytes, and at most {MAX_BYTES} are taken: strip it of debug information, or build it for size"
    )]
    TooLarge(u64),
    /// It does not begin as WebAssembly.
    #[error(
        "this is no WebAssembly: deploy a component, which is a binary file that begins with \\0asm"
    )]
    NotWebAssembly,
    /// It is a module.
    #[error(
        "this is a core module, not a component: build it for wasm32-wasip2, or make a component of it with `wasm-tools component new`"
    )]
    CoreModule,
    /// It is damaged, or uses what the engine does not have.
    #[error(
        "the component is not valid: {reason} (at byte {offset}): build it anew with a released toolchain"
    )]
    Invalid {
        /// Why, as the validator says it.
        reason: String,
        /// Where.
        offset: u64,
    },
    /// It does not answer HTTP.
    #[error(
        "the component exports {}, and not wasi:http/incoming-handler@0.2: build it for the world wasi:http/proxy",
        Listed(.exports)
    )]
    NoHandler {
        /// What it exports.
        exports: Vec<String>,
    },
    /// It wants what nobody provides.
    #[error("the component imports {}, which functions do not have: they have {Provided}", Listed(.imports))]
    Imports {
        /// What it wants.
        imports: Vec<String>,
    },
}

impl From<BinaryReaderError> for CheckError {
    fn from(error: BinaryReaderError) -> Self {
        Self::Invalid { reason: error.message().to_owned(), offset: error.offset() as u64 }
    }
}

/// Names, so many of them as someone reads.
struct Listed<'a>(&'a [String]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 12;
        if self.0.is_empty() {
            return f.write_str("nothing");
        }
        let shown = &self.0[..self.0.len().min(SHOWN)];
        f.write_str(&shown.join(", "))?;
        match self.0.len() - shown.len() {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// The table of interfaces.
struct Provided;

impl fmt::Display for Provided {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (package, interfaces) in PROVIDED {
            write!(f, "wasi:{package}/{{{}}}, ", interfaces.join(","))?;
        }
        write!(f, "each of version 0.2.0 to 0.2.{PATCH}")
    }
}

/// Whether these bytes are a component that the guest can run.
///
/// # Errors
/// [`CheckError`] says why not.
pub fn check(component: &[u8]) -> Result<Checked, CheckError> {
    if component.len() > MAX_BYTES {
        return Err(CheckError::TooLarge(component.len() as u64));
    }
    if !component.starts_with(b"\0asm") {
        return Err(CheckError::NotWebAssembly);
    }
    if Parser::is_core_wasm(component) {
        return Err(CheckError::CoreModule);
    }
    let features = features();
    let mut parser = Parser::new(0);
    parser.set_features(features);
    let mut validator = Validator::new_with_features(features);
    let mut allocations = FuncValidatorAllocations::default();
    let mut checked = Checked { starts_nothing: true, memory_bytes: 0 };
    let (mut imports, mut exports) = (Vec::new(), Vec::new());
    let mut has_handler = false;
    // Modules and components that this one is within; its own imports and exports are those that count.
    let mut depth = 0_u32;
    for payload in parser.parse_all(component) {
        let payload = payload?;
        match validator.payload(&payload)? {
            ValidPayload::Func(function, body) => {
                let mut function = function.into_validator(allocations);
                function.validate(&body)?;
                allocations = function.into_allocations();
            }
            ValidPayload::Ok | ValidPayload::Parser(_) | ValidPayload::End(_) => {}
        }
        match payload {
            Payload::Version { encoding, .. } => {
                if depth == 0 && encoding == Encoding::Module {
                    return Err(CheckError::CoreModule);
                }
                depth += 1;
            }
            Payload::End(_) => depth -= 1,
            Payload::StartSection { .. } => checked.starts_nothing = false,
            Payload::MemorySection(memories) => {
                for memory in memories {
                    let memory = memory?;
                    let page = 1_u64 << memory.page_size_log2.unwrap_or(16);
                    let bytes = memory.initial.saturating_mul(page);
                    checked.memory_bytes = checked.memory_bytes.saturating_add(bytes);
                }
            }
            Payload::ComponentImportSection(section) if depth == 1 => {
                for import in section {
                    let name = import?.name;
                    if !interface(name).is_some_and(|(package, name)| is_provided(&package, &name))
                    {
                        imports.push(name.name.to_owned());
                    }
                }
            }
            Payload::ComponentExportSection(section) if depth == 1 => {
                for export in section {
                    let export = export?;
                    has_handler |= export.kind == ComponentExternalKind::Instance
                        && interface(export.name).is_some_and(|(package, name)| {
                            package == "http" && name == "incoming-handler"
                        });
                    exports.push(export.name.name.to_owned());
                }
            }
            _ => {}
        }
    }
    if !has_handler {
        return Err(CheckError::NoHandler { exports });
    }
    if !imports.is_empty() {
        return Err(CheckError::Imports { imports });
    }
    Ok(checked)
}

/// What the engine has, as it is set up: what wasmtime has by default, without what its crate's
/// features leave out.
fn features() -> WasmFeatures {
    let left_out = WasmFeatures::GC_TYPES | WasmFeatures::EXCEPTIONS | WasmFeatures::THREADS;
    WasmFeatures::WASM3.difference(left_out) | WasmFeatures::COMPONENT_MODEL
}

/// Package and name of an interface of WASI, if this is one, of a version that there may be.
fn interface(name: ComponentExternName<'_>) -> Option<(String, String)> {
    let parsed = ComponentName::new(name.name, 0).ok()?;
    let ComponentNameKind::Interface(interface) = parsed.kind() else { return None };
    let version = interface.version(name.version_suffix).ok()??;
    let is_known = version.pre.is_empty()
        && (version.major, version.minor) == (0, 2)
        && version.patch <= PATCH;
    (is_known && interface.namespace().as_str() == "wasi")
        .then(|| (interface.package().to_string(), interface.projection().to_string()))
}

fn is_provided(package: &str, name: &str) -> bool {
    let listed = PROVIDED.iter().find(|(provided, _)| *provided == package);
    listed.is_some_and(|(_, interfaces)| interfaces.contains(&name))
}
