//! What components are refused, and that no bytes are the checker's end.

use proptest::prelude::*;
use proptest::sample::Index;
use warren_function::check::{CheckError, Checked, MAX_BYTES, PROVIDED, check};

use crate::component::component;

fn import(name: &str) -> String {
    format!("(import \"{name}\" (instance))")
}

fn refused(imports: &[&str]) -> String {
    let imports: String = imports.iter().map(|name| import(name)).collect();
    check(&component(&imports, "")).unwrap_err().to_string()
}

#[test]
fn one_that_imports_all_that_there_is_passes_in_every_version() {
    for version in ["0.2.0", "0.2.9", "0.2.12", "0.2.3+build"] {
        let names = PROVIDED.into_iter().flat_map(|(package, interfaces)| {
            interfaces.iter().map(move |name| format!("wasi:{package}/{name}@{version}"))
        });
        let imports: String = names.map(|name| import(&name)).collect();
        let checked = Checked { starts_nothing: true, memory_bytes: 2 << 16 };
        assert_eq!(check(&component(&imports, "")), Ok(checked), "{version}");
    }
}

#[test]
fn imports_that_nobody_provides_are_named_and_so_is_what_there_is() {
    let offending = [
        "wasi:keyvalue/store@0.2.0",
        "wasi:http/types@0.3.0",
        "wasi:http/types@0.2.13",
        "wasi:http/types@0.2.0-rc-2023-11-10",
        "wasi:http/types",
        "mine:http/types@0.2.0",
        "types",
    ];
    for name in offending {
        let error = refused(&["wasi:io/error@0.2.0", name]);
        assert!(error.starts_with(&format!("the component imports {name}, which")), "{error}");
        assert!(error.contains("wasi:clocks/{monotonic-clock,wall-clock}"), "{error}");
        assert!(error.ends_with("0.2.0 to 0.2.12"), "{error}");
    }
    let error = refused(&["a:b/c", "a:b/d"]);
    assert!(error.contains("a:b/c, a:b/d, which"), "{error}");
    let many: Vec<_> = (0..20).map(|n| format!("a:b/c{n}")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    assert!(refused(&many).contains("a:b/c11 and 8 more, which"));
}

#[test]
fn one_that_answers_no_http_is_told_what_it_exports() {
    let exports = |name: &str| {
        let text = format!(
            "(component (instance $i) (export \"{name}\" (instance $i)) (export \"x\" (instance $i)))"
        );
        check(&wat::parse_str(text).unwrap())
    };
    assert!(exports("wasi:http/incoming-handler@0.2.12").is_ok());
    for name in ["wasi:cli/run@0.2.0", "wasi:http/incoming-handler@0.3.0", "wasi:http/types@0.2.0"]
    {
        let error = exports(name).unwrap_err();
        assert_eq!(error, CheckError::NoHandler { exports: vec![name.into(), "x".into()] });
        assert!(error.to_string().contains(&format!("exports {name}, x, and not")), "{error}");
    }
    let nothing = check(&wat::parse_str("(component)").unwrap()).unwrap_err();
    assert!(nothing.to_string().contains("exports nothing,"), "{nothing}");
    let function = r#"(component (core module $m (func (export "f")))
        (core instance $i (instantiate $m))
        (func $f (canon lift (core func $i "f")))
        (instance $h (export "f" (func $f)))
        (export "wasi:http/incoming-handler@0.2.0" (func $f)))"#;
    assert!(check(&wat::parse_str(function).unwrap()).is_err());
}

#[test]
fn imports_and_exports_of_nested_components_do_not_count() {
    let nested = r#"(component (import "a:b/c" (instance $i)) (export "x:y/z" (instance $i)))"#;
    assert!(check(&component(nested, "")).is_ok());
    let inner = r#"(component (component (instance $i)
        (export "wasi:http/incoming-handler@0.2.0" (instance $i))))"#;
    let error = check(&wat::parse_str(inner).unwrap()).unwrap_err();
    assert_eq!(error, CheckError::NoHandler { exports: vec![] });
}

#[test]
fn start_functions_are_found_wherever_they_are() {
    let starts = |component: Vec<u8>| !check(&component).unwrap().starts_nothing;
    let start = "(func $start) (start $start)";
    assert!(!starts(component("", "")));
    assert!(starts(component("", start)));
    let nested = format!("(component (core module {start}))");
    assert!(starts(component(&nested, "")));
}

#[test]
fn what_is_no_component_says_what_it_is() {
    let module = check(&wat::parse_str("(module)").unwrap()).unwrap_err();
    assert_eq!(module, CheckError::CoreModule);
    assert!(module.to_string().contains("wasm-tools component new"));
    for bytes in [&b""[..], b"\0as", b"(component)", b"\x7fELF"] {
        assert_eq!(check(bytes), Err(CheckError::NotWebAssembly));
    }
    assert_eq!(check(&vec![0; MAX_BYTES + 1]), Err(CheckError::TooLarge(MAX_BYTES as u64 + 1)));
    let whole = component("", "");
    // Behind its export there are names only, which nobody needs.
    let name = b"incoming-handler";
    let export = whole.windows(name.len()).position(|bytes| bytes == name).unwrap();
    for length in 4..=export {
        check(&whole[..length]).expect_err("it is cut");
    }
}

#[test]
fn code_that_is_not_valid_is_found_with_its_place() {
    let valid = component("", "(func (result i32) (i32.const 1234567))");
    // `i32.const`, whose operand it is, becomes `f32.const`, and the rest something else.
    let at = valid.windows(2).position(|pair| pair == [0x41, 0x87]).unwrap();
    let mut bytes = valid;
    bytes[at] = 0x43;
    let CheckError::Invalid { offset, reason } = check(&bytes).unwrap_err() else { panic!() };
    assert!(offset >= at as u64 && !reason.is_empty());
}

proptest! {
    #[test]
    fn no_bytes_are_the_checkers_end(
        changes in prop::collection::vec((any::<Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<Index>()),
    ) {
        let imports = import("wasi:io/streams@0.2.0") + &import("wasi:cli/environment@0.2.0");
        let mut bytes = component(&imports, "(func $start) (start $start) (data (i32.const 0) \"x\")");
        for (index, byte) in changes {
            let index = index.index(bytes.len());
            bytes[index] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        // What passes has the memory that its text gives it, or what the bytes make of that.
        match check(&bytes) {
            Ok(checked) => prop_assert_eq!(checked.memory_bytes % (1 << 16), 0),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}
