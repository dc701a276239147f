//! Components, written down in WebAssembly's text format.

/// One that answers HTTP, with these imports, and with `module` in its core module.
pub fn component(imports: &str, module: &str) -> Vec<u8> {
    let text = format!(
        r#"(component
            {imports}
            (core module $m
                (memory 2)
                {module}
                (func (export "handle") (param i32 i32)))
            (core instance $i (instantiate $m))
            (func $handle (param "request" u32) (param "response" u32)
                (canon lift (core func $i "handle")))
            (instance $handler (export "handle" (func $handle)))
            (export "wasi:http/incoming-handler@0.2.3" (instance $handler)))"#
    );
    wat::parse_str(text).unwrap()
}
