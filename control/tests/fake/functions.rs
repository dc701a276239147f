//! What functions are made of in tests.

use std::path::PathBuf;

/// A component that answers HTTP, with these imports.
pub fn component(imports: &str) -> Vec<u8> {
    let text = format!(
        r#"(component
            {imports}
            (core module $m
                (memory 2)
                (func (export "handle") (param i32 i32)))
            (core instance $i (instantiate $m))
            (func $handle (param "request" u32) (param "response" u32)
                (canon lift (core func $i "handle")))
            (instance $handler (export "handle" (func $handle)))
            (export "wasi:http/incoming-handler@0.2.3" (instance $handler)))"#
    );
    wat::parse_str(text).unwrap()
}

/// The real compiler.
pub fn compiler() -> PathBuf {
    let beside = || {
        let deps = std::env::current_exe().unwrap();
        deps.parent().and_then(|deps| deps.parent()).unwrap().join("warren-compile")
    };
    let compiler = std::env::var_os("WARREN_COMPILE").map_or_else(beside, PathBuf::from);
    let build = "cargo build --release -p warren-function --features compile --bin warren-compile";
    assert!(compiler.exists(), "{} is not there: `{build}` makes it", compiler.display());
    compiler
}
